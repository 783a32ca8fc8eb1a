# Every verb of this repository, the same here and in CI: `make help`.
# Needs Python >= 3.11, make and git; everything else is put into .venv (scripts/bootstrap).

SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

BIN := .venv/bin
ARGS ?=
export PYTHON

.PHONY: help setup up test test-slow soak simulate fmt lint types proto proto-check docs bench wheel smoke-wheel clean

help: ## List every verb
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The stamps lie inside .venv, so they go when it goes.
.venv/.stoker-run: pyproject.toml uv.lock scripts/bootstrap
	@scripts/bootstrap run

.venv/.stoker-dev: pyproject.toml uv.lock scripts/bootstrap
	@scripts/bootstrap dev

setup: .venv/.stoker-dev ## Make .venv with every tool in it (no root, no compiler)
	@:

up: .venv/.stoker-run ## Bring up a fleet on this machine: its GPUs, or simulated ones (ARGS="--nodes 3")
	@$(BIN)/stoker up --or-simulate 8xH100-80GB $(ARGS)

# Not slow, not soak, not gpu: what a change is checked with. CI=true turns every skip into a failure.
test: .venv/.stoker-dev ## Test (15 minutes at most on 2 cores); as root with apt it installs what tests need
	@scripts/system-packages
	@$(BIN)/pytest -m "not slow and not soak and not gpu" $(ARGS)

test-slow: .venv/.stoker-dev ## Test with rotating seeds, chaos and packages (30 minutes at most)
	@scripts/system-packages
	@$(BIN)/pytest -m "slow and not soak and not gpu" $(ARGS) || [ $$? -eq 5 ]

# pytest's status 5 means that no test bears the marker.
soak: .venv/.stoker-dev ## Test the long forms, for hours
	@scripts/system-packages
	@$(BIN)/pytest -m "soak and not gpu" $(ARGS) || [ $$? -eq 5 ]

simulate: .venv/.stoker-dev ## Run the seeded simulation only, its slow forms too
	@$(BIN)/pytest -m "not soak and not gpu" tests/simulation $(ARGS)

fmt: .venv/.stoker-dev ## Format and sort imports
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

lint: .venv/.stoker-dev ## Check style, format, import contracts, and that uv.lock fits pyproject.toml
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@.uv/bin/uv lock --check --quiet --python $(BIN)/python

types: .venv/.stoker-dev ## Check types: mypy --strict and pyright strict
	@$(BIN)/mypy
	@$(BIN)/pyright

proto: .venv/.stoker-dev ## Generate proto/stoker/v1/*_pb2* from the .proto files
	@$(BIN)/python scripts/generate_protocol.py

proto-check: .venv/.stoker-dev ## Check that the committed generated code is what the .proto files give
	@$(BIN)/python scripts/generate_protocol.py --check

docs: .venv/.stoker-dev ## Generate the generated parts of docs/
	@$(BIN)/python scripts/generate_docs.py

bench: .venv/.stoker-dev ## Measure sampling, ingest and allocate, at the sizes docs/benchmarks.md quotes
	@$(BIN)/stoker bench sampling --simulate 8xH100-80GB --json
	@$(BIN)/stoker bench ingest --nodes 1000 --gpus 8 --hz 1 --seconds 20 --json
	@$(BIN)/stoker bench allocate --nodes 1000 --rate 500 --json

wheel: .venv/.stoker-dev ## Build the sdist, and from it the wheel, into dist/
	@rm -rf dist
	@.uv/bin/uv build --quiet --python $(BIN)/python

smoke-wheel: wheel ## Install the wheel in a fresh environment, import every part, start both daemons
	@$(BIN)/python scripts/smoke_wheel.py dist

clean: ## Remove what is built and cached, .venv and .uv too
	@rm -rf .venv .uv build dist .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

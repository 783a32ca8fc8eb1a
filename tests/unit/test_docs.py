"""The pages say what is: generated parts are current, commands and their options exist."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stoker.cli.app import stoker as command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _commands(page: Path) -> list[list[str]]:
    """Return what the page tells its reader to type, after `stoker`."""
    text = page.read_text()
    blocks = re.findall(r"^(?: {4}|\$ )stoker (.+)$", text, flags=re.MULTILINE)
    inline = re.findall(r"`stoker ([^`]+)`", text)
    return [re.split("[#;]", line)[0].split() for line in [*blocks, *inline]]


def _options(found: click.Command, daemon: str) -> set[str]:
    """Return the options of a verb; what is passed on to a daemon is the daemon's own."""
    if not found.context_settings.get("ignore_unknown_options"):
        return {opt for option in found.params for opt in option.opts}
    ask = [sys.executable, "-m", f"stoker.{daemon}", "--help"]
    help_ = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z-]+", help_))


def _unknown(words: list[str]) -> str:
    """Return what of a command line does not exist; empty: all of it does."""
    found: click.Command = command
    for word in words:
        if word == "--":
            return ""
        if word.startswith("--"):
            if word.split("=")[0] not in _options(found, words[0]) | {"--help"}:
                return f"{found.name} has no option {word}"
        elif isinstance(found, click.Group):
            following = found.get_command(click.Context(found), word)
            if following is None:
                return f"{found.name} has no verb {word}"
            found = following
    return ""


def test_generated_parts_are_current() -> None:
    check = [sys.executable, "scripts/generate_docs.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_message_field_and_call_of_the_protocol_has_a_comment() -> None:
    reference = (ROOT / "docs" / "protocol.md").read_text()
    silent = re.findall(r"^\|.*\|\s*\|$|^\*\*\w+\*\*$", reference, flags=re.MULTILINE)
    heads = {"| no. | field | type | |", "| no. | value | |", "| call | request | response | |"}
    assert [row for row in silent if row not in heads] == []


def test_every_decision_has_its_page_listed_in_order() -> None:
    numbers = [int(page.name[:4]) for page in sorted((ROOT / "docs" / "adr").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_on_the_page_exist(page: Path) -> None:
    wrong = {" ".join(words): why for words in _commands(page) if (why := _unknown(words))}
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_on_the_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_verbs_on_the_pages_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    told = {
        verb
        for page in PAGES
        for verb in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    }
    assert told <= verbs

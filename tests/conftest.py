"""What every test shares: requirements that skip by name, no skip in CI, golden files."""

import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes is a matter of the machine; the rest is as it was, which in CI is other.
settings.register_profile("any machine", settings(deadline=None))
settings.load_profile("any machine")

GOLDEN = Path(__file__).parent / "golden"

# In CI everything that tests need is there, so a skip hides a missing install step.
IN_CI = os.environ.get("CI") == "true"

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write golden files, compare nothing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text with the file of that name in tests/golden; `--rewrite` writes the file."""
    rewrite = bool(request.config.getoption("--rewrite"))

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if rewrite:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no tests/golden/{name}: run with --rewrite, then review it"
        assert text == path.read_text(encoding="utf-8")

    return compare


def lacking_programs(*names: str) -> str | None:
    lacking = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def refusal(meaning: str, *command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{meaning}: {done.stderr.strip()}" if done.returncode else None


def lacking_trace() -> str | None:
    if lacking := lacking_programs("strace"):
        return lacking
    return refusal("strace may not trace here", "strace", "-o", os.devnull, "true")


def lacking_compiler() -> str | None:
    if lacking := lacking_programs("cc"):
        return lacking
    return None if Path("/usr/include/stdio.h").exists() else "no C headers (/usr/include/stdio.h)"


def lacking_tmpfs() -> str | None:
    if lacking := lacking_programs("unshare", "mount"):
        return lacking
    mount = ("unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt")
    return refusal("a tmpfs may not be mounted here", *mount)


# The markers that name a need (pyproject.toml says what each is); the value says why it is not met.
NEEDS: dict[str, Callable[[], str | None]] = {
    "prometheus": lambda: lacking_programs("prometheus", "promtool"),
    "strace": lacking_trace,
    "compiler": lacking_compiler,
    "tmpfs": lacking_tmpfs,
    "root": lambda: None if os.geteuid() == 0 else "not run as root",
}


@pytest.hookimpl(trylast=True)  # after `-m` has deselected: only what will run is looked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, find_lack in NEEDS.items():
        wanting = [item for item in items if item.get_closest_marker(name)]
        lack = find_lack() if wanting else None
        if lack is not None:
            for item in wanting:
                item.add_marker(pytest.mark.skip(reason=lack))


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    # The longrepr of a skip is (file, line, reason).
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def fail_if_skipped_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure (`xfail`) is reported as a skip too; it did run.
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI nothing may be: {skip_reason(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_if_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped_in_ci(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.getreports("skipped") if not hasattr(r, "wasxfail")]
    if skipped:
        terminalreporter.section("not tested here")
        for report in skipped:
            terminalreporter.line(f"{report.nodeid}: {skip_reason(report)}")

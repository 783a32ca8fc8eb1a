"""What a person sees of a host that was examined. Nothing here prints."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stoker.agent.doctor.checkup import gravest_first
from stoker.agent.doctor.findings import Finding, Status
from stoker.cli.columns import GAP, Columns
from stoker.cli.text import one_line

_STYLES = {
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.CRITICAL: "red",
    Status.UNKNOWN: "magenta",
}


def page(findings: Sequence[Finding], *, only_problems: bool = False) -> RenderableType | None:
    """Return a table of what was found, then what to do, the gravest first; None: nothing is."""
    shown = [each for each in findings if not (only_problems and each.status is Status.OK)]
    parts: list[RenderableType] = []
    if shown:
        parts += ["", _table(shown)]
    advised = [each for each in gravest_first(findings) if each.advice]
    if advised:
        parts += ["", Text("WHAT TO DO", style="bold"), _advice(advised)]
    return Group(*parts) if parts else None


def _table(findings: Sequence[Finding]) -> Columns:
    table = Columns(("CHECK", "STATUS", "FOUND"), prose="FOUND")
    for each in findings:
        style = _STYLES[each.status]
        found = one_line(each.found)
        if each.because_of:
            found += f" (see {each.because_of})"
        table.add(Text(each.name), Text(each.status.name, style=style), Text(found))
        for detail in each.details:
            table.add(Text(""), Text(""), Text(f"- {one_line(detail)}"))
    return table


def _advice(findings: Sequence[Finding]) -> Table:
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    table.add_column()
    said: set[str] = set()
    number = 0
    for each in findings:
        fresh = [advice for advice in dict.fromkeys(each.advice) if advice not in said]
        said |= set(fresh)
        for place, advice in enumerate(fresh):
            number += 1
            name = each.name if place == 0 else ""
            table.add_row(Text(f"{number}."), Text(name), Text(one_line(advice)))
    return table

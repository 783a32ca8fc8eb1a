"""Explanations for a person: what stands in the way, what would help, and who is ahead."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from stoker.cli.columns import Columns
from stoker.cli.render import wanted
from stoker.cli.wording import ago, counted, words
from stoker.client import Explanation, Placement, ProposedChange, RequestAhead


def explanation(explained: Explanation, now: float) -> RenderableType:
    """Return why, what would help, and the reason of each node; `now` in Unix seconds."""
    lines: list[RenderableType] = []
    if explained.allocation is not None:
        found = explained.allocation
        lines.append(words(f"{found.id}: {found.state}, {wanted(found.request)}"))
    lines.append(words(explained.summary))
    if explained.choice:
        lines.append(words(f"chosen by {explained.choice}"))
    refusals = explained.refusals
    if explained.change is not None:
        lines.append(words(_change(explained.change), "bold"))
    elif refusals is not None:
        lines.append("no single change that was looked for would place it now")
    if refusals is not None and refusals.ahead:
        lines += _ahead(explained.ahead, refusals.ahead, now)
    if refusals is not None and refusals.nodes:
        table = Columns(("NODE", "FILTER", "REASON"), prose="REASON", dispensable=("FILTER",))
        for each in refusals.nodes:
            table.add(words(each.node), words(each.filter), words(each.reason))
        lines += ["", table]
        more = refusals.nodes_total - len(refusals.nodes)
        if more > 0:
            lines.append(f"and {more} more nodes")
    return Group(*lines)


def _change(change: ProposedChange) -> str:
    return f"smallest change: {change.summary}; it would then go to {places(change.placements)}"


def places(placements: Sequence[Placement]) -> str:
    """Return where: `node n1 GPU 0, 1`, of a gang each node."""
    shown: list[str] = []
    for each in placements:
        gpus = ", ".join(str(device.index) for device in each.devices)
        shown.append(f"node {each.node}" + (f" GPU {gpus}" if gpus else ""))
    return " and ".join(shown)


def _ahead(ahead: Sequence[RequestAhead], total: int, now: float) -> list[RenderableType]:
    lines: list[RenderableType] = ["", f"{counted(total, 'request')} ahead in the queue"]
    if not ahead:
        return lines
    table = Columns(
        ("AHEAD", "WANTED", "HOLDER", "PRIORITY", "ASKED"), numbers=("PRIORITY",), prose="WANTED"
    )
    for each in ahead:
        table.add(
            words(each.allocation_id),
            words(each.wanted),
            words(each.holder),
            Text(str(each.priority)),
            Text(ago(each.requested_at, now)),
        )
    return [*lines, table]

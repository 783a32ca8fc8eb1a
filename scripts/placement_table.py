"""Prints the table of docs/placement.md: published figures, the reference's, and those of reports.

    python scripts/placement_table.py FOLDER

FOLDER has a report of `stoker bench placement --json` for every trace, named after it
(`default.json`). Published and reference figures are those of docs/placement-published.csv.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "placement-published.csv"
POLICIES = ("random", "dotprod", "clustering", "packing", "bestfit", "fgd")
OURS = "fragmentation"
REFERENCE = "fgd+pp"

# (trace, per cent arrived, policy) -> published and reference figure, as they stand in the file.
Known = Mapping[tuple[str, str, str], tuple[str, str]]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Print the table of docs/placement.md.")
    parser.add_argument("folder", type=Path, help="with a report, TRACE.json, for every trace")
    folder: Path = parser.parse_args().folder
    known = read_published(PUBLISHED.read_text(encoding="utf-8"))
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = [
        "\n".join([f"At {percent} % arrived:", "", *table(reports, known, percent)])
        for percent in ("130", "100")
    ]
    print("\n\n".join(parts))


def read_published(text: str) -> Known:
    """Return the figures of the file."""
    return {
        (row["trace"], row["arrived_percent"], row["policy"]): (row["published"], row["reference"])
        for row in csv.DictReader(text.splitlines())
    }


def table(reports: Mapping[str, Any], known: Known, percent: str) -> Iterator[str]:
    """Yield the lines of the table at so much arrived: a row for every trace with a report."""
    head = ["trace", *POLICIES, "reference", f"**{OURS}**", "± sd", "beats fgd", "bound"]
    yield _row(head)
    yield _row(["---"] * len(head))
    for trace, report in reports.items():
        policies = report["policies"]
        cells = [trace]
        for policy in POLICIES:
            published, _ = known.get((trace, percent, policy), ("-", "-"))
            cells.append(f"{published} / {_mean(policies.get(policy), percent)}")
        _, reference = known.get((trace, percent, REFERENCE), ("-", "-"))
        ours = policies.get(OURS)
        wins = ours and ours["better_than_fgd"]
        beaten = f"{wins[f'at_{percent}']} of {wins['seeds']}" if wins else "-"
        deviation = ours and ours[f"allocated_at_{percent}"]["std"]
        cells += [reference, f"**{_mean(ours, percent)}**"]
        cells += ["-" if deviation is None else f"{deviation:.2f}", beaten]
        yield _row([*cells, _mean(report["bound"], percent)])


def _mean(figures: Any, percent: str) -> str:
    return "-" if figures is None else f"{figures[f'allocated_at_{percent}']['mean']:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

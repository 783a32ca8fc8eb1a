"""Writes the generated parts of docs/: between `<!-- generated: NAME -->` and `<!-- end -->`.

    python scripts/generate_docs.py [--check]

With --check it writes nothing and fails when a page is not what the tables and .proto files give.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from google.protobuf import descriptor_pb2 as d

from stoker.agent.doctor.checkup import CHECKS
from stoker.agent.facts import Fact
from stoker.agent.health import checks as health
from stoker.agent.health.meanings import Meaning
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.xids import RECOVERY_ACTIONS, TABLE_VERSION, UNKNOWN_XID, XIDS
from stoker.agent.metrics.dcgm import XID_DOC, XID_FIELD
from stoker.agent.metrics.dcgm_fields import FIELDS
from stoker.agent.metrics.row import GPU_LABELS, INFO_LABELS, MIG_LABELS
from stoker.agent.metrics.table import LABEL_BOUNDS, METRICS, gpu_metric_name
from stoker.aggregator.model import TRANSITIONS
from stoker.core.config import defaults_yaml

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
ALERTS = ROOT / "packaging" / "prometheus" / "stoker-alerts.yaml"


def allocation_diagram() -> str:
    """Return the life of an allocation as a Mermaid state diagram, from the transition table."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for state, following in TRANSITIONS.items():
        source = "[*]" if state is None else state.value
        lines += [
            f"    {source} --> {to.value}: {' or '.join(events)}"
            for to, events in following.items()
        ]
        if not following:
            lines.append(f"    {source} --> [*]")
    return "\n".join([*lines, "```"])


def protocol_reference() -> str:
    """Return every service and message with its comments, from the .proto files."""
    return "\n\n".join(part for file in _files() for part in _file_reference(file))


def own_metrics() -> str:
    """Return the table of the agent's own metrics, from the table that the page is made by."""
    twins: dict[str, list[str]] = {}
    for each in FIELDS:
        if len(each.facts) == 1:
            twins.setdefault(gpu_metric_name(each.facts[0]), []).append(f"`{each.name}`")
    rows = [
        "| series | type | unit | labels | meaning | from | made | DCGM's names |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for metric in METRICS.values():
        cells = (
            f"`{metric.name}`",
            str(metric.kind),
            metric.unit,
            _labels(metric.labels),
            metric.doc,
            metric.source,
            metric.rate,
            " ".join(twins.get(metric.name, [])),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def metric_labels() -> str:
    """Return what bounds the values of every label of the agent's own metrics."""
    rows = ["| label | how many values |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {text} |" for name, text in LABEL_BOUNDS.items())])


def dcgm_fields() -> str:
    """Return the table of the fields of DCGM that are told, from the table of that page."""
    rows = ["| no. | series | type | unit | meaning | made of |", "|---|---|---|---|---|---|"]
    for each in FIELDS:
        made_of = " ".join(f"`{_fact_series(fact)}`" for fact in each.facts)
        cells = (str(each.number), f"`{each.name}`", str(each.kind), each.unit, each.doc, made_of)
        rows.append(f"| {' | '.join(cells)} |")
    rows.append(f"| 230 | `{XID_FIELD}` | gauge | Xid | {XID_DOC} | events |")
    return "\n".join(rows)


def alerts() -> str:
    """Return the table of the alerts, from the rules that Prometheus loads."""
    rows = ["| alert | severity | after | what it says |", "|---|---|---|---|"]
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            said = re.sub(r"\{\{ (with|end)[^}]*\}\}", "", rule["annotations"]["summary"])
            said = re.sub(r"\{\{ \$(?:labels\.)?(\w+)[^}]*\}\}B?", r"*\1*", said)
            said = re.sub(r"\{\{[^}]*\}\}", "", said).strip()
            after = "at once" if rule["for"] == "0s" else rule["for"]
            rows.append(f"| `{rule['alert']}` | {rule['labels']['severity']} | {after} | {said} |")
    return "\n".join(rows)


def health_checks() -> str:
    """Return the table of what is looked at on a GPU, and what comes of it."""
    rows = [
        "| check | kind | finds | verdict | action | ends | options | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in health.ROWS:
        kind = f"`{row.code}`" if row.code else ""
        options = " ".join(f"`{name}`" for name in row.options)
        cells = (f"`{row.check}`", kind, row.finds, *_meaning(row.meaning), options, row.source)
        rows.append(f"| {' | '.join(cells)} |")
    rows.append("| `xid` | its number | an Xid | *below* | *below* | *below* | `xids` | *below* |")
    rates = ", ".join(
        f"{rate:g} (generation {generation})"
        for generation, rate in health.PCIE_REPLAYS_PER_MINUTE_AND_LANE.items()
    )
    return "\n".join([*rows, "", f"PCIe replays per minute and lane: at most {rates}."])


def health_options() -> str:
    """Return the commented defaults of the options of health."""
    return "\n".join(["```yaml", defaults_yaml(HealthConfig).rstrip(), "```"])


def health_xids() -> str:
    """Return the table of Xids."""
    rows = [
        f"Version {TABLE_VERSION} of the table.",
        "",
        "| Xid | name | whose | verdict | action | ends | source | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in XIDS.values():
        whose = "hardware" if each.is_of_hardware else "software"
        cells = (
            str(each.number),
            each.name,
            whose,
            *_meaning(each.meaning),
            each.source,
            each.note,
        )
        rows.append(f"| {' | '.join(cells)} |")
    unknown = " | ".join(_meaning(UNKNOWN_XID))
    rows.append(f"| any other |  |  | {unknown} | ours | newer than the table |")
    rows += ["", "| Xid 154 in the kernel's log | verdict | action | ends |", "|---|---|---|---|"]
    rows += [
        f"| {each.text} | {' | '.join(_meaning(each.meaning))} |"
        for each in RECOVERY_ACTIONS.values()
    ]
    return "\n".join(rows)


def _meaning(meaning: Meaning) -> tuple[str, str, str]:
    return meaning.verdict.value, meaning.action.value, meaning.ends.value


def _fact_series(fact: Fact) -> str:
    return gpu_metric_name(fact).removeprefix("stoker_gpu_")


def _labels(names: tuple[str, ...]) -> str:
    """Return labels as text; the sets that many series have are named once, above the table."""
    for known, text in ((INFO_LABELS, "*info*"), (MIG_LABELS, "*mig*"), (GPU_LABELS, "*gpu*")):
        if names[: len(known)] == known:
            return " ".join([text, *(f"`{name}`" for name in names[len(known) :])])
    return " ".join(f"`{name}`" for name in names)


def doctor_checks() -> str:
    """Return the table of the doctor's checks, in the order in which they are made."""
    rows = ["| check | asks | by |", "|---|---|---|"]
    rows += [f"| `{check.name}` | {check.question} | {check.source} |" for check in CHECKS]
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {
    "alerts": alerts,
    "allocation-diagram": allocation_diagram,
    "dcgm-fields": dcgm_fields,
    "doctor-checks": doctor_checks,
    "health-checks": health_checks,
    "health-options": health_options,
    "health-xids": health_xids,
    "metric-labels": metric_labels,
    "own-metrics": own_metrics,
    "protocol-reference": protocol_reference,
}


def _files() -> list[d.FileDescriptorProto]:
    names = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all.bin"
        protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *names]
        subprocess.run(
            [*protoc, "--include_source_info", f"--descriptor_set_out={out}"], check=True
        )
        return list(d.FileDescriptorSet.FromString(out.read_bytes()).file)


def _file_reference(file: d.FileDescriptorProto) -> Iterator[str]:
    comments = {
        tuple(at.path): " ".join(at.leading_comments.split())
        for at in file.source_code_info.location
    }
    yield f"### {file.name}"
    for i, service in enumerate(file.service):
        rows = ["| call | request | response | |", "|---|---|---|---|"]
        for j, method in enumerate(service.method):
            asks = _streamed(method.client_streaming, method.input_type)
            answers = _streamed(method.server_streaming, method.output_type)
            rows.append(f"| `{method.name}` | {asks} | {answers} | {comments[6, i, 2, j]} |")
        yield "\n".join([f"**service {service.name}**", "", *rows])
    for i, message in enumerate(file.message_type):
        text = f"**{message.name}** {comments.get((4, i), '')}".strip()
        rows = [
            f"| {each.number} | `{each.name}` | {_type(each)} | {comments.get((4, i, 2, j), '')} |"
            for j, each in enumerate(message.field)
        ]
        table = ["", "| no. | field | type | |", "|---|---|---|---|", *rows] if rows else []
        yield "\n".join([text, *table])
    for i, enum in enumerate(file.enum_type):
        rows = [
            f"| {value.number} | `{value.name}` | {comments.get((5, i, 2, j), '')} |"
            for j, value in enumerate(enum.value)
        ]
        text = f"**{enum.name}** {comments.get((5, i), '')}".strip()
        yield "\n".join([text, "", "| no. | value | |", "|---|---|---|", *rows])


def _streamed(is_stream: bool, type_name: str) -> str:
    return f"{'stream ' if is_stream else ''}`{type_name.removeprefix('.stoker.v1.')}`"


def _type(field: d.FieldDescriptorProto) -> str:
    name = (
        field.type_name.removeprefix(".stoker.v1.")
        or d.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    if name.endswith("Entry"):
        return "map of string to string"
    if field.label == d.FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def rendered(text: str) -> str:
    """Return a page with its generated parts as they should be."""

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{PARTS[found[2]]()}\n\n{found[3]}"

    pattern = r"(<!-- generated: ([a-z-]+) -->).*?(<!-- end -->)"
    return re.sub(pattern, part, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    stale: list[str] = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        wanted = rendered(text)
        if wanted != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(wanted)
    if check and stale:
        print(f"not what the tables give, run `make docs`: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

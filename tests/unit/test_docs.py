"""The generated parts of docs/ are what the tables and the .proto files give, and nothing is left unsaid."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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

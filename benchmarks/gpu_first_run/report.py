"""The rows of the report and their table."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

PARTS = {
    "environment": "Environment",
    "parity": "Parity with one CPU process",
    "teacher": "The teacher",
    "suspicions": "Suspicions",
    "time": "Time of each part",
}
NO_CPU = "n/a on a CPU"

Outcome = Literal["PASS", "FAIL", "figure", "n/a"]


@dataclass(frozen=True)
class Row:
    """A line of the report."""

    part: str
    name: str
    outcome: Outcome
    value: str
    expected: str = ""


class Report:
    """The rows so far, in a file that several processes append to, so that a part that is killed keeps its rows."""

    def __init__(self, out: Path):
        self.out, self.file = out, out / "rows.jsonl"

    def add(self, part: str, name: str, outcome: Outcome | bool, value: str, expected: str = "") -> None:
        """Print a row and keep it. A bool is PASS or FAIL."""
        outcome = {True: "PASS", False: "FAIL"}.get(outcome, outcome)
        print(f"{outcome:6} {name}: {value}", flush=True)
        with open(self.file, "a") as file:
            file.write(json.dumps(asdict(Row(part, name, outcome, value, expected))) + "\n")

    def rows(self) -> list[Row]:
        """All rows."""
        return [Row(**record) for record in read_lines(self.file)]

    def write(self, title: str) -> bool:
        """Write report.md and report.json. Returns whether no row failed."""
        rows = self.rows()
        failed = [row.name for row in rows if row.outcome == "FAIL"]
        text = render(title, rows)
        (self.out / "report.md").write_text(text)
        records = {"title": title, "failed": failed, "rows": [asdict(row) for row in rows]}
        (self.out / "report.json").write_text(json.dumps(records, indent=1) + "\n")
        print(f"\n{text}\n{len(failed)} of {len(rows)} rows failed; {self.out}/report.md", flush=True)
        return not failed


def render(title: str, rows: Iterable[Row]) -> str:
    """The rows as Markdown, to be pasted into docs/benchmarks.md."""
    lines = [title, "", "| | result | value | expected |", "|---|---|---|---|"]
    part = None
    for row in rows:
        if row.part != part:
            lines.append(f"| **{PARTS[row.part]}** | | | |")
            part = row.part
        cells = (row.name, row.outcome, row.value, row.expected)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def read_lines(file: Path) -> list[dict]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

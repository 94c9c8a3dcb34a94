"""Compare runs: one page of sentences, tables and plots, at equal tokens, FLOPs and seconds."""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich import box
from rich.console import Console
from rich.table import Table

from megacocomix.errors import run_cli
from megacocomix.evaluation.curves import read_runs
from megacocomix.evaluation.plots import PLOTS
from megacocomix.evaluation.report import cautions, results_table, write_report

EXAMPLE = """example:
  python tools/compare_runs.py runs/69m-ntp runs/69m-cocomix --out runs/comparison

The first run is the one that the others are compared with. Runs validated on different data are refused."""


def main() -> None:
    """Read the runs, write the page, show the results and where to look."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder with config.yaml and metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.md and plots/")
    parser.add_argument("--force", action="store_true", help="replace the report.md and plots that --out holds")
    args = parser.parse_args()

    runs = read_runs(args.runs)
    report = write_report(runs, args.out, shlex.join(["python", "tools/compare_runs.py", *sys.argv[1:]]), args.force)

    console = Console(soft_wrap=True, highlight=False)
    head, rows = results_table(runs)
    # A run a column: two or three of them fit a terminal, the results in a line do not.
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate((head[0], *(row[0] for row in rows))):
        shown.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in list(zip(head, *rows, strict=True))[1:]:
        shown.add_row(*line)
    console.print(shown)
    for caution in cautions(runs):
        console.print(f"careful: {caution.replace('**', '')}", style="yellow", markup=False)
    for path in (report, *(report.parent / "plots" / name for name in PLOTS.values())):
        console.print(str(path), markup=False)


if __name__ == "__main__":
    run_cli(main)

"""Compare two or more runs at equal tokens, FLOPs and seconds: one page with tables, sentences and plots."""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megacocomix.compare import identical
from megacocomix.compare.groups import read_groups
from megacocomix.compare.plots import FEW
from megacocomix.compare.report import results_table, write_report
from megacocomix.compare.summary import comparison_warnings
from megacocomix.errors import EXIT_FAILED, EXIT_FINISHED, UserError, run_cli

EXAMPLE = """examples:
  python tools/compare_runs.py runs/69m-ntp runs/69m-cocomix --out runs/comparison
  python tools/compare_runs.py runs/ntp-s1 runs/ntp-s2 runs/cocomix-s1 runs/cocomix-s2 --out runs/comparison
  python tools/compare_runs.py runs/before runs/after --identical

Runs that differ only in training.seed form one group, shown as mean and spread. The other groups are compared with the
first one. Runs that were validated on different data are refused. --identical exits with 0 if two runs are identical to
the bit, and with 1 if they differ."""


def main() -> int:
    """Read the runs, write the page, and print the results; or print whether two runs are identical."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder with config.yaml and metrics.jsonl")
    parser.add_argument("--out", metavar="DIR", help="folder for comparison.md and plots/")
    parser.add_argument("--force", action="store_true", help="replace comparison.md and the plots in --out")
    parser.add_argument("--identical", action="store_true", help="only check whether two runs are identical to the bit")
    args = parser.parse_args()

    if args.identical:
        if len(args.runs) != 2 or args.out:
            raise UserError("--identical compares two runs and writes nothing: give two run folders and no --out.")
        answer = identical.compare(*args.runs)
        print(f"{answer.text}.")
        return EXIT_FINISHED if answer.identical else EXIT_FAILED
    if not args.out:
        raise UserError("give --out DIR for the page and its plots, or --identical to check two runs without a page.")

    groups = read_groups(args.runs)
    command = shlex.join(["python", "tools/compare_runs.py", *sys.argv[1:]])
    page = write_report(groups, args.out, command, args.force)

    console = Console(soft_wrap=True, highlight=False)
    console.print(terminal_table(*results_table(groups)))
    for warning in comparison_warnings(groups):
        console.print(f"warning: {warning.replace('**', '')}", style="yellow", markup=False)
    for path in (page, *sorted((page.parent / "plots").glob("*.png"))):
        console.print(str(path), markup=False)
    return EXIT_FINISHED


def terminal_table(head: list[str], rows: list[list[str]]) -> Table:
    """The results for the terminal. Up to FEW runs are columns, because a row with all results would be too wide; more
    runs are rows, with their losses only."""
    lines = list(zip(*[head, *rows], strict=True))
    if len(rows) > FEW:
        lines = list(zip(*[line for line in lines if line[0] in ("run", "seeds") or "loss" in line[0]], strict=True))
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(lines[0]):
        shown.add_column(escape(name), justify="right" if index else "left", overflow="fold")
    for line in lines[1:]:
        shown.add_row(*map(escape, line))
    return shown


if __name__ == "__main__":
    run_cli(main)

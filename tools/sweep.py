#!/usr/bin/env python
"""Run every row of a plan with every seed, evaluate each run on all held-out text, and compare them on one page.

    python tools/sweep.py configs/sweeps/ablations.yaml

Started again, it skips finished runs and resumes unfinished ones. The page is OUT/comparison/comparison.md.

Exit codes: 0 all runs are done, 1 some failed (the others were run), 2 an error in the plan, 75 stopped on a signal
after saving."""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megacocomix.errors import EXIT_REQUEUE, run_cli
from megacocomix.training.sweep import Sweep, plan_jobs, read_plan

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Read the plan, run it, and compare the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", metavar="PLAN", help="YAML file, such as configs/sweeps/ablations.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check every run's config and print its state")
    options = parser.parse_args()
    plan = read_plan(options.plan)
    jobs = plan_jobs(plan)
    if options.dry_run:
        for job in jobs:
            state = "done" if job.is_done else f"step {job.step} of {job.last_step}"
            print(f"{job.name}: {state}: {' '.join(job.arguments)}")
        return 0
    code = Sweep(plan, jobs, ROOT, lambda line: tqdm.write(line, file=sys.stdout)).run()
    if code == EXIT_REQUEUE:
        print("stopped on a signal: start the same command again to resume")
        return code
    done = [job.config.run for job in jobs if job.is_done]
    failed = [job for job in jobs if not job.is_done]
    if len(done) > 1:
        out = str(Path(plan.out) / "comparison")
        compare = [sys.executable, str(ROOT / "tools/compare_runs.py"), *done, "--out", out, "--force"]
        compared = subprocess.run(compare).returncode
        code = code or compared
    for job in failed:
        print(f"failed: {job.failure}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run_cli(main)

#!/usr/bin/env bash
# The first hour on a GPU machine, as one command: is it right, and where does its time go? --cpu, or no GPU: the same
# steps on two gloo processes at tiny size, in two minutes. docs/benchmarks.md explains every row.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -x .venv/bin/python && -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi
exec python -m benchmarks.gpu_first_run "$@"

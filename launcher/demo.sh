#!/usr/bin/env bash
# The main job on an embedded default: the shipped text, teacher and autoencoder; a CoCoMix student and its next-token
# control of equal activated parameters; their comparison. Started again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c GPU || true)
processes=${PROCESSES:-$((gpus > 0 ? (gpus > 2 ? 2 : gpus) : 2))}

say() { printf '\n== %s\n' "$*"; }
pretrain() { deepspeed --log_level error --num_accelerators "$processes" launcher/pretrain.py --config configs/tiny.yaml "$@"; }

say "1/5 preparing the shipped text"
python tools/prepare_data.py assets/corpus/wiki_vital.jsonl.gz --out data/wiki --tokenizer assets/teacher/tokenizer.model --valid 0.05
say "2/5 pretraining CoCoMix: ZeRO-3 on $processes processes, labels from the live teacher"
pretrain run="$out/cocomix"
say "3/5 pretraining the next-token control of equal activated parameters, on the same tokens"
pretrain run="$out/ntp" method.name=ntp
say "4/5 evaluating both on all held-out text"
python tools/evaluate.py perplexity "$out/cocomix"
python tools/evaluate.py perplexity "$out/ntp"
say "5/5 comparing"
python tools/compare_runs.py "$out/ntp" "$out/cocomix" --out "$out" --force

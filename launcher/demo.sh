#!/usr/bin/env bash
# The main job on an embedded default: the shipped text, teacher and autoencoder; a CoCoMix student and its next-token
# control of equal activated parameters; their comparison. Run it again to resume it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c GPU || true)
processes=${PROCESSES:-$((gpus > 0 ? (gpus > 2 ? 2 : gpus) : 2))}

heading() { printf '\n== %s\n' "$*"; }
pretrain() { deepspeed --log_level error --num_accelerators "$processes" launcher/pretrain.py --config configs/tiny.yaml "$@"; }

heading "1/5 preparing the shipped text"
python tools/prepare_data.py assets/corpus/wiki_vital.jsonl.gz --out data/wiki --tokenizer assets/teacher/tokenizer.model --valid 0.05
heading "2/5 pretraining CoCoMix: ZeRO-3 on $processes processes, labels from the live teacher"
pretrain run="$out/cocomix"
heading "3/5 pretraining the next-token control of equal activated parameters, on the same tokens"
pretrain run="$out/ntp" method.name=ntp
heading "4/5 evaluating both on all held-out text"
python tools/evaluate.py perplexity "$out/cocomix"
python tools/evaluate.py perplexity "$out/ntp"
heading "5/5 comparing"
python tools/compare_runs.py "$out/ntp" "$out/cocomix" --out "$out" --force

#!/usr/bin/env bash
# The shipped teacher from nothing: tokenizer, next-token pretraining with the same trainer as everything else, export to
# Hugging Face's format, sparse autoencoder. Everything is seeded; about an hour on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-data/teacher/export}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c GPU || true)
processes=${PROCESSES:-$((gpus > 0 ? (gpus > 2 ? 2 : gpus) : 2))}
text=assets/corpus/wiki_vital.jsonl.gz

heading() { printf '\n== %s\n' "$*"; }

[ ! -e "$out" ] || { echo "error: $out exists already: remove it, or name another folder: launcher/teacher.sh DIR" >&2; exit 2; }
heading "1/5 training the tokenizer"
[ -e data/teacher/tokenizer.model ] || python tools/train_tokenizer.py $text --out data/teacher/tokenizer.model --vocab-size 4096 --valid 0.05
heading "2/5 preparing the text"
python tools/prepare_data.py $text --out data/teacher --tokenizer data/teacher/tokenizer.model --valid 0.05
heading "3/5 pretraining the teacher"
deepspeed --log_level error --num_accelerators "$processes" launcher/pretrain.py --config configs/teacher.yaml
heading "4/5 exporting it"
python tools/convert_checkpoint.py runs/teacher --out "$out" --to hf
python tools/evaluate.py perplexity "$out" --data data/teacher/valid
heading "5/5 training its autoencoder"
python tools/train_sae.py --teacher "$out" --data data/teacher/train --valid data/teacher/valid \
  --layer 3 --latents 2048 --k 16 --steps 2000 --batch-rows 2048 --lr 1e-3 --out "$out/sae.safetensors"
heading "done: $out; to ship it, put it in the place of assets/teacher and write its model card"

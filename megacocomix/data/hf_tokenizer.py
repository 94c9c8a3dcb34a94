"""A tokenizer of ours → files that transformers' AutoTokenizer reads, with nothing but transformers installed."""

import json
import shutil
from pathlib import Path

from megacocomix.data.tokenizer import END_OF_TEXT, tokenizer_files


def export_tokenizer(spec: str, out: Path) -> None:
    """Copy the files of the tokenizer that `spec` names into the folder `out`, and write those that are missing.

    Padding is with the end of text and on the left, as generation needs it. A text that spells out a special token
    gets that token's id, as anywhere in transformers.
    """
    for name, file in tokenizer_files(spec).items():
        shutil.copyfile(file, out / name)
    if Path(spec).is_dir():
        return
    if spec == "gpt2":
        settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    else:
        settings = _convert_sentencepiece(out)
    settings |= {"bos_token": settings["eos_token"], "pad_token": settings["eos_token"], "padding_side": "left"}
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # `generate(**tokens)` takes no token types
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _convert_sentencepiece(out: Path) -> dict[str, str]:
    """tokenizer.model → tokenizer.json, which needs no SentencePiece; returns the settings that go with it."""
    import sentencepiece
    from transformers import LlamaTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    unknown, end = (processor.id_to_piece(i) for i in (processor.unk_id(), processor.eos_id()))
    # Llama's is SentencePiece's byte-pair scheme with bytes for the unknown; its special tokens would be added to ours.
    special = {"unk_token": unknown, "eos_token": end, "bos_token": end}
    converted = LlamaTokenizer.from_pretrained(out, add_prefix_space=False, **special)
    converted.backend_tokenizer.save(str(out / "tokenizer.json"))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": unknown, "eos_token": end}

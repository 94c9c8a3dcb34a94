"""Texts from the command line: streamed, sampled, in batches, and with what steering did beside them."""

import json
import random

import pytest

import tiny
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.errors import UserError
from megacocomix.interpret.decode import Sampling
from megacocomix.interpret.generation import Decoder, Text, parse_at, read_prompts
from megacocomix.interpret.steering import Edit
from megacocomix.interpret.token_text import TextStream, token_texts
from processes import run_tool


def written(edits, ids=(3, 1, 4), **sampling):
    """A decoder and the text it wrote."""
    decoder = Decoder(tiny.student(), None, Sampling(max_new_tokens=5, **sampling), "before", "decoded")
    text = Text("$!%", list(ids), 0, "student", sampling.get("seed", 0), edits)
    for _ in decoder.run([text]):
        pass
    return decoder, text


def test_a_record_has_the_text_and_the_effect_at_each_step():
    decoder, text = written([Edit(3, low=50.0)])
    record = decoder.record(text)
    assert record["text"] == tiny.letters().decode(record["tokens"])
    assert len(record["tokens"]) == len(record["kl"]) == len(record["selected"]["3"]) == 5
    assert record["selected"] == {"3": [True] * 5} and min(record["kl"]) > 0
    assert (record["steer"], record["place"], record["ends"]) == (["3=min:50"], "before", "max_new_tokens")
    assert json.loads(json.dumps(record)) == record


def test_the_effect_is_said_step_by_step_and_so_is_its_absence():
    decoder, text = written([Edit(3, low=50.0)])
    whole, each = decoder.effect(text)
    assert "3 selected at 5 of 5 steps" in whole
    assert f"{sum(step.kl for step in text.steps) / 5:.3f} nats a step" in whole
    assert each.count("*") == 5 + 1
    decoder, text = written([Edit(3, high=-50.0)])
    (line,) = decoder.effect(text)
    assert line == "3=max:-50 before selection had no effect: 3 selected at 0 of 5 steps"
    decoder, text = written([])
    assert list(decoder.effect(text)) == []


@pytest.mark.parametrize("text", ["plain words", "Héllo, 日本語 ⏎ 🙂🙃", "tab\tline\n\n  end ", "\ufffd \ufffd", ""])
@pytest.mark.parametrize("name", ["gpt2", "assets/teacher/tokenizer.model"])
def test_pieces_of_tokens_are_the_text(root, name, text):
    tokenizer = load_tokenizer(name if name == "gpt2" else root / name)
    (ids,) = tokenizer.encode_batch([text])
    assert len(token_texts(tokenizer, ids)) == len(ids)
    assert "".join(token_texts(tokenizer, ids)) == text
    if "\ufffd" not in text:  # no text shows half of a character
        assert not any("\ufffd" in each for each in token_texts(tokenizer, ids))


def test_the_text_after_a_prompt_goes_on_where_the_prompt_ends():
    tokenizer = load_tokenizer("gpt2")
    (ids,) = tokenizer.encode_batch(["one 🙂 two"])
    for place in range(len(ids) + 1):
        prompt = tokenizer.decode(ids[:place])
        stream = TextStream(tokenizer, ids[:place])
        if not prompt.endswith("\ufffd"):
            assert prompt + "".join(map(stream.push, ids[place:])) + stream.flush() == "one 🙂 two"


@pytest.mark.parametrize("name", ["gpt2", "assets/teacher/tokenizer.model"])
def test_pieces_of_any_tokens_are_their_text_also_where_it_is_no_utf_8(root, name):
    tokenizer = load_tokenizer(name if name == "gpt2" else root / name)
    drawn = random.Random(0)
    parts = [token for token in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([token])]
    for share in (1.0, 0.5):
        for _ in range(400):
            pick = lambda share=share: drawn.choice(parts) if drawn.random() < share else drawn.randrange(4000)
            ids = [pick() for _ in range(12)]
            assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_are_no_text_are_not_held_back_for_ever():
    tokenizer = load_tokenizer("gpt2")
    ids = [tokenizer.encode_batch(["🙂"])[0][0]] * 12
    stream = TextStream(tokenizer)
    texts = [stream.push(token) for token in ids]
    assert any(texts[:5])
    assert "".join(texts) + stream.flush() == tokenizer.decode(ids)


def test_prompts_are_lines_or_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo <b>\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two <b>"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\nline", "id": 3}\r\n{"prompt": "one\u2028line"}')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\nline", "one\u2028line"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "x"}\n', "line 2"),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1"),
        ("a.jsonl", b"[]\n", "line 1"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "line 1 holds half a character"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_positions_are_read():
    assert parse_at("0,4-6, 9", 10) == {0, 4, 5, 6, 9}
    assert parse_at("all", 10) == "all"
    for wrong in ("", "x", "5-2", "-1", "1,,2", "²"):
        with pytest.raises(UserError, match="is no position"):
            parse_at(wrong, 10)
    for beyond in ("10", "0-999999999"):
        with pytest.raises(UserError, match="positions 0 … 9"):
            parse_at(beyond, 10)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student of the tiny run's shape that reads GPT-2's tokens, with a teacher and an autoencoder that fit."""
    import torch

    from megacocomix.checkpoint.open import LoadedModel
    from megacocomix.config.schema import ModelConfig
    from megacocomix.hf.export import export_hf
    from megacocomix.model.gpt2 import GPT2, initialise

    folder = tmp_path_factory.mktemp("exported")
    shape = ModelConfig(**tiny.SHAPE | {"vocab_size": 50257}, dropout=0.0)
    for name, method in (("student", tiny.method()), ("teacher", None)):
        width = 24 if name == "teacher" else 32
        sizes = shape.model_copy(update={"hidden_size": width})
        model = GPT2(sizes, method)
        initialise(model, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5 if parameter.dim() > 1 else 1)
        export_hf(LoadedModel(model, sizes, None, "", folder), folder / name, "gpt2")
    tiny.make_sae(folder / "sae.safetensors", sae_layer=1, location="resid_post_mlp")
    return folder


def run(root, *arguments):
    """tools/generate.py → exit code, standard output and standard error."""
    done = run_tool([root / "tools/generate.py", *arguments], root)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_writes_the_same_texts_as_it_prints(root, exported, tmp_path):
    out = tmp_path / "texts.jsonl"
    (tmp_path / "prompts.txt").write_text("One\nA prompt that is far too long for this context of sixteen tokens\n")
    student, common = exported / "student", ["--max-new-tokens", "6", "--seed", "7", "--steer", "3=8"]
    code, _, err = run(root, student, "--prompts", tmp_path / "prompts.txt", "--samples", 2, "--out", out, *common)
    assert code == 0, err
    assert "1 of 2 prompts do not fit the context of 16 tokens" in err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [7, 8, 9, 10]
    assert [line["prompt_tokens_dropped"] > 0 for line in lines] == [False, False, True, True]
    code, printed, err = run(root, student, "--prompt", "One", *common)
    assert code == 0, err
    assert printed.startswith("One" + lines[0]["text"])
    assert "3=8 before selection" in printed
    code, _, err = run(root, student, "--prompt", "One", "--out", out)
    assert code == 2 and "exists already" in err


@pytest.mark.slow
def test_side_by_side_shows_student_and_teacher_with_and_without(root, exported):
    common = [exported / "student", "--prompt", "One", "--max-new-tokens", "5", "--steer", "3=min:30", "--side-by-side"]
    code, printed, err = run(root, *common, "--teacher", exported / "teacher", "--sae", exported / "sae.safetensors")
    assert code == 0, err
    heads = [line for line in printed.splitlines() if line.startswith("== ")]
    assert heads == [
        "== student, seed 0",
        "== student, seed 0, steered 3=min:30",
        "== teacher, seed 0",
        "== teacher, seed 0, steered 3=min:30",
    ]
    assert printed.count("KL from unsteered") == 2 and "3 active at 5 of 5 steps" in printed
    code, _, err = run(root, *common)
    assert code == 2 and "give --teacher DIR --sae FILE" in err

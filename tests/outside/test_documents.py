"""Documents against the `datasets` library: what it reads is read, and what is not read is said."""

import bz2
import gzip
import json
import lzma
import os
import random
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megacocomix.data.documents import read_documents
from megacocomix.data.prepare import prepare_data
from megacocomix.data.sources import LeftOut, file_kind, find_sources
from megacocomix.data.tokens import MANIFEST
from megacocomix.errors import UserError
from processes import run_tool

CHECKOUT = Path(__file__).parents[2]
TEXTS = [
    "One.",
    'Two "quoted", \u2028 and\nthree lines.\n\nNaïve.',
    "tab\there",
    "\r\nkept\rinside",
    "x" * 200_000,
    "NaN?",
]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def read(*inputs, field="text", **options):
    return list(read_documents(find_sources(inputs, **options), field))


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """The column `text` as `datasets` reads a file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()

    def rows(kind, file, **options):
        loaded = datasets.load_dataset(
            kind, data_files=str(file), split="train", cache_dir=tmp_path / "cache", **options
        )
        return loaded["text"][:]

    return rows


def file_of(suffix, texts, number=0):
    """The content of a file of each kind, written by the library that defines it."""
    import datasets
    import pandas

    rows = [{"number": number, "text": text} for text in texts]
    frame = pandas.DataFrame(rows)
    if suffix == ".json":
        return json.dumps(rows, indent=2).encode()
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix in (".csv", ".tsv"):
        return frame.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",").encode()
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows)
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(sink)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


@pytest.mark.parametrize("suffix", BUILDERS)
def test_a_file_holds_the_rows_that_datasets_reads(tmp_path, expected, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(file_of(suffix, TEXTS))
    assert read(file) == expected(BUILDERS[suffix], file) == TEXTS


@pytest.mark.parametrize("suffix", [*BUILDERS, ".tsv"])
@pytest.mark.parametrize("compression", [*COMPRESS])
def test_every_kind_is_read_under_every_compression_and_in_capitals(tmp_path, suffix, compression):
    file = tmp_path / f"A{suffix}{compression}".upper()
    file.write_bytes(COMPRESS[compression](file_of(suffix, TEXTS)))
    assert read(file) == TEXTS


@pytest.mark.parametrize(
    "content",
    ['{"text": "a"}\n\n{"text": "b"}\n', '\ufeff{"text": "a"}\r\n{"text": "b"}', '[{"text": "a"},\n {"text": "b"}]'],
)
def test_a_json_file_is_lines_or_an_array(tmp_path, expected, content):
    (tmp_path / "a.json").write_text(content, newline="")
    assert read(tmp_path / "a.json") == expected("json", tmp_path / "a.json") == ["a", "b"]


def test_a_json_file_is_one_object_over_several_lines(tmp_path, expected):
    (tmp_path / "a.json").write_text(json.dumps({"number": 1, "text": "a\nb"}, indent=4))
    assert read(tmp_path / "a.json") == expected("json", tmp_path / "a.json") == ["a\nb"]


def test_an_arrow_file_is_read_in_both_formats(tmp_path, expected):
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert read(tmp_path / "a.arrow") == expected("arrow", tmp_path / "a.arrow") == TEXTS


def test_text_has_the_line_ends_of_datasets_and_rows_keep_theirs(tmp_path, expected):
    content = "one\r\ntwo\rthree\n\r\nfour\u2028\x0bfive\r\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert [text + "\n" for text in read(tmp_path / "a.txt")] == expected(
        "text", tmp_path / "a.txt", sample_by="document"
    )
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": content}).encode() + b"\r\n")
    assert read(tmp_path / "a.jsonl") == [content]


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_is_split_at_separators_with_any_line_end(tmp_path, compression):
    file = tmp_path / f"a.txt{compression}"
    file.write_bytes(COMPRESS[compression](b"\xef\xbb\xbfone\r\nline\r\n<|endoftext|>\r\ntwo\n<|endoftext|>\rthree"))
    assert read(file) == ["one\nline", "two", "three"]
    file.write_bytes(COMPRESS[compression](b"\xef\xbb\xbf"))
    assert read(file) == []


@pytest.mark.parametrize("compression", list(COMPRESS)[1:])
def test_a_compressed_file_of_several_parts_is_read_to_its_end(tmp_path, compression):
    compress = COMPRESS[compression]
    parts = [file_of(".jsonl", [str(random.Random(i).random()) for _ in range(3000)], i) for i in range(3)]
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(b"".join(map(compress, [parts[0], b"", *parts[1:]])))
    (tmp_path / "plain.jsonl").write_bytes(b"".join(parts))
    assert read(file) == read(tmp_path / "plain.jsonl")
    whole = file.read_bytes()
    damaged = {"cut": whole[:-5], "last part alone": whole + compress(parts[0])[:20], "junk": whole + b"\x01junk" * 9}
    last = compress(parts[0])
    damaged["later part"] = whole + b"XXXX" + last[4:]
    for name, content in damaged.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.\w+ cannot be read: "):
            pytest.fail(f"{name}: {len(read(file))} documents")


def test_a_frame_without_data_before_the_data_is_skipped(tmp_path):
    """Seekable and parallel zstd files hold such frames."""
    frame = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    (tmp_path / "a.jsonl.zst").write_bytes(frame + COMPRESS[".zst"](b'{"text": "a"}\n') + frame)
    assert read(tmp_path / "a.jsonl.zst") == ["a"]


UNFIT = {
    "zipped.jsonl": (gzip.compress(b'{"text": "a"}\n'), r"compressed: the name has to end in \.gz"),
    "zstd.txt": (COMPRESS[".zst"](b"a"), r"compressed: the name has to end in \.zst"),
    "plain.txt.gz": (b"text\n", r"not compressed as \.gz, which the name says"),
    "empty.txt.xz": (b"", r"not compressed as \.xz"),
    "swapped.csv.bz2": (gzip.compress(b"text\na\n"), r"not compressed as \.bz2"),
    "utf16.txt": ("Hello".encode("utf-16"), "not UTF-8 text: it is binary, or UTF-16"),
    "utf16le.txt": ("Hello".encode("utf-16-le"), "not UTF-8 text: it is binary, or UTF-16"),
    "utf16.csv.gz": (gzip.compress("text\na".encode("utf-16")), "not UTF-8 text: it is binary, or UTF-16"),
    "zip.txt": (b"PK\x03\x04\x14\x00\x00\x00", "not UTF-8 text: it is binary, or UTF-16"),
    "text.parquet": (b"text\n", "cannot be read: .*[Pp]arquet"),
    "text.arrow": (b"text and more text\n", "cannot be read: "),
    "ragged.csv": (b"text,n\na,1\nb\n", "line 3 has 1 columns, but the header has 2"),
    "open.csv": (b'text\na\n"b\nc\n', "line 4 is not CSV: unexpected end of data"),
    "header.csv": (b"a first line\nb\n", "line 1 has no field 'text'.*: a first line"),
    "twice.csv": (b"text,n,text\na,1,b\n", "line 1 has the field 'text' twice"),
    "twice.jsonl": (
        b'{"text": "a"}\n{"text": "a", "text": "b"}\n',
        "line 2 cannot be read: an object holds 'text' twice",
    ),
    "cr.csv": (b"text,n\ra,1\rb,2\r", "rows that end in a carriage return alone"),
    "cr.jsonl": (b'{"text": "a"}\r{"text": "b"}\r', "rows that end in a carriage return alone"),
    "other.jsonl": (b'{"id": 1}\n{"id": 2}\n', "line 1 has no field 'text'.*: id"),
    "other.json": (b'[{"id": 1}]', "row 1 has no field 'text'.*: id"),
    "strings.json": (b'["a"]', "row 1 is not a JSON object"),
    "broken.json": (b'\n{\n "text": "a",\n "n": oops}', "line 4 is not JSON: Expecting value at column 7"),
    "number.json": (b'[{"text": "a"}, {"text": 3}]', "row 2: field 'text' holds int"),
    "pointer.bin.jsonl": (LFS, "a pointer of git-lfs instead of the data: run `git lfs pull`"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path, name):
    content, message = UNFIT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and len(caught.value.problems) == 1


def test_text_that_is_no_unicode_in_a_table_is_refused_by_name(tmp_path):
    column = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff"))
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", pyarrow.schema({"text": pyarrow.string()})) as writer:
        writer.write_batch(pyarrow.record_batch([column], names=["text"]))
    with pytest.raises(UserError, match=r"a\.arrow cannot be read: .*UTF8"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_that_a_table_holds_twice_is_refused_by_name(tmp_path, suffix):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=rf"a\{suffix} has the field 'text' twice"):
        read(tmp_path / f"a{suffix}")


def test_a_row_without_the_field_is_null_as_in_datasets_unless_no_row_has_it(tmp_path, expected):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"text": "a"}\n{"id": 2, "meta": {"text": "b"}}\n{"text": "c"}\n')
    assert expected("json", tmp_path / "a.jsonl") == [None, "a", None, "c"]
    left_out = LeftOut()
    assert list(read_documents([tmp_path / "a.jsonl"], left_out=left_out)) == ["a", "c"] and left_out.documents == 2
    (tmp_path / "late.jsonl").write_text('{"id": 1}\n' * 1024 + '{"text": "a"}\n')
    with pytest.raises(UserError, match=r"late\.jsonl line 1 has no field 'text'"):
        read(tmp_path / "late.jsonl")


def test_an_arrow_stream_that_is_cut_between_two_batches_is_refused(tmp_path):
    """pyarrow and `datasets` read one as a shorter stream."""
    import datasets

    datasets.Dataset.from_dict({"text": ["a"] * 5000}).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    whole = pyarrow.BufferReader(file.read_bytes())
    for _ in range(3):
        pyarrow.ipc.read_message(whole)
    file.write_bytes(file.read_bytes()[: whole.tell()])
    assert 0 < len(datasets.load_from_disk(str(tmp_path / "saved"))) < 5000
    for source in (file, tmp_path / "saved"):
        with pytest.raises(UserError, match=r"\.arrow is truncated: it does not end in Arrow's end-of-stream marker"):
            read(source)


LAYOUTS = {
    "files": ["train.jsonl", "test.jsonl", "validation.jsonl"],
    "shards": ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
    "folders": ["training/a.jsonl", "eval/a.jsonl", "dev/a.jsonl"],
    "words in names": ["my-train_1.jsonl", "my_val.2.jsonl"],
    "words in folders": ["wiki-testing/a.jsonl", "wiki-train/a.jsonl"],
}


def write_rows(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_in_which_datasets_finds_several_splits_is_refused(tmp_path, layout):
    from datasets.data_files import get_data_patterns

    names = LAYOUTS[layout]
    write_rows(tmp_path / "in", names)
    splits = {str(split) for split in get_data_patterns(str(tmp_path / "in"))}
    with pytest.raises(
        UserError, match=r"in holds several splits: .*Give the files or the folder of one by name"
    ) as caught:
        read(tmp_path / "in")
    assert len(splits) == len(names) and all(f"{split} (" in str(caught.value) for split in splits)
    assert read(*(tmp_path / "in" / name for name in names)) == names


def test_a_folder_with_one_split_or_with_words_that_only_contain_a_splits_name_is_read(tmp_path):
    for number, names in enumerate((["test.jsonl"], ["a.jsonl", "train.jsonl"], ["contest.jsonl", "trainer.jsonl"])):
        write_rows(tmp_path / str(number), names)
        assert read(tmp_path / str(number)) == names
    write_rows(tmp_path / "mixed", ["a.jsonl", "test.jsonl"])
    with pytest.raises(UserError, match=r"other files \(a\.jsonl\), test \(test\.jsonl\)"):
        read(tmp_path / "mixed")


def test_a_saved_dataset_is_the_files_that_its_state_lists_in_that_order(tmp_path):
    import datasets

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"]}).save_to_disk(saved, num_shards=2)
    prepare_data([str(saved)], tmp_path / "out", "gpt2")
    datasets.load_from_disk(str(saved)).map(lambda row: {"length": len(row["text"])})
    assert list(saved.glob("cache-*.arrow"))
    assert prepare_data([str(saved)], tmp_path / "out", "gpt2")[1] is True
    state = json.loads((saved / "state.json").read_bytes())
    for listed in (state["_data_files"][::-1], state["_data_files"][:1]):
        (saved / "state.json").write_text(json.dumps(state | {"_data_files": listed}))
        assert read(saved) == datasets.load_from_disk(str(saved))["text"][:]
        with pytest.raises(UserError, match=r"other settings \(sources\)"):
            prepare_data([str(saved)], tmp_path / "out", "gpt2")
    (saved / state["_data_files"][0]["filename"]).unlink()
    with pytest.raises(UserError, match=r"state\.json lists files that do not exist: .*00000-of-00002\.arrow"):
        read(saved)
    (saved / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json is truncated or damaged"):
        read(saved)


@pytest.mark.parametrize("form", ["numpy", "arrow", "pandas"])
def test_the_format_of_a_saved_dataset_hides_no_text(tmp_path, form):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    rows.with_format(form, columns=["n"]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["a", "b"]


def test_a_cache_of_datasets_is_refused_with_the_remedy(tmp_path, expected):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    expected("json", tmp_path / "a.jsonl")
    for options in ({}, {"skip_unknown": True}):
        with pytest.raises(UserError, match=r"is a cache of the `datasets` library.*save_to_disk"):
            read(tmp_path / "cache", **options)


def test_what_is_kept_beside_a_token_file_is_ignored(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / ".b.bin.scan.json").write_text("{}")
    assert read(tmp_path) == ["a"]


def test_pointers_of_git_lfs_are_refused_whatever_their_kind_also_in_a_saved_dataset(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(LFS)
    for name in ("a.txt", "b.parquet", "c.jsonl.gz", "d.csv.zst"):
        (tmp_path / name).write_bytes(LFS)
    with pytest.raises(UserError, match=r"a\.txt, .*b\.parquet, .*c\.jsonl\.gz and 2 more are a pointer of git-lfs"):
        read(tmp_path)


def test_an_unknown_kind_in_a_folder_is_refused_or_counted_and_hidden_files_are_not_data(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("x.bin", "y.BIN", "z.tar.gz", "_SUCCESS", "._a.jsonl", "config.json", ".DS_Store"):
        (tmp_path / name).write_text("no data")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(UserError, match=r"2 \.bin, .*Give the files to read by name\.$") as caught:
        find_sources([tmp_path])
    for one in ("1 .tar.gz", "1 _SUCCESS", "1 hidden .jsonl", "1 config.json"):
        assert one in str(caught.value)
    with pytest.raises(UserError, match="--skip-unknown"):
        find_sources([tmp_path], LeftOut())
    left_out = LeftOut()
    assert read(tmp_path, left_out=left_out, skip_unknown=True) == ["a"]
    assert left_out.files == {".bin": 2, ".tar.gz": 1, "_SUCCESS": 1, "hidden .jsonl": 1, "config.json": 1}
    assert read(tmp_path / ".git") == ["b"]


def test_links_are_followed_each_file_once_and_those_that_lead_nowhere_are_named(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "sub" / "b.jsonl").write_text('{"text": "b"}\n')
    (elsewhere / "c.jsonl").write_text('{"text": "c"}\n')
    (elsewhere / "blob").write_text('{"text": "d"}\n')
    (folder / "a.jsonl").symlink_to(folder / "sub" / "b.jsonl")  # a second name
    (folder / "latest").symlink_to("sub/b.jsonl")  # a third one, of no kind
    (folder / "d.jsonl").symlink_to(elsewhere / "blob")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "sub" / "up").symlink_to(folder)  # a loop
    left_out = LeftOut()
    sources = find_sources([folder], left_out)
    assert [source.relative_to(folder) for source in sources] == [
        Path("again/c.jsonl"),
        Path("d.jsonl"),
        Path("sub/b.jsonl"),
    ]
    assert list(read_documents(sources)) == ["c", "d", "b"]
    assert left_out.links == 3 and not left_out.files
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "self.txt").symlink_to("self.txt")
    with pytest.raises(UserError, match=r"links that lead nowhere: .*gone\.jsonl, .*self\.txt"):
        find_sources([folder])


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        find_sources([tmp_path])


def test_everything_beside_a_saved_dataset_is_read_too(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path / "both" / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["split"]})}).save_to_disk(
        tmp_path / "both" / "dict"
    )
    (tmp_path / "both" / "saved" / "more.txt").write_text("more")
    (tmp_path / "both" / "first.txt").write_text("first")
    assert read(tmp_path / "both") == ["split", "first", "saved", "more"]


def test_documents_without_text_are_counted_in_the_manifest_and_printed(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n\n{"text": null}\n{"text": " \\n"}\n')
    (folder / "b.txt").write_text("one\n<|endoftext|>\n\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    (folder / "c.csv").write_text('text,n\n"",1\nNA,2\n')
    (folder / "x.bin").write_text("")
    tool, common = CHECKOUT / "tools" / "prepare_data.py", ["--out", tmp_path / "out", "--tokenizer", "gpt2"]
    refused = run_tool([tool, folder, *common, "--workers", "1"], CHECKOUT)
    assert refused.returncode == 2 and "1 .bin" in refused.stderr and not (tmp_path / "out").exists()
    for _ in range(2):  # the second time it is complete
        done = run_tool([tool, folder, *common, "--workers", "1", "--skip-unknown"], CHECKOUT)
        assert done.returncode == 0, done.stderr
        assert "in 4 documents" in done.stdout
        assert "left out: 4 documents without text" in done.stdout and "left out: 1 .bin" in done.stdout
    manifest = json.loads((tmp_path / "out" / "train" / MANIFEST).read_bytes())
    assert manifest["left_out"] == asdict(LeftOut(documents=4, files={".bin": 1}))
    del manifest["left_out"]  # as earlier versions wrote it
    (tmp_path / "out" / "train" / MANIFEST).write_text(json.dumps(manifest))
    assert prepare_data([folder], tmp_path / "out", "gpt2", skip_unknown=True)[1]


def test_only_the_split_train_of_a_name_on_the_hub_is_read_and_that_is_said(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_iterable_dataset()
    found = datasets.IterableDatasetDict({"train": rows, "test": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: found)
    left_out = LeftOut()
    assert list(read_documents(["owner/name"], left_out=left_out)) == ["a"]
    assert list(left_out.lines()) == ["owner/name: the split train of the default config is read, not test"]
    broken = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, 1 / 0]))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, streaming: datasets.IterableDatasetDict({"train": broken})
    )
    with pytest.raises(UserError, match="owner/name cannot be read to its end: division by zero"):
        list(read_documents(["owner/name"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: found)
    del found["train"]
    with pytest.raises(UserError, match="owner/name has no split train on the Hub, only test"):
        list(read_documents(["owner/name"]))


def test_a_kind_is_the_last_suffix_under_the_compression():
    kinds = {"a.b.TXT": (".txt", ""), "x/a.jsonl.Gz": (".jsonl", ".gz"), "a.gz": None, "a.tar.gz": None, ".txt": None}
    assert {name: file_kind(name) for name in kinds} == kinds

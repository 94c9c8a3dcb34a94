"""Finds the sources of raw text: files, saved datasets, names on the Hugging Face Hub.

The kinds of files are those of the `datasets` library, which ignores hidden files and folders too. Nothing else in a
folder is left out in silence: a file that is not read is refused, or counted in `LeftOut`.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megacocomix.errors import UserError
from megacocomix.files import damaged, is_lfs_pointer

KINDS = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = {
    ".gz": rb"\x1f\x8b",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    ".xz": rb"\xfd7zXZ\0",
    ".bz2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
}
"""Suffixes that may follow a kind → what such files begin with."""
SUFFIXES = f"{' '.join(KINDS)}, also compressed ({' '.join(COMPRESSIONS)})"
SAVED_DATASET = {"dataset_info.json", "state.json"}
SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
"""Splits → the words in the name of a file or folder by which `datasets` knows them, between other than letters."""
ABOUT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json"}
"""Files about a data set, which `datasets` does not read as data either."""


@dataclass
class LeftOut:
    """What was given, and is not used."""

    documents: int = 0
    """Documents of white space alone, and rows whose field is null or absent."""
    files: dict[str, int] = field(default_factory=dict)
    """Number of files of an unknown kind, by suffix."""
    links: int = 0
    """Links to files that are read under another name."""
    splits: dict[str, list[str]] = field(default_factory=dict)
    """Names on the Hub → their splits other than train."""

    def lines(self) -> Iterator[str]:
        """A line for the user about each of these, if there is any."""
        if self.documents:
            yield f"left out: {self.documents:,} documents without text (only white space, null, or no such field)"
        if self.files:
            yield f"left out: {_counts(self.files)} (files of a kind that is not read)"
        if self.links:
            yield f"left out: {self.links:,} links to files that are read under another name"
        for name, splits in self.splits.items():
            others = f", not {' '.join(splits)}" if splits else ""
            yield f"{name}: the split train of the default config is read{others}"


def file_kind(path: Path | str) -> tuple[str, str] | None:
    """(".jsonl", ".gz") for "A.JSONL.GZ", (".jsonl", "") for "a.jsonl"; None for a kind that is not read."""
    first, last = ["", "", *Path(str(path).lower()).suffixes][-2:]
    kind, compression = (first, last) if last in COMPRESSIONS else (last, "")
    return (kind, compression) if kind in KINDS else None


def find_sources(
    inputs: Sequence[str], left_out: LeftOut | None = None, skip_unknown: bool = False
) -> list[Path | str]:
    """The sources to read, in order: a Path for each file or saved dataset, a str for a name on the Hugging Face Hub.

    A folder means every saved dataset and every file in and below it, sorted by name. Links are followed, and a file
    with several names is read once. Hidden files and folders are ignored, as `datasets` does, except for hidden files
    of a known kind. These, and files of an unknown kind, are refused, or with `skip_unknown` counted in `left_out`.
    A folder in which a validation or test split lies beside other files is refused.
    Raises UserError with a line for each input that does not exist or cannot be read, before anything is read.
    """
    counted = LeftOut() if left_out is None else left_out
    sources, problems = [], []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = _in_folder(path)
            sources += found.sources
            counted.links += found.num_links
            if found.dangling:
                problems.append(f"{name} holds links that lead nowhere: {_some(found.dangling)}.")
            if not found.sources:
                problems.append(f"{name} holds no dataset and no files of a known kind: {SUFFIXES}.")
            elif found.unknown and not skip_unknown:
                remedy = ", or leave these out with --skip-unknown" if left_out is not None else ""
                problems.append(
                    f"{name} also holds files of a kind that is not read: {_counts(_by_suffix(found.unknown))}, such "
                    f"as {found.unknown[0]}. Give the files to read by name{remedy}."
                )
            counted.files = _by_suffix(found.unknown, counted.files)
            problems += _mixed_splits(path, found.sources)
        elif path.is_file() and file_kind(path):
            sources.append(path)
        elif path.exists():
            problems.append(f"{name} is of an unknown kind. Valid: {SUFFIXES}, or a dataset folder.")
        elif not file_kind(name) and not path.is_symlink() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
            sources.append(str(name))
        else:
            problems.append(f"{name} does not exist.")
    problems += _damaged(file for source in sources for file in source_files(source))
    if problems:
        raise UserError(*problems)
    return sources


def source_files(source: Path | str) -> list[Path]:
    """The files of a source in the order in which they are read; none for a name on the Hub. Raises UserError for a
    saved dataset that is damaged."""
    if isinstance(source, str):
        return []
    if source.is_file():
        return [source]
    state = source / "state.json"  # other .arrow files beside it are caches of `Dataset.map`
    try:
        files = [source / file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(state, repr(error)) from error
    if absent := [file for file in files if not file.is_file()]:
        raise UserError(f"{state} lists files that do not exist: {_some(absent)}.")
    return files


@dataclass
class _Found:
    sources: list[Path]
    unknown: list[Path]
    dangling: list[Path]
    num_links: int


def _in_folder(folder: Path) -> _Found:
    names, datasets = _walk(folder)
    found = _Found(datasets, [], [], 0)
    seen = set()
    # Of the names of one file, the one that is read: of a known kind, then the file's own rather than a link.
    for file in sorted(names, key=lambda file: (not _is_data(file), file.is_symlink(), file)):
        if not os.path.exists(file):
            found.dangling.append(file)
        elif (real := os.path.realpath(file)) in seen:
            found.num_links += 1
        else:
            seen.add(real)
            (found.sources if _is_data(file) else found.unknown).append(file)
    found.sources.sort()
    return found


def _is_data(file: Path) -> bool:
    is_hidden = file.name.startswith(".")
    return bool(file_kind(file)) and not is_hidden and file.name not in ABOUT_DATA and file.is_file()


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in and below a folder, and the saved datasets, whose own files are not among these. No folder is
    entered twice."""

    def fail(error: OSError) -> None:
        raise error

    files, datasets, seen, pending = [], [], set(), [folder]
    while pending:  # linked folders come last, so that a folder below keeps its own name
        for where, folders, names in os.walk(pending.pop(0), onerror=fail):
            here, real = Path(where), os.path.realpath(where)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            pending += [here / name for name in folders if (here / name).is_symlink()]
            if "dataset_dict.json" in names:
                _check_one_split(here)
                names.remove("dataset_dict.json")
            has_arrow = any(name.endswith(".arrow") for name in names)
            if has_arrow and set(names) & SAVED_DATASET == {"dataset_info.json"}:
                raise UserError(
                    f"{here} is a cache of the `datasets` library, in which a row may lie several times: load the "
                    "dataset, write it with save_to_disk, and give that folder."
                )
            if set(names) >= SAVED_DATASET:
                datasets.append(here)
                names = [name for name in names if name not in SAVED_DATASET and not name.endswith(".arrow")]
            files += [here / name for name in names if not name.startswith(".") or _is_hidden_data(name)]
    return files, datasets


def _is_hidden_data(name: str) -> bool:
    """Whether a hidden file is of a known kind, and not what we keep beside tokens (see `binary` and `tokens`)."""
    return bool(file_kind(name)) and not name.endswith((".scan.json", ".verified.json"))


def _mixed_splits(folder: Path, sources: Sequence[Path]) -> Iterator[str]:
    """An error line if a folder holds text to validate or test on, and other text."""
    found: dict[str | None, Path] = {}
    for source in sources:
        found.setdefault(_split(source.relative_to(folder)), source)
    if len(found) > 1 and found.keys() - {"train", None}:
        names = [f"{split or 'other files'} ({source.relative_to(folder)})" for split, source in found.items()]
        yield f"{folder} holds several splits: {', '.join(names)}. Give the files or the folder of one by name."


def _split(path: Path) -> str | None:
    """The split that the first telling part of a path names, as in `datasets`; but a blank ends no word, because titles
    are not splits."""
    for part in path.parts:
        for split, words in SPLITS.items():
            if re.search(rf"(^|[-._0-9])({words})($|[-._0-9])", part, re.IGNORECASE):
                return split
    return None


def _check_one_split(folder: Path) -> None:
    """Raises UserError if a saved DatasetDict has several splits."""
    try:
        splits = [str(split) for split in json.loads((folder / "dataset_dict.json").read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/dataset_dict.json is damaged.") from error
    if len(splits) != 1:
        raise UserError(f"{folder} has several splits, give one: {' '.join(str(folder / s) for s in splits)}")


def _damaged(files: Iterable[Path]) -> Iterator[str]:
    """An error line for each way in which files do not begin as their names say."""
    problems: dict[str, list[Path]] = {}
    for file in files:
        if problem := _problem(file):
            problems.setdefault(problem, []).append(file)
    for problem, found in problems.items():
        yield f"{_some(found)} {'are' if len(found) > 1 else 'is'} {problem}."


def _problem(file: Path) -> str | None:
    with open(file, "rb") as raw:
        head = raw.read(64)
    if is_lfs_pointer(file):
        return "a pointer of git-lfs instead of the data: run `git lfs pull` where it was cloned"
    expected = file_kind(file)[1]
    actual = next((suffix for suffix, magic in COMPRESSIONS.items() if re.match(magic, head)), "")
    if expected and expected != actual:
        return f"not compressed as {expected}, which the name says"
    if actual and not expected:
        return f"compressed: the name has to end in {actual}"
    return None


def _by_suffix(files: Sequence[Path], before: dict[str, int] | None = None) -> dict[str, int]:
    """Number of files of each suffix, the most frequent first; a name without a suffix counts as one."""
    return dict((Counter(map(_suffix, files)) + Counter(before or {})).most_common())


def _suffix(file: Path) -> str:
    suffixes = file.suffixes[-2:] if file.suffix.lower() in COMPRESSIONS else file.suffixes[-1:]
    if not suffixes or file.name in ABOUT_DATA:
        return file.name
    return ("hidden " if file.name.startswith(".") else "") + "".join(suffixes).lower()


def _counts(files: dict[str, int]) -> str:
    shown = ", ".join(f"{count:,} {suffix}" for suffix, count in list(files.items())[:8])
    return shown + (f" and {len(files) - 8} other suffixes" if len(files) > 8 else "")


def _some(files: Sequence[Path]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")

"""Renamed options, and the upgrade of files that have the old names (tools/upgrade_config.py).

A config with an old name is refused with an error that gives the new name. It is never translated silently.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from megacocomix.config.yaml_text import parse_yaml
from megacocomix.errors import UserError
from megacocomix.files import write_json, write_text


class NewName(NamedTuple):
    """The new name of an option, and the new names of its values if they changed too."""

    key: str
    values: dict[str, bool] | None = None

    def __str__(self) -> str:
        values = ", ".join(f"{old} is now {str(new).lower()}" for old, new in (self.values or {}).items())
        return f"{self.key} ({values})" if values else self.key


RENAMED = {
    "parallel.cuts": NewName("parallel.split_points"),
    "parallel.stages_per_rank": NewName("parallel.virtual_stages"),
    "parallel.gather": NewName("parallel.reshard_after_forward", {"per_step": False, "per_microbatch": True}),
    "training.init": NewName("training.init_from"),
}


def upgrade(path: Path) -> Iterator[str]:
    """Rename options in a recipe, a sweep's plan, a run (its config and all its checkpoints) or a checkpoint. Comments
    and order stay. Yields one line per change. Raises UserError if `path` is none of these, and at the end with every
    file that could not be upgraded, which stays as it was."""
    path = path.resolve()  # a symbolic link stays one
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    manifests = sorted(path.glob("checkpoints/step-*/checkpoint.json")) or [path / "checkpoint.json"]
    files = [path] if path.is_file() else [file for file in (path / "config.yaml", *manifests) if file.is_file()]
    if not files:
        raise UserError(f"{path} is not a run or a checkpoint: it has no config.yaml and no checkpoint.json.")
    problems = []
    for file in files:
        try:
            changed = (_upgrade_manifest if file.name == "checkpoint.json" else _upgrade_yaml)(file)
            yield from (f"{file}: {old} is now {RENAMED[old]}" for old in changed)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def _upgrade_yaml(file: Path) -> list[str]:
    """The old names that were replaced."""
    try:
        text = file.read_bytes().decode()  # not read_text, which would change line ends
        edits = sorted(set(_yaml_edits(text, yaml.compose(text, Loader=yaml.SafeLoader), "")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split()):.120}.") from None
    for edit in reversed(edits):  # from the end, so that earlier positions stay valid
        text = text[: edit.start] + edit.new + text[edit.start + len(edit.old) :]
    parse_yaml(text, str(file))  # an option may have been there under both names
    if edits:
        write_text(file, text)
    return [edit.option for edit in edits if edit.option]


class _Edit(NamedTuple):
    start: int
    old: str
    new: str
    option: str
    """The old name of the option; empty for an edit of its value."""


def _yaml_edits(text: str, node: yaml.Node | None, path: str, parents: tuple = ()) -> Iterator[_Edit]:
    """Every old name and value below a node. `path` is the node's dotted key. A node with an alias may be found several
    times, and may contain itself."""
    if node in parents:
        return
    within = (*parents, node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{path}.{key.value}" if path else str(key.value)
            if new := RENAMED.get(dotted):
                yield from _edits_of(text, key, dotted.rpartition(".")[2], new.key.rpartition(".")[2], dotted)
                if new.values and isinstance(value, yaml.ScalarNode) and value.value in new.values:
                    yield from _edits_of(text, value, value.value, str(new.values[value.value]).lower())
            yield from _yaml_edits(text, value, dotted, within)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _yaml_edits(text, item, path, within)
            if isinstance(item, yaml.ScalarNode):  # in a plan: section.key=value
                key, equals, value = item.value.partition("=")
                if equals and (new := RENAMED.get(key)):
                    yield from _edits_of(text, item, f"{key}=", f"{new.key}=", key)
                    if new.values and value in new.values:
                        yield from _edits_of(text, item, value, str(new.values[value]).lower())


def _edits_of(text: str, node: yaml.ScalarNode, old: str, new: str, option: str = "") -> Iterator[_Edit]:
    """The edit of `old` inside a scalar: its quotes, escapes and anchor stay."""
    start = text.rfind(old, node.start_mark.index, node.end_mark.index)
    if start >= 0:
        yield _Edit(start, old, new, option)


def _upgrade_manifest(file: Path) -> list[str]:
    """The old names that were replaced."""
    damaged = f"{file} is damaged or not a native checkpoint.json."
    try:
        manifest = json.loads(file.read_bytes())
        sections, inputs = dict(manifest["config"]), dict(manifest["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(damaged) from None
    changed = []
    for old, new in RENAMED.items():
        section, key = old.split(".")
        new_key = new.key.rpartition(".")[2]
        values = sections.get(section) or {}
        if not isinstance(values, dict):
            raise UserError(damaged)
        if key in values:
            if new_key in values:
                raise UserError(f"{file} holds both {old} and {new.key}.")
            value = values.pop(key)
            known = new.values if isinstance(value, str) else None
            values[new_key] = known.get(value, value) if known else value
            changed.append(old)
        if old in inputs:  # option → hash of the file it names
            inputs[new.key] = inputs.pop(old)
    if changed:
        write_json(file, manifest | {"inputs": inputs})
    return changed

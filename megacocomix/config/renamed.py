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


def upgrade(path: Path) -> list[str]:
    """Rename options in a recipe, a sweep's plan, a run (its config and all its checkpoints) or a checkpoint. Comments
    and order stay. Returns one line per change. Raises UserError if `path` is none of these."""
    if path.is_file():
        return _upgrade_yaml(path)
    manifests = sorted(path.glob("checkpoints/step-*/checkpoint.json")) or [path / "checkpoint.json"]
    found = [file for file in (path / "config.yaml", *manifests) if file.is_file()]
    if not found:
        raise UserError(f"{path} is not a recipe, run or checkpoint: it has no config.yaml and no checkpoint.json.")
    return [line for file in found for line in (_upgrade_yaml if file.suffix == ".yaml" else _upgrade_manifest)(file)]


def _upgrade_yaml(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode()  # not read_text, which would change line ends
        edits = list(_yaml_edits(yaml.compose(text, Loader=yaml.SafeLoader), ""))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split()):.120}.") from None
    for edit in sorted(edits, reverse=True):  # from the end, so that earlier positions stay valid
        text = text[: edit.start] + edit.text + text[edit.stop :]
    parse_yaml(text, str(file))  # an option may have been there under both names
    if edits:
        write_text(file, text)
    return [f"{file}: {edit.old} is now {RENAMED[edit.old]}" for edit in sorted(edits) if edit.is_key]


class _Edit(NamedTuple):
    start: int
    stop: int
    text: str
    old: str
    is_key: bool = True


def _yaml_edits(node: yaml.Node | None, path: str) -> Iterator[_Edit]:
    """Every old name and value below a node. `path` is the node's dotted key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{path}.{key.value}" if path else str(key.value)
            if new := RENAMED.get(dotted):
                yield _Edit(key.start_mark.index, key.end_mark.index, new.key.rpartition(".")[2], dotted)
                if new.values and value.value in new.values:
                    text = str(new.values[value.value]).lower()
                    yield _Edit(value.start_mark.index, value.end_mark.index, text, dotted, is_key=False)
            yield from _yaml_edits(value, dotted)
    elif isinstance(node, yaml.SequenceNode):  # in a plan: items are section.key=value
        for item in node.value:
            yield from _yaml_edits(item, path)
    elif isinstance(node, yaml.ScalarNode):
        key, equals, value = str(node.value).partition("=")
        if equals and (new := RENAMED.get(key)):
            value = str(new.values[value]).lower() if new.values and value in new.values else value
            quote = node.style or ""
            yield _Edit(node.start_mark.index, node.end_mark.index, f"{quote}{new.key}={value}{quote}", key)


def _upgrade_manifest(file: Path) -> list[str]:
    try:
        manifest = json.loads(file.read_bytes())
        sections = dict(manifest["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged or not a native checkpoint.json.") from None
    lines = []
    for old, new in RENAMED.items():
        section, key = old.split(".")
        values = sections.get(section) or {}
        if key in values:
            value = values.pop(key)
            values[new.key.rpartition(".")[2]] = new.values.get(value, value) if new.values else value
            lines.append(f"{file}: {old} is now {new}")
        if old in manifest.get("inputs", {}):  # option → hash of the file it names
            manifest["inputs"][new.key] = manifest["inputs"].pop(old)
    if lines:
        write_json(file, manifest)
    return lines

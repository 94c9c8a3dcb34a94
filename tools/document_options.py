#!/usr/bin/env python
"""Write docs/options.md, the reference of all options, from the docstrings in megacocomix/config/.

python tools/document_options.py --out docs/options.md
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.config.method import PRESETS
from megacocomix.config.schema import Config, section_type
from megacocomix.errors import run_cli

VALUES = """\
Files are read by the core schema of YAML 1.2: `010` is ten, `0o10` eight, `1e-4` a number; booleans are `true` and
`false`; `on`, `1:30`, `1_000` and `2024-01-01` are text. On the command line a text option takes everything after the
`=` as it is, also `#`, `:`, quotes and leading zeros; only where an option may be null, `null`, `~` and nothing mean
null. A list is written as `[a, b]`."""


def options_page() -> str:
    """The whole page as Markdown."""
    lines = ["# Options", ""]
    lines += ["Made by `tools/document_options.py` of the docstrings in `config/schema.py` and `config/method.py`.", ""]
    lines += ["A recipe is a YAML file with these sections; on the command line an option is `section.key=value`.", ""]
    lines += [VALUES, ""]
    for name, field in Config.model_fields.items():
        section = section_type(name)
        if section is None:
            lines += [f"## {name}", "", field.description, ""]
            continue
        lines += [f"## {name}", "", section.__doc__, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, option in section.model_fields.items():
            default = "*required*" if option.is_required() else f"`{_yaml(option.default)}`"
            meaning = " ".join(option.description.split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {_type(option.annotation)} | {default} | {meaning} |")
        lines.append("")
        if name == "method":
            lines += [*_presets_table(), ""]
    return "\n".join(lines)


def _presets_table() -> list[str]:
    """The settings of each method.name; a dash where it sets nothing."""
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    lines = [f"| `name` | {' | '.join(f'`{key}`' for key in keys)} |", f"|---|{'---|' * len(keys)}"]
    for name, preset in PRESETS.items():
        lines.append(f"| `{name}` | {' | '.join(f'`{preset[key]}`' if key in preset else '–' for key in keys)} |")
    return lines


def _yaml(value) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(annotation) -> str:
    """A type annotation as text for the user."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}s"
    if origin is tuple:
        return f"list of {len(parts)} numbers"
    if origin is Annotated:
        return _type(parts[0])
    if parts:
        return " or ".join(map(_type, parts))
    return {type(None): "null", str: "text", int: "integer", float: "number", bool: "true/false"}[annotation]


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/options.md", metavar="FILE")
    Path(parser.parse_args().out).write_text(options_page())


if __name__ == "__main__":
    run_cli(main)

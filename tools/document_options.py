#!/usr/bin/env python
"""Write docs/options.md, the reference of every option, from the sentences in megacocomix/config.py and method.py.

python tools/document_options.py --out docs/options.md
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacocomix.config.method import COCOMIX, PRESETS
from megacocomix.config.schema import Config, section_type
from megacocomix.errors import run_cli


def options_page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# Options",
        "",
        "Generated from `megacocomix/config.py` and `method.py` by `tools/document_options.py`; edit it there.",
        "",
    ]
    lines += ["A recipe is a YAML file with these sections; on the command line an option is `section.key=value`.", ""]
    for name, field in Config.model_fields.items():
        section = section_type(name)
        if section is None:
            lines += [f"## {name}", "", field.description, ""]
            continue
        lines += [f"## {name}", "", section.__doc__, "", "| key | type | default | what |", "|---|---|---|---|"]
        for key, option in section.model_fields.items():
            default = "*required*" if option.is_required() else f"`{_yaml(option.default)}`"
            what = " ".join(option.description.split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {_type(option.annotation)} | {default} | {what} |")
        lines.append("")
        if name == "method":
            lines += [*_presets_table(), ""]
    return "\n".join(lines)


def _presets_table() -> list[str]:
    """What each method.name sets; a dash where it is as for cocomix."""
    lines = [f"| `name` | {' | '.join(f'`{key}`' for key in COCOMIX)} |", f"|---|{'---|' * len(COCOMIX)}"]
    for name, preset in PRESETS.items():
        differs = lambda key, name=name, preset=preset: name == "cocomix" or preset[key] != COCOMIX[key]
        lines.append(f"| `{name}` | {' | '.join(f'`{preset[key]}`' if differs(key) else '–' for key in COCOMIX)} |")
    return lines


def _yaml(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(annotation) -> str:
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}[annotation.__name__]
    parts = get_args(annotation)
    if getattr(annotation, "__origin__", None) is list:
        return f"list of {_type(parts[0])}s"
    if getattr(annotation, "__origin__", None) is tuple:
        return "list of " + str(len(parts)) + " numbers"
    if not any(isinstance(part, type) or get_args(part) for part in parts):
        return ", ".join(f"`{part}`" for part in parts)  # a Literal
    if hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    return " or ".join(_type(part) for part in parts)


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/options.md", metavar="FILE")
    Path(parser.parse_args().out).write_text(options_page())


if __name__ == "__main__":
    run_cli(main)

"""YAML by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3): `010` is ten, `1e-4` a number, and `on`,
`1:30`, `1_000` and `2024-01-01` are text. PyYAML itself reads and writes YAML 1.1. Merge keys (`<<`) stay. A key given
twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from megacocomix.errors import UserError

TAG = "tag:yaml.org,2002:"
# Type → the texts of its values, and the characters that these begin with. An int's text is a float's too.
CORE = {
    "null": (r"null|Null|NULL|~|", [*"nN~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}


class _TextLoader(yaml.SafeLoader):
    """All scalars are text."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError(f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: {key} is given twice.")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Loader(_TextLoader):
    yaml_implicit_resolvers = {}

    def construct_core(self, node):
        """A scalar whose tag may have been written out: `!!bool yes` is an error."""
        kind, text = node.tag.removeprefix(TAG), self.construct_scalar(node)
        if not re.fullmatch(CORE[kind][0], text):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no {kind}", node.start_mark)
        if kind == "int":
            return int(text, 0) if text[1:2] in ("o", "x") else int(text)
        return getattr(self, f"construct_yaml_{kind}")(node)


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes that is anything else in YAML 1.1 or 1.2, so that parsers of both read the same."""


for _kind, (_texts, _first) in CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(f"(?:{_texts})$"), _first)
    _Loader.add_constructor(TAG + _kind, _Loader.construct_core)
_Loader.add_implicit_resolver(f"{TAG}merge", re.compile("<<$"), ["<"])
_Loader.add_constructor(f"{TAG}merge", _Loader.construct_yaml_str)  # where it is no key


def read_yaml(file: Path) -> Any:
    """Parse a YAML file. Raises UserError if it cannot be read or is malformed."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return parse_yaml(text, str(file))


def parse_yaml(text: str, name: str, as_text: bool = False) -> Any:
    """Parse YAML; with `as_text` all scalars are text. Errors mention `name`. Raises UserError on malformed text."""
    try:
        loader = (_TextLoader if as_text else _Loader)(text)
        loader.name = name
        return loader.get_single_data()
    except UserError:
        raise
    except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}.") from None


def parse_scalar(text: str, name: str) -> Any:
    """The value of a null, boolean or number; other text is returned as it is, with `#` and `:`. Raises UserError,
    which mentions `name`, on a number of thousands of digits."""
    kind = next((kind for kind, (texts, _) in CORE.items() if re.fullmatch(texts, text)), None)
    return parse_yaml(text, name) if kind else text


def dump_yaml(value: Any) -> str:
    """A value as YAML, which `parse_yaml` and parsers of YAML 1.1 read back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)

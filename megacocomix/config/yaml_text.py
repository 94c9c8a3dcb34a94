"""A YAML parser with two fixes: `1e-4` is a number, and a key given twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from megacocomix.errors import UserError


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise UserError(f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: {key} is given twice.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(file: Path) -> Any:
    """Parse a YAML file. Raises UserError if it cannot be read or is malformed."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return parse_yaml(text, str(file))


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML with the rules of `_Loader`. Errors mention `name`. Raises UserError on malformed text."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except UserError:
        raise
    except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}.") from None

"""`section.key=value`: the value is text until the option's type is known."""

from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from megacocomix.config.schema import Config, section_type
from megacocomix.config.yaml_text import CORE, parse_scalar, parse_yaml
from megacocomix.errors import UserError

NUMBERS = {int, float, bool}
NULL = CORE["null"][0].split("|")


class Override(NamedTuple):
    """One option of the command line."""

    section: str
    key: str
    """Empty for a plain key such as run, and for a whole section."""
    value: Any

    @property
    def name(self) -> str:
        """The option as `section.key`."""
        return ".".join(filter(None, (self.section, self.key)))


def parse_override(override: str) -> Override:
    """Split `section.key=value`, and read the value by the option's type. Text stays as it is. Raises UserError without
    `=` or key, or for a list or a section that is malformed YAML. A value of the wrong type is left to the schema."""
    name, equals, text = override.partition("=")
    section, _, key = name.partition(".")
    if not equals or not section or name.endswith("."):
        raise UserError(f"override {override!r} is not section.key=value, such as training.steps=100.")
    return Override(section, key, _read(text, _types(_annotation(section, key)), f"override {name}"))


def _annotation(section: str, key: str) -> Any:
    """The type of an option; str for one that does not exist, which the schema refuses."""
    fields = Config.model_fields
    if key:
        options = section_type(section) if section in fields else None
        fields = options.model_fields if options else {}
    field = fields.get(key or section)
    return field.annotation if field else str


def _types(annotation: Any) -> set:
    """The types that an annotation unites; for a Literal, those of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return set().union(*map(_types, arguments))
    if origin is Annotated:
        return _types(arguments[0])
    return set(map(type, arguments)) if origin is Literal else {annotation}


def _read(text: str, types: set, name: str) -> Any:
    if str in types:
        return None if type(None) in types and text in NULL else text
    if types & NUMBERS:
        return parse_scalar(text.strip(), name)
    return parse_yaml(text, name, as_text=list[str] in types)

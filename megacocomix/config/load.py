"""A recipe → a config, in layers of which a later one wins: the preset that the file names, the file, the preset that
the command line names, the command line."""

import copy
from pathlib import Path

import yaml
from pydantic import ValidationError

from megacocomix.config.method import COCOMIX, PRESETS
from megacocomix.config.renamed import RENAMED
from megacocomix.config.schema import Config, section_type
from megacocomix.config.section import Section
from megacocomix.config.yaml_text import parse_yaml
from megacocomix.errors import UserError, nearest


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read FILE, put `section.key=value` overrides over it, resolve the null defaults. All problems are reported in one
    UserError."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    file = parse_yaml(text, str(path))
    if not isinstance(file, dict):
        raise UserError(f"{path} is not a config: expected sections such as model and training.")
    return build_config(_merge_layers(file, [_parse_override(override) for override in overrides]), str(path))


def build_config(values: dict, name: str = "config") -> Config:
    """Check nested values against the fields and resolve the null defaults. Raises one UserError with every problem."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(*(_explain(problem, name) for problem in error.errors())) from None
    return _resolve_defaults(config)


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def _parse_override(override: str) -> tuple[list[str], object]:
    """`section.key=value` → its keys and its value."""
    key, equals, text = override.partition("=")
    section, _, field = key.partition(".")
    if not equals or not section or key.endswith("."):
        raise UserError(f"override {override!r} is not section.key=value, such as training.steps=100.")
    return [section, field] if field else [section], parse_yaml(text, f"override {key}")


def _merge_layers(file: dict, overrides: list[tuple[list[str], object]]) -> dict:
    """The layers as one. A file's own preset needs none of its own: options that are null take its values later."""
    preset = {}
    for keys, value in overrides:
        if keys == ["method", "name"]:
            preset = PRESETS.get(str(value), {})
    values = copy.deepcopy(file)
    if isinstance(values.get("method"), dict):
        values["method"] |= preset
    merged = _put_over(copy.deepcopy(values), overrides)
    model, method = values.get("model"), merged.get("method")
    if isinstance(model, dict) and isinstance(method, dict):
        predict = method.get("predict") or PRESETS.get(str(method.get("name")), COCOMIX)["predict"]
        # A method without predictions is as wide as the control of equal activated parameters.
        if predict == "nothing" and (width := model.pop("control_hidden_size", None)) is not None:
            model["hidden_size"] = width
            return _put_over(values, overrides)
    return merged


def _put_over(values: dict, overrides: list[tuple[list[str], object]]) -> dict:
    for (section, *field), value in overrides:
        if not field:
            values[section] = value
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][field[0]] = value
        else:
            raise UserError(f"override {section}.{field[0]}: {section} is not a section.")
    return values


def _resolve_defaults(config: Config) -> Config:
    method, reference = config.method.resolved(), config.method.match_reference

    def fill(section: Section, field: str, ours, theirs) -> Section:
        value = getattr(section, field)
        return section if value is not None else section.model_copy(update={field: theirs if reference else ours})

    parallel = config.parallel
    if parallel.sequence is None:
        parallel = parallel.model_copy(update={"sequence": parallel.tensor > 1})
    if parallel.reshard_after_forward is None:
        holds = parallel.pipeline > 1 and parallel.zero == 3
        parallel = parallel.model_copy(update={"reshard_after_forward": not holds})
    return config.model_copy(
        update={
            "parallel": parallel,
            "model": fill(config.model, "dropout", 0.0, 0.1),
            "method": fill(method, "mask_unlabelled", True, False),
            "optimizer": fill(config.optimizer, "decay", "matrices", "all"),
        }
    )


def _explain(problem: dict, name: str) -> str:
    place = [str(part) for part in problem["loc"]]
    where = ".".join(place)
    if problem["type"] == "extra_forbidden":
        if new := RENAMED.get(where):
            return f"{name}: {where} is now {new}. tools/upgrade_config.py translates recipes, runs and checkpoints."
        known = Config.model_fields if len(place) == 1 else section_type(place[0]).model_fields
        return f"{name}: {where} is not an option.{nearest(place[-1], known)}"
    if problem["type"] == "missing":
        return f"{name}: {where} is missing."
    message = problem["msg"]
    return f"{name}: {where} = {problem['input']!r}: {message[0].lower()}{message[1:]}."

"""Read a recipe. It has four layers, of which a later one wins: the preset that the file names, the file's options, the
preset that the command line names, the command line's options."""

import copy
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError

from megacocomix.config.method import COCOMIX, PRESETS
from megacocomix.config.overrides import Override, parse_override
from megacocomix.config.renamed import RENAMED
from megacocomix.config.schema import Config, section_type
from megacocomix.config.yaml_text import dump_yaml, read_yaml
from megacocomix.errors import UserError, nearest


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a recipe, apply `section.key=value` overrides, resolve the null defaults. Raises one UserError with every
    problem."""
    file = read_yaml(Path(path))
    if not isinstance(file, dict):
        raise UserError(f"{path} is not a config: expected sections such as model and training.")
    parsed = [parse_override(override) for override in overrides]
    return build_config(_merge_layers(file, parsed), str(path), {override.name for override in parsed})


def build_config(values: dict, name: str = "config", overridden: Collection[str] = ()) -> Config:
    """Validate nested values and resolve the null defaults. Raises one UserError with every problem, which names the
    source of the option: `name`, or "override" if it is among `overridden`."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = [(".".join(map(str, problem["loc"])), problem) for problem in error.errors()]
        lines = [
            f"{'override' if _is_within(where, overridden) else name}: {_explain(problem)}"
            for where, problem in problems
        ]
        if any(where in RENAMED and where not in overridden for where, _ in problems):
            lines.append("tools/upgrade_config.py translates recipes, sweep plans, runs and checkpoints.")
        raise UserError(*lines) from None
    return _resolve_defaults(config)


def dump_config(config: Config) -> str:
    """The resolved config as YAML. `load_config` reads the same config back from it."""
    return dump_yaml(config.model_dump(mode="json"))


def _merge_layers(file: dict, overrides: list[Override]) -> dict:
    """All layers as one config. The preset that the file names is missing: `_resolve_defaults` fills it in later, where
    an option is still null."""
    preset = {}
    for section, key, value in overrides:
        if (section, key) == ("method", "name"):
            preset = PRESETS.get(str(value), {})
    values = copy.deepcopy(file)
    if isinstance(values.get("method"), dict):
        values["method"] |= preset
    for section, key, value in overrides:
        if not key:
            values[section] = value
        elif values.get(section) is None or isinstance(values[section], dict):  # null: a section without options
            values[section] = values.get(section) or {}
            values[section][key] = value
        else:
            raise UserError(f"override {section}.{key}: {section} is not a section.")
    model, method = values.get("model"), values.get("method")
    if isinstance(model, dict) and isinstance(method, dict):
        predict = method.get("predict") or PRESETS.get(str(method.get("name")), COCOMIX)["predict"]
        # A method without predictions takes the width of the control with as many activated parameters.
        width = model.pop("control_hidden_size", None) if predict == "nothing" else None
        if width is not None and not any((section, key) == ("model", "hidden_size") for section, key, _ in overrides):
            model["hidden_size"] = width
    return values


def _resolve_defaults(config: Config) -> Config:
    parallel, reference = config.parallel, config.method.match_reference
    defaults = {
        "parallel": {
            "sequence": parallel.tensor > 1,
            "reshard_after_forward": parallel.pipeline == 1 or parallel.zero < 3,
        },
        "model": {"dropout": 0.1 if reference else 0.0},
        "method": PRESETS[config.method.name] | {"mask_unlabelled": not reference},
        "optimizer": {"decay": "all" if reference else "matrices"},
    }
    return config.model_copy(
        update={section: getattr(config, section).with_defaults(values) for section, values in defaults.items()}
    )


def _is_within(where: str, names: Collection[str]) -> bool:
    """Whether an option, or an element of its list, is among `names` or in a section that is."""
    return any(f"{where}.".startswith(f"{name}.") for name in names)


def _explain(problem: dict) -> str:
    place = [str(part) for part in problem["loc"]]
    where = ".".join(place)
    if problem["type"] == "extra_forbidden":
        if new := RENAMED.get(where):
            return f"{where} is now {new}."
        known = Config.model_fields if len(place) == 1 else section_type(place[0]).model_fields
        return f"{where} is not an option.{nearest(place[-1], known)}"
    if problem["type"] == "missing":
        return f"{where} is missing."
    message = problem["msg"]
    return f"{where} = {problem['input']!r}: {message[0].lower()}{message[1:]}."

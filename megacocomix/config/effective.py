"""Which settings have an effect on a run, and which row of the paper the run is.

Both answers come from the resolved options, never from a name. Configs of earlier versions lack newer options: the
preset of their method.name has the values that those runs used.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from pydantic import ValidationError

from megacocomix.config.method import MethodConfig
from megacocomix.errors import UserError

# Sections that affect where and how often a run writes, not its computation.
BOOKKEEPING = ("run", "checkpoint", "logging")


def _has_module(method: MethodConfig) -> bool:
    return method.mix != "nothing" or method.learns_concepts or method.learns_hidden


LABELLED = attrgetter("learns_concepts")
USED_BY: dict[str, Callable[[MethodConfig], bool]] = {
    "method.concept_weight": lambda method: method.predict != "nothing",
    "method.placement": lambda method: method.mix != "nothing",
    "method.interleave_every": attrgetter("interleaves"),
    "method.insertion_layer": _has_module,
    "method.num_concepts": lambda method: method.predict == "concepts" and _has_module(method),
    "method.num_kept": lambda method: method.predict == "concepts" and method.mix == "predicted",
    "method.num_labels": LABELLED,
    "method.label_source": LABELLED,
    "method.label_sign": lambda method: method.learns_concepts and method.label_source == "attribution",
    "method.label_end_of_text": LABELLED,
    "method.mask_unlabelled": LABELLED,
    "method.hidden_loss": attrgetter("learns_hidden"),
    "method.target_size": lambda method: method.predict == "hidden",
    "method.match_reference": _has_module,
    "teacher.sae": LABELLED,
    "teacher.labels": LABELLED,
    "teacher.sae_precision": LABELLED,
    "teacher.sae_layer": lambda method: method.learns_concepts or method.learns_hidden,
    "teacher.location": lambda method: method.learns_concepts or method.learns_hidden,
}
"""Settings that only some methods use → whether a method uses it. Any other teacher.* setting needs a teacher."""


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested values as `section.key` → value."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_method(config: dict, where: str) -> MethodConfig:
    """The method section with its preset filled in. A missing section means next-token prediction. Raises UserError."""
    section = config.get("method") or {"name": "ntp"}
    given = {key: value for key, value in section.items() if value is not None and key in MethodConfig.model_fields}
    try:
        return MethodConfig(**given).resolved()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: method.{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def settings_in_effect(config: dict, method: MethodConfig) -> dict[str, Any]:
    """The config as `section.key` → value, without the settings that its method does not use."""
    flat = flatten(config)
    if "method" in config:
        flat |= {key: value for key, value in flatten({"method": method.model_dump()}).items() if value is not None}
    used = {key: value for key, value in flat.items() if key not in USED_BY or USED_BY[key](method)}
    return {key: value for key, value in used.items() if method.has_teacher or not key.startswith("teacher.")}


def row_of_the_paper(method: MethodConfig) -> str | None:
    """The paper's name for this method, None if the paper has no such row."""
    kd = "KD" if method.distills else ""
    if not _has_module(method):
        return kd or "NTP"
    if method.predict == "nothing" and method.interleaves and method.interleave_every == 1:
        return f"{kd or 'NTP'} + pause"
    if kd or (method.mix != "nothing" and method.placement == "interleave" and method.interleave_every != 1):
        return None
    if method.mix == "nothing":
        return "predict only" if method.learns_concepts else None
    if method.mix != "predicted":
        return None
    if method.predict == "hidden":
        return f"hidden, {method.hidden_loss}" if method.learns_hidden and method.interleaves else None
    if not method.learns_concepts:
        return "mix only" if method.interleaves else None
    if not method.interleaves:
        return "add" if method.label_source == "attribution" else None
    if method.label_source != "attribution":
        return f"{method.label_source} labels"
    return "CoCoMix" if method.label_sign == "positive" else f"{method.label_sign} attributions"

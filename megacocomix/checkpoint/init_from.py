"""training.init_from: a run starts from the weights of another model instead of random ones."""

import torch

from megacocomix.checkpoint.external.source import Hints, Source
from megacocomix.checkpoint.open import open_source
from megacocomix.config.method import ARCHITECTURE
from megacocomix.config.schema import Config
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import initial_value

SIZES = ("num_layers", "hidden_size", "num_heads", "context", "vocab_size")
ONLY_OF = {"num_concepts": "concepts", "num_kept": "concepts", "target_size": "hidden"}
"""Options that matter only for this value of method.predict."""


def open_init(config: Config) -> Source | None:
    """The source named by training.init_from, or None if it is null. Raises UserError unless it fits the student. A
    student with a concept module may start from a model without one."""
    if config.training.init_from is None:
        return None
    model, method = config.model, config.method
    hints = {"num_heads": model.num_heads, "vocab_size": model.vocab_size}
    if method.has_module:
        hints |= {"insertion_layer": method.insertion_layer, "num_kept": method.num_kept}
    try:
        source = open_source(config.training.init_from, Hints(**hints))
    except UserError as error:
        raise UserError(*(f"training.init_from: {problem}" for problem in error.problems)) from None
    where = f"training.init_from {config.training.init_from}"
    if source.method.has_module and not method.has_module:
        raise UserError(
            f"{where} has a concept module, but method.name {method.name} has none. Nearest valid: method.name=cocomix."
        )
    pairs = [("model", model, source.shape, SIZES)]
    if source.method.has_module:
        fields = [key for key in ARCHITECTURE if ONLY_OF.get(key, method.predict) == method.predict]
        pairs.append(("method", method, source.method, fields))
    problems = [
        f"{section}.{field} {getattr(wanted, field)} does not fit {where}, which has {getattr(found, field)}. "
        f"Nearest valid: {section}.{field}={getattr(found, field)}."
        for section, wanted, found, fields in pairs
        for field in fields
        if getattr(wanted, field) != getattr(found, field)
    ]
    if problems:
        raise UserError(*problems)
    return source


def first_value(name: str, shape: torch.Size, config: Config, init: Source | None) -> torch.Tensor:
    """A parameter's value before the first step: read from `init` if it has that parameter, else random."""
    if init is not None and (init.method.has_module or not name.startswith("concept.")):
        return init.read(name)
    return initial_value(name, shape, config.training.seed, config.model.num_layers)


def describe_init(config: Config, init: Source) -> str:
    """A log line about the weights that a new run starts from."""
    is_random = config.method.has_module and not init.method.has_module
    random = "; the concept module, which it lacks, starts random" if is_random else ""
    return f"weights start from {init.path} ({init.kind}){random}"

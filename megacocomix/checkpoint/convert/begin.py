"""training.init: the weights that a run begins with, in the place of random ones."""

import torch

from megacocomix.checkpoint.convert.recognise import open_source
from megacocomix.checkpoint.convert.sources import Hints, Source
from megacocomix.config import Config
from megacocomix.errors import UserError
from megacocomix.model.gpt2 import initial_value


def open_init(config: Config) -> Source | None:
    """The source that training.init names, where it does. Raises UserError unless it fits the student; a student with
    concepts may begin from a model without."""
    if config.training.init is None:
        return None
    model, method = config.model, config.method
    settings = {"insertion_layer": method.insertion_layer, "num_kept": method.num_kept} if method.has_module else {}
    try:
        source = open_source(
            config.training.init, Hints(**settings, num_heads=model.num_heads, vocab_size=model.vocab_size)
        )
    except UserError as error:
        raise UserError(*(f"training.init: {problem}" for problem in error.problems)) from None
    where = f"training.init {config.training.init}"
    if source.concepts and not method.has_module:
        raise UserError(
            f"{where} has a concept module, but method.name {method.name} has none. Nearest valid: method.name=cocomix."
        )
    pairs = [("model", model, source.shape, ("num_layers", "hidden_size", "num_heads", "context", "vocab_size"))]
    if source.concepts:
        parts = ["insertion_layer", "predict", "mix", "placement", "interleave_every"]
        parts += ["num_concepts", "num_kept"] if method.predict == "concepts" else []
        parts += ["target_size"] if method.predict == "hidden" else []
        pairs.append(("method", method, source.concepts, parts))
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
    """A parameter's value before the first step: from `init` where that has it, else drawn."""
    if init is not None and (init.concepts or not name.startswith("concept.")):
        return init.read(name)
    return initial_value(name, shape, config.training.seed, config.model.num_layers)


def say_init(config: Config, init: Source) -> str:
    """A line that says what a new run begins with."""
    drawn = "; the concept module, which it lacks, is drawn" if config.method.has_module and not init.concepts else ""
    return f"weights begin as {init.path} ({init.kind}){drawn}"

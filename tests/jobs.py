"""What the ranks of a test's job do: train, as launcher/pretrain.py would. For `processes.run_processes`."""

import torch

from megacocomix.config.schema import Config
from megacocomix.errors import UserError


def train_all(configs: list[Config], on_event=lambda event, trainer: None) -> list[tuple[int, list[str]]]:
    """Train one config after the other; exit code and problems of each."""
    from megacocomix.parallel.runtime import start_runtime, stop_runtime
    from megacocomix.training.determinism import set_determinism
    from megacocomix.training.trainer import train

    torch.set_num_threads(1)
    runtime, outcomes = start_runtime(), []
    for config in configs:
        try:
            set_determinism(config.training.deterministic)
            outcomes.append((train(config, runtime, on_event), []))
        except UserError as error:
            outcomes.append((2, error.problems))
    stop_runtime()
    return outcomes


def train(config: Config, on_event=lambda event, trainer: None) -> tuple[int, list[str]]:
    """Train one config."""
    return train_all([config], on_event)[0]

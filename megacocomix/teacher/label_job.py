"""Label all windows of a config's training data, in any number of processes, at once or one after the other."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megacocomix.config.schema import Config
from megacocomix.data.check import check_tokens
from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.hub import local_folder
from megacocomix.signals import StopSignal
from megacocomix.teacher.label_cache import LabelCache, claim_shard, shard_file, start_cache
from megacocomix.teacher.labels import ConceptLabeler, open_labeler
from megacocomix.teacher.targets import wanted_cache

# Tokens labelled between two checks for a stop signal.
GROUP_TOKENS = 4096


@dataclass
class LabelReport:
    """The work of a process, and the state of the cache afterwards."""

    num_labelled: int = 0
    """Windows that this process labelled."""
    num_held: int = 0
    """Windows that have labels in the cache."""
    num_windows: int = 0
    is_stopped: bool = False
    """Whether a signal ended the process early."""
    problems: tuple[str, ...] = ()
    """Error lines for the user. An error ends this process; other processes may go on."""


def label_all(config: Config, out: Path, device: torch.device, rank: int = 0, world: int = 1) -> LabelReport:
    """Add the missing shards to the cache `out`, except those that other processes are writing. A shard whose bytes do
    not match its SHA-256 is labelled again.

    Processes share only the folder; rank and world determine where each begins. On SIGTERM, SIGINT and SIGUSR1 the
    function ends after the current group of windows; the current shard is lost. A full disk, or unreadable data, ends
    only this process, and the report contains the error. Raises UserError for a config without concepts, for inputs
    that do not match, and for a folder of something else.
    """
    if not config.method.learns_concepts:
        raise UserError(f"method.name {config.method.name} has no concepts to label. Use method.name=cocomix.")
    tokenizer = load_tokenizer(config.data.tokenizer)
    shards = TokenShards.open(config.data.train, config.data.dtype, verify=rank == 0)
    check_tokens(f"data.train {config.data.train}", shards, config.model.vocab_size, (config.data.tokenizer, tokenizer))
    train = TokenDataset(shards, config.model.context, None)
    local_folder(config.teacher.model, download=True)  # of several processes one downloads, the others wait
    labeler = open_labeler(config, device, tokenizer.eot_id)
    report = LabelReport(num_windows=train.num_windows)
    manifest = start_cache(out, wanted_cache(config, labeler, train))
    if rank == 0:
        print(
            f"{manifest.num_windows:,} windows of {manifest.context} tokens in {manifest.num_shards:,} shards, "
            f"{manifest.num_windows * manifest.window_bytes / 2**20:,.1f} MiB; labelling costs "
            f"{manifest.flops_per_token / 1e6:.1f} MFLOP a token",
            flush=True,
        )
    # Each process begins with its own shards. Then it helps with the others until it finds nothing to do.
    shards = sorted(range(manifest.num_shards), key=lambda shard: (shard - rank) % world)
    stop = StopSignal()
    bar = tqdm(total=manifest.num_windows, unit="window", desc="labelling", disable=rank > 0 or not sys.stderr.isatty())

    def label_shard(shard: int) -> None:
        # A process verifies the hashes of its own shards.
        with claim_shard(out, shard, verify=shard % world == rank) as write:
            if write and shard_file(out, shard).is_file():
                print(f"warning: {shard_file(out, shard)} is damaged; it is labelled again", file=sys.stderr)
            labels = _label(labeler, train, manifest.windows(shard), stop, bar) if write else None
            if labels is not None:
                write(labels)
                report.num_labelled += len(labels)

    is_left = True
    try:
        with stop, bar:
            while is_left and not stop:
                before = report.num_labelled
                for shard in shards:
                    if not stop:
                        label_shard(shard)
                is_left = report.num_labelled > before and not all(shard_file(out, shard).is_file() for shard in shards)
        report.is_stopped = bool(stop)
    except OSError as error:
        report.problems = (
            f"{out} cannot be written ({error.strerror or error}): the complete shards stay valid; "
            "fix it and start the same command again.",
        )
    except UserError as error:
        report.problems = error.problems
    report.num_held = LabelCache(out).num_held
    return report


def _label(
    labeler: ConceptLabeler, train: TokenDataset, windows: range, stop: StopSignal, bar: tqdm
) -> np.ndarray | None:
    """Labels of these windows, int64 [windows, T, K_attr]; None if a signal arrived meanwhile."""
    labels, group = [], max(1, GROUP_TOKENS // train.context)
    for start in range(windows.start, windows.stop, group):
        tokens = train.batch(range(start, min(start + group, windows.stop)))
        check_token_ids(tokens, labeler.teacher.vocab_size, "data.train")
        labels.append(labeler(torch.from_numpy(tokens).to(labeler.sae.decoder.device)).cpu())
        bar.update(len(tokens))
        if stop:
            return None
    return torch.cat(labels).numpy()

"""Label all windows of a config's training data, in as many processes as there are, at once or one after the other."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megacocomix.config.schema import Config
from megacocomix.data.tokenizer import load_tokenizer, tokenizer_mismatches
from megacocomix.data.tokens import TokenDataset, TokenShards, check_token_ids
from megacocomix.errors import UserError
from megacocomix.hub import local_folder
from megacocomix.signals import StopSignal
from megacocomix.teacher.label_cache import CacheManifest, LabelCache, claim_shard, shard_file, start_cache
from megacocomix.teacher.labels import ConceptLabeler, open_labeler
from megacocomix.teacher.targets import wanted_cache

# Between two looks at whether to stop.
GROUP_TOKENS = 4096


@dataclass
class LabelReport:
    """What a process did, and how the cache stands afterwards."""

    num_labelled: int = 0
    """Windows that this process labelled."""
    num_held: int = 0
    num_windows: int = 0
    is_stopped: bool = False
    """Whether a signal ended it early."""
    problems: tuple[str, ...] = ()
    """What ended this process on the way, and perhaps no other: lines for the user."""


def label_all(config: Config, out: Path, device: torch.device, rank: int = 0, world: int = 1) -> LabelReport:
    """Fill the cache `out` with the shards that it lacks; those that other processes are at are left to them. A shard
    whose bytes do not give its SHA-256 is labelled again.

    Processes share nothing but the folder: rank and world only say where each begins. On SIGTERM, SIGINT and SIGUSR1 it
    ends after the windows at hand; the shard that was begun is lost. A full disk, or data that cannot be read, ends
    this process alone: the report says so. Raises UserError for a config without concepts, inputs that do not fit, and
    a folder of something else.
    """
    if not config.method.learns_concepts:
        raise UserError(f"method.name {config.method.name} has no concepts to label. Use method.name=cocomix.")
    tokenizer = load_tokenizer(config.data.tokenizer)
    train = TokenDataset(TokenShards.open(config.data.train, verify=rank == 0), config.model.context, None)
    holders = (
        (f"data.tokenizer {config.data.tokenizer}", tokenizer.sha256),
        (
            f"data.train {config.data.train}",
            train.shards.tokenizer_sha256,
        ),
    )
    if problems := tokenizer_mismatches(*holders):
        raise UserError(*problems)
    local_folder(config.teacher.model, download=True)  # processes that ask at once wait for the first one's download
    labeler = open_labeler(config, device, tokenizer.eot_id)
    report = LabelReport(num_windows=train.num_windows)
    manifest = start_cache(out, wanted_cache(config, labeler, train))
    if rank == 0:
        print(
            f"{manifest.num_windows:,} windows of {manifest.context} tokens in {manifest.num_shards:,} shards, "
            f"{manifest.num_windows * manifest.window_bytes / 2**20:,.1f} MiB; labelling one costs "
            f"{manifest.flops_per_token / 1e6:.1f} MFLOP a token",
            flush=True,
        )
    with tqdm(
        total=manifest.num_windows, unit="window", desc="labelling", disable=rank > 0 or not sys.stderr.isatty()
    ) as bar:
        # Each begins with the shards that are its own, then helps with what is left, until nothing is to be had.
        shards = sorted(range(manifest.num_shards), key=lambda shard: (shard - rank) % world)
        try:
            with StopSignal() as stop:
                while _pass_over(shards, out, manifest, labeler, train, report, bar, stop, rank, world):
                    pass
            report.is_stopped = bool(stop)
        except OSError as error:
            report.problems = (
                f"{out} cannot be written ({error.strerror or error}): the shards that are complete stay valid; "
                "mend it and start the same command again.",
            )
        except UserError as error:
            report.problems = error.problems
    report.num_held = LabelCache(out).num_held
    return report


def _pass_over(
    shards: list[int],
    out: Path,
    manifest: CacheManifest,
    labeler: ConceptLabeler,
    train: TokenDataset,
    report: LabelReport,
    bar: tqdm,
    stop: StopSignal,
    rank: int,
    world: int,
) -> bool:
    """Label every shard that is missing and not another's. Returns whether to look again: there was one, one is missing
    still, and no signal came."""
    before = report.num_labelled
    for shard in shards:
        # Its own it also compares with their hashes.
        with claim_shard(out, shard, verify=shard % world == rank) as write:
            if write and shard_file(out, shard).is_file():
                print(f"warning: {shard_file(out, shard)} is damaged; it is labelled again", file=sys.stderr)
            labels = _label(labeler, train, manifest.windows(shard), stop, bar) if write else None
            if labels is not None:
                write(labels)
                report.num_labelled += len(labels)
        if stop:
            return False
    return report.num_labelled > before and not all(shard_file(out, shard).is_file() for shard in shards)


def _label(
    labeler: ConceptLabeler, train: TokenDataset, windows: range, stop: StopSignal, bar: tqdm
) -> np.ndarray | None:
    """Labels of these windows, int64 [windows, T, K_attr]; None where a signal came in between."""
    labels, group = [], max(1, GROUP_TOKENS // train.context)
    for start in range(windows.start, windows.stop, group):
        tokens = train.batch(range(start, min(start + group, windows.stop)))
        check_token_ids(tokens, labeler.teacher.vocab_size, "data.train")
        labels.append(labeler(torch.from_numpy(tokens).to(labeler.sae.decoder.device)).cpu())
        bar.update(len(tokens))
        if stop:
            return None
    return torch.cat(labels).numpy()

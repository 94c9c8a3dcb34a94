"""Megatron-LM's legacy GPT-2 checkpoints, tensor parallel or not → a source.

A folder (`iter_0001000` or `release`, or their parent, whose `latest_checkpointed_iteration.txt` says which) holds
`mp_rank_00/model_optim_rng.pt` and one more such file a tensor rank. Names are nested: language_model → embedding →
word_embeddings, position_embeddings; language_model → encoder (once transformer) → layers.N.….

Ranks shard output rows of qkv, dense_h_to_4h and the token embedding, and input columns of the two projections back.
Each rank's qkv rows lie [3, heads, size] in checkpoint version 0, [heads, size, 3] in 1, [heads, 3, size], which is
our own layout, from 2 on.
"""

import re
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.checkpoint.external.source import (
    NEXT_TOKEN,
    Hints,
    Source,
    check_tensors,
    neutral_config,
    parameter_shapes,
)
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.pickles import load_pickle

TOKENS = "embedding.word_embeddings.weight"
OUTER = {
    "embed.tokens.weight": TOKENS,
    "embed.positions.weight": "embedding.position_embeddings.weight",
    "norm.weight": "encoder.final_layernorm.weight",
    "norm.bias": "encoder.final_layernorm.bias",
}
INNER = {
    "norm_1": ("input_layernorm", "ln_1"),
    "attention.qkv": ("self_attention.query_key_value", "attn.c_attn"),
    "attention.out": ("self_attention.dense", "attn.c_proj"),
    "norm_2": ("post_attention_layernorm", "ln_2"),
    "mlp.up": ("mlp.dense_h_to_4h", "mlp.c_fc"),
    "mlp.down": ("mlp.dense_4h_to_h", "mlp.c_proj"),
}
SHARDED_BY_ROWS = (
    "query_key_value.weight",
    "query_key_value.bias",
    "dense_h_to_4h.weight",
    "dense_h_to_4h.bias",
    TOKENS,
)
SHARDED_BY_COLUMNS = ("self_attention.dense.weight", "dense_4h_to_h.weight")
# What our model computes. Where a checkpoint's args say otherwise, its weights are of another model.
EXPECTED = {
    "layernorm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "untie_embeddings_and_output_weights": False,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "apply_layernorm_1p": False,
    "swiglu": False,
    "squared_relu": False,
    "add_bias_linear": True,
    "num_experts": None,
}


def find_ranks(path: Path) -> list[Path]:
    """The files of all tensor ranks, in order; none where this is no Megatron checkpoint. Raises UserError where ranks
    are missing or it was cut into pipeline stages."""
    pattern = "mp_rank_*/model_optim_rng.pt"
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        iteration = tracker.read_text(errors="replace").strip()
        if iteration != "release" and not iteration.isdecimal():
            raise UserError(f"{tracker} says {iteration[:40]!r}, not an iteration.")
        path = path / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
        if not path.is_dir():
            raise UserError(f"{path} does not exist, but {tracker.name} names it.")
    files = sorted(path.glob(pattern))
    if not files and tracker.is_file():
        raise UserError(f"{path} holds no {pattern}: only Megatron-LM's legacy layout is read.")
    for rank, file in enumerate(files):
        if re.fullmatch(r"mp_rank_\d\d_\d+.*", file.parent.name):
            raise UserError(f"{file.parent} is a pipeline stage: merge the stages with Megatron-LM's own tool first.")
        if file.parent.name != f"mp_rank_{rank:02d}":
            raise UserError(f"{path} has {file.parent.name}, but no mp_rank_{rank:02d}.")
    return files


def open_megatron(path: Path, hints: Hints) -> Source:
    """Read all ranks' tensors (they stay on disk) and check them. Raises UserError."""
    files = find_ranks(path)
    store = _Ranks(files)
    shape = _shape(store, hints, path)
    shapes = parameter_shapes(neutral_config(shape, NEXT_TOKEN))
    expected = {_megatron_name(name)[0]: tuple(size) for name, size in shapes.items()}
    if store.shapes.get(TOKENS, (0,))[0] > shape.vocab_size:  # padded so that it divides among the ranks
        expected[TOKENS] = (store.shapes[TOKENS][0], shape.hidden_size)
    check_tensors(store, expected, path)
    kind = f"Megatron-LM checkpoint, version {store.version:g}, tensor parallel {len(files)}"

    def read(name: str) -> Tensor:
        """Megatron's → ours."""
        whole = store.read(_megatron_name(name)[0]).float()
        if ".attention.qkv." in name and store.version < 2:
            ranks = whole.chunk(len(files))
            whole = torch.cat([_by_head(rank, store.version, shape.num_heads // len(files)) for rank in ranks])
        return whole[: shape.vocab_size] if name == "embed.tokens.weight" else whole

    return Source(kind, path, shape, NEXT_TOKEN, files, read, _HuggingFaceView(store, shape).read)


def _by_head(rows: Tensor, version: float, num_heads: int) -> Tensor:
    """qkv rows of one rank in version 0 or 1 → [heads, 3, size]."""
    if version < 1:
        return rows.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return rows.unflatten(0, (num_heads, -1, 3)).transpose(1, 2).flatten(0, 2)


def _megatron_name(name: str) -> tuple[str, str]:
    """Our name → Megatron's, and Hugging Face's of what lies in a layer."""
    if name in OUTER:
        return OUTER[name], ""
    _, index, inner = name.split(".", 2)
    module, kind = inner.rsplit(".", 1)
    theirs, hugging = INNER[module]
    return f"encoder.layers.{index}.{theirs}.{kind}", f"{hugging}.{kind}"


class _Ranks:
    """The tensors of all ranks, merged when they are read."""

    def __init__(self, files: list[Path]):
        self.files = files
        contents = [load_pickle(file) for file in files]
        self.arguments = contents[0].get("args")
        version = contents[0].get("checkpoint_version", 0)
        if not isinstance(version, int | float) or not 0 <= version <= 3:
            raise UserError(f"{files[0]} is of checkpoint_version {version!r}; 0 to 3 can be read.")
        self.version = float(version)
        self._shards = [_flat(content, file) for content, file in zip(contents, files, strict=True)]
        self.shapes = {}
        for name, shard in self._shards[0].items():
            for rank, others in enumerate(self._shards):
                if name not in others or others[name].shape != shard.shape:
                    found = list(others[name].shape) if name in others else "missing"
                    raise UserError(
                        f"{files[rank]}: {name} is {found}, but {list(shard.shape)} in {files[0].parent.name}."
                    )
            size, dim = list(shard.shape), _sharded_dim(name)
            if dim is not None and len(size) > dim:
                size[dim] *= len(files)
            self.shapes[name] = tuple(size)
        for file, others in zip(files, self._shards, strict=True):
            if extra := sorted(others.keys() - self._shards[0].keys()):
                raise UserError(f"{file} holds {extra[0]}, which {files[0]} does not.")

    def file_of(self, name: str) -> Path:
        """The first rank's file: all hold a shard of every tensor."""
        return self.files[0]

    def read(self, name: str) -> Tensor:
        """A whole tensor, from all ranks' shards."""
        dim = _sharded_dim(name)
        return self._shards[0][name] if dim is None else torch.cat([shards[name] for shards in self._shards], dim)


def _sharded_dim(name: str) -> int | None:
    return 0 if name.endswith(SHARDED_BY_ROWS) else 1 if name.endswith(SHARDED_BY_COLUMNS) else None


def _flat(content: dict, file: Path) -> dict[str, Tensor]:
    """Nested dictionaries → one, under the newest of the names that Megatron used over the years."""
    try:
        model = content["model"]["language_model"]
        parts = {"embedding": model["embedding"], "encoder": model.get("encoder") or model["transformer"]}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} holds no language_model with embedding and encoder.") from None
    flat, stack = {}, [("", parts)]
    while stack:
        prefix, values = stack.pop()
        for key, value in values.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", value))
            elif isinstance(value, Tensor):
                flat[f"{prefix}{key}".replace(".attention.", ".self_attention.")] = value
    return flat


def _shape(store: _Ranks, hints: Hints, path: Path) -> ModelConfig:
    arguments = vars(store.arguments) if isinstance(store.arguments, Namespace) else {}
    for key, expected in EXPECTED.items():
        if arguments.get(key, expected) != expected:
            raise UserError(f"{path}: {key} is {arguments[key]!r} in its args; only {expected!r} can be read.")
    if arguments.get("bias_gelu_fusion") is False and not arguments.get("openai_gelu"):
        raise UserError(
            f"{path}: its args use the exact GELU (bias_gelu_fusion and openai_gelu are off); GPT-2 and this package "
            "use the tanh approximation."
        )
    for name in (TOKENS, OUTER["embed.positions.weight"]):
        if len(store.shapes.get(name, ())) != 2:
            raise UserError(f"{store.files[0]} lacks {name}.")
    num_heads = hints.num_heads or arguments.get("num_attention_heads")
    if not isinstance(num_heads, int):
        raise UserError(f"{path} does not say its number of attention heads: give --num-heads.")
    rows, width = store.shapes[TOKENS]
    vocab_size = hints.vocab_size or arguments.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UserError(f"{path} does not say its true vocabulary, which is padded to {rows} rows: give --vocab-size.")
    if vocab_size > rows:
        raise UserError(f"{path}: {TOKENS} has {rows} rows, fewer than the vocabulary of {vocab_size}.")
    if num_heads < 1 or width % num_heads or num_heads % len(store.files):
        raise UserError(
            f"{path}: {num_heads} attention heads do not divide width {width}, or not among {len(store.files)} ranks."
        )
    layers = {int(match[1]) for name in store.shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return ModelConfig(
        num_layers=max(layers, default=0) + 1,
        hidden_size=width,
        num_heads=num_heads,
        context=store.shapes[OUTER["embed.positions.weight"]][0],
        vocab_size=vocab_size,
        dropout=0.0,
    )


class _HuggingFaceView:
    """The same weights under Hugging Face's names, by index arithmetic on the merged rows and not through our layout:
    what the conversion is checked against, as nothing here can run Megatron-LM."""

    def __init__(self, store: _Ranks, shape: ModelConfig):
        self.store, self.shape = store, shape
        self.names = {
            "transformer.wte.weight": TOKENS,
            "transformer.wpe.weight": OUTER["embed.positions.weight"],
            "transformer.ln_f.weight": OUTER["norm.weight"],
            "transformer.ln_f.bias": OUTER["norm.bias"],
        }

    def read(self, name: str) -> Tensor:
        if name in self.names:
            return self.store.read(self.names[name]).float()[: self.shape.vocab_size if "wte" in name else None]
        _, _, index, inner = name.split(".", 3)
        module, kind = inner.rsplit(".", 1)
        megatron = next(theirs for theirs, hugging in INNER.values() if hugging == module)
        tensor = self.store.read(f"encoder.layers.{index}.{megatron}.{kind}").float()
        if module == "attn.c_attn":
            tensor = tensor[self._rows()]
        return tensor.T if tensor.dim() == 2 else tensor

    def _rows(self) -> Tensor:
        """For each of Hugging Face's qkv columns (part, head, element) the merged row where Megatron has it."""
        size = self.shape.hidden_size // self.shape.num_heads
        local = self.shape.num_heads // len(self.store.files)
        part, head, element = torch.meshgrid(
            torch.arange(3), torch.arange(self.shape.num_heads), torch.arange(size), indexing="ij"
        )
        rank, head = head // local, head % local
        if self.store.version < 1:
            within = (part * local + head) * size + element
        elif self.store.version < 2:
            within = (head * size + element) * 3 + part
        else:
            within = (head * 3 + part) * size + element
        return (rank * (3 * local * size) + within).flatten()

"""Opens Megatron-LM's legacy GPT-2 checkpoints, tensor parallel or not.

The folder is `iter_0001000` or `release`, or its parent, whose `latest_checkpointed_iteration.txt` names it. It holds
one file a tensor rank: `mp_rank_00/model_optim_rng.pt` and so on. Names are nested: language_model → embedding →
word_embeddings, position_embeddings; language_model → encoder (once transformer) → layers.N.….

Ranks shard the output rows of qkv, dense_h_to_4h and the token embedding, and the input columns of the two projections
back to the residual stream. Each rank's qkv rows are ordered [3, heads, size] in checkpoint version 0 and
[heads, size, 3] in version 1. From version 2 on they are [heads, 3, size], which is our own layout.
"""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megacocomix.checkpoint.external.source import NEXT_TOKEN, Hints, Source, check_tensors, parameter_shapes
from megacocomix.checkpoint.hf_names import INNER as HF_INNER
from megacocomix.checkpoint.hf_names import hf_name
from megacocomix.checkpoint.tensors import TYPE_NAMES
from megacocomix.config.schema import ModelConfig
from megacocomix.errors import UserError
from megacocomix.pickles import load_pickle

TOKENS = "embedding.word_embeddings.weight"
# A second copy of the tied embedding, which the last pipeline stage had.
HEAD = "word_embeddings_for_head.weight"
OUTER = {
    "embed.tokens.weight": TOKENS,
    "embed.positions.weight": "embedding.position_embeddings.weight",
    "norm.weight": "encoder.final_layernorm.weight",
    "norm.bias": "encoder.final_layernorm.bias",
}
INNER = {
    "norm_1": "input_layernorm",
    "attention.qkv": "self_attention.query_key_value",
    "attention.out": "self_attention.dense",
    "norm_2": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
SHARDED_BY_ROWS = (
    "query_key_value.weight",
    "query_key_value.bias",
    "dense_h_to_4h.weight",
    "dense_h_to_4h.bias",
    TOKENS,
    HEAD,
)
SHARDED_BY_COLUMNS = ("self_attention.dense.weight", "dense_4h_to_h.weight")
# The settings that our model computes, of all versions. A checkpoint whose args differ belongs to another model.
EXPECTED = {
    "pipeline_model_parallel_size": 1,
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "group_query_attention": False,
    "multi_latent_attention": False,
    "qk_layernorm": False,
    "window_size": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "retro_add_retriever": False,
    "mtp_num_layers": None,
    "layernorm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
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

SIZES = ("num_layers", "hidden_size", "max_position_embeddings", "ffn_hidden_size")


def find_ranks(path: Path) -> list[Path]:
    """The files of all tensor ranks, in order; empty if this is no Megatron checkpoint. Raises UserError if ranks are
    missing or the checkpoint has pipeline stages."""
    pattern = "mp_rank_*/model_optim_rng.pt"
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        iteration = tracker.read_text(errors="replace").strip()
        if iteration != "release" and not iteration.isdecimal():
            raise UserError(f"{tracker} holds {iteration[:40]!r}, not an iteration.")
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
    expected = {_megatron_name(name): size for name, size in parameter_shapes(shape, NEXT_TOKEN, path).items()}
    if store.shapes.get(TOKENS, (0,))[0] > shape.vocab_size:  # padded so that it divides among the ranks
        expected[TOKENS] = (store.shapes[TOKENS][0], shape.hidden_size)
    check_tensors(store, expected, path, re.compile(re.escape(HEAD)))
    if HEAD in store.shapes and not torch.equal(store.read(HEAD), store.read(TOKENS)):
        raise UserError(f"{store.files[0]}: {HEAD} is not {TOKENS}; only a tied head is read.")
    kind = f"Megatron-LM checkpoint, version {store.version:g}, tensor parallel {len(files)}"

    def read(name: str) -> Tensor:
        whole = store.read(_megatron_name(name)).float()
        if ".attention.qkv." in name and store.version < 2:
            ranks = whole.chunk(len(files))
            whole = torch.cat([_by_head(rank, store.version, shape.num_heads // len(files)) for rank in ranks])
        return whole[: shape.vocab_size] if name == "embed.tokens.weight" else whole

    return Source(kind, path, shape, NEXT_TOKEN, files, read, _hf_reader(store, shape))


def _by_head(rows: Tensor, version: float, num_heads: int) -> Tensor:
    """qkv rows of one rank in version 0 or 1 → [heads, 3, size]."""
    if version < 1:
        return rows.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
    return rows.unflatten(0, (num_heads, -1, 3)).transpose(1, 2).flatten(0, 2)


def _megatron_name(name: str) -> str:
    """Our name → Megatron's."""
    if name in OUTER:
        return OUTER[name]
    _, index, inner = name.split(".", 2)
    module, kind = inner.rsplit(".", 1)
    return f"encoder.layers.{index}.{INNER[module]}.{kind}"


class _Ranks:
    """The tensors of all ranks. Each is unsharded when it is read."""

    def __init__(self, files: list[Path]):
        self.files = files
        contents = [load_pickle(file) for file in files]
        self.arguments = contents[0].get("args")
        version = contents[0].get("checkpoint_version", 0)
        if not isinstance(version, int | float) or not 0 <= version <= 3:
            raise UserError(f"{files[0]} is of checkpoint_version {version!r}; 0 to 3 can be read.")
        self.version = float(version)
        iterations = [content.get("iteration") for content in contents]
        for file, iteration in zip(files, iterations, strict=True):
            if iteration != iterations[0]:
                raise UserError(f"{file} is of iteration {iteration}, but {files[0]} of {iterations[0]}.")
        for file, content in zip(files, contents, strict=True):
            if _settings(content) != _settings(contents[0]):
                raise UserError(f"{file} has another checkpoint_version, or other sizes in its args, than {files[0]}.")
        self._shards = [_flat(content, file) for content, file in zip(contents, files, strict=True)]
        self.shapes, self.dtypes = {}, {}
        for name, shard in self._shards[0].items():
            for rank, others in enumerate(self._shards):
                if name not in others or others[name].shape != shard.shape:
                    found = list(others[name].shape) if name in others else "missing"
                    raise UserError(
                        f"{files[rank]}: {name} is {found}, but {list(shard.shape)} in {files[0].parent.name}."
                    )
            size, dim = list(shard.shape), _sharded_dim(name)
            if dim is None and not all(torch.allclose(each[name], shard, 1e-2, 1e-3) for each in self._shards):
                raise UserError(
                    f"{files[0].parent.parent}: {name} differs between its ranks: they are of several runs."
                )
            if dim is not None and len(size) > dim:
                size[dim] *= len(files)
            self.shapes[name] = tuple(size)
            self.dtypes[name] = TYPE_NAMES.get(shard.dtype, str(shard.dtype))
        for file, others in zip(files, self._shards, strict=True):
            if extra := sorted(others.keys() - self._shards[0].keys()):
                raise UserError(f"{file} holds {extra[0]}, which {files[0]} does not.")

    def file_of(self, name: str) -> Path:
        """The first rank's file. Every rank's file holds a shard of every tensor."""
        return self.files[0]

    def read(self, name: str) -> Tensor:
        """A whole tensor, from all ranks' shards."""
        dim = _sharded_dim(name)
        return self._shards[0][name] if dim is None else torch.cat([shards[name] for shards in self._shards], dim)


def _settings(content: dict) -> dict:
    """What must be the same in all ranks."""
    arguments = vars(content["args"]) if isinstance(content.get("args"), Namespace) else {}
    keys = (*EXPECTED, *SIZES, "num_attention_heads", "vocab_size")
    return {key: arguments.get(key) for key in keys} | {"checkpoint_version": content.get("checkpoint_version")}


def _sharded_dim(name: str) -> int | None:
    return 0 if name.endswith(SHARDED_BY_ROWS) else 1 if name.endswith(SHARDED_BY_COLUMNS) else None


def _flat(content: dict, file: Path) -> dict[str, Tensor]:
    """Flatten nested dictionaries. Names that Megatron changed over the years become the newest ones."""
    try:
        model = dict(content["model"])
        model |= model.pop("language_model")
        if "transformer" in model:
            model["encoder"] = model.pop("transformer")
        if not {"embedding", "encoder"} <= model.keys():
            raise KeyError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file} holds no language_model with embedding and encoder.") from None
    flat, stack = {}, [("", model)]
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
    ranks = arguments.get("tensor_model_parallel_size", len(store.files))
    if ranks != len(store.files):
        raise UserError(f"{path} has {len(store.files)} tensor ranks, but its args say {ranks}: copy the others too.")
    if arguments.get("bias_gelu_fusion") is False and not arguments.get("openai_gelu"):
        raise UserError(
            f"{path}: its args use the exact GELU (bias_gelu_fusion and openai_gelu are off); GPT-2 and this package "
            "use the tanh approximation."
        )
    for name in (TOKENS, OUTER["embed.positions.weight"]):
        if len(store.shapes.get(name, ())) != 2:
            raise UserError(f"{store.files[0]} lacks {name}.")
    num_heads = arguments.get("num_attention_heads") or hints.num_heads
    if not isinstance(num_heads, int):
        raise UserError(f"{path} does not record its number of attention heads: give --num-heads.")
    rows, width = store.shapes[TOKENS]
    vocab_size = arguments.get("vocab_size") or hints.vocab_size
    if not isinstance(vocab_size, int):
        raise UserError(
            f"{path} does not record its vocabulary without padding ({rows} rows with it): give --vocab-size."
        )
    if vocab_size > rows:
        raise UserError(f"{path}: {TOKENS} has {rows} rows, fewer than the vocabulary of {vocab_size}.")
    if num_heads < 1 or width % num_heads or num_heads % len(store.files):
        raise UserError(
            f"{path}: {num_heads} attention heads do not divide width {width}, or not among {len(store.files)} ranks."
        )
    layers = {int(match[1]) for name in store.shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    num_layers, context = max(layers, default=0) + 1, store.shapes[OUTER["embed.positions.weight"]][0]
    sizes = zip(SIZES, (num_layers, width, context, 4 * width), strict=True)
    for key, size in sizes:
        if arguments.get(key, size) not in (size, None):
            raise UserError(f"{path}: {key} is {arguments[key]} in its args, but {size} by its tensors.")
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=width,
        num_heads=num_heads,
        context=context,
        vocab_size=vocab_size,
        dropout=0.0,
    )


def _hf_reader(store: _Ranks, shape: ModelConfig) -> Callable[[str], Tensor]:
    """Reads the same weights by Hugging Face's names. It indexes the unsharded rows and never uses our layout, so that
    the conversion can be checked against it: Megatron-LM itself cannot run here."""
    outer = {hf_name(ours): theirs for ours, theirs in OUTER.items()}
    inner = {hf: INNER[ours] for ours, hf in HF_INNER.items()}

    def read(name: str) -> Tensor:
        if name in outer:
            return store.read(outer[name]).float()[: shape.vocab_size if "wte" in name else None]
        _, _, index, module_kind = name.split(".", 3)
        module, kind = module_kind.rsplit(".", 1)
        tensor = store.read(f"encoder.layers.{index}.{inner[module]}.{kind}").float()
        if module == "attn.c_attn":
            tensor = tensor[_qkv_rows(store, shape)]
        return tensor.T if tensor.dim() == 2 else tensor

    return read


def _qkv_rows(store: _Ranks, shape: ModelConfig) -> Tensor:
    """For each of Hugging Face's qkv columns (part, head, element), the row of Megatron's unsharded tensor."""
    size, local = shape.hidden_size // shape.num_heads, shape.num_heads // len(store.files)
    part, head, element = torch.meshgrid(
        torch.arange(3), torch.arange(shape.num_heads), torch.arange(size), indexing="ij"
    )
    rank, head = head // local, head % local
    if store.version < 1:
        within = (part * local + head) * size + element
    elif store.version < 2:
        within = (head * size + element) * 3 + part
    else:
        within = (head * 3 + part) * size + element
    return (rank * (3 * local * size) + within).flatten()

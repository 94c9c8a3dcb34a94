"""Makes folders as other programs write them, from a random model or from the golden student."""

import json
from argparse import Namespace

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import tiny


def published_folder(folder, golden, config_yaml=True):
    """The golden student as the published code's save_pretrained writes it. Returns (inputs, logits)."""
    with safe_open(golden, "pt") as file:
        case = json.loads(file.metadata()["case"])
    tensors = load_file(golden)
    prefix = "student."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    positions = weights["transformer.wpe.weight"].shape[0]
    config = GPT2Config(
        n_layer=case["s_layer"],
        n_embd=case["s_embd"],
        n_head=case["s_head"],
        n_positions=positions,
        vocab_size=case["vocab"],
        architectures=["GPT2CoCoMixLMHeadModel"],
    )
    config.save_pretrained(folder)
    if config_yaml:
        lines = f"mode: cocomix\nconcept_dim: {case['latents']}\nconcept_num: {case['k']}\n"
        (folder / "config.yaml").write_text(f"{lines}insert_layer_index: {case['insert']}\nlr: 6e-4\n")
    return tensors["input_ids"][0], tensors["logits"]


def huggingface_model(seed=0):
    """A GPT2LMHeadModel of the tiny sizes. All parameters are random, biases and norms too."""
    torch.manual_seed(seed)
    shape = tiny.SHAPE
    config = GPT2Config(
        n_layer=shape["num_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_heads"],
        n_positions=shape["context"],
        vocab_size=shape["vocab_size"],
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def megatron_folder(folder, model, version, tensor, padded=128, arguments=None, transformer="encoder"):
    """Write a Hugging Face model in Megatron-LM's legacy layout, for `tensor` ranks. The row orders are implemented a
    second time here."""
    state, config = model.transformer.state_dict(), model.config
    heads, size = config.n_head, config.n_embd // config.n_head
    tokens = torch.cat((state["wte.weight"], torch.randn(padded - config.vocab_size, config.n_embd)))
    for rank in range(tensor):
        mine = range(rank * heads // tensor, (rank + 1) * heads // tensor)

        def rows(whole, mine=mine):
            """Output rows of the fused projection, [3·D, …] part by part, in the order of `version`."""
            part = whole.view(3, heads, size, *whole.shape[1:])
            if version < 1:
                order = [part[p, h, e] for p in range(3) for h in mine for e in range(size)]
            elif version < 2:
                order = [part[p, h, e] for h in mine for e in range(size) for p in range(3)]
            else:
                order = [part[p, h, e] for h in mine for p in range(3) for e in range(size)]
            return torch.stack(order)

        attention = "self_attention" if transformer == "encoder" else "attention"
        layers = {}
        for index in range(config.n_layer):
            get = lambda name, index=index: state[f"h.{index}.{name}"]
            layers |= {
                f"layers.{index}.{name}": value.clone()
                for name, value in {
                    "input_layernorm.weight": get("ln_1.weight"),
                    "input_layernorm.bias": get("ln_1.bias"),
                    f"{attention}.query_key_value.weight": rows(get("attn.c_attn.weight").T),
                    f"{attention}.query_key_value.bias": rows(get("attn.c_attn.bias")),
                    f"{attention}.dense.weight": get("attn.c_proj.weight").T.chunk(tensor, 1)[rank],
                    f"{attention}.dense.bias": get("attn.c_proj.bias"),
                    "post_attention_layernorm.weight": get("ln_2.weight"),
                    "post_attention_layernorm.bias": get("ln_2.bias"),
                    "mlp.dense_h_to_4h.weight": get("mlp.c_fc.weight").T.chunk(tensor, 0)[rank],
                    "mlp.dense_h_to_4h.bias": get("mlp.c_fc.bias").chunk(tensor)[rank],
                    "mlp.dense_4h_to_h.weight": get("mlp.c_proj.weight").T.chunk(tensor, 1)[rank],
                    "mlp.dense_4h_to_h.bias": get("mlp.c_proj.bias"),
                }.items()
            }
        layers |= {"final_layernorm.weight": state["ln_f.weight"], "final_layernorm.bias": state["ln_f.bias"]}
        embedding = {
            "word_embeddings": {"weight": tokens.chunk(tensor)[rank].clone()},
            "position_embeddings": {"weight": state["wpe.weight"].clone()},
        }
        content = {
            "iteration": 10,
            "model": {"language_model": {"embedding": embedding, transformer: layers}},
            "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
        }
        if version:
            content["checkpoint_version"] = version
        if arguments is not None:
            content["args"] = Namespace(**arguments)
        file = folder / f"iter_0000010/mp_rank_{rank:02d}/model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save(content, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")

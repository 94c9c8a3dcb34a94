"""A plain implementation of the published labelling recipe: dense tensors, gradients of all weights, fp32.

Only for comparison; nothing else uses it. Where the published code does more than the recipe needs, this does less:
the published code keeps the graph of the encoder and accumulates its teacher's gradients without end. The published
teacher's attention has no fused kernel; here the given model decides that.
"""

import torch
import torch.nn.functional as F


def label_densely(lm, sae: dict[str, torch.Tensor], layer: int, k: int, num_labels: int, tokens_BT):
    """Labels int64 [B, T, num_labels] of tokens int64 [B, T], from a transformers GPT-2 and an autoencoder in OpenAI's
    layout on the output of block `layer`."""
    lm.zero_grad()  # the published code never calls this, so its teacher's gradients accumulate
    kept = []
    hook = lm.transformer.h[layer].register_forward_hook(lambda _, __, output: kept.append(output))
    logits_BTV = lm(tokens_BT, use_cache=False).logits
    hook.remove()
    hidden_BTD = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    hidden_BTD.retain_grad()
    F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    with torch.no_grad():
        centred = hidden_BTD - hidden_BTD.mean(-1, keepdim=True)
        normed = centred / (centred.std(-1, keepdim=True) + 1e-5)
        pre_BTC = (normed - sae["pre_bias"]) @ sae["encoder.weight"].T + sae["latent_bias"]
        top = pre_BTC.topk(k, dim=-1)
        latents_BTC = torch.zeros_like(pre_BTC).scatter(-1, top.indices, top.values.relu())
        attribution_BTC = (hidden_BTD.grad @ sae["decoder.weight"]) * latents_BTC
        return attribution_BTC.topk(num_labels, dim=-1).indices

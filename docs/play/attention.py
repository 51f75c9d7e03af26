"""Compute the attention weights of all heads of SmolLM2 on two sentences: writes
attention.json beside this file.
"""

import base64
import json
import math
from pathlib import Path

import torch

from qwen_analog import QwenForCausalLM, load
from qwen_analog.attention import causal_mask
from qwen_analog.rope import apply_rotary

HERE = Path(__file__).resolve().parent
SENTENCES = [
    "The trophy did not fit in the suitcase because it was too big.",
    "red blue green seven red blue green seven red blue green",
]


@torch.no_grad()
def attention_weights(model: QwenForCausalLM, ids: list[int]) -> torch.Tensor:
    """Return the weights [L, H, T, T] of every head, by queries and keys.

    The pass does not keep them, so they are computed again from what enters each
    attention module.
    """
    entered, left, weights = [], [], []
    attentions = [block.self_attn for block in model.model.layers]

    def note(_, given, result) -> None:
        entered.append(given)
        left.append(result)

    hooks = [module.register_forward_hook(note) for module in attentions]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for module, (x, cos, sin, *_), result in zip(attentions, entered, left):
        q = apply_rotary(module.heads(module.q_proj(x)), cos, sin)[0]  # [H, T, h]
        k = apply_rotary(module.heads(module.k_proj(x)), cos, sin)[0]  # [K, T, h]
        v = module.heads(module.v_proj(x))[0]  # [K, T, h]
        group = q.shape[0] // k.shape[0]
        k, v = (heads.repeat_interleave(group, dim=0) for heads in (k, v))
        scores = q @ k.mT / math.sqrt(module.head_dim)  # [H, T, T]
        scores = scores.masked_fill(~causal_mask(len(ids)), -math.inf)
        weights.append(scores.softmax(-1))
        mixed = (weights[-1] @ v).transpose(0, 1).flatten(1)  # [T, H * h]
        # these weights give what the module gave
        assert torch.allclose(module.o_proj(mixed), result[0], atol=1e-4)
    return torch.stack(weights)


def noted_heads(weights: torch.Tensor, ids: list[int]) -> list[dict]:
    """Return the heads that do one thing most clearly, with the share that they do."""
    T = len(ids)
    before = weights[:, :, range(1, T), range(T - 1)].mean(-1)  # [L, H]
    first = weights[:, :, 1:, 0].mean(-1)
    found = [("looks at the token before", before), ("looks at the first token", first)]
    # where this token stood before: what followed it then
    pairs = [(t, ids.index(ids[t], 0, t) + 1) for t in range(T) if ids[t] in ids[:t]]
    if len(pairs) > 3:
        queries, keys = map(list, zip(*pairs))
        share = weights[:, :, queries, keys].mean(-1)
        found.insert(0, ("looks at what followed this word last time", share))
    return [
        {"what": what, "share": round(share.max().item(), 2)}
        | dict(zip(("layer", "head"), divmod(share.argmax().item(), share.shape[1])))
        for what, share in found
    ]


def main() -> None:
    model, tokenizer = load("smollm2", "cpu")
    sentences = []
    for text in SENTENCES:
        ids = tokenizer.encode(text)
        weights = attention_weights(model, ids)
        rows, columns = torch.tril_indices(len(ids), len(ids))
        # what lies above the diagonal is 0; a 255th is less than a screen shows
        bytes_ = (weights[:, :, rows, columns] * 255).round().byte().numpy().tobytes()
        sentences.append(
            {
                "tokens": [tokenizer.decode([i]) for i in ids],
                "noted": noted_heads(weights, ids),
                "weights": base64.b64encode(bytes_).decode(),
            }
        )
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    data = {"layers": layers, "heads": heads, "sentences": sentences}
    text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
    (HERE / "attention.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The search for the first wrong layer, as the chapter on real weights writes it."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from weights_helpers import IDS, TOKENIZER, first_difference, small

from qwen_analog.hf import save_pretrained


def swap_norms(block):
    block.input_layernorm, block.post_attention_layernorm = (
        block.post_attention_layernorm,
        block.input_layernorm,
    )


def halve_frequencies(model):
    model.model.rotary_emb.theta /= 2


BREAKS = {
    "a bias": (
        lambda m: m.model.layers[1].self_attn.v_proj.bias.add_(0.1),
        "model.layers.1.self_attn.v_proj",
    ),
    "a bias that is zero": (
        lambda m: m.model.layers[0].self_attn.k_proj.bias.zero_(),
        "model.layers.0.self_attn.k_proj",
    ),
    "the last norm's eps": (lambda m: setattr(m.model.norm, "eps", 1.0), "model.norm"),
    "the norms": (
        lambda m: swap_norms(m.model.layers[2]),
        "model.layers.2.input_layernorm",
    ),
    "the order of heads": (
        lambda m: m.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda module, a: a[0].flip(-1)
        ),
        "input of model.layers.0.self_attn.o_proj",
    ),
    "o_proj": (
        lambda m: m.model.layers[0].self_attn.o_proj.weight.mul_(1.1),
        "model.layers.0.self_attn.o_proj",
    ),
    "the residual": (
        lambda m: m.model.layers[1].self_attn.register_forward_hook(
            lambda module, a, out: 2 * out
        ),
        "input of model.layers.1.post_attention_layernorm",
    ),
    "gelu": (
        lambda m: setattr(
            m.model.layers[1].mlp,
            "forward",
            lambda x, p=m.model.layers[1].mlp: p.down_proj(
                torch.nn.functional.gelu(p.gate_proj(x)) * p.up_proj(x)
            ),
        ),
        "input of model.layers.1.mlp.down_proj",
    ),
    "the second residual": (
        lambda m: m.model.layers[2].mlp.register_forward_hook(
            lambda module, a, out: -out
        ),
        "model.layers.2",
    ),
    "theta": (halve_frequencies, "input of model.layers.0.self_attn.o_proj"),
    "nan": (
        lambda m: m.model.layers[2].mlp.up_proj.weight.fill_(torch.nan),
        "model.layers.2.mlp.up_proj",
    ),
    "the last norm": (lambda m: m.model.norm.weight.add_(1), "model.norm"),
    "the head": (
        lambda m: setattr(
            m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight * 1.01)
        ),
        "lm_head",
    ),
    "the embedding": (
        lambda m: setattr(
            m.model.embed_tokens, "weight", torch.nn.Parameter(m.lm_head.weight * 1.01)
        ),
        "model.embed_tokens",
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference") / "model"
    return AutoModelForCausalLM.from_pretrained(
        save_pretrained(small(), TOKENIZER, directory)
    )


@pytest.mark.mutant
@pytest.mark.parametrize("name", BREAKS)
@torch.no_grad()
def test_first_difference(name, reference):
    ours = small()
    assert first_difference(ours, reference, IDS) is None
    breaks, where = BREAKS[name]
    breaks(ours)
    hooks = [
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for model in (ours, reference)
        for module in model.modules()
    ]
    found = first_difference(ours, reference, IDS)
    assert found.where == where and not found.error < 1e-3
    assert hooks == [
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for model in (ours, reference)
        for module in model.modules()
    ]

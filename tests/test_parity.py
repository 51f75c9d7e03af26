"""Logits, gradients and state_dict against Hugging Face's Qwen2, Qwen3 and Llama, on
scrambled weights; and mutants these checks must kill.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from book import scramble_
from test_mlp import SiLU
from test_rope import interleaved
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwen_analog import (
    QwenConfig,
    QwenForCausalLM,
    attention,
    model as model_module,
    norm,
    rope,
)

BASE = dict(
    vocab_size=131,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=80,
    max_position_embeddings=128,
)
SHAPES = {
    "plain": {},
    "head_dim not hidden/heads": dict(head_dim=20),
    "one KV head": dict(num_key_value_heads=1),
    "KV heads = heads": dict(num_key_value_heads=4),
    "untied": dict(tie_word_embeddings=False),
    "theta 1e4": dict(rope_theta=1e4),
    "YaRN": dict(
        rope_theta=1e4,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "one layer, odd FFN": dict(num_hidden_layers=1, intermediate_size=37),
    "Qwen3": dict(qk_norm=True, attention_bias=False, head_dim=20, rms_norm_eps=0.1),
    "Qwen3, untied, one KV head": dict(
        qk_norm=True,
        attention_bias=False,
        head_dim=16,
        tie_word_embeddings=False,
        num_key_value_heads=1,
    ),
    "Llama": dict(attention_bias=False, tie_word_embeddings=False),
    "Llama 3": dict(
        attention_bias=False,
        head_dim=20,
        rope_theta=1e4,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 96,
        },
    ),
}
BOUND = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def pair(dtype, **overrides):
    """Our model and Hugging Face's with the same scrambled weights."""
    config = QwenConfig(**{**BASE, **overrides})
    values = config.to_dict()
    rotation = {
        "rope_type": "default",
        "rope_theta": values.pop("rope_theta"),
        **(values.pop("rope_scaling") or {}),
    }
    if values.pop("qk_norm"):
        theirs = Qwen3ForCausalLM(Qwen3Config(**values, rope_parameters=rotation))
    elif values.pop("attention_bias"):
        theirs = Qwen2ForCausalLM(Qwen2Config(**values, rope_parameters=rotation))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**values, rope_parameters=rotation))
    scramble_(theirs)
    with torch.no_grad():
        theirs.model.embed_tokens.weight *= (
            0.01  # small inputs to the first norm: its eps shows
        )
    inv_freq = theirs.model.rotary_emb.inv_freq.clone()
    theirs = theirs.to(dtype)
    theirs.model.rotary_emb.inv_freq = inv_freq  # .to(bfloat16) rounded it
    ours = QwenForCausalLM(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(length=17):
    return torch.randint(
        BASE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1)
    )


def distances(ours, theirs):
    """Largest difference of logits and of gradients, each relative to the largest
    reference value.
    """
    ids = tokens()
    a, b = ours(ids), theirs(ids).logits
    weights = torch.randn(b.shape, generator=torch.Generator().manual_seed(2)).to(b)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    ours_by_name, gradients = dict(ours.named_parameters()), []
    for name, p in theirs.named_parameters():
        got = ours_by_name[name].grad if name in ours_by_name else None
        gap = (
            (got - p.grad).abs().max() / p.grad.abs().max()
            if got is not None
            else math.inf
        )
        gradients.append(float(gap))
    return {
        "logits": ((a - b).abs().max() / b.abs().max()).item(),
        "gradients": max(gradients),
    }


def disagreement(ours, theirs):
    return max(distances(ours, theirs).values())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients(shape, dtype):
    assert disagreement(*pair(dtype, **SHAPES[shape])) < BOUND[dtype]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_with_a_cache(shape):
    ours, theirs = pair(torch.float64, **SHAPES[shape])
    cache, theirs_cache = ours.new_cache(2, 17), None
    for part in tokens().split((9, 1, 7), dim=1):
        expected = theirs(part, past_key_values=theirs_cache, use_cache=True)
        theirs_cache = expected.past_key_values
        found = ours(part, cache=cache)
        assert (found - expected.logits).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ["plain", "Qwen3", "Llama 3"])
def test_state_dict_both_ways(shape):
    ours, theirs = pair(torch.float32, **SHAPES[shape])
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(scramble_(ours, seed=3).state_dict())
    torch.testing.assert_close(
        ours(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4
    )
    without_head = {k: v for k, v in ours.state_dict().items() if k != "lm_head.weight"}
    QwenForCausalLM(ours.config).load_state_dict(without_head)


def replace(target, name, value):
    return lambda patch, ours: patch.setattr(target, name, value)


def sdpa(**changes):
    real = F.scaled_dot_product_attention
    return replace(
        attention.F,
        "scaled_dot_product_attention",
        lambda *a, **k: real(*a, **{**k, **changes}),
    )


def tiled_heads(q, k, v, real=F.scaled_dot_product_attention, **options):
    n = q.shape[1] // k.shape[1]
    return real(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1), **options)


def drop_bias(name):
    def mutate(patch, ours):
        for layer in ours.model.layers:
            getattr(layer.self_attn, name).bias = None

    return mutate


def swap_norms(patch, ours):
    for layer in ours.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = (
            layer.post_attention_layernorm,
            layer.input_layernorm,
        )


def swap_gate_up(patch, ours):
    for layer in ours.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def no_final_norm(patch, ours):
    ours.model.norm = torch.nn.Identity()


def theta(patch, ours):
    ours.model.rotary_emb.theta = 1e4


def eps(patch, ours):
    for module in ours.modules():
        if isinstance(module, norm.RMSNorm):
            module.eps = 1e-5


def layer_norm(self, x):
    return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


def post_norm(self, x, cos, sin, mask=None, cache=None):
    x = self.input_layernorm(x + self.self_attn(x, cos, sin, mask, cache))
    return self.post_attention_layernorm(x + self.mlp(x))


def no_residual(self, x, cos, sin, mask=None, cache=None):
    x = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
    return x + self.mlp(self.post_attention_layernorm(x))


def query_only(x, cos, sin):
    return (
        x
        if x.shape[1] == BASE["num_key_value_heads"]
        else x * cos[:, None] + rope.rotate_half(x) * sin[:, None]
    )


def block(rule):
    """Give every block another rule: x, attention, mlp, both norms -> the new x."""

    def forward(self, x, cos, sin, mask=None, cache=None):
        def attend(v):
            return self.self_attn(v, cos, sin, mask, cache)

        norms = self.input_layernorm, self.post_attention_layernorm
        return rule(x, attend, self.mlp, *norms)

    return replace(model_module.DecoderLayer, "forward", forward)


def mlp_first(x, attend, mlp, n1, n2):
    x = x + mlp(n2(x))
    return x + attend(n1(x))


def adds_to_the_normed(x, attend, mlp, n1, n2):
    x = n1(x)
    x = n2(x + attend(x))
    return x + mlp(x)


def one_norm(x, attend, mlp, n1, n2):
    x = x + attend(n1(x))
    return x + mlp(n1(x))


def cut_last(patch, ours):
    ours.model.layers = ours.model.layers[:-1]


def reverse_blocks(patch, ours):
    ours.model.layers = ours.model.layers[::-1]


def norm_after_head(patch, ours):
    weight, head = ours.model.norm.weight, ours.lm_head.weight
    ours.model.norm = torch.nn.Identity()
    ours.lm_head.forward = lambda x: F.rms_norm(
        (x * weight) @ head.T, (len(head),), eps=1e-6
    )


def scaled_embedding(patch, ours):
    ours.model.embed_tokens.register_forward_hook(
        lambda module, args, out: out * out.shape[-1] ** 0.5
    )


def fresh_head(patch, ours):
    ours.lm_head.weight = torch.nn.Parameter(torch.randn_like(ours.lm_head.weight))


def copied_head(patch, ours):
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach().clone())


def detached_head(patch, ours):
    """Right logits; but the embedding misses the gradient through the head."""
    ours.lm_head.forward = lambda x: F.linear(x, ours.lm_head.weight.detach())


def positions(change):
    def mutate(patch, ours):
        ours.model.rotary_emb.register_forward_pre_hook(
            lambda module, args: (change(args[0]), args[1])
        )

    return mutate


MUTANTS = {
    "no q bias": drop_bias("q_proj"),
    "no k bias": drop_bias("k_proj"),
    "no v bias": drop_bias("v_proj"),
    "norms swapped": swap_norms,
    "gate and up swapped": swap_gate_up,
    "no final norm": no_final_norm,
    "theta 1e4": theta,
    "eps 1e-5": eps,
    "LayerNorm": replace(norm.RMSNorm, "forward", layer_norm),
    "GELU": replace(F, "silu", F.gelu),
    "interleaved rotation": replace(rope, "rotate_half", interleaved),
    "keys not rotated": replace(attention, "apply_rotary", query_only),
    "no causal mask": sdpa(is_causal=False),
    "no 1/sqrt(h)": sdpa(scale=1.0),
    "KV heads tiled": replace(attention.F, "scaled_dot_product_attention", tiled_heads),
    "post-norm": replace(model_module.DecoderLayer, "forward", post_norm),
    "no residual": replace(model_module.DecoderLayer, "forward", no_residual),
    "branches in parallel": block(
        lambda x, attend, mlp, n1, n2: x + attend(n1(x)) + mlp(n2(x))
    ),
    "mlp before attention": block(mlp_first),
    "adds to the normed vector": block(adds_to_the_normed),
    "one norm for both": block(one_norm),
    "blocks in reverse order": reverse_blocks,
    "last block left out": cut_last,
    "norm after the head": norm_after_head,
    "embedding times sqrt(D)": scaled_embedding,
    "untied: a fresh head": fresh_head,
    "untied: a copied head": copied_head,
    "a detached head": detached_head,
    "all positions 0": positions(torch.zeros_like),
    "positions reversed": positions(lambda p: p.flip(-1)),
    "positions doubled": positions(lambda p: 2 * p),
}


def project(rule):
    """Give q, k of Qwen3's attention another rule; it gets the layer and q, k, v."""

    def changed(self, x):
        return rule(self, *attention.HeadProjections.project(self, x))

    return replace(attention.NormedAttention, "project", changed)


def over_all_heads(norm, x):
    """Divide by one root mean square for a token's heads together."""
    mean_square = x.pow(2).mean((1, 3), keepdim=True)
    return norm.weight * x * torch.rsqrt(mean_square + norm.eps)


def norm_after_rotation(patch, ours):
    project(lambda layer, q, k, v: (q, k, v))(patch, ours)
    real, layers = rope.apply_rotary, iter([])

    def rotate(x, cos, sin):
        nonlocal layers
        norm = next(layers, None)
        if norm is None:
            parts = [layer.self_attn for layer in ours.model.layers]
            layers = iter([norm for a in parts for norm in (a.q_norm, a.k_norm)])
            norm = next(layers)
        return norm(real(x, cos, sin))

    patch.setattr(attention, "apply_rotary", rotate)


def each_layer(change):
    def mutate(patch, ours):
        for layer in ours.model.layers:
            change(layer.self_attn)

    return mutate


def small_eps(layer):
    layer.q_norm.eps = layer.k_norm.eps = 1e-6


def swapped_scales(layer):
    layer.q_norm, layer.k_norm = layer.k_norm, layer.q_norm


def scale_of_queries(layer):
    layer.k_norm = layer.q_norm


QWEN3_MUTANTS = {
    "no norms": project(lambda layer, q, k, v: (q, k, v)),
    "no norm of keys": project(lambda layer, q, k, v: (layer.q_norm(q), k, v)),
    "no norm of queries": project(lambda layer, q, k, v: (q, layer.k_norm(k), v)),
    "values too": project(
        lambda layer, q, k, v: (layer.q_norm(q), layer.k_norm(k), layer.k_norm(v))
    ),
    "over all heads at once": project(
        lambda layer, q, k, v: (
            over_all_heads(layer.q_norm, q),
            over_all_heads(layer.k_norm, k),
            v,
        )
    ),
    "after the rotation": norm_after_rotation,
    "scales swapped": each_layer(swapped_scales),
    "the scale of queries for keys": each_layer(scale_of_queries),
    "a fixed eps": each_layer(small_eps),
    "weight 1 + w": project(
        lambda layer, q, k, v: (layer.q_norm(q) * 2, layer.k_norm(k) * 2, v)
    ),
}


def speeds(change):
    """Replace the kept share and the speeds of Llama 3's rotation."""

    def changed(self, device=None):
        plain = rope.RotaryEmbedding.inverse_frequencies(self, device)
        turns = self.original_length * plain / (2 * math.pi)
        return change(self, plain, turns)

    return replace(rope.Llama3RotaryEmbedding, "inverse_frequencies", changed)


def blend(self, plain, turns, low=None, high=None):
    low, high = low or self.low, high or self.high
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / self.factor + kept * plain


LLAMA3_MUTANTS = {
    "not slowed down": speeds(lambda self, plain, turns: plain),
    "fast pairs too": speeds(lambda self, plain, turns: plain / self.factor),
    "fast pairs only": speeds(
        lambda self, plain, turns: torch.where(turns > self.high, plain / 8, plain)
    ),
    "no blend": speeds(
        lambda self, plain, turns: torch.where(turns < self.high, plain / 8, plain)
    ),
    "blend kept": speeds(
        lambda self, plain, turns: torch.where(turns < self.low, plain / 8, plain)
    ),
    "turns of the new length": speeds(
        lambda self, plain, turns: blend(self, plain, turns * self.factor)
    ),
    "radians for turns": speeds(
        lambda self, plain, turns: blend(self, plain, turns * 2 * math.pi)
    ),
    "another end of the blend": speeds(
        lambda self, plain, turns: blend(self, plain, turns, high=3.0)
    ),
    "scores sharpened": replace(
        rope.Llama3RotaryEmbedding,
        "forward",
        lambda *arguments, real=rope.RotaryEmbedding.forward: tuple(
            (0.1 * math.log(8) + 1) * table for table in real(*arguments)
        ),
    ),
}
OF_SHAPE = {"plain": MUTANTS, "Qwen3": QWEN3_MUTANTS, "Llama 3": LLAMA3_MUTANTS}


@pytest.mark.mutant
@pytest.mark.parametrize(
    "shape, mutant", [(shape, name) for shape in OF_SHAPE for name in OF_SHAPE[shape]]
)
def test_mutant_is_killed(shape, mutant, monkeypatch, record_property):
    ours, theirs = pair(torch.float64, **SHAPES[shape])
    theirs.set_attn_implementation(
        "eager"
    )  # the reference must not run through a patched function
    for layer in theirs.model.layers:
        layer.mlp.act_fn = SiLU()
    assert disagreement(ours, theirs) < BOUND[torch.float64]
    ours.zero_grad(), theirs.zero_grad()
    OF_SHAPE[shape][mutant](monkeypatch, ours)
    found = distances(ours, theirs)
    record_property("mutant", (mutant, found))  # conftest.py prints the table
    assert max(found.values()) > 100 * BOUND[torch.float64]


def test_positions_are_relative():
    ours, theirs = pair(torch.float64)
    positions(lambda p: p + 1)(None, ours)
    assert disagreement(ours, theirs) < BOUND[torch.float64]

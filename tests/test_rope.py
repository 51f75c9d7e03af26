"""Rotations beside Hugging Face's, ordinary and stretched, and wrong ones."""

import math

import pytest
import torch
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from qwen_analog import rope
from qwen_analog.rope import RotaryEmbedding, YarnRotaryEmbedding, apply_rotary

SETTINGS = [
    (128, 1e6, 4.0, 32768, {}),
    (64, 1e4, 2.0, 2048, {"beta_fast": 16.0, "beta_slow": 2.0}),
    (8, 100.0, 8.0, 16, {}),
    (32, 1e5, 4.0, 512, {"attention_factor": 1.3}),
]


def reference(h, length, parameters):
    config = Qwen2Config(
        hidden_size=4 * h,
        num_attention_heads=4,
        max_position_embeddings=length,
        rope_parameters=parameters,
    )
    return Qwen2RotaryEmbedding(config)


def same_tables(ours, theirs, length):
    ends = torch.arange(5), torch.arange(length - 5, length)
    p = torch.cat(ends)[None]
    return all(
        torch.equal(a, b)
        for dtype in (torch.float32, torch.bfloat16)
        for a, b in zip(ours(p, dtype), theirs(torch.zeros(1, dtype=dtype), p))
    )


def stretched_agrees():
    for h, theta, factor, original, more in SETTINGS:
        parameters = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            **more,
        }
        theirs = reference(h, int(factor * original), parameters)
        ours = YarnRotaryEmbedding(h, theta, factor, original, **more)
        if not same_tables(ours, theirs, 4 * original):
            return False
    return True


@pytest.mark.parametrize("h, theta", [(128, 1e6), (64, 1e4), (8, 100.0)])
def test_plain_tables_are_the_reference(h, theta):
    theirs = reference(h, 4096, {"rope_type": "default", "rope_theta": theta})
    assert same_tables(RotaryEmbedding(h, theta), theirs, 4096)


def test_stretched_tables_are_the_reference():
    assert stretched_agrees()


def shifted_pair(offset):
    real = rope._yarn_pair
    return lambda *arguments: real(*arguments) + offset


def frequencies(change):
    real = YarnRotaryEmbedding.inverse_frequencies

    def changed(self, device=None):
        return change(self, real(self, device))

    return changed


def betas_ignored(self, *arguments, real=YarnRotaryEmbedding.__init__, **more):
    real(self, *arguments, attention_factor=more.get("attention_factor"))


def not_sharpened(self, *arguments, real=YarnRotaryEmbedding.__init__, **more):
    real(self, *arguments, **{"attention_factor": 1.0, **more})


def new_length(turns, length, h, theta, real=rope._yarn_pair):
    return real(turns, 4 * length, h, theta)


MUTANTS = {
    "all pairs slowed down": (
        YarnRotaryEmbedding,
        "inverse_frequencies",
        lambda self, device=None: (
            RotaryEmbedding.inverse_frequencies(self, device) / self.factor
        ),
    ),
    "no pair slowed down": (
        YarnRotaryEmbedding,
        "inverse_frequencies",
        RotaryEmbedding.inverse_frequencies,
    ),
    "scores not sharpened": (YarnRotaryEmbedding, "__init__", not_sharpened),
    "the ramp a pair too late": (rope, "_yarn_pair", shifted_pair(1)),
    "the ramp a pair too early": (rope, "_yarn_pair", shifted_pair(-1)),
    "turns within the new length": (rope, "_yarn_pair", new_length),
    "betas ignored": (YarnRotaryEmbedding, "__init__", betas_ignored),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    assert not stretched_agrees()


def test_scores_depend_on_the_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=g, dtype=torch.float64)
    embedding = RotaryEmbedding(16, 100.0)

    def score(t, s):
        tables = [embedding(torch.tensor([[p]]), torch.float64) for p in (t, s)]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum().item()

    assert math.isclose(score(7, 3), score(104, 100), abs_tol=1e-4)
    assert not math.isclose(score(7, 3), score(7, 4), abs_tol=1e-2)


def test_reordered_weights_give_the_interleaved_rotation():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 8, 5, generator=g, dtype=torch.float64)
    x = torch.randn(1, 4, 5, generator=g, dtype=torch.float64)
    cos, sin = RotaryEmbedding(8, 100.0)(torch.arange(4)[None], torch.float64)

    def heads(w):
        return (x @ w.T).view(1, 4, 3, 8).transpose(1, 2)  # [1, 3, T, h]

    y = heads(weight)
    a, b, c, s = y[..., ::2], y[..., 1::2], cos[:, None, :, :4], sin[:, None, :, :4]
    theirs = torch.stack((a * c - b * s, a * s + b * c), dim=-1)  # pairs (2i, 2i + 1)
    ours = apply_rotary(heads(rope.interleaved_to_half(weight, 3)), cos, sin)
    assert torch.allclose(ours.view(1, 3, 4, 2, 4).mT, theirs)


def test_an_odd_head_is_refused_and_bfloat16_spoils_nothing():
    with pytest.raises(ValueError, match="head_dim must be even for rotary pairs"):
        RotaryEmbedding(7)
    p = torch.arange(30000, 30005)[None]
    cast = RotaryEmbedding(64).to(torch.bfloat16)
    assert torch.equal(cast(p)[0], RotaryEmbedding(64)(p)[0])
    plain = RotaryEmbedding(64)(p)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RotaryEmbedding(64)(p)[0], plain)
    assert not list(cast.state_dict())


def rotation_agrees():
    """Whether queries, keys and their gradients are Hugging Face's, bit for bit."""
    theirs = reference(64, 32768, {"rope_type": "default", "rope_theta": 1e6})
    p = torch.cat((torch.arange(6), torch.arange(20000, 20006)))[None]
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(4)
        q = torch.randn(1, 4, 12, 64, generator=g).to(dtype).requires_grad_()
        k = torch.randn(1, 2, 12, 64, generator=g).to(dtype).requires_grad_()
        tables = RotaryEmbedding(64, 1e6)(p, dtype)
        results = []
        for y in (
            apply_rotary_pos_emb(q, k, *theirs(q, p)),
            [rope.apply_rotary(x, *tables) for x in (q, k)],
        ):
            loss = sum(x.float().pow(2).sum() + x.float().sum() for x in y)
            results.append([*y, *torch.autograd.grad(loss, (q, k))])
        if not all(map(torch.equal, *results)):
            return False
    return True


def test_rotated_queries_and_keys_are_the_reference():
    assert rotation_agrees()


def tables(theta=None, shift=0, positions=None, change=None):
    """`RotaryEmbedding.forward` with one mistake."""
    real = RotaryEmbedding.forward

    def forward(self, position_ids, dtype=torch.float32):
        if theta:
            self.theta = theta
        ids = position_ids + shift
        ids = positions(ids) if positions else ids
        cos, sin = real(self, ids, dtype)
        return change(cos, sin) if change else (cos, sin)

    return RotaryEmbedding, "forward", forward


def keys_not_rotated(x, cos, sin, real=apply_rotary):
    return x if x.shape[1] == 2 else real(x, cos, sin)


def rotated_in_float32(x, cos, sin, real=apply_rotary):
    return real(x.float(), cos.float(), sin.float()).to(x.dtype)


def coarse(self, device=None, real=RotaryEmbedding.inverse_frequencies):
    return real(self, device).bfloat16().float()


def interleaved(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def slower_by_half(self, device=None, real=RotaryEmbedding.inverse_frequencies):
    return real(self, device).sqrt()


def doubled_in_place(cos, sin):
    """Each angle twice in a row, as interleaved pairs want it."""
    half = cos.shape[-1] // 2
    return tuple(t[..., :half].repeat_interleave(2, dim=-1) for t in (cos, sin))


ROTATIONS = {
    "theta ** (-i / h)": (RotaryEmbedding, "inverse_frequencies", slower_by_half),
    "tables for interleaved pairs": tables(change=doubled_in_place),
    "a sign on the wrong half": (
        rope,
        "rotate_half",
        lambda x, real=rope.rotate_half: -real(x),
    ),
    "interleaved pairs": (rope, "rotate_half", interleaved),
    "theta 10,000": tables(theta=1e4),
    "positions from 1": tables(shift=1),
    "bfloat16 frequencies": (RotaryEmbedding, "inverse_frequencies", coarse),
    "bfloat16 positions": tables(positions=lambda p: p.bfloat16()),
    "turned the other way": tables(change=lambda c, s: (c, -s)),
    "keys not rotated": (rope, "apply_rotary", keys_not_rotated),
    "sine and cosine swapped": tables(change=lambda c, s: (s, c)),
    "rotated in float32": (rope, "apply_rotary", rotated_in_float32),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", ROTATIONS)
def test_a_wrong_rotation_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*ROTATIONS[mutant])
    assert not rotation_agrees()

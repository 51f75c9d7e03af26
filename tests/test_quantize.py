"""Quantized layers: kernels and pieces against what they read back, GGUF's blocks
against the gguf package, whole models, and what is refused.
"""

import copy
from itertools import product

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from weights_helpers import IDS, small

from qwen_analog import quantize as module
from qwen_analog.quantize import (
    FORMATS,
    Int4Linear,
    Int8Linear,
    gguf_layer,
    pack_levels,
    quantize,
    to_int4,
    to_int8,
    unpack_levels,
)

SHAPES = [(128, 96), (100, 64), (7, 32), (1, 320), (130, 576)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(N, K):
    """A matrix whose rows and groups differ in size and lie off zero."""
    size = 2.0 ** torch.arange(N).remainder(7)[:, None]
    shift = drawn(N, K // 32, seed=1).repeat_interleave(32, dim=1)
    return size * (drawn(N, K) + shift)


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def check_reads_back():
    """Half a scale is the largest error, but for the rounding of scale and zero."""
    weight = uneven(100, 96)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = (Int8Linear(weight).dequantize() - weight).abs()
    assert (error <= 0.51 * step).all() and (error > 0.4 * step).any()
    groups = weight.unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / 15
    error = (Int4Linear(weight).dequantize() - weight).abs().unflatten(1, (-1, 32))
    size = groups.abs().amax(2)
    assert (error <= (0.51 * step + size / 128)[..., None]).all()
    assert off(Int4Linear(weight).dequantize(), weight) < 0.08


def check_products():
    for N, K in SHAPES:
        weight, bias = uneven(N, K), 9 * drawn(N, seed=3)
        for make in (Int8Linear, Int4Linear):
            layer = make(weight, bias)
            for M in (1, 5, 300):
                x = drawn(2, M, K, seed=M).bfloat16()
                plain = x.float() @ layer.dequantize().T + bias
                assert off(layer(x.float()), plain) < 0.01, (make, N, K, M)
                assert layer(x).dtype == torch.bfloat16
            assert layer.dequantize().shape == weight.shape


def check_levels():
    levels, scales = to_int8(uneven(64, 96))
    assert levels.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert levels.min() >= -127 and scales.shape == (64,)
    best = to_int8(uneven(64, 96))[0].float() * scales.float()[:, None]
    assert off(best, uneven(64, 96)) < 0.0075
    levels, scales, zeros = to_int4(uneven(64, 96))
    assert levels.max() <= 15 and scales.shape == zeros.shape == (64, 3)


def check_pieces():
    """A matrix so large that it is widened in several pieces."""
    weight, x = uneven(2000, 1024), drawn(3, 1024).bfloat16()
    for make, dtype in product(
        (Int8Linear, Int4Linear), (torch.float32, torch.bfloat16)
    ):
        layer = make(weight)
        layer.wide_dtype = dtype
        found = layer.in_pieces(x)
        assert found.dtype == dtype
        error = off(found.float(), x.float() @ layer.dequantize().T)
        assert error < (1e-5 if dtype == torch.float32 else 0.01)
        assert layer(x).dtype == x.dtype


CHECKS = [check_reads_back, check_products, check_levels, check_pieces]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_layers(check):
    check()


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "pieces"])
@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_both_ways_give_the_same(make, kernel, monkeypatch):
    layer = make(uneven(200, 576))
    if kernel and not layer.has_kernel():
        pytest.skip("torch has no kernel for this processor")
    x = drawn(30, 576).bfloat16()
    found = layer.kernel(x) if kernel else layer.in_pieces(x)
    assert off(found.float(), x.float() @ layer.dequantize().T) < 0.01
    monkeypatch.setattr(make, "has_kernel", lambda self: False)
    assert off(layer(x[:1]).float(), found[:1].float()) < 0.01


def test_rows_that_do_not_fill_a_register_pass_by_the_kernel():
    for K in (1, 33, 48, 100):
        layer = Int8Linear(drawn(9, K))
        assert not layer.has_kernel()
        x = drawn(3, K).bfloat16()
        assert off(layer(x).float(), x.float() @ layer.dequantize().T) < 0.01


@pytest.mark.parametrize("group_size", [1, 16, 32, 64, 96, 192])
def test_group_sizes(group_size):
    layer = Int4Linear(uneven(64, 192), group_size=group_size)
    x = drawn(4, 192).bfloat16()
    assert off(layer(x).float(), x.float() @ layer.dequantize().T) < 0.01


@pytest.mark.parametrize("block", [32, 64])
def test_levels_come_back_from_bytes(block):
    levels = torch.randint(16, (100, 7)).byte()
    found = unpack_levels(pack_levels(levels, block)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(found[:100], levels) and not found[100:].any()


def test_another_order_of_torch_switches_the_kernel_off(monkeypatch):
    """Elsewhere torch may pack otherwise: then every product is widened, and right."""
    monkeypatch.setattr(module, "cpu_block", lambda: 0)
    layer = Int4Linear(uneven(100, 64))
    x = drawn(2, 64).bfloat16()
    assert not layer.has_kernel()
    assert off(layer(x).float(), x.float() @ layer.dequantize().T) < 0.01
    monkeypatch.setattr(module, "cpu_block", lambda: 32)
    assert torch.equal(Int4Linear(uneven(100, 64)).dequantize(), layer.dequantize())


def test_zeros_and_equal_weights():
    for make in FORMATS.values():
        assert not make(torch.zeros(3, 64)).dequantize().any()
    assert torch.equal(
        Int4Linear(torch.full((3, 64), 0.5)).dequantize(), torch.full((3, 64), 0.5)
    )


def blocks_of(kind, weight):
    return torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))


def check_gguf():
    for kind in ("Q4_0", "Q4_1"):
        kind = gguf.GGMLQuantizationType[kind]
        blocks = blocks_of(kind, uneven(64, 96))
        check_blocks(blocks, kind)
    rows = np.random.default_rng(0).integers(0, 256, (5, 2, 144), dtype=np.uint8)
    rows[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    kind = gguf.GGMLQuantizationType.Q4_K
    check_blocks(torch.from_numpy(rows.reshape(5, -1)), kind)


def check_blocks(blocks, kind):
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))
    layer = gguf_layer(blocks, kind.name, "int4")
    assert isinstance(layer, Int4Linear)
    assert off(layer.dequantize(), expected) < 0.005
    eight = gguf_layer(blocks, kind.name, "int8")
    assert isinstance(eight, Int8Linear) and off(eight.dequantize(), expected) < 0.01


def test_gguf_blocks_are_kept():
    check_gguf()


def test_gguf_types_of_more_bits():
    weight, bias = uneven(64, 96), drawn(64)
    blocks = blocks_of(gguf.GGMLQuantizationType.Q8_0, weight)
    layer = gguf_layer(blocks, "Q8_0", "int4", bias)
    assert isinstance(layer, Int8Linear) and torch.equal(layer.bias, bias)
    raw = weight.view(torch.uint8)
    assert isinstance(gguf_layer(raw, "F32", "int4"), Int4Linear)
    assert isinstance(gguf_layer(raw, "F32", "int8"), Int8Linear)
    with pytest.raises(ValueError, match="^type Q8_1 is not supported$"):
        gguf_layer(torch.zeros(2, 40, dtype=torch.uint8), "Q8_1", "int4")


def test_damaged_scales_are_refused():
    for kind, size in (("Q4_1", 20), ("Q4_0", 18), ("Q4_K", 144), ("Q8_0", 34)):
        blocks = torch.full((2, size), 255, dtype=torch.uint8)  # nan in float16
        with pytest.raises(ValueError, match="not finite cannot be quantized"):
            gguf_layer(blocks, kind, "int4")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model(format, tied):
    model = small(hidden_size=96, intermediate_size=64, tie_word_embeddings=tied)
    again = quantize(copy.deepcopy(model), format, keep=["model.layers.0.mlp.up_proj"])
    kept = again.model.layers[0].mlp.up_proj
    assert type(kept) is nn.Linear and not again.training
    assert type(again.lm_head) is FORMATS[format]
    embedding = again.model.embed_tokens.weight
    assert torch.equal(embedding, model.model.embed_tokens.weight)
    assert not any(p.requires_grad for p in again.parameters())
    assert off(again(IDS), model(IDS)) < (0.05 if format == "int8" else 0.5)
    bias = model.model.layers[1].self_attn.q_proj.bias
    assert torch.equal(again.model.layers[1].self_attn.q_proj.bias, bias)
    ids = again.generate(IDS[:1], 5, temperature=0, eos_token_id=())
    assert ids.shape[1] == IDS.shape[1] + 5


def test_moving_never_casts():
    for make in FORMATS.values():
        layer = nn.Sequential(make(uneven(64, 64), drawn(64)))
        before = layer[0].dequantize()
        for cast in (layer.double, layer.half, layer.float, layer.bfloat16):
            cast()
            assert torch.equal(layer[0].dequantize(), before)
        assert copy.deepcopy(layer).to("meta")[0].weight.is_meta


REFUSALS = {
    "quantize must be int8 or int4, not 'int2'": lambda m: quantize(m, "int2"),
    "keep names no linear layer: 'head'": lambda m: quantize(m, "int8", ["head"]),
    "there is no linear layer": lambda m: quantize(quantize(m, "int8"), "int8"),
    "cannot be trained: train the plain model": lambda m: quantize(m, "int4").train(),
    "cannot be saved: save the plain model": lambda m: quantize(m, "int4").state_dict(),
    "cannot be overwritten": lambda m: quantize(
        copy.deepcopy(m), "int4"
    ).load_state_dict(m.state_dict()),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    model = small(hidden_size=96, intermediate_size=64)
    with pytest.raises(ValueError, match=message) as error:
        REFUSALS[message](model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", module.FORMATS)
def test_a_loss_is_that_of_the_logits(format):
    model = quantize(small(hidden_size=96, intermediate_size=64), format)
    ids = torch.arange(12).view(2, 6)
    wanted = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
    torch.testing.assert_close(model(ids, targets=ids), wanted)


def test_nothing_is_written(tmp_path):
    model = quantize(small(hidden_size=96, intermediate_size=64), "int8")
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_shape_that_does_not_fit_replaces_nothing():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(40, 8))
    with pytest.raises(ValueError, match="^1: a row of 40 weights cannot be cut"):
        quantize(model, "int4")
    assert type(model[0]) is nn.Linear
    for size in (0, -32, 5):
        with pytest.raises(ValueError, match="cannot be cut into groups"):
            to_int4(torch.ones(2, 64), size)


def one_scale(weight):
    levels = (weight / (weight.abs().max() / 127)).round()
    scale = (weight.abs().max() / 127).expand(len(weight))
    return levels.to(torch.int8), scale.bfloat16()


def scale_of_columns(weight):
    scale = weight.abs().amax() / 127 + 0 * weight[:, 0]
    return (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()


def scale_rounded_after(weight):
    scale = weight.abs().amax(dim=1) / 127
    levels = (weight / scale[:, None]).round()
    return levels.to(torch.int8), scale.bfloat16()


def truncated(weight):
    scale = (weight.abs().amax(dim=1) / 127).bfloat16()
    return (weight / scale.float()[:, None]).trunc().to(torch.int8), scale


def wraps_around(weight):
    scale = (weight.abs().amax(dim=1) / 128).bfloat16()
    levels = (weight / scale.float()[:, None]).round()
    return levels.to(torch.int16).to(torch.int8), scale


def changed4(change):
    def mutant(weight, group_size=32):
        return change(*to_int4(weight, group_size))

    return mutant


def fourteen_steps(weight, group_size=32):
    levels, scales, zeros = to_int4(weight, group_size)
    return levels.clamp(0, 14), scales, zeros


MUTANTS4 = {
    "zero is the least": changed4(lambda q, s, z: (q, s, z - 8 * s)),
    "no zero": changed4(lambda q, s, z: (q, s, 0 * z)),
    "level 7 is zero": changed4(lambda q, s, z: (q, s, z + s)),
    "groups of another row": changed4(lambda q, s, z: (q, s.roll(1, 0), z)),
    "groups backwards": changed4(lambda q, s, z: (q, s.flip(1), z.flip(1))),
    "groups along N": changed4(
        lambda q, s, z: (q, s.T.reshape(s.shape), z.T.reshape(s.shape))
    ),
    "clipped": fourteen_steps,
    "levels shuffled": changed4(lambda q, s, z: (q.roll(1, 1), s, z)),
}
MUTANTS8 = [one_scale, scale_of_columns, scale_rounded_after, truncated, wraps_around]


def noticed(checks=CHECKS):
    for check in checks:
        try:
            check()
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS8, ids=lambda f: f.__name__)
def test_an_int8_mutant_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(module, "to_int8", mutant)
    monkeypatch.setitem(globals(), "to_int8", mutant)
    assert noticed()


@pytest.mark.mutant
@pytest.mark.parametrize("name", MUTANTS4)
def test_an_int4_mutant_is_noticed(name, monkeypatch):
    monkeypatch.setattr(module, "to_int4", MUTANTS4[name])
    assert noticed()


def too_large(self, rows, start, stop):
    return rows @ self.wide(start, stop, rows.dtype) * 1.05


PARTS = {
    "halves swapped": ("unpack_levels", lambda p: torch.cat((p >> 4, p & 15), dim=-1)),
    "neighbours": (
        "_nibbles",
        lambda p: torch.stack((p & 15, p >> 4), dim=-1).flatten(1),
    ),
    "high half first": (
        "_nibbles",
        lambda p: torch.cat((p >> 4, p & 15), dim=-1).flatten(1),
    ),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", PARTS)
def test_a_mutant_of_the_bytes_is_noticed(name, monkeypatch):
    monkeypatch.setattr(module, *PARTS[name])
    assert noticed([*CHECKS, check_gguf])


def without_bias(self, x):
    self.bias = None
    return original(self, x)


def not_scaled(self, rows):
    return rows @ self.weight.T.to(rows.dtype)


original = Int8Linear.forward
METHODS = {
    "dropped bias": (module.QuantizedLinear, "forward", without_bias),
    "int8 without its scale": (Int8Linear, "kernel", not_scaled),
    "pieces that overlap": (
        Int4Linear,
        "piece",
        lambda self, rows, a, b: rows @ self.wide(0, b - a, rows.dtype),
    ),
    "pieces that are a little large": (Int4Linear, "piece", too_large),
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", METHODS)
def test_a_mutant_of_a_layer_is_noticed(name, monkeypatch):
    monkeypatch.setattr(*METHODS[name])
    assert noticed()


@pytest.mark.mutant
def test_q4_0_with_another_zero_is_noticed(monkeypatch):
    true = module.q4_0_groups

    def mutant(blocks):
        levels, d, zeros = true(blocks)
        return levels, d, zeros + d

    monkeypatch.setitem(module.STORED, "Q4_0", mutant)
    assert noticed([check_gguf])

"""Models laid out for inference against the models they were made of."""

import copy

import pytest
import torch
from book import scramble_
from weights_helpers import LLAMA3, QWEN3

from qwen_analog import QwenConfig, QwenForCausalLM, inference as module
from qwen_analog.generate import next_logits
from qwen_analog.inference import can_pack, optimize_for_inference
from qwen_analog.quantize import quantize


def make(**changes):
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }
    return scramble_(QwenForCausalLM(QwenConfig(**settings))).eval()


IDS = torch.randint(96, (3, 10), generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([0, 3, 1])


@torch.no_grad()
def logits_of(model, padding=PADDING, parts=(7, 1, 2)):
    cache = model.new_cache(3, 16)
    parts = IDS.split(parts, dim=1)
    return torch.cat(
        [next_logits(model, part, cache, padding, part.shape[1]) for part in parts], 1
    )


def laid_out(model, format=None):
    return optimize_for_inference(copy.deepcopy(model), format)


def agree(model, dtype=torch.float32):
    model = model.to(dtype)
    other = laid_out(model)
    for padding in (PADDING, None):
        a, b = logits_of(model, padding), logits_of(other, padding)
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-3):
            return False
    with torch.no_grad():
        return torch.allclose(model(IDS), other(IDS), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"tie_word_embeddings": False},
        {"attention_bias": False},
        QWEN3,
        {**QWEN3, "tie_word_embeddings": False, "num_key_value_heads": 1},
        {"attention_bias": False, "rope_scaling": LLAMA3},
    ],
)
def test_logits_are_the_models(changes):
    assert agree(make(**changes))


@pytest.mark.parametrize("changes", [{}, QWEN3])
def test_bfloat16_is_bit_equal(changes):
    model = make(**changes).bfloat16()
    if not can_pack(model.lm_head.weight):
        pytest.skip("this processor has no packed product in bfloat16")
    assert torch.equal(logits_of(model), logits_of(laid_out(model)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("changes", [{}, QWEN3])
def test_long_prompts_in_float32_are_the_models(monkeypatch, changes, packed):
    """Of 600 tokens, and of 520 behind 80: hidden states as near as bfloat16 allows."""
    model = make(**changes, max_position_embeddings=1024).bfloat16()
    if not packed:
        monkeypatch.setattr(module, "can_pack", lambda weight: False)
    fast = laid_out(model)
    exact = copy.deepcopy(model).float()
    ids = torch.randint(96, (1, 600), generator=torch.Generator().manual_seed(1))

    def read(model, asked, parts=(80, 520)):
        monkeypatch.setattr(module, "float32_is_faster", lambda: asked)
        cache = model.new_cache(1, 600)
        with torch.no_grad():
            read = [model.model(part, cache=cache) for part in ids.split(parts, 1)]
        return torch.cat(read, dim=1).float()

    right = read(exact, False)
    narrow, wide = read(fast, False), read(fast, True)
    off = (narrow - right).norm(), (wide - right).norm()
    assert off[1] < 1.1 * off[0] < 0.05 * right.norm()
    assert torch.equal(narrow[:, :80], wide[:, :80])  # few rows: as without
    assert not torch.equal(narrow, wide)
    whole = read(fast, True, (600,))
    assert (whole - right).norm() < 1.1 * off[0]


def test_layers_widen_for_many_rows_only(monkeypatch):
    widened = []
    monkeypatch.setattr(module, "float32_is_faster", lambda: True)
    monkeypatch.setattr(module, "_widened", lambda layer, x: widened.append(len(x)))
    layer = laid_out(make().bfloat16()).lm_head
    for rows in (511, 512):
        layer(torch.ones(rows, 64, dtype=torch.bfloat16))
    assert widened == [512]


def test_without_packing(monkeypatch):
    monkeypatch.setattr(module, "can_pack", lambda weight: False)
    assert agree(make())


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {**QWEN3, "head_dim": 32}])
def test_quantized_is_what_quantize_makes(changes, format):
    model = make(**changes)
    expected = logits_of(quantize(copy.deepcopy(model), format))
    found = logits_of(laid_out(model, format))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)
    assert not torch.allclose(found, logits_of(model), rtol=1e-3, atol=1e-3)


def test_loss_is_the_models():
    model = make(tie_word_embeddings=False)
    with torch.no_grad():
        losses = [m(IDS, targets=IDS) for m in (model, laid_out(model))]
    torch.testing.assert_close(*losses)


def test_generation_is_the_models():
    model = make()
    texts = [
        m.generate(IDS[:1], max_new_tokens=12, temperature=0)
        for m in (model, laid_out(model))
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda m: m.state_dict(),
        lambda m: m.train(),
        lambda m: m.double(),
        lambda m: m.load_state_dict(make().state_dict()),
        optimize_for_inference,
    ],
)
def test_what_is_refused(attempt):
    with pytest.raises(ValueError, match="laid out for inference") as error:
        attempt(laid_out(make()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "format", "message"),
    [({}, "int3", "int8 or int4"), ({"intermediate_size": 80}, "int4", "down_proj")],
)
def test_a_refused_format_changes_nothing(changes, format, message):
    model = make(**changes)
    before = logits_of(model)
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(model, format)
    assert torch.equal(logits_of(model), before)


def swapped(*linears):
    return STACKED(*reversed(linears))


def without_bias(*linears):
    return STACKED(*linears)[0], None


def unweighted(x, norm):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], None, norm.eps)


def norms_swapped(attention, H, K):
    norm = HEAD_NORM(attention, H, K)
    norm.weight = torch.nn.Parameter(norm.weight.flip(0))
    return norm


def scale_of_queries(attention, H, K):
    norm = HEAD_NORM(attention, H, K)
    norm.weight = torch.nn.Parameter(norm.weight[:1])
    return norm


HEAD_NORM = module._head_norm
STACKED, ATTEND = module._stacked, module.grouped_query_attention


@pytest.mark.mutant
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("_stacked", swapped),
        ("_stacked", without_bias),
        ("_normed", unweighted),
        ("grouped_query_attention", lambda q, k, v, mask: ATTEND(q, k, v, None)),
        ("grouped_query_attention", lambda q, k, v, mask: ATTEND(q, v, k, mask)),
    ],
)
def test_broken_parts_are_noticed(monkeypatch, name, broken):
    monkeypatch.setattr(module, name, broken)
    try:
        same = agree(make())
    except RuntimeError:  # the shapes no longer fit
        return
    assert not same


@pytest.mark.mutant
@pytest.mark.parametrize(
    "broken", [norms_swapped, scale_of_queries, lambda attention, H, K: None]
)
def test_broken_norms_of_heads_are_noticed(monkeypatch, broken):
    monkeypatch.setattr(module, "_head_norm", broken)
    assert not agree(make(**QWEN3))

"""The names others depend on, the published counts, the cache and packed documents."""
import re
import tomllib
from pathlib import Path

import pytest
import torch
from book import scramble_
from hypothesis import given, settings, strategies as st

from qwen_analog import PRESETS, KVCache, QwenConfig, QwenForCausalLM
from qwen_analog.config import parameter_ledger
from qwen_analog.loss import linear_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"card": 3_199_240_192, "analog-2.5b": 2_557_446_144, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
          "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512}


def tiny():
    return scramble_(QwenForCausalLM(QwenConfig.from_preset("tiny"))).double().eval()


def ids(rows=2, length=12):
    return torch.randint(512, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    config = QwenConfig.from_preset(name)
    with torch.device("meta"):
        model = QwenForCausalLM(config)
    assert model.count_parameters() == sum(parameter_ledger(config).values()) == COUNTS[name]


def test_default_config_is_the_card():
    assert QwenConfig() == QwenConfig.from_preset("card") and set(COUNTS) < set(PRESETS)


@pytest.mark.parametrize("field, value", [("vocab_size", 0), ("hidden_size", 2.5), ("num_hidden_layers", True), ("head_dim", 3),
                                          ("num_key_value_heads", 3), ("rope_theta", float("nan")), ("rms_norm_eps", "1e-6"),
                                          ("attention_bias", 1), ("num_attention_heads", -1), ("widht", 1)])
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        QwenConfig.from_dict({field: value})


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_any_chunking_equals_the_full_forward(chunks):
    model, x = tiny(), ids(length=sum(chunks))
    cache = model.new_cache(2, sum(chunks))
    with torch.no_grad():
        pieces = torch.cat([model(piece, cache=cache) for piece in x.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(x), rtol=1e-5, atol=1e-5)


def test_cache_overflow_and_crop():
    cache = KVCache(1, 1, 2, 4, max_length=3)
    cache.update(0, torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))
    with pytest.raises(ValueError, match="holds 3 tokens; 4 are needed"):
        cache.update(0, torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))
    cache.crop(1)
    assert cache.length == 1
    with pytest.raises(ValueError, match="cannot crop to 2"):
        cache.crop(2)


def test_a_token_of_the_card_costs_147456_bytes():
    c = QwenConfig()
    cache = KVCache(c.num_hidden_layers, 1, c.num_key_value_heads, c.head_dim, 1, dtype=torch.bfloat16, device="meta")
    assert cache.nbytes == 147_456


def test_packed_documents_do_not_see_each_other():
    model, x = tiny(), ids(rows=1)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        apart = torch.cat((model(x[:, :5]), model(x[:, 5:])), dim=1)
        torch.testing.assert_close(model(x, document_ids=documents), apart)
        assert (model(x) - apart).abs().max() > 0.1


def test_checkpointing_changes_neither_loss_nor_gradients():
    model, x = tiny().train(), ids()
    results = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        loss = model(x[:, :-1], targets=x[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("chunk_size", [1, 5, 100, None])
def test_chunked_loss_equals_plain(chunk_size):
    hidden = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (3, 7))
    targets[0, :4] = -100
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    reference = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(reference, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_tied_model_refuses_a_different_head():
    model = tiny()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        model.load_state_dict(state)


def test_pins_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {r for group in [project["dependencies"], *project["optional-dependencies"].values()] for r in group if "==" in r}
    pins |= set((ROOT / "requirements-assets.txt").read_text().split())
    locked = set((ROOT / "requirements.lock").read_text().lower().replace("_", "-").split())
    locked |= set((ROOT / "requirements-assets.txt").read_text().split())
    environment = set(re.findall(r"^ {6}- (\S+)$", (ROOT / "environment.yml").read_text(), re.M))
    assert pins == environment and pins <= locked

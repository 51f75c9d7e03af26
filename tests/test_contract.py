"""The names others depend on, the published counts, the cache and packed documents."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from book import scramble_
from hypothesis import given, settings, strategies as st

from qwen_analog import PRESETS, KVCache, QwenConfig, QwenForCausalLM
from qwen_analog.config import check_generation_config, parameter_counts
from qwen_analog.loss import linear_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {
    "analog-3b": 3_199_240_192,
    "analog-2.5b": 2_557_446_144,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}


def tiny():
    return scramble_(QwenForCausalLM(QwenConfig.from_preset("tiny"))).double().eval()


def ids(rows=2, length=12):
    return torch.randint(
        512, (rows, length), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    config = QwenConfig.from_preset(name)
    with torch.device("meta"):
        model = QwenForCausalLM(config)
    assert (
        model.count_parameters()
        == sum(parameter_counts(config).values())
        == COUNTS[name]
    )


def test_positions_of_fields_keep_their_meaning():
    """Fields that came later stand behind those that were there."""
    names = [field.name for field in dataclasses.fields(QwenConfig)]
    assert names[-3:] == ["attention_bias", "initializer_range", "qk_norm"]
    assert QwenConfig(512, 64, 2, 4, 2) == QwenConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        qk_norm=False,
    )


def test_default_config_is_the_card():
    assert QwenConfig() == QwenConfig.from_preset("analog-3b")
    assert QwenConfig() == QwenConfig.from_preset("card")
    assert set(COUNTS) < set(PRESETS)


NONSENSE = [
    None,
    True,
    "x",
    "1e4",
    [],
    {},
    float("nan"),
    float("inf"),
    -1,
    0,
    2.5j,
    10**30,
    10**5000,
]


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(QwenConfig)]
)
def test_every_field_refuses_nonsense_in_one_line_that_names_it(field):
    fine = {
        "head_dim": [None],
        "rope_scaling": [None],
        "tie_word_embeddings": [True],
        "attention_bias": [True],
        "qk_norm": [True],
    }
    for value in NONSENSE:
        if any(value is right for right in fine.get(field, ())):
            continue
        with pytest.raises(ValueError) as error:
            QwenConfig.from_dict({field: value})
        assert (
            field in str(error.value)
            and "\n" not in str(error.value)
            and len(str(error.value)) < 250
        ), value


@pytest.mark.parametrize(
    "name",
    [
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
    ],
)
def test_every_number_of_a_stretched_rotation_is_checked(name):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    QwenConfig(rope_scaling=yarn)
    for value in NONSENSE:
        with pytest.raises(
            ValueError, match=f"rope_scaling's {name} must be a positive number"
        ):
            QwenConfig(rope_scaling={**yarn, name: value})


def test_a_configuration_that_is_no_mapping_and_a_preset_that_is_no_name():
    for values in ([1], None, "tiny", 5):
        with pytest.raises(
            ValueError, match="a model's configuration must be fields and their values"
        ):
            QwenConfig.from_dict(values)
    for values in ({5: 1}, {"a\nb" * 1000: 1}):
        with pytest.raises(ValueError, match="unknown model field") as error:
            QwenConfig.from_dict(values)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for name in (["card"], None, "crad"):
        with pytest.raises(ValueError, match="unknown preset"):
            QwenConfig.from_preset(name)


def test_generation_settings_keep_their_meaning():
    given = {
        "eos_token_id": 5,
        "bos_token_id": 1,
        "pad_token_id": None,
        "do_sample": False,
        "temperature": 0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": None,
        "repetition_penalty": 1.2,
        "max_new_tokens": 2048,
        "stop_strings": ["x"],
        "_from": {"a": [None, 1.5]},
    }
    checked = check_generation_config(given, 10, "g.json")
    assert checked == {
        **{name: value for name, value in given.items() if name != "pad_token_id"},
        "eos_token_id": [5],
    }
    assert (
        check_generation_config(checked, 10, "g.json") == checked
        and json.loads(json.dumps(checked)) == checked
    )
    assert check_generation_config({"eos_token_id": [7, 5, 7]}, 10, "g.json") == {
        "eos_token_id": [7, 5]
    }
    nothing = {
        "eos_token_id": None,
        "bos_token_id": -1,
        "pad_token_id": 10,
        "a": float("nan"),
        "b": {5: 1},
        "c": object(),
        7: 1,
        "d": 2**70,
    }
    assert (
        check_generation_config(nothing, 10, "g.json")
        == {}
        == check_generation_config({"eos_token_id": []}, 10, "g.json")
    )


@pytest.mark.parametrize(
    "name, values",
    [
        ("eos_token_id", [10, -1, True, "5", 5.0, [5, None], [[5]], {}, 2**70]),
        ("do_sample", [1, "yes", []]),
        ("temperature", [float("nan"), float("inf"), -0.1, "1", True, [1], 10**400]),
        ("top_k", [-1, 2.0, True, "5", 2**40, float("nan")]),
        ("top_p", [1.1, -0.1, float("nan"), "1", True]),
        ("min_p", [1.1, -1, "x", {}]),
        ("repetition_penalty", [0, -1, 1e-300, 1e300, "1", True]),
    ],
)
def test_wrong_generation_settings_are_refused_by_file_and_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^g.json: {name} ") as error:
            check_generation_config({name: value}, 10, "g.json")
        assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match="^g.json: generation settings must be names and their values"
    ):
        check_generation_config([1], 10, "g.json")


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab_size", 0),
        ("hidden_size", 2.5),
        ("num_hidden_layers", True),
        ("head_dim", 3),
        ("num_key_value_heads", 3),
        ("rope_theta", float("nan")),
        ("rms_norm_eps", "1e-6"),
        ("attention_bias", 1),
        ("num_attention_heads", -1),
        ("widht", 1),
    ],
)
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        QwenConfig.from_dict({field: value})


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_any_chunking_equals_the_full_forward(chunks):
    model, x = tiny(), ids(length=sum(chunks))
    cache = model.new_cache(2, sum(chunks))
    with torch.no_grad():
        pieces = torch.cat(
            [model(piece, cache=cache) for piece in x.split(chunks, dim=1)], dim=1
        )
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
    cache = KVCache(
        c.num_hidden_layers,
        1,
        c.num_key_value_heads,
        c.head_dim,
        1,
        dtype=torch.bfloat16,
        device="meta",
    )
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
    for switch in (
        model.gradient_checkpointing_disable,
        model.gradient_checkpointing_enable,
    ):
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
    reference = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten()
    )
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(reference, (hidden, weight)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_tied_model_refuses_a_different_head():
    model = tiny()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        model.load_state_dict(state)


def lines(name):
    return (ROOT / name).read_text().lower().replace("_", "-").split()


def test_each_range_holds_the_version_that_is_locked():
    """pyproject.toml gives ranges; the lock pins what `make` and CI install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    ranges = [Requirement(text) for group in groups for text in group]
    locked = dict(line.split("==") for line in lines("requirements.lock"))
    for wanted in ranges:
        name = wanted.name.replace("_", "-").lower()
        if name != "qwen-analog":
            assert locked[name] in wanted.specifier, wanted
            operators = {part.operator for part in wanted.specifier}
            assert operators == {">="}, f"{wanted}: a library gives a range"


def test_the_environment_is_part_of_the_lock():
    named = re.findall(r"^ {6}- (\S+)$", (ROOT / "environment.yml").read_text(), re.M)
    pinned = {line.lower().replace("_", "-") for line in named}
    assert pinned <= {*lines("requirements.lock"), *lines("requirements-assets.txt")}
    for name in ("torch", "jupyterlab", "matplotlib", "einops", "datasets", "nbmake"):
        assert any(pin.startswith(name + "==") for pin in pinned), name

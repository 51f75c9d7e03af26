"""What `QwenConfig` refuses, with each rule left out once, and what generation settings
keep and refuse.
"""

import copy
import inspect
import json
import pickle
import random
from collections import Counter

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_analog import config as module
from qwen_analog.config import (
    PRESETS,
    GenerationDefaults,
    ModelShape,
    QwenConfig,
    parameter_counts,
)
from qwen_analog.model import QwenForCausalLM

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WRONG = [
    ("vocab_size", 0),
    ("hidden_size", 2048.0),
    ("num_hidden_layers", True),
    ("num_hidden_layers", -4),
    ("num_attention_heads", "16"),
    ("intermediate_size", None),
    ("max_position_embeddings", 0),
    ("num_key_value_heads", 6),
    ("hidden_size", 2050),
    ("head_dim", 0),
    ("head_dim", 65),
    ("head_dim", 64.0),
    ("head_dim", True),
    ("rope_theta", float("nan")),
    ("rope_theta", float("inf")),
    ("rope_theta", "1e6"),
    ("rms_norm_eps", -1e-6),
    ("initializer_range", 0),
    ("initializer_range", True),
    ("rope_scaling", 4.0),
    ("rope_scaling", {"rope_type": "linear", "factor": 4.0}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {**YARN, "factor": 0}),
    ("rope_scaling", {**YARN, "mscale": 1.0}),
    ("rope_scaling", {**YARN, "low_freq_factor": 1.0}),
    ("rope_scaling", {**LLAMA3, "beta_fast": 32.0}),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 0}),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}),
    ("rope_scaling", {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}),
    ("rope_scaling", {**LLAMA3, "rope_type": ["llama3"]}),
    ("qk_norm", 1),
    ("qk_norm", None),
    ("tie_word_embeddings", 1),
    ("attention_bias", "yes"),
    ("hidden_size", 10**12),
    ("num_kv_heads", 2),
]
RIGHT = [
    {},
    {"head_dim": 80},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 16},
    {"rope_theta": 10000},
    {"hidden_size": 2050, "head_dim": 128},
    {"rope_scaling": {**YARN, "beta_fast": 16}},
    {"tie_word_embeddings": False},
    {"attention_bias": False},
    {"rope_scaling": LLAMA3},
    {"qk_norm": True, "attention_bias": False, "head_dim": 128},
]


def first_wrong_decision():
    for field, value in WRONG:
        try:
            QwenConfig.from_dict({field: value})
        except ValueError as error:
            if field not in str(error):
                return f"{field}={value!r}: {error}"
        except Exception as error:
            return f"{field}={value!r}: {type(error).__name__}"
        else:
            return f"{field}={value!r} is accepted"
    for values in RIGHT:
        try:
            QwenConfig.from_dict(values)
        except ValueError as error:
            return f"{values} is refused: {error}"
    return None


def test_it_refuses_what_is_wrong_and_nothing_else():
    assert first_wrong_decision() is None


def whole(change):
    def is_whole(value, least, most, real=module._is_whole):
        return change(value, least, most) or real(value, least, most)

    return "_is_whole", is_whole


def number_of(*types):
    return "_is_number", lambda value: isinstance(value, types)


def without(table, *names):
    rows = getattr(module, table)
    if isinstance(rows, tuple):
        return table, tuple(name for name in rows if name not in names)
    return table, {name: row for name, row in rows.items() if name not in names}


def lazy_head_dim(config):
    module._check_fields(config)
    return config.head_dim or config.hidden_size // config.num_attention_heads


def hopeful(config, real=module._check_fields):
    """Refuse a theta that is too small, instead of asking for one that is right."""
    theta = config.rope_theta
    if isinstance(theta, float) and theta <= 1:
        raise ValueError(f"rope_theta must be above 1, not {theta}")
    real(ModelShape(**{**vars(config), "rope_theta": 1e6, "head_dim": 2}))


MUTANTS = {
    "counts may be booleans": whole(lambda v, least, most: v is True),
    "counts may be zero": whole(lambda v, least, most: v == 0 and least == 1),
    "counts may be negative": whole(lambda v, least, most: v == -4),
    "counts may be huge": whole(
        lambda v, least, most: type(v) is int and v > most and v > 10**9
    ),
    "counts may be floats": whole(
        lambda v, least, most: isinstance(v, float) and v >= least
    ),
    "a text is a number": number_of(int, float, str),
    "numbers must be floats": number_of(float),
    "theta is not checked": without("_RANGES", "rope_theta"),
    "eps is not checked": without("_RANGES", "rms_norm_eps"),
    "the initial range is not checked": without("_RANGES", "initializer_range"),
    "no flag is checked": without("_FLAGS", *module._FLAGS),
    "ties are not checked": without("_FLAGS", "tie_word_embeddings"),
    "biases are not checked": without("_FLAGS", "attention_bias"),
    "norms of queries are not checked": without("_FLAGS", "qk_norm"),
    "YaRN's names for Llama 3": ("_OF_LLAMA3", module._OF_LLAMA3 + module._OF_YARN),
    "Llama 3's names for YaRN": ("_OF_YARN", module._OF_LLAMA3 + module._OF_YARN),
    "theta may be infinite": (
        "_RANGES",
        {**module._RANGES, "rope_theta": (1, float("inf"))},
    ),
    "heads are not checked": ("_checked_head_dim", lazy_head_dim),
    "stretching is not checked": ("_check_rope_scaling", lambda given: None),
    "names are not checked": ("_check_names", lambda values, known: None),
    "theta is asked for what is wrong": ("_check_fields", hopeful),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_rule_left_out_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(module, *MUTANTS[mutant])
    assert first_wrong_decision() is not None


def test_the_default_preset_has_two_names():
    assert QwenConfig.from_preset("card") == QwenConfig.from_preset("analog-3b")
    assert QwenConfig.from_preset("analog-3b") == QwenConfig()
    assert "analog-3b" in PRESETS and "card" not in PRESETS
    small = QwenConfig.from_preset("card", hidden_size=1024)
    assert small.head_dim == 64


GIVEN = {
    "eos_token_id": [7, 5],
    "bos_token_id": 1,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "min_p": None,
    "max_new_tokens": 2048,
    "others": {"a": 1},
}


def test_settings_are_attributes_and_read_like_a_dict():
    defaults = GenerationDefaults.from_dict(GIVEN, 10, "g.json")
    assert defaults.eos_token_id == (7, 5) and defaults.temperature == 0.7
    assert defaults.top_p is None and defaults.pad_token_id is None
    assert defaults == GIVEN == defaults.to_dict() == dict(defaults) == {**defaults}
    assert defaults["eos_token_id"] == [7, 5] and defaults.get("top_p") is None
    assert "top_k" in defaults and len(defaults) == len(GIVEN)
    assert json.loads(json.dumps(defaults.to_dict())) == GIVEN
    again = GenerationDefaults.from_dict(defaults, 10, "g.json")
    for same in (again, copy.deepcopy(defaults), pickle.loads(pickle.dumps(defaults))):
        assert same == defaults and same != GenerationDefaults()
    assert not GenerationDefaults() and GenerationDefaults() == {}
    with pytest.raises(AttributeError):
        defaults.top_k = 3
    with pytest.raises(KeyError):
        defaults["top_p"]


@pytest.mark.parametrize("ends", [5, [5], (5,), [5, 5]])
def test_end_ids_in_every_form(ends):
    defaults = GenerationDefaults.from_dict({"eos_token_id": ends}, 10, "g.json")
    assert defaults.eos_token_id == (5,) and defaults == {"eos_token_id": [5]}


PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "mlp",
    "norm": "norms",
    "lm_head": "lm_head",
}


def count_modules(make, config):
    """Weights by part of the model `make(config)`; a shared matrix counts once."""
    with torch.device("meta"):
        model = make(config)
    counts = Counter(dict.fromkeys(PARTS.values(), 0))
    for name, p in model.named_parameters():
        counts[next(PARTS[word] for word in PARTS if word in name)] += p.numel()
    return dict(counts)


def odd_shapes():
    """Shapes that nobody would train: no biases, a head_dim of its own, random ones."""
    draw = random.Random(0)
    yield "no biases", QwenConfig.from_preset("tiny", attention_bias=False)
    yield "own head_dim", QwenConfig.from_preset("tiny", head_dim=20)
    for i in range(40):
        kv_heads = draw.randint(1, 4)
        yield (
            f"random {i}",
            QwenConfig(
                vocab_size=draw.randint(1, 500),
                hidden_size=draw.randint(1, 90),
                num_hidden_layers=draw.randint(1, 5),
                num_attention_heads=kv_heads * draw.randint(1, 4),
                num_key_value_heads=kv_heads,
                head_dim=2 * draw.randint(1, 20),
                intermediate_size=draw.randint(1, 99),
                tie_word_embeddings=draw.random() < 0.5,
                attention_bias=draw.random() < 0.5,
                qk_norm=i % 2 == 1,
            ),
        )


@pytest.fixture(scope="module")
def counted():
    """(shape, weights by part of the real modules) of presets and odd shapes."""
    presets = [(name, QwenConfig.from_preset(name)) for name in PRESETS]
    shapes = dict(presets + list(odd_shapes()))
    return {n: (c, count_modules(QwenForCausalLM, c)) for n, c in shapes.items()}


def first_difference(ledger, counted):
    for name, (config, real) in counted.items():
        for part, count in ledger(config).items():
            if count != real[part]:
                return f"{name}, {part}: {count:,}, not {real[part]:,}"
    return None


def hugging_face(config):
    values = config.to_dict()
    if values.pop("qk_norm"):
        return Qwen3ForCausalLM(Qwen3Config(**values))
    del values["attention_bias"]  # always true there
    return Qwen2ForCausalLM(Qwen2Config(**values))


def test_the_ledger_counts_what_the_modules_hold(counted):
    assert first_difference(parameter_counts, counted) is None
    assert len(counted) == len(PRESETS) + 42
    for name in PRESETS:
        config, real = counted[name]
        assert count_modules(hugging_face, config) == real, name


WRONG_COUNTS = {
    "forgets the bias of q": ("q_width + 2 * kv_width if", "2 * kv_width if"),
    "forgets the bias of v": ("q_width + 2 * kv_width if", "q_width + kv_width if"),
    "a bias on o too": ("2 * D * q_width\n", "2 * D * q_width + D\n"),
    "K = H": ("config.num_key_value_heads *", "config.num_attention_heads *"),
    "keys and values share a matrix": ("2 * D * kv_width", "D * kv_width"),
    "an MLP of two matrices": ("L * 3 * D * F", "L * 2 * D * F"),
    "forgets the final norm": ("(2 * L + 1) * D", "2 * L * D"),
    "one norm a layer": ("(2 * L + 1)", "(L + 1)"),
    "counts a tied head": ("0 if config.tie_word_embeddings else V * D", "V * D"),
    "forgets an untied head": ("0 if config.tie_word_embeddings else V * D", "0"),
    "biases always": (" if config.attention_bias else 0", ""),
    "forgets the norms of heads": (" if config.qk_norm else 0", " if False else 0"),
    "norms of heads always": (" if config.qk_norm else 0", ""),
    "a norm of queries only": ("2 * config.head_dim if", "config.head_dim if"),
    "a norm weight for each head": ("2 * config.head_dim if", "q_width + kv_width if"),
    "o is D x D": ("2 * D * q_width\n", "D * q_width + D * D\n"),
    "h = D / H": ("config.num_attention_heads * config.head_dim", "D"),
}


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", WRONG_COUNTS)
def test_a_wrong_ledger_is_noticed(mutant, counted):
    old, new = WRONG_COUNTS[mutant]
    source = inspect.getsource(parameter_counts)
    assert source.count(old) == 1
    space = dict(vars(module))
    exec(source.replace(old, new), space)
    assert first_difference(space["parameter_counts"], counted) is not None

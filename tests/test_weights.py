"""Tensors in files against those of a model: headers and shards that lie."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_helpers import IDS, one_line, small, theirs

from qwen_analog.config import GenerationDefaults
from qwen_analog.hf import load_pretrained
from qwen_analog.weights import assemble, check_tensors, weight_shapes

pytest_plugins = ["weights_helpers"]


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


def test_rotary_frequencies_in_shards_are_passed_over(tmp_path, tokenizer_files):
    """Llama files of 2023 hold them, and their index names them."""
    reference = theirs(tmp_path, tokenizer_files, "llama", shard="40KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    file = tmp_path / weight_map["model.norm.weight"]
    save_file({**load_file(file), name: torch.ones(4)}, file)
    index.write_text(json.dumps({"weight_map": {**weight_map, name: file.name}}))
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), reference(IDS).logits, atol=2e-5)


def test_one_message_lists_all_differences():
    config = small().config
    expected = weight_shapes(config)
    assert expected == {
        name: list(weight.shape)
        for name, weight in small().state_dict().items()
        if name != "lm_head.weight"
    }
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    assert weight_shapes(untied)["lm_head.weight"] == [430, 48]
    check_tensors(expected, expected, "a file")
    found = {name: shape for name, shape in expected.items() if "k_proj" not in name}
    found |= {"model.norm.weight": [49], "x\ny": [2]}
    with pytest.raises(ValueError) as error:
        check_tensors(found, expected, "a file")
    missing = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3)]
    missing += [f"model.layers.{i}.self_attn.k_proj.bias" for i in range(3)]
    assert one_line(error) == (
        "a file: the tensors do not fit the configuration; missing:"
        f" {', '.join(missing)}; not of this model: 'x\\ny'; of another shape:"
        " model.norm.weight is [49], not [48]"
    )


def test_the_weights_that_were_read_become_the_parameters():
    model = small()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    again = assemble(model.config, weights, GenerationDefaults(eos_token_id=(3,)))
    for name, weight in again.state_dict().items():
        if name != "lm_head.weight":  # tied: the embedding's
            assert weight.data_ptr() == weights[name].data_ptr()
    assert not again.training and again.generation_config.eos_token_id == (3,)
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))

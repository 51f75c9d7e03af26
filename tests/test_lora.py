"""Adapters beside PEFT's: logits, gradients, files both ways, and what is refused."""

import copy
import json

import pytest
import torch
from helpers import BYTES, SHAPE, refused, small_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_analog import QwenConfig, QwenForCausalLM, load
from qwen_analog.cli import build_parser, main
from qwen_analog.hf import save_pretrained
from qwen_analog.inference import optimize_for_inference
from qwen_analog.jsonl import write_jsonl
from qwen_analog.lora import (
    TARGETS,
    LoRALinear,
    add_lora,
    load_lora,
    lora_disabled,
    lora_layers,
    merge_lora,
    save_lora,
)
from qwen_analog.quantize import quantize

NARROW = {"intermediate_size": 32}
IDS = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))


def reference():
    values = {name: value for name, value in SHAPE.items() if name != "rope_theta"}
    rotation = {"rope_type": "default", "rope_theta": SHAPE["rope_theta"]}
    config = Qwen2Config(**values, rope_parameters=rotation, tie_word_embeddings=True)
    theirs = Qwen2ForCausalLM(config).eval()
    theirs.load_state_dict(small_model().state_dict())
    return theirs


def adapted(**options):
    model = add_lora(small_model(), 4, 8, **options)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_peft_reads_ours_and_has_our_gradients(tmp_path):
    ours = adapted()
    save_lora(ours, tmp_path / "a")
    theirs = PeftModel.from_pretrained(reference(), tmp_path / "a", is_trainable=True)
    logits, expected = ours(IDS), theirs.eval()(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for name, p in ours.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if p.requires_grad:
            name = f"base_model.model.{name}.default.weight"
            grad = theirs.get_parameter(name).grad
            torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_is_peft_to_the_bit():
    ours = adapted()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS))
    theirs = get_peft_model(small_model(), settings).eval()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        p.copy_(q)
    assert torch.equal(ours.bfloat16()(IDS), theirs.bfloat16()(IDS))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "alpha_pattern": {"down_proj": 3}},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5}},
        {"layers_to_transform": [1]},
    ],
)
@torch.no_grad()
def test_we_read_peft(tmp_path, options):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options
    )
    theirs = get_peft_model(reference(), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "a")
    ours, expected = load_lora(small_model(), tmp_path / "a"), theirs(IDS).logits
    torch.testing.assert_close(ours(IDS), expected, atol=1e-4, rtol=1e-5)
    save_lora(ours, tmp_path / "b")
    again = PeftModel.from_pretrained(reference(), tmp_path / "b")(IDS).logits
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_off_merged_and_opened(tmp_path):
    plain, model = small_model(), adapted()
    fresh = add_lora(small_model())
    assert torch.equal(fresh(IDS), plain(IDS))
    expected = model(IDS)
    assert not torch.allclose(expected, plain(IDS), atol=1e-2)
    with pytest.raises(KeyError), lora_disabled(model):
        assert torch.equal(model(IDS), plain(IDS))
        raise KeyError
    assert torch.equal(model(IDS), expected)
    base = save_pretrained(plain, BYTES, tmp_path / "base")
    save_lora(model, tmp_path / "a", base=base)
    opened = load(tmp_path / "a")[0]
    merge_lora(model)
    assert torch.equal(opened(IDS), model(IDS))
    torch.testing.assert_close(model(IDS), expected, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_generation_settings_stay_with_an_adapter(tmp_path):
    model, path = adapted(), tmp_path / "a" / "generation_config.json"
    save_lora(model, tmp_path / "a")
    assert not path.exists()  # nothing to say
    model.generation_config = {"eos_token_id": [7, 3], "temperature": 0.5}
    save_lora(model, tmp_path / "b")
    (tmp_path / "b" / path.name).rename(path)
    base = small_model()
    base.generation_config = {"eos_token_id": 3, "top_k": 9}
    expected = {"eos_token_id": [7, 3], "temperature": 0.5, "top_k": 9}
    assert load_lora(base, tmp_path / "a").generation_config == expected
    path.write_text('{"eos_token_id": 99999}')
    base = small_model()
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id 99999"):
        load_lora(base, tmp_path / "a")
    assert not lora_layers(base) and not base.generation_config


def test_an_adapter_is_put_on_the_base_that_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    save_pretrained(small_model(), BYTES, "base")
    narrow = QwenConfig.from_dict({**small_model().config.to_dict(), **NARROW})
    save_pretrained(QwenForCausalLM(narrow), BYTES, "other")
    for name, base in (("a", "gone/base"), ("b", None), ("c", "a")):
        save_lora(model, name, base=base)
    merge_lora(model)
    for name in "abc":
        opened, _ = load(name, base="base")
        assert torch.equal(opened(IDS), model(IDS))
    write_jsonl([{"text": "some text"}], "d.jsonl")
    wrong = {"a": "gone/base", "b": "base_model_name_or_path", "c": "adapter itself"}
    for name, says in wrong.items():
        said = refused(capsys, "export", "out", "--model", name)
        assert said.startswith(f"qwen-analog: error: {name}: ")
        assert says in said and "with --base" in said
    text = "--data d.jsonl --heldout-fraction 1 --context 8"
    for command in (
        "export out --model a",
        "generate x --max-new-tokens 2 --model a",
        f"eval {text} --model base a",
    ):
        assert main([*command.split(), "--base", "base"]) == 0
    exported, _ = load("out")
    assert torch.equal(exported(IDS), model(IDS))
    with pytest.raises(ValueError, match="other does not open, or is another model"):
        load("a", base="other")
    with pytest.raises(ValueError, match="base is no adapter, so it has no base"):
        load("base", base="other")
    for command in ("chat", "serve"):
        arguments = build_parser(command).parse_args([command, "--base", "x"])
        assert arguments.base == "x"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "'use_dora' True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "'bias' 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"alpha_pattern": {"(a+)+": 1}}, "only names"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_refused_by_name(tmp_path, change, says):
    save_lora(adapted(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = small_model()
    with pytest.raises(ValueError, match="adapter_config.json") as error:
        load_lora(model, tmp_path / "a")
    assert says in str(error.value) and not lora_layers(model)


def test_wrong_values_and_other_models(tmp_path):
    model = small_model()
    for options in ({"rank": 0}, {"alpha": 0}, {"targets": ["lm_head"]}):
        with pytest.raises(ValueError):
            add_lora(model, **options)
    with pytest.raises(ValueError, match="no adapters"):
        save_lora(model, tmp_path / "a")
    with pytest.raises(ValueError, match="already"):
        add_lora(copy.deepcopy(adapted()))


@pytest.mark.parametrize("use", ["optimize", "quantize", "save"])
def test_adapters_are_not_left_behind_silently(tmp_path, use):
    model = adapted()
    with pytest.raises(ValueError, match=r"has an adapter: call merge_lora\(model\)"):
        if use == "optimize":
            optimize_for_inference(model)
        elif use == "quantize":
            quantize(model, "int8")
        else:
            save_pretrained(model, BYTES, tmp_path / "whole")
    assert not list(tmp_path.iterdir())
    optimize_for_inference(merge_lora(model))

"""Training with the blocks' products in eight bits."""

import copy

import pytest
import torch
from torch import nn

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog import float8 as module
from qwen_analog.arguments import MissingExtraError
from qwen_analog.config import ACTIVATION_CHECKPOINTING
from qwen_analog.float8 import check_float8, to_float8
from qwen_analog.memory import set_activation_checkpointing
from qwen_analog.parallel import compile_layers
from qwen_analog.train_config import TrainConfig

SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=64,
)
IDS = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def settings(**values) -> TrainConfig:
    values = {"model": SHAPE, "sequence_length": 32, "float8": True, **values}
    return TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Hopper"),
        ({"precision": "fp32"}, "precision"),
        ({"lora_rank": 2}, "lora_rank"),
        ({"sequence_length": 24}, "micro_batch_size"),
        ({"model": {**SHAPE, "intermediate_size": 100}}, "intermediate_size"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message) as error:
        check_float8(settings(**values), CPU)
    assert "float8" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_on_which_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU's name")
    monkeypatch.setattr(module, "need", lambda name: None)
    if capability >= (9, 0):
        check_float8(settings(), torch.device("cuda"))
    else:
        with pytest.raises(ValueError, match="a GPU's name"):
            check_float8(settings(), torch.device("cuda"))


def test_without_float8_nothing_is_asked():
    check_float8(settings(float8=False, precision="fp32", lora_rank=2), CPU)


def test_without_torchao_a_line_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"qwen-analog\[float8\]"):
        to_float8(QwenForCausalLM(QwenConfig(**SHAPE)))


# --- what needs torchao: its layer, emulated


def pair(precision=torch.float32):
    pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    plain = QwenForCausalLM(QwenConfig(**SHAPE)).to(precision)
    eight = copy.deepcopy(plain)
    module.to_float8(eight, emulate=True)
    return plain, eight


def learn(model):
    model.zero_grad()
    loss = model(IDS[:, :-1], targets=IDS[:, 1:].contiguous())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def close(a, b) -> bool:
    """Loss and gradients nearly those of the other, and not the same."""
    gaps = {n: ((b[1][n] - g).norm() / g.norm()).item() for n, g in a[1].items()}
    near = abs(a[0] - b[0]) < 0.03 * a[0] and max(gaps.values()) < 0.25
    inside = [gap for n, gap in gaps.items() if "proj.weight" in n]
    return near and min(inside) > 0.005


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_nearly_the_plain_models(precision):
    plain, eight = pair(precision)
    assert close(learn(plain), learn(eight))


def test_the_blocks_and_no_other_layer_and_the_same_keys():
    plain, eight = pair()
    changed = {
        name
        for name, layer in eight.named_modules()
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    }
    linears = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)]
    assert changed == {name for name in linears if name != "lm_head"}
    assert eight.state_dict().keys() == plain.state_dict().keys()
    other = QwenForCausalLM(QwenConfig(**SHAPE))
    other.load_state_dict(eight.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IDS), plain(IDS))


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
def test_with_activation_checkpointing(mode):
    _, eight = pair()
    expected = learn(eight)
    set_activation_checkpointing(eight, mode)
    found = learn(eight)
    assert found[0] == expected[0]
    assert all(torch.equal(g, found[1][n]) for n, g in expected[1].items())


def test_compiled_by_block(monkeypatch):
    _, eight = pair()
    expected, compile_ = learn(eight), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compile_(self, backend="aot_eager")
    )
    compile_layers(eight)
    assert abs(learn(eight)[0] - expected[0]) < 1e-4


def test_a_model_that_training_builds(monkeypatch):
    pytest.importorskip("torchao.float8")
    from qwen_analog import train
    from qwen_analog.parallel import build_model

    monkeypatch.setattr(train, "to_float8", lambda m: to_float8(m, emulate=True))
    prepare = lambda model: train.prepare_layers(model, settings())
    how = {"strategy": "ddp", "precision": "fp32"}
    model, _ = build_model(QwenConfig(**SHAPE), 3, CPU, prepare=prepare, **how)
    torch.manual_seed(3)
    plain = QwenForCausalLM(QwenConfig(**SHAPE))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Float8Linear"


def unscaled(library):
    """float8 without scales: what is small is lost."""

    def convert(model, config, module_filter_fn):
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and module_filter_fn(layer, name):
                cut = lambda x: x.div(1000).to(torch.float8_e4m3fn).to(x.dtype) * 1000
                layer.forward = lambda x, m=layer: nn.functional.linear(
                    cut(x), cut(m.weight), m.bias
                )

    return convert


@pytest.mark.mutant
@pytest.mark.parametrize("broken", [unscaled, lambda library: lambda *a, **b: None])
def test_broken_products_are_noticed(monkeypatch, broken):
    library = pytest.importorskip("torchao.float8")
    monkeypatch.setattr(library, "convert_to_float8_training", broken(library))
    plain, eight = pair()
    assert not close(learn(plain), learn(eight))

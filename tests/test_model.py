"""What the model refuses, the import inside the package folder, and Llama's layout."""

import copy
import os
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from book import scramble_
from transformers import LlamaConfig, LlamaForCausalLM

import qwen_analog
from qwen_analog import QwenConfig, QwenForCausalLM

TINY = QwenConfig.from_preset("tiny")


@pytest.fixture(scope="module")
def model():
    return QwenForCausalLM(TINY)


@pytest.mark.parametrize(
    "ids, message",
    [
        (
            torch.ones(1, 3),
            "input_ids must be torch.int64 or torch.int32, not torch.float32",
        ),
        (torch.ones(1, 3, dtype=torch.bool), "not torch.bool"),
        (torch.ones(1, 3, dtype=torch.int16), "not torch.int16"),
        (
            torch.ones(3, dtype=torch.int64),
            r"input_ids must be \[batch, seq\], not of shape \[3\]",
        ),
        (torch.ones(1, 1, 3, dtype=torch.int64), "input_ids must be"),
        (
            torch.ones(1, 0, dtype=torch.int64),
            r"not of shape \[1, 0\], with at least one token",
        ),
        (
            torch.ones(0, 3, dtype=torch.int64),
            r"not of shape \[0, 3\], with at least one token",
        ),
        ([[1, 2]], r"input_ids must be a tensor \[batch, seq\], not a list"),
        (
            torch.ones(1, 257, dtype=torch.int64),
            "257 positions, 0 of them in the cache, exceed max_position_embeddings 256",
        ),
        (torch.tensor([[5, 512]]), r"input_ids must lie in 0 .. 511, not 5 .. 512"),
        (torch.tensor([[-1, 5]]), r"input_ids must lie in 0 .. 511, not -1 .. 5"),
        (torch.tensor([[512]], dtype=torch.int32), "input_ids must lie in"),
    ],
)
def test_bad_ids_are_refused(model, ids, message):
    with pytest.raises(ValueError, match=message) as error:
        model(ids)
    assert "\n" not in str(error.value)


def test_the_cache_counts_towards_the_positions_and_is_left_alone(model):
    cache = model.new_cache(1, 300)
    model(torch.zeros(1, 250, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="257 positions, 250 of them in the cache"):
        model(torch.zeros(1, 7, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="must lie in"):
        model(torch.full((1, 2), 600), cache=cache)
    assert cache.length == 250
    model(torch.zeros(1, 6, dtype=torch.int64), cache=cache)
    assert cache.length == 256


@pytest.mark.parametrize(
    "targets",
    [
        torch.ones(1, 4, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(4, dtype=torch.int64),
    ],
)
def test_targets_of_another_shape_are_refused(model, targets):
    with pytest.raises(
        ValueError, match=r"targets must have the shape of input_ids, \[2, 2\]"
    ):
        model(torch.ones(2, 2, dtype=torch.int64), targets=targets)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"targets": torch.zeros(1, 3)},
            "targets must be whole numbers, not torch.float32",
        ),
        (
            {"targets": [[1, 2, 3]]},
            r"targets must have the shape of input_ids, \[1, 3\], not a list",
        ),
        (
            {"document_ids": torch.zeros(1, 2, dtype=torch.int64)},
            r"document_ids must have the shape of input_ids, \[1, 3\], not \[1, 2\]",
        ),
        ({"document_ids": torch.zeros(1, 3)}, "document_ids must be whole numbers"),
        ({"logits_to_keep": -1}, "logits_to_keep must be at least 0"),
    ],
)
def test_other_arguments_that_do_not_fit_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        model(torch.zeros(1, 3, dtype=torch.int64), **arguments)
    assert "\n" not in str(error.value)


def test_generation_settings_belong_to_one_model_and_go_where_it_goes():
    model, other = QwenForCausalLM(TINY), QwenForCausalLM(TINY)
    assert model.generation_config == {} == other.generation_config
    model.generation_config = {"eos_token_id": [5], "top_k": 3}
    other.load_state_dict(model.state_dict())
    assert other.generation_config == {} and not any(
        "generation" in name for name in model.state_dict()
    )
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        model.to(torch.float64),
    ):
        assert again.generation_config == {"eos_token_id": [5], "top_k": 3}


def test_int32_ids_and_a_compiled_model_give_the_same(model):
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(ids)
    assert torch.equal(model(ids.int()), expected)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="eager")(ids), expected
    )


def test_init_weights_ties_what_to_empty_untied():
    with torch.device("meta"):
        model = QwenForCausalLM(TINY)
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("installed", [True, False])
def test_import_inside_the_package_folder(installed):
    folder = Path(qwen_analog.__file__).parent
    code = (
        "from model import DecoderLayer, QwenConfig, QwenForCausalLM, QwenModel\nimport"
        " qwen_analog, qwen_analog.model as m, sys\nassert DecoderLayer is"
        " m.DecoderLayer and QwenModel is m.QwenModel and sys.modules['model'] is"
        " m\nassert QwenForCausalLM is qwen_analog.QwenForCausalLM and QwenConfig is"
        " qwen_analog.QwenConfig\nprint(qwen_analog.__file__)"
    )
    env = dict(os.environ)
    if (
        not installed
    ):  # -S skips the .pth files through which an editable install is found
        env["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
    run = subprocess.run(
        [sys.executable, *([] if installed else ["-S"]), "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).samefile(folder / "__init__.py")


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-5), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_without_biases_it_is_llama(tied, dtype, bound):
    config = QwenConfig(
        vocab_size=131,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        max_position_embeddings=128,
        attention_bias=False,
        tie_word_embeddings=tied,
    )
    values = config.to_dict()
    theta = values.pop("rope_theta")
    theirs = scramble_(
        LlamaForCausalLM(
            LlamaConfig(
                **values,
                mlp_bias=False,
                rope_parameters={"rope_type": "default", "rope_theta": theta},
            )
        )
    ).to(dtype)
    ours = QwenForCausalLM(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(131, (2, 17), generator=torch.Generator().manual_seed(1))
    a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() < bound * b.abs().max()
    weights = torch.randn(b.shape, generator=torch.Generator().manual_seed(2)).to(b)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    ours_by_name = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert (
            ours_by_name[name].grad - p.grad
        ).abs().max() < bound * p.grad.abs().max(), name
    with torch.no_grad():
        for layer in ours.model.layers:
            layer.input_layernorm.eps = 1e-3
    assert (ours(ids) - b).abs().max() > 10 * bound * b.abs().max()

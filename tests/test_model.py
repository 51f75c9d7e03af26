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
from test_parity import BASE
from transformers import LlamaConfig, LlamaForCausalLM

import qwen_analog
from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.attention import document_positions

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
    config = QwenConfig(**BASE, attention_bias=False, tie_word_embeddings=tied)
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


def test_methods_that_lead_up_are_the_functions(tmp_path, monkeypatch):
    model = QwenForCausalLM(TINY).eval()
    ids = torch.arange(6).reshape(2, 3)
    options = {"temperature": 0.8, "seed": 3, "eos_token_id": []}
    expected = qwen_analog.generate.generate(model, ids, 5, **options)
    assert torch.equal(model.generate(ids, 5, **options), expected)
    assert model.generate(ids, temperature=0, eos_token_id=[]).shape == (2, 103)

    saved = []
    monkeypatch.setattr(
        "qwen_analog.hf.save_pretrained", lambda *a, **k: saved.append((a, k))
    )
    model.save_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert saved == [((model, None, tmp_path / "m"), {"dtype": torch.bfloat16})]


def test_a_model_goes_through_a_directory(tmp_path):
    pytest.importorskip("qwen_analog.loading")
    model = QwenForCausalLM(TINY).eval()
    model.generation_config = {"eos_token_id": [5], "top_k": 3}
    model.save_pretrained(tmp_path / "m")
    again = QwenForCausalLM.from_pretrained(tmp_path / "m", device="cpu")
    ids = torch.arange(6).reshape(2, 3)
    assert torch.equal(again.eval()(ids), model(ids))
    assert again.generation_config == model.generation_config


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eos_token_id": 512}, "eos_token_id 512 is no id of this model"),
        ({"top_p": 7}, "top_p must be a number from 0 to 1"),
        ([1], "generation settings must be names and their values"),
    ],
)
def test_wrong_generation_settings_are_refused_when_assigned(model, wrong, message):
    with pytest.raises(ValueError, match=f"^model.generation_config: {message}"):
        model.generation_config = wrong
    model.generation_config = None
    assert model.generation_config == {}


def test_layers_are_made_of_parts_and_read_no_config():
    from qwen_analog.model import DecoderLayer, decoder_parts

    torch.manual_seed(0)
    layer = DecoderLayer(*decoder_parts(TINY, 1))
    assert layer.self_attn.layer_idx == 1 and layer.mlp.up_proj.out_features == 176
    assert list(layer.state_dict()) == [
        name.removeprefix("model.layers.1.")
        for name in QwenForCausalLM(TINY).state_dict()
        if name.startswith("model.layers.1.")
    ]


def run_in_pieces(model, ids, positions=None):
    """Logits of `ids` [B, 12] from a cache filled in two pieces of 6."""
    cache = model.new_cache(len(ids), 12)
    first = model(ids[:, :6], cache=cache)
    return torch.cat(
        (first, model(ids[:, 6:], position_ids=positions, cache=cache)), dim=1
    )


@pytest.mark.mutant
@pytest.mark.parametrize("shift", [0, 1, -6])
def test_new_positions_beside_a_cache_are_noticed(shift):
    model = scramble_(QwenForCausalLM(TINY)).double().eval()
    ids = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids)
        got = run_in_pieces(model, ids, torch.arange(6, 12)[None] + shift)
    gap = (got - whole).abs().max() / whole.abs().max()
    assert gap > 0.01 if shift else gap < 1e-9


@pytest.mark.mutant
def test_packed_documents_that_leak_are_noticed():
    model = scramble_(QwenForCausalLM(TINY)).double().eval()
    ids = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        alone = torch.cat((model(ids[:, :5]), model(ids[:, 5:])), dim=1)
        assert torch.allclose(model(ids, document_ids=documents), alone)
        got = model(ids, position_ids=document_positions(documents))  # and no mask
    apart = (got - alone).abs().amax(-1)[0]
    assert apart[:5].max() < 1e-9 and apart[5:].max() > 0.01


def test_the_first_block_runs_twice_with_recomputation():
    model = QwenForCausalLM(TINY).train()
    ids = torch.randint(512, (2, 9), generator=torch.Generator().manual_seed(0))
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: calls.append(1))
    for switch, expected in (("disable", 1), ("enable", 3)):
        getattr(model, f"gradient_checkpointing_{switch}")()
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        assert len(calls) == expected


@pytest.mark.mutant
def test_without_its_guard_the_file_cannot_be_imported_inside_its_folder():
    source = (Path(qwen_analog.__file__).parent / "model.py").read_text()
    assert "if not __package__" in source
    broken = source.replace("if not __package__", "if False")
    with pytest.raises(ImportError):
        exec(broken, {"__name__": "model", "__package__": ""})


def test_a_z_loss_is_refused_where_the_head_has_no_plain_matrix():
    model, ids = QwenForCausalLM(TINY), torch.arange(6).view(2, 3)
    loss = model(ids, targets=ids)
    model.lm_head = torch.nn.Sequential(model.lm_head)  # as a quantized head
    torch.testing.assert_close(model(ids, targets=ids), loss)
    with pytest.raises(ValueError, match="z_loss needs an lm_head that is nn.Linear"):
        model(ids, targets=ids, z_loss=1e-4)

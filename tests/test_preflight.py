"""How a run begins, and what is refused before any data are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import BYTES
from training import (  # noqa: F401
    MODEL,
    as_file,
    entries,
    final_weights,
    folder,
    settings,
    train_on,
)

from qwen_analog import QwenConfig, QwenForCausalLM, batches, preflight
from qwen_analog import train as module
from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import load_checkpoint, load_model, save_checkpoint
from qwen_analog.config import parameter_counts
from qwen_analog.distributed import DistributedContext
from qwen_analog.run_directory import claim
from qwen_analog.jsonl import DataError
from qwen_analog.hf import save_pretrained
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import TiktokenTokenizer
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig


def test_a_run_is_never_overwritten_and_auto_continues_it():
    train(settings(max_steps=6))
    before = Path("checkpoints/final/checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match="holds final already"):
        train(settings())
    with pytest.raises(CheckpointError, match="holds final already"):
        train(settings(), resume_from="checkpoints/step_2")
    assert train(settings(), resume_from="auto") == {"step": 6}
    assert Path("checkpoints/final/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(data=[]), DataError, "no data"),
        (dict(data=["nowhere.jsonl"]), DataError, "no data at 'nowhere.jsonl'"),
        (dict(sequence_length=65), ValueError, "sequence_length 65 is longer"),
        (dict(tokenizer="tiktoken:nowhere"), ValueError, "nowhere"),
        (
            dict(model={**MODEL, "vocab_size": 277}),
            ValueError,
            "vocab_size 277 is too small",
        ),
        (dict(model={**MODEL, "vocab_size": 151936}), ValueError, "no token uses"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(changes, error, message):
    with pytest.raises(error, match=message):
        train(settings(**changes))
    assert not Path("checkpoints").exists()


def test_a_directory_in_use_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(batches, "tokenize_files", lambda *_: pytest.fail("tokenized"))
    with claim("checkpoints"):
        for resume in (None, "auto"):
            with pytest.raises(
                CheckpointError, match="checkpoints is in use by another run"
            ):
                train(settings(), resume_from=resume)


def test_a_refused_run_leaves_nothing_and_the_next_may_begin():
    with pytest.raises(DataError):
        train(settings(data=["nowhere.jsonl"]))
    assert not Path("checkpoints").exists()
    assert train(settings(max_steps=1))["step"] == 1


def source(kind, seed=5, **changes):
    """A model with generation settings, on the disk."""
    torch.manual_seed(seed)
    model = QwenForCausalLM(QwenConfig(**{**MODEL, **changes}))
    model.generation_config = {"eos_token_id": [258, 256], "top_k": 7}
    if kind == "checkpoint":
        save_checkpoint(kind, model, BYTES)
    else:
        save_pretrained(model, BYTES, kind)
    return model


def begin(**changes):
    """Settings that name neither model nor tokenizer."""
    values = settings(**changes).model_dump(exclude_unset=True)
    return TrainConfig.create(
        {
            name: value
            for name, value in values.items()
            if name not in ("model", "tokenizer") or name in changes
        }
    )


@pytest.mark.parametrize("kind", ["checkpoint", "huggingface"])
def test_a_run_begins_with_the_weights_of_others(kind):
    model = source(kind, tie_word_embeddings=False, attention_bias=False)
    train(begin(learning_rate=1e-12, weight_decay=0.0), init_from=kind)
    got, _ = load_model("checkpoints/final")
    assert (
        got.config == model.config
        and got.generation_config["eos_token_id"] == [258, 256]
        and got.generation_config["top_k"] == 7
    )
    for name, weight in model.state_dict().items():
        assert (got.state_dict()[name] - weight).abs().max() < 1e-8
    shutil.rmtree(kind)  # later starts need it no more
    shutil.rmtree("checkpoints/final")
    train(begin(learning_rate=1e-12, weight_decay=0.0), resume_from="auto")
    assert load_model("checkpoints/final")[0].generation_config["top_k"] == 7


@pytest.mark.slow
def test_a_sharded_run_begins_with_the_weights_of_others():
    model = source("checkpoint")
    config = as_file(
        begin(
            learning_rate=1e-12,
            weight_decay=0.0,
            parallel="fsdp",
            micro_batch_size=2,
            max_steps=1,
            tensorboard=False,
        )
    )
    Path(config).write_text(
        json.dumps(
            {
                k: v
                for k, v in json.loads(Path(config).read_text()).items()
                if k not in ("model", "tokenizer")
            }
        )
    )
    train_on(2, "--config", config, "--init-from", "checkpoint")
    for name, weight in model.state_dict().items():
        assert (final_weights("checkpoints")[name] - weight).abs().max() < 1e-8


def test_what_the_settings_name_must_be_the_sources(capsys):
    source("checkpoint")
    assert (
        train(begin(model={"hidden_size": 32}, max_steps=1), init_from="checkpoint")[
            "step"
        ]
        == 1
    )
    with pytest.raises(ValueError, match="intermediate_size is 64, not 48"):
        train(
            begin(model={"intermediate_size": 64}, output_dir="b"),
            init_from="checkpoint",
        )
    TiktokenTokenizer({token: i for i, token in enumerate(reversed(BYTE_ORDER))}).save(
        "."
    )
    with pytest.raises(
        ValueError, match="tokenizer: tiktoken:tokenizer.tiktoken is another"
    ):
        train(
            begin(tokenizer="tiktoken:tokenizer.tiktoken", output_dir="b"),
            init_from="checkpoint",
        )
    assert module.main(["--init-from", "checkpoint", "--resume", "auto"]) == 2
    assert "--init-from starts a new run and --resume" in capsys.readouterr().err
    assert (
        module.main(["--resume", "", "--data", "corpus.jsonl"]) == 2
        and "must not be empty" in capsys.readouterr().err
    )
    assert (
        module.main(
            [
                "--init-from",
                "nowhere/at/all",
                "--data",
                "corpus.jsonl",
                "--output-dir",
                "c",
            ]
        )
        == 2
    )
    assert (
        capsys.readouterr().err.count("\n") == 1
        and not Path("b").exists()
        and not Path("c").exists()
    )


LARGE = {
    **MODEL,
    "hidden_size": 16384,
    "num_hidden_layers": 200,
    "intermediate_size": 65536,
}


@pytest.mark.parametrize(
    "changes",
    [
        dict(model=LARGE),
        dict(gradient_accumulation_steps=10**13),
        dict(micro_batch_size=10**12),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_read(changes, monkeypatch):
    monkeypatch.setattr(batches, "tokenize_files", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(
        ValueError,
        match=r"needs about [\d,.]+ GB of memory, and cpu has .*--ignore-memory",
    ) as caught:
        train(settings(**changes))
    assert (
        "\n" not in str(caught.value)
        and "micro_batch_size" in str(caught.value)
        and not Path("checkpoints").exists()
    )


def test_adapters_need_less_room_than_all_weights(monkeypatch):
    wide = {**MODEL, "hidden_size": 1024, "intermediate_size": 4096}
    whole, thin = settings(model=wide), settings(model=wide, lora_rank=2)
    weights = 4 * sum(parameter_counts(whole.qwen_config()).values())
    free = shutil._ntuple_diskusage(10**12, 0, 6 * weights)  # two moments: 10
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: free)
    needs = []
    monkeypatch.setattr(preflight, "require_memory", lambda *a: needs.append(a[0]))
    with DistributedContext() as context:
        preflight.check_room(thin, context)
        with pytest.raises(ValueError, match="its checkpoints need about"):
            preflight.check_room(whole, context)
    assert weights < needs[0] < needs[2] - 2 * weights


def test_room_for_checkpoints_is_asked_for_and_may_be_overruled(monkeypatch):
    monkeypatch.setattr(
        preflight.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000),
    )
    with pytest.raises(
        ValueError, match="output_dir checkpoints: its checkpoints need about"
    ):
        train(settings())
    assert train(settings(max_steps=1), ignore_memory=True)["step"] == 1


def test_a_warm_up_longer_than_the_run_is_shortened(capsys):
    train(
        settings(
            max_steps=20,
            warmup_steps=1000,
            learning_rate=0.01,
            save_every=99,
            eval_every=99,
        )
    )
    assert "warmup_steps 1,000 does not fit into 20 steps" in capsys.readouterr().err
    assert max(
        entry.get("learning_rate", 0) for entry in entries("checkpoints")
    ) == pytest.approx(0.01)
    assert load_checkpoint("checkpoints/final")["train_config"]["warmup_steps"] == 2


def test_prompts_that_do_not_fit_are_refused_before_training():
    with pytest.raises(
        ValueError,
        match="sample_prompts: 'xxx.*make 91 tokens; max_position_embeddings is 64",
    ):
        train(settings(sample_prompts=["x" * 80], sample_tokens=10))


def test_new_data_are_for_resuming(capsys):
    assert module.main(["--config", as_file(settings()), "--new-data"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("checkpoints").exists()

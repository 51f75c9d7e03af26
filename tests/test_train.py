"""Training: settings, resuming bit for bit, one process against two, faults, and the
commands.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

from qwen_analog import QwenForCausalLM
from qwen_analog.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_model,
)
from qwen_analog.cli import main as cli
from qwen_analog.config import QwenConfig
from qwen_analog.data import DataError
from qwen_analog.tokenizer import BYTE_ORDER, TiktokenTokenizer
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = dict(
    vocab_size=278,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    rope_theta=1e4,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a corpus of unequal documents and a byte vocabulary, as working
    directory.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    TiktokenTokenizer({token: i for i, token in enumerate(BYTE_ORDER)}).save(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{i}: " + "abcdefgh "[: 1 + i % 9] * (i * i % 17 + 1)})
            + "\n"
            for i in range(200)
        )
    )
    return tmp_path


def settings(**changes):
    values = dict(
        model=MODEL,
        tokenizer="tiktoken:tokenizer.tiktoken",
        data=["corpus.jsonl"],
        heldout_fraction=0.1,
        sequence_length=32,
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=6,
        warmup_steps=2,
        learning_rate=0.01,
        save_every=2,
        eval_every=3,
        eval_sequences=8,
        log_every=1,
        keep_last=9,
        precision="fp32",
    )
    return TrainConfig.create({**values, **changes})


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return (
        len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, (list, tuple))
        else a == b
    )


def training_state(path):
    checkpoint = load_checkpoint(path)
    return {
        k: checkpoint[k]
        for k in ("model_state_dict", "optimizer_state_dicts", "step", "data")
    }


def run(*command, processes=None, **kwargs):
    """A command in a process of its own; `processes` starts it under torchrun."""
    start = (
        [sys.executable]
        if processes is None
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(Path.cwd() / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*start, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        **kwargs,
    )


def as_file(config, name="config.json"):
    Path(name).write_text(config.model_dump_json())
    return name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stream", [False, True])
def test_resumed_equals_uninterrupted_bit_for_bit(optimizer, stream):
    shared = dict(
        optimizer=optimizer,
        stream=stream,
        precision="bf16",
        activation_checkpointing="full",
    )
    train(settings(output_dir="whole", **shared))
    for k in (2, 4):
        train(
            settings(output_dir=f"resumed_{k}", **shared),
            resume_from=f"whole/step_{k}/checkpoint.pt",
        )
        assert same(training_state(f"resumed_{k}/final"), training_state("whole/final"))


def test_two_runs_are_equal_and_another_seed_is_not():
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(settings(output_dir=name, seed=seed))
    assert same(training_state("a/final"), training_state("b/final"))
    assert not same(
        training_state("a/final")["model_state_dict"],
        training_state("c/final")["model_state_dict"],
    )


def final_weights(directory):
    return load_checkpoint(f"{directory}/final")["model_state_dict"]


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_one_process_equals_two_and_any_accumulation():
    train(settings(output_dir="one"))
    for accumulation, micro in ((2, 2), (4, 1)):
        train(
            settings(
                output_dir=f"accumulated_{accumulation}",
                gradient_accumulation_steps=accumulation,
                micro_batch_size=micro,
            )
        )
        assert (
            distance(final_weights("one"), final_weights(f"accumulated_{accumulation}"))
            < 1e-4
        )
    done = run(
        "-m",
        "qwen_analog.train",
        "--config",
        as_file(settings(output_dir="two", micro_batch_size=2)),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    moved = distance(
        final_weights("one"), QwenForCausalLM(QwenConfig(**MODEL)).state_dict()
    )
    assert distance(final_weights("one"), final_weights("two")) < 1e-4 < 0.01 < moved
    lines = [
        [json.loads(line) for line in Path(d, "metrics.jsonl").read_text().splitlines()]
        for d in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "heldout_loss", "heldout_bits_per_byte"):
            assert a.keys() == b.keys() and a.get(name, 0) == pytest.approx(
                b.get(name, 0), rel=1e-4
            )


def test_two_processes_continue_what_one_began():
    train(settings(output_dir="one"))
    done = run(
        "-m",
        "qwen_analog.train",
        "--config",
        as_file(settings(output_dir="two", micro_batch_size=2)),
        "--resume",
        "one/step_4",
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert distance(final_weights("one"), final_weights("two")) < 1e-4


def test_a_checkpoint_holds_what_the_contract_says():
    train(settings(output_dir="checkpoints"))
    checkpoint = torch.load("checkpoints/final/checkpoint.pt")
    model = QwenForCausalLM(QwenConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model_state_dict"])
    loaded, tokenizer = load_model("checkpoints/final")
    ids = torch.tensor([tokenizer.encode("12: abc")])
    assert torch.equal(model(ids), loaded(ids))
    names = {path.name for path in Path("checkpoints/final").iterdir()}
    assert names == {
        "checkpoint.pt",
        "model.safetensors",
        "config.json",
        "tokenizer.tiktoken",
    }
    assert {path.name for path in Path("checkpoints").iterdir()} == {
        "step_2",
        "step_4",
        "final",
        "metrics.jsonl",
        "ledger",
        "tensorboard",
        "loss.png",
        "summary.json",
        "run.lock",
    }


def test_hugging_face_reads_the_final_directory():
    from transformers import AutoModelForCausalLM

    train(settings(output_dir="checkpoints"))
    theirs, (ours, _) = (
        AutoModelForCausalLM.from_pretrained("checkpoints/final"),
        load_model("checkpoints/final"),
    )
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_old_checkpoints_are_pruned():
    train(settings(keep_last=1, save_every=1))
    assert sorted(
        p.name for p in Path("checkpoints").iterdir() if (p / "checkpoint.pt").exists()
    ) == ["final", "step_5"]


def test_a_run_is_never_overwritten_and_auto_continues_it():
    train(settings(max_steps=6))
    before = Path("checkpoints/final/checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match="holds final already"):
        train(settings())
    with pytest.raises(CheckpointError, match="holds final already"):
        train(settings(), resume_from="checkpoints/step_2")
    assert train(settings(), resume_from="auto") == {"step": 6}
    assert Path("checkpoints/final/checkpoint.pt").read_bytes() == before


def test_checkpoints_of_something_else_are_refused():
    train(settings(output_dir="old"))
    other = {**MODEL, "intermediate_size": 64}
    with pytest.raises(CheckpointError, match="differs in intermediate_size"):
        train(settings(model=other), resume_from="old/step_2")
    ranks = {token: i for i, token in enumerate(reversed(BYTE_ORDER))}
    TiktokenTokenizer(ranks).save(".")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        train(settings(), resume_from="old/step_2")


@pytest.mark.parametrize(
    "changes",
    [
        dict(sequence_length=16),
        dict(seed=1),
        dict(heldout_fraction=0.2),
        dict(stream=True),
        dict(optimizer="muon"),
    ],
)
def test_a_run_whose_blocks_would_differ_cannot_go_on(changes):
    train(settings(output_dir="old", max_steps=2, save_every=1))
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"was trained with another {name}"):
        train(settings(**changes), resume_from="old/step_1")


def test_damaged_checkpoints_are_refused():
    train(settings(output_dir="old"))
    file = Path("old/step_2/checkpoint.pt")
    whole = file.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"not a checkpoint",
        whole[:-9000] + bytes([whole[-9000] ^ 1]) + whole[-8999:],
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step_2/checkpoint.pt is damaged"):
            train(settings(), resume_from="old/step_2")
    torch.save({"weights": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="was not written by this package"):
        train(settings(), resume_from=str(file))
    with pytest.raises(CheckpointError, match="no checkpoint at nowhere"):
        train(settings(), resume_from="nowhere")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_never_runs_code():
    torch.save({"model_state_dict": Bomb()}, "bomb.pt")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint("bomb.pt")
    assert not Path("exploded").exists()


def test_a_crash_in_a_save_leaves_the_last_checkpoint(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    real = torch.save
    monkeypatch.setattr(
        torch,
        "save",
        lambda value, path: full() if value["step"] == 4 else real(value, path),
    )
    with pytest.raises(OSError, match="No space left"):
        train(settings())
    assert latest_checkpoint("checkpoints") == Path("checkpoints/step_2")
    monkeypatch.setattr(torch, "save", real)
    train(settings(), resume_from="auto")
    train(settings(output_dir="whole"))
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


def test_a_step_that_is_not_finite_is_not_applied(monkeypatch):
    import qwen_analog.step as module

    real, calls = module.forward_loss, []

    def spoiled(model, *rest):
        loss = real(model, *rest)
        calls.append(model.training)
        return loss * float("nan") if sum(calls) == 3 and model.training else loss

    monkeypatch.setattr(module, "forward_loss", spoiled)
    train(settings())
    lines = [
        json.loads(line)
        for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()
    ]
    (skipped,) = [line for line in lines if "skipped" in line]
    assert skipped["step"] == 3 and all(
        source.startswith("corpus.jsonl:") for source in skipped["sources"]
    )
    assert all(
        torch.isfinite(weight).all() for weight in final_weights("checkpoints").values()
    )


def test_three_such_steps_stop_the_run(monkeypatch):
    import qwen_analog.step as module

    real = module.forward_loss
    monkeypatch.setattr(
        module, "forward_loss", lambda model, *rest: real(model, *rest) * float("inf")
    )
    with pytest.raises(ValueError, match="not finite 3 times in a row"):
        train(settings(save_every=100))


def test_a_signal_saves_and_ends(folder):
    config = as_file(
        settings(max_steps=100_000, save_every=100_000, eval_every=100_000)
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen_analog.train", "--config", config],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")},
    )
    deadline = time.monotonic() + 120
    while (
        not Path("checkpoints/metrics.jsonl").exists() and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    newest = latest_checkpoint("checkpoints")
    assert (
        process.returncode == 0
        and "continue with --resume auto" in output
        and newest.name.startswith("step_")
    )
    assert load_checkpoint(newest)["step"] == int(newest.name[5:])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(learning_rte=1), "learning_rte"),
        (dict(max_steps=0), "max_steps"),
        (dict(max_steps=2.5), "max_steps"),
        (dict(max_steps="9"), "max_steps"),
        (dict(optimizer="sgd"), "optimizer"),
        (dict(precision="fp16"), "precision"),
        (dict(learning_rate=float("nan")), "learning_rate"),
        (dict(model={"hidden_sze": 3}), "hidden_sze"),
        (dict(model={"num_key_value_heads": 3}), "num_key_value_heads"),
        (dict(model="huge"), "unknown preset 'huge'"),
        (dict(data="corpus.jsonl"), "data"),
        (dict(beta2=1.0), "beta2"),
    ],
)
def test_a_bad_setting_names_itself_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)


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


def test_bad_lines_are_named_or_counted(capsys):
    with open("corpus.jsonl", "a") as file:
        file.write('{"text": 1}\n')
    with pytest.raises(DataError, match="corpus.jsonl, line 201"):
        train(settings())
    train(settings(skip_bad_lines=True, max_steps=1))
    assert (
        "skipped 1 bad lines, the first at corpus.jsonl:201" in capsys.readouterr().err
    )


def test_the_shipped_settings_are_the_card():
    config = TrainConfig.from_file(ROOT / "qwen_analog" / "train_config.json")
    assert config.qwen_config() == QwenConfig() == TrainConfig().qwen_config()
    assert config.model_copy(
        update={"model": "analog-3b"}
    ) == TrainConfig() and config.model_fields_set == set(TrainConfig.model_fields)
    card = TrainConfig(model="card").qwen_config()
    assert card == TrainConfig().qwen_config()


def test_the_card_runs_inside_the_package_folder(folder):
    config = as_file(settings(max_steps=2))
    done = run(
        ROOT / "qwen_analog" / "train.py", "--config", config, "--data", "corpus.jsonl"
    )
    assert done.returncode == 0, done.stderr
    done = run(
        ROOT / "qwen_analog" / "train.py",
        "--data",
        "corpus.jsonl",
        "--resume",
        "checkpoints/final/checkpoint.pt",
    )
    assert done.returncode == 0 and "nothing to train" in done.stdout, done.stderr


def test_errors_of_the_commands_are_one_line():
    for arguments in (
        ["--data", "nowhere.jsonl"],
        ["--config", "nowhere.json"],
        ["--resume", "nowhere"],
        ["--max-steps", "0"],
    ):
        done = run(
            "-m",
            "qwen_analog.train",
            "--config",
            as_file(settings(), "good.json"),
            *arguments,
        )
        assert (
            done.returncode == 2
            and done.stderr.splitlines()[-1].startswith("error: ")
            and "Traceback" not in done.stderr
        )


def test_generate_command(capsys):
    train(settings())
    arguments = [
        "generate",
        "12: ab",
        "--max-new-tokens",
        "5",
        "--seed",
        "1",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.1",
    ]
    assert cli(arguments) == cli(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("12: ab") and lines[-2:] == [lines[-1]] * 2
    assert (
        cli(["generate", "12: ab", "--max-new-tokens", "30", "--temperature", "0"]) == 0
    )
    text = capsys.readouterr().out.rstrip("\n")
    assert (
        cli(
            [
                "generate",
                "12: ab",
                "--max-new-tokens",
                "30",
                "--temperature",
                "0",
                "--stop",
                text[9:11],
                "--stop",
                "never",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == text[: text.index(text[9:11], 6)] + "\n"
    assert cli(["generate", "x", "--checkpoint", "nowhere"]) == 2
    assert "there is no directory nowhere" in capsys.readouterr().err
    assert (
        cli(["generate", "x", "--max-new-tokens", "5"]) == 0
        and cli(["generate", "x", "--checkpoint", "checkpoints/step_99"]) == 2
    )
    assert (
        "there is no checkpoint at checkpoints/step_99: train one first"
        in capsys.readouterr().err
    )


def test_prepare_command(capsys):
    assert cli(["prepare", "stdlib", "--vocab-size", "300"]) == 0
    first = json.loads(Path("data/stdlib/stdlib.jsonl").read_text().splitlines()[0])
    assert (
        set(first) == {"title", "text"} and "stdlib.jsonl: " in capsys.readouterr().out
    )
    assert (
        cli(["prepare", "stdlib"]) == 2 and "exists already" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"max_steps": NaN}',
        b'{"model": 3}',
        b'{"data": [1]}',
        b"null",
    ],
)
def test_hostile_settings_files_are_one_line(content, tmp_path):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_file(path)
    assert "settings.json" in str(caught.value) and "\n" not in str(caught.value)

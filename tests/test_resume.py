"""Going on from a checkpoint: the same data, tokens, settings, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from helpers import Bomb, up_to_rounding
from training import (  # noqa: F401
    MODEL,
    ROOT,
    as_file,
    final_weights,
    entries,
    folder,
    rewrite,
    same,
    settings,
    stopped,
    training_state,
    write_corpus,
)

from qwen_analog import train as module
from qwen_analog.archive import CheckpointError
from qwen_analog.checkpoint import load_checkpoint
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import TiktokenTokenizer
from qwen_analog.train import train
from qwen_analog.train_config import TrainConfig


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


def test_a_checkpoint_never_runs_code():
    torch.save({"model_state_dict": Bomb()}, "bomb.pt")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_checkpoint("bomb.pt")
    assert not Path("the_bomb_went_off").exists()


def test_auto_goes_on_from_the_newest_whole_checkpoint(capsys):
    stopped()
    file = Path("checkpoints/step_4/checkpoint.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    train(settings(), resume_from="auto")
    assert same(training_state("checkpoints/final"), training_state("whole/final"))
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("warning")
    ]
    assert len(said) == 1 and "step_4" in said[0] and "step_2" in said[0]
    assert (
        load_checkpoint("checkpoints/step_4")["step"] == 4
        and Path("checkpoints/step_4.damaged").is_dir()
    )


def test_a_moved_directory_goes_on_with_its_own_settings():
    stopped(learning_rate=0.02)
    shutil.move("checkpoints", "elsewhere")
    assert module.main(["--resume", "auto", "--output-dir", "elsewhere"]) == 0
    assert same(training_state("elsewhere/final"), training_state("whole/final"))


CHANGES = {
    "appended": lambda lines: [*lines, '{"text": "one more"}\n'],
    "shuffled": lambda lines: [*lines[9:], *lines[:9]],
    "replaced": lambda lines: [line.replace("abc", "xyz") for line in lines],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", CHANGES)
def test_data_that_changed_are_refused_or_begun_anew(how, stream, capsys):
    stopped(stream=stream, heldout_fraction=0.0)
    corpus = Path("corpus.jsonl")
    corpus.write_text("".join(CHANGES[how](corpus.read_text().splitlines(True))))
    with pytest.raises(
        CheckpointError,
        match=r"step_4 was trained on other data \(.*corpus.jsonl.*--new-data",
    ):
        train(settings(stream=stream, heldout_fraction=0.0), resume_from="auto")
    assert not Path("checkpoints/final").exists()
    train(
        settings(stream=stream, heldout_fraction=0.0), resume_from="auto", new_data=True
    )
    assert "the run goes on with these, from their beginning" in capsys.readouterr().err
    position = load_checkpoint("checkpoints/final")["data"]
    assert (
        position.get("position", 8) == 8 and position.get("epoch", 0) == 0
    )  # two steps of four blocks


def test_the_same_data_elsewhere_are_the_same():
    stopped()
    Path("moved").mkdir()
    shutil.move("corpus.jsonl", "moved/corpus.jsonl")
    train(settings(data=["moved"]), resume_from="auto")
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


def test_a_checkpoint_that_does_not_know_its_data_says_so(capsys):
    stopped()
    rewrite(
        "checkpoints/step_4/checkpoint.pt",
        lambda checkpoint: (
            checkpoint.pop("data_fingerprint"),
            checkpoint.pop("tokens"),
        ),
    )
    summary = train(settings(), resume_from="auto")
    assert "holds no fingerprint of its data" in capsys.readouterr().err
    assert (
        same(training_state("checkpoints/final"), training_state("whole/final"))
        and summary["tokens"] == 6 * 128
    )


def test_a_finished_run_is_not_taken_for_one_of_other_data(capsys):
    arguments = ["--config", as_file(settings()), "--resume", "auto"]
    assert module.main(arguments) == 0
    write_corpus(30, file="my.jsonl")
    capsys.readouterr()
    for options in (arguments, ["--resume", "auto"]):
        assert module.main([*options, "--data", "my.jsonl"]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        for part in (
            "checkpoints/final is a finished run of 6 steps on corpus.jsonl",
            "my.jsonl",
            "--output-dir",
            "--init-from checkpoints/final",
        ):
            assert part in said
        assert (
            module.main(options) == 0 and "nothing to train" in capsys.readouterr().out
        )
    rewrite(
        "checkpoints/final/checkpoint.pt",
        lambda checkpoint: checkpoint.pop("data_fingerprint"),
    )
    assert (
        module.main([*arguments, "--data", "my.jsonl"]) == 2
        and module.main(arguments) == 0
    )


def test_tokens_are_those_that_were_read():
    train(settings(output_dir="whole", micro_batch_size=1, log_every=1))
    for how in ("new", "old"):
        shutil.copytree("whole/step_4", f"{how}/step_4")
    rewrite("old/step_4/checkpoint.pt", lambda checkpoint: checkpoint.pop("tokens"))
    for how in ("new", "old"):
        summary = train(
            settings(output_dir=how, micro_batch_size=8), resume_from="auto"
        )
        assert (
            summary["tokens"]
            == 4 * 32 + 2 * 256
            == load_checkpoint(f"{how}/final")["tokens"]
        )
        assert [entry["tokens"] for entry in entries(how) if "tokens" in entry] == [
            128 + 256,
            128 + 512,
        ]


def test_a_checkpoint_brings_its_tokenizer_and_shape():
    stopped()
    Path("tokenizer.tiktoken").unlink()
    named = settings().model_dump(exclude_unset=True)
    train(
        TrainConfig.create(
            {name: value for name, value in named.items() if name != "model"}
        ),
        resume_from="auto",
    )
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


def test_a_shape_without_a_vocabulary_takes_the_tokenizers():
    shape = {name: value for name, value in MODEL.items() if name != "vocab_size"}
    stopped(model=shape)
    assert load_checkpoint("whole/final")["config"]["vocab_size"] == MODEL["vocab_size"]
    train(settings(model=shape), resume_from="auto")
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


@pytest.mark.parametrize(
    "change", [dict(rank_states=[None]), dict(rank_states=[{}]), dict(spike_watch={})]
)
def test_a_checkpoint_without_a_random_state_is_one_line(change, capsys):
    stopped()
    rewrite(
        "checkpoints/step_4/checkpoint.pt", lambda checkpoint: checkpoint.update(change)
    )
    for options in (["--config", as_file(settings())], []):
        assert module.main([*options, "--resume", "checkpoints/step_4"]) == 2
        assert capsys.readouterr().err.endswith(
            "error: checkpoints/step_4 holds no training state: it cannot be resumed\n"
        )


def test_steps_that_cannot_be_skipped_are_refused():
    for steps, message in (
        ([0], "steps count from 1"),
        ([-3], "steps count from 1"),
        ([7], "step 7 is beyond max_steps 6"),
    ):
        with pytest.raises(ValueError, match=f"skip_steps: {message}"):
            train(settings(skip_steps=steps))
    stopped(skip_steps=[3])
    with pytest.raises(
        ValueError, match="skip_steps: step 2 was done before checkpoints/step_4"
    ):
        train(settings(skip_steps=[2, 3]), resume_from="auto")
    train(
        settings(skip_steps=[3, 5]), resume_from="auto"
    )  # 3 was skipped when its turn came
    assert [
        entry["step"] for entry in entries("checkpoints") if "skipped" in entry
    ] == [3, 5]


# --- runs of version 0.1.0

OLD = ROOT / "tests" / "data" / "v0_1_0"
THEIR_OPTIMIZER = ["--optimizer", "muon"]  # a flag of those runs


def old_run():
    """The data, the settings and the runs that version 0.1.0 left."""
    shutil.copytree(OLD, ".", dirs_exist_ok=True)


def losses_of(directory):
    return {e["step"]: e["loss"] for e in entries(directory) if "loss" in e}


@pytest.mark.parametrize("settings_from", ["file", "checkpoint"])
def test_a_run_of_version_0_1_0_goes_on_exactly(settings_from):
    old_run()
    words = ["--resume", "plain/step_2", "--output-dir", "out"]
    if settings_from == "file":
        words += ["--config", "train_config.json", *THEIR_OPTIMIZER]
    assert module.main(words) == 0
    before, now = training_state("plain/final"), training_state("out/final")
    # another machine's bits: its kernels may round otherwise
    assert same(now, before, up_to_rounding)
    then = losses_of("plain")
    expected = {step: pytest.approx(then[step], rel=1e-6) for step in (3, 4)}
    assert losses_of("out") == expected
    assert load_checkpoint("out/final")["tokens"] == 4 * 2 * 32
    assert load_checkpoint("out/final")["train_config"]["sequence_length"] == 32


def test_a_directory_of_version_0_1_0_goes_on_by_auto():
    old_run()
    shutil.rmtree("plain/final")
    assert module.main(["--resume", "auto", "--output-dir", "plain"]) == 0
    assert losses_of("plain").keys() == {1, 2, 3, 4}
    weights = load_file(OLD / "plain/final/model.safetensors")
    found = load_file("plain/final/model.safetensors")
    assert same(dict(found), dict(weights), up_to_rounding)


def test_a_sharded_run_of_version_0_1_0_goes_on_with_one_process():
    old_run()
    words = ["--parallel", "ddp", "--micro-batch-size", "4", "--output-dir", "out"]
    assert module.main(["--resume", "fsdp/step_2", *words]) == 0
    expected, found = load_file("fsdp/final.safetensors"), final_weights("out")
    assert all((found[n] - w).abs().max() < 1e-4 for n, w in expected.items())


def test_another_sequence_length_than_in_version_0_1_0_is_refused(capsys):
    old_run()
    words = ["--config", "train_config.json", *THEIR_OPTIMIZER]
    words += ["--output-dir", "out"]
    words += ["--resume", "plain/step_2", "--block-size", "16"]
    assert module.main(words) == 2
    assert "trained with another sequence_length" in capsys.readouterr().err

"""How a run begins, goes on and ends: its directory, data, tokenizer, memory and
weights; settings that do not fit; what is only for looking at.
"""

import io
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_train import (
    MODEL,
    ROOT,
    as_file,
    final_weights,
    folder,
    run,
    same,
    settings,
    training_state,
)  # noqa: F401

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog import train as module
from qwen_analog.checkpoint import (
    CheckpointError,
    claim,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from qwen_analog.cli import main as cli
from qwen_analog.data import DataError
from qwen_analog.hf import save_pretrained
from qwen_analog.tokenizer import BYTE_ORDER, TiktokenTokenizer
from qwen_analog.train import TrainConfig, fitted, train


def entries(directory):
    return [
        json.loads(line, parse_constant=pytest.fail)
        for line in Path(directory, "metrics.jsonl").read_text().splitlines()
    ]


def write_corpus(count, first=0, file="corpus.jsonl"):
    Path(file).write_text(
        "".join(
            json.dumps({"text": f"document {i} " * (1 + i % 5)}) + "\n"
            for i in range(first, first + count)
        )
    )


def rewrite(path, change):
    """A checkpoint.pt with its dict changed."""
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def stopped(**changes):
    """A run of 6 steps in `whole`, and a copy in `checkpoints` as if it had been
    stopped after step 4.
    """
    train(settings(output_dir="whole", **changes))
    shutil.copytree("whole", "checkpoints")
    shutil.rmtree("checkpoints/final")


# --- the directory


def test_a_directory_in_use_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(module, "tokenize_files", lambda *_: pytest.fail("tokenized"))
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


# --- the data

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


def test_few_documents_are_divided_and_one_is_not(capsys):
    for count in (50, 1):
        write_corpus(count)
        changes = settings().model_dump(exclude_unset=True) | {
            "output_dir": f"out_{count}",
            "max_steps": 2,
            "eval_every": 1,
        }
        del changes["heldout_fraction"]
        train(TrainConfig.create(changes))
        assert any("heldout_loss" in entry for entry in entries(f"out_{count}")) == (
            count > 1
        )
    assert "nothing is held out" in capsys.readouterr().err
    with pytest.raises(DataError, match="heldout_fraction 0.1: one document"):
        train(settings(output_dir="named"))


# --- tokens, tokenizer


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


# --- the weights of others


def source(kind, seed=5, **changes):
    """A model with generation settings, on the disk."""
    torch.manual_seed(seed)
    model = QwenForCausalLM(QwenConfig(**{**MODEL, **changes}))
    model.generation_config = {"eos_token_id": [258, 256], "top_k": 7}
    tokenizer = TiktokenTokenizer({token: i for i, token in enumerate(BYTE_ORDER)})
    if kind == "checkpoint":
        save_checkpoint(kind, model, tokenizer)
    else:
        save_pretrained(model, tokenizer, kind)
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
    done = run(
        "-m",
        "qwen_analog.train",
        "--config",
        config,
        "--init-from",
        "checkpoint",
        processes=2,
    )
    assert done.returncode == 0, done.stderr
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


# --- memory and room

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
    monkeypatch.setattr(module, "tokenize_files", lambda *_: pytest.fail("tokenized"))
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


def test_room_for_checkpoints_is_asked_for_and_may_be_overruled(monkeypatch):
    monkeypatch.setattr(
        module.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000),
    )
    with pytest.raises(
        ValueError, match="output_dir checkpoints: its checkpoints need about"
    ):
        train(settings())
    assert train(settings(max_steps=1), ignore_memory=True)["step"] == 1


# --- settings


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


def test_every_setting_beyond_the_run_is_named():
    config, notes = fitted(
        settings(
            max_steps=20,
            warmup_steps=19,
            schedule="wsd",
            save_every=21,
            eval_every=22,
            log_every=23,
            keep_every=7,
        )
    )
    assert config.warmup_steps == 19
    for name in (
        "wsd",
        "save_every 21",
        "eval_every 22",
        "log_every 23",
        "keep_every 7",
    ):
        assert any(name in note for note in notes)
    config, (note,) = fitted(
        settings(max_steps=20, warmup_steps=20)
    )  # would end at the highest rate
    assert (
        config.warmup_steps == 2
        and "warmup_steps 20 does not fit into 20 steps" in note
    )
    assert (
        fitted(settings())[1] == []
        and fitted(settings(max_steps=1, warmup_steps=1, save_every=1, eval_every=1))[1]
        == []
    )
    assert (
        "profile_steps"
        in fitted(settings(max_steps=2, profile_steps=1, eval_every=1))[1][0]
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


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"max_steps": 3, "max_steps": 4}', "'max_steps' stands in it more than once"),
        ('{"model": {"vocab_size": 1, "vocab_size": 2}}', "vocab_size"),
        ('{"learning_rate": 1e999}', "learning_rate"),
        ('{"z_loss": NaN}', "z_loss"),
        ('{"weight_decay": true}', "weight_decay"),
        ('{"max_steps": true}', "max_steps"),
        ('{"beta1": "0.9"}', "beta1"),
        ('{"seed": 1' + "0" * 30 + "}", "seed"),
        ('{"output_dir": ""}', "output_dir"),
        ('{"data": ["a\\u0000b"]}', "data"),
        ('{"a\\nb": 1}', "no such setting"),
        (" " * 2**21, "larger than"),
        ('{"max_steps": ' + "9" * 5000 + "}", "settings.json"),
    ],
)
def test_odd_settings_files_are_one_line(content, message):
    Path("settings.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.from_file("settings.json")
    assert "settings.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_is_no_settings_file_and_a_byte_order_mark_is_no_fault():
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        TrainConfig.from_file(".")
    Path("settings.json").write_bytes(b'\xef\xbb\xbf{"max_steps": 3}')
    assert TrainConfig.from_file("settings.json").max_steps == 3


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--learning-rate", "nan"),
        ("--weight-decay", "-1"),
        ("--peak-tflops", "inf"),
        ("--max-steps", "-5"),
        ("--beta2", "1"),
        ("--heldout-fraction", "1"),
        ("--micro-batch-size", "99999999999999999999"),
        ("--model", "huge"),
    ],
)
def test_a_flag_is_refused_by_its_name(flag, value, capsys):
    for config in ([], ["--config", as_file(settings())]):
        assert module.main([*config, flag, value]) == 2
        said = capsys.readouterr().err
        assert flag in said and said.count("\n") == 1


def test_prompts_that_do_not_fit_are_refused_before_training():
    with pytest.raises(
        ValueError,
        match="sample_prompts: 'xxx.*make 91 tokens; max_position_embeddings is 64",
    ):
        train(settings(sample_prompts=["x" * 80], sample_tokens=10))


def test_the_settings_for_a_laptop_train_on_own_documents(capsys):
    write_corpus(50)
    file = ROOT / "qwen_analog" / "train_laptop.json"
    assert (
        cli(
            [
                "tokenizer",
                "--data",
                "corpus.jsonl",
                "--output",
                "data/own",
                "--vocab-size",
                "300",
            ]
        )
        == 0
    )
    assert (
        cli(
            [
                "train",
                "--config",
                str(file),
                "--data",
                "corpus.jsonl",
                "--max-steps",
                "2",
                "--micro-batch-size",
                "2",
                "--eval-sequences",
                "1",
            ]
        )
        == 0
    )
    assert (
        cli(
            [
                "generate",
                "document",
                "--checkpoint",
                "runs/own/final",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    config = TrainConfig.from_file(file)
    assert (
        fitted(config)[1] == []
        and load_checkpoint("runs/own/final")["config"]["vocab_size"] < 300
    )
    assert config.precision == "fp32" and config.qwen_config().hidden_size <= 256


def test_new_data_are_for_resuming(capsys):
    assert module.main(["--config", as_file(settings()), "--new-data"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("checkpoints").exists()


# --- the end


class Gone(io.StringIO):
    """An output that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("lost", [["stdout"], ["stdout", "stderr"]])
def test_a_run_goes_on_when_its_words_are_not_read(lost, monkeypatch):
    for name in lost:
        monkeypatch.setattr(sys, name, Gone())
    assert module.main(["--config", as_file(settings(max_steps=3))]) == 141
    assert (
        Path("checkpoints/final").is_dir() and Path("checkpoints/summary.json").exists()
    )


def test_training_in_a_thread():
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(
            module.main(["--config", as_file(settings(max_steps=2))])
        )
    )
    thread.start()
    thread.join()
    assert codes == [0] and Path("checkpoints/final").is_dir()


@pytest.mark.parametrize("name", ["summary.json", "loss.png"])
def test_what_is_only_for_looking_at_does_not_fail_a_run(name, capsys):
    Path("checkpoints", name).mkdir(parents=True)
    assert (
        module.main(
            [
                "--config",
                as_file(
                    settings(max_steps=1, sample_prompts=["xyzzy"], sample_tokens=3)
                ),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert (
        f"warning: checkpoints/{name} could not be written" in said.err
        and "xyzzy" in said.out
    )


def test_samples_that_fail_do_not_fail_a_run(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such text")

    monkeypatch.setattr(module, "complete", broken)
    assert (
        module.main(
            [
                "--config",
                as_file(settings(max_steps=1, sample_prompts=["x"], sample_tokens=3)),
            ]
        )
        == 0
    )
    assert (
        "sample_prompts could not be written: no such text" in capsys.readouterr().err
    )


def test_summary_and_metrics_are_json_whatever_the_loss_is(monkeypatch):
    real, calls = module.train_step, []

    def spoiled(*arguments):
        loss, norm, applied = real(*arguments)
        calls.append(loss)
        return (
            (loss, norm, applied)
            if len(calls) < 6
            else (float("nan"), float("inf"), False)
        )

    monkeypatch.setattr(module, "train_step", spoiled)
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda *_: {"loss": float("nan"), "bits_per_byte": float("inf")},
    )
    summary = train(settings())
    assert (
        json.loads(
            Path("checkpoints/summary.json").read_text(), parse_constant=pytest.fail
        )
        == summary
    )
    assert summary["loss"] == calls[4] and summary["heldout_loss"] is None
    assert [
        entry["heldout_loss"]
        for entry in entries("checkpoints")
        if "heldout_loss" in entry
    ] == [None, None]


@pytest.mark.parametrize("where", ["tokenize_files", "build_model", "load_tokenizer"])
def test_ctrl_c_before_the_first_step_is_one_line(where, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, where, interrupted)
    assert module.main(["--config", as_file(settings())]) == 130
    assert capsys.readouterr().err == "interrupted\n"

"""The command `eval`: held-out documents, memory, files, models that fail."""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import exit_code, fork
from test_scoring import BYTES, CONFIG, MODEL, ids_of

from qwen_analog import evaluate as module, scoring
from qwen_analog.arguments import add_eval_arguments
from qwen_analog.baselines import NGram, xz_bits_per_byte
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.cli import main
from qwen_analog.jsonl import write_jsonl
from qwen_analog.token_cache import held_out_mask, is_held_out
from qwen_analog.evaluate import run
from qwen_analog.hf import save_pretrained
from qwen_analog.model import QwenForCausalLM
from qwen_analog.scoring import (
    MINIMAL_PAIRS,
    Evaluation,
    evaluate_documents,
    evaluation_of,
    loss_by_position,
    paired_difference,
    token_nll,
)

pytestmark = pytest.mark.usefixtures("folder")


def evaluate(command, *more):
    parser = argparse.ArgumentParser()
    add_eval_arguments(parser)
    run(parser.parse_args([*command.split(), *more]))


def check_stored_documents(model, ngram, expected):
    """What is stored of every document gives the paired difference of the two."""
    a, b = (
        Evaluation(**{name: np.array(v) for name, v in row["by_document"].items()})
        for row in (model, ngram)
    )
    assert np.allclose(a.nll, expected.nll, atol=1e-3)
    assert np.array_equal(a.tokens, expected.tokens)
    assert np.array_equal(a.bytes, b.bytes)
    assert math.isclose(a.standard_error, model["standard_error"], rel_tol=1e-4)
    difference, error = paired_difference(a, b)
    assert math.isclose(
        difference, model["bits_per_byte"] - ngram["bits_per_byte"], abs_tol=1e-4
    )
    assert 0 < error


def test_the_command(capsys):
    documents = [
        {
            "title": f"t{i}",
            "text": (
                f"document {i}: the cat sat on {i * i} mats, which is"
                f" {'odd' if i % 2 else 'even'}."
            ),
        }
        for i in range(60)
    ]
    write_jsonl(documents, "data.jsonl")
    save_checkpoint("final", MODEL, BYTES)
    evaluate(
        "--model final --data data.jsonl --heldout-fraction 0.2 --context 12 --stride 5"
        " --pairs --positions --baselines --json out/e.json"
    )
    held = [d["text"] for d in documents if is_held_out(d["title"], 0.2)]
    written = json.loads(Path("out/e.json").read_text())
    (found,) = written["models"].values()
    expected = evaluate_documents(MODEL, BYTES, held, context=12, stride=5)
    assert (
        math.isclose(found["bits_per_byte"], expected.bits_per_byte, rel_tol=1e-6)
        and found["documents"] == len(held) < 60
    )
    assert (
        found["bytes"] == sum(len(t.encode()) for t in held)
        and found["pairs"]["all"]["total"] == 96
    )
    assert [(b["first"], b["last"]) for b in found["loss_by_position"]] == [
        (0, 0),
        (1, 2),
        (3, 6),
        (7, 11),
    ]
    mean, _ = loss_by_position(token_nll(MODEL, BYTES, held, context=12), 12)
    assert math.isclose(
        found["loss_by_position"][2]["loss"], mean[3:7].mean(), rel_tol=1e-6
    )
    assert written["settings"]["context"] == 12 and set(written["baselines"]) == {
        "xz",
        "xz after the rest",
        "5-gram",
    }
    rest = [d["text"] for d in documents if not is_held_out(d["title"], 0.2)]
    counted = NGram(BYTES.vocab_size, 5).fit(
        [ids_of(text) for text in rest]
    )  # from the rest alone
    assert math.isclose(
        written["baselines"]["5-gram"]["bits_per_byte"],
        evaluation_of([counted.nll(ids_of(text)) for text in held], held).bits_per_byte,
        rel_tol=1e-9,
    )
    assert written["baselines"]["xz after the rest"][
        "bits_per_byte"
    ] == xz_bits_per_byte("\n".join(held).encode(), ("\n".join(rest) + "\n").encode())
    assert f"{expected.bits_per_byte:.3f} +-" in capsys.readouterr().out
    check_stored_documents(found, written["baselines"]["5-gram"], expected)
    with pytest.raises(ValueError, match="heldout-fraction must lie above 0"):
        evaluate("--data data.jsonl --heldout-fraction 0")
    write_jsonl(documents[:1], "one.jsonl")
    with pytest.raises(ValueError, match="none of the 1 documents is held out"):
        evaluate("--data one.jsonl --heldout-fraction 0.1")
    assert not list(Path("out").glob("*.partial"))


def test_the_command_opens_what_holds_a_model(capsys):
    write_jsonl([{"text": "one text"}, {"text": "and another"}], "data.jsonl")
    save_checkpoint("ours", MODEL, BYTES)
    save_pretrained(MODEL, BYTES, "theirs")
    sources = ["ours", "ours/checkpoint.pt", "theirs"]
    evaluate("--data data.jsonl --heldout-fraction 1 --model", *sources)
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and len({line.split(": ", 1)[1] for line in lines}) == 1
        and "2 documents" in lines[0]
    )
    with pytest.raises(ValueError, match="nowhere"):
        evaluate("--model nowhere --data data.jsonl --heldout-fraction 1")


def trained(directory, share, **state):
    """A checkpoint that says what it held out."""
    save_checkpoint(
        directory, MODEL, BYTES, train_config={"heldout_fraction": share}, **state
    )
    return directory


def test_what_the_checkpoint_held_out_is_evaluated(capsys):
    documents = [{"title": f"t{i}", "text": f"document {i}"} for i in range(300)]
    write_jsonl(documents, "d.jsonl")
    out = Path("e.json")
    sources = [trained(name, share) for name, share in (("a", 0.1), ("b", 0.02))]
    for models, share in ((sources[:1], 0.1), (sources, 0.02)):
        evaluate("--data d.jsonl --json e.json --model", *models)
        counts = {
            figures["documents"]
            for figures in json.loads(out.read_text())["models"].values()
        }
        assert (
            counts == {sum(is_held_out(d["title"], share) for d in documents)}
            and f"heldout_fraction {share}" in capsys.readouterr().out
        )
        assert json.loads(out.read_text())["settings"]["heldout_fraction"] == share
    evaluate("--data d.jsonl --heldout-fraction 0.1 --model", sources[1])
    assert "has seen some" in capsys.readouterr().err
    evaluate("--data d.jsonl --heldout-fraction 0.02 --model", sources[1])
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="heldout_fraction 0, on all documents"):
        evaluate("--data d.jsonl --model", trained("all", 0.0))


def test_what_is_evaluated_is_said_where_no_model_says_it(capsys):
    write_jsonl(
        ({"title": f"t{i}", "text": f"document {i}"} for i in range(300)), "d.jsonl"
    )
    save_pretrained(MODEL, BYTES, "theirs")
    evaluate("--model theirs --data d.jsonl")
    assert "a part of 0.05" in capsys.readouterr().out


def test_memory_is_asked_for_the_documents_there_are(monkeypatch, capsys):
    """Not for the longest that the model could read."""
    write_jsonl([{"text": "one text"}], "d.jsonl")
    save_checkpoint("m", MODEL, BYTES)
    asked = []
    monkeypatch.setattr(
        module,
        "require_memory",
        lambda size, device, what, *_: asked.append((size, what)),
    )
    evaluate("--model m --data d.jsonl --heldout-fraction 1")
    assert asked == [
        (module._scoring_memory(MODEL.config, 8), "reading 8 tokens at once with m")
    ]
    assert "nan" not in capsys.readouterr().out


def test_few_documents_are_split_as_in_training(capsys):
    """Where the hash chooses none, training held out the one with the smallest."""
    documents = [{"title": f"t{i}", "text": "x" * (i + 1)} for i in range(20)]
    write_jsonl(documents, "d.jsonl")
    evaluate("--data d.jsonl --json e.json --model", trained("a", 0.001))
    (figures,) = json.loads(Path("e.json").read_text())["models"].values()
    (held,) = np.flatnonzero(held_out_mask([d["title"] for d in documents], 0.001))
    assert figures["documents"] == 1 and figures["bytes"] == held + 1


@pytest.mark.parametrize("changed", [False, True])
def test_other_data_than_that_of_the_training_is_said(changed, capsys):
    documents = [{"title": f"t{i}", "text": f"document {i}"} for i in range(60)]
    size = sum(len(d["text"]) for d in documents)
    write_jsonl(documents + [{"text": "one more"}] * changed, "d.jsonl")
    source = trained(
        "a",
        0.1,
        data_fingerprint={
            "files": [
                {"name": "d.jsonl", "documents": 60, "bytes": size, "sha256": "-"}
            ],
            "held_out": "-",
        },
    )
    evaluate("--data d.jsonl --model", source)
    assert ("60 documents" in capsys.readouterr().err) == changed


def test_documents_are_read_in_pieces(monkeypatch):
    """Groups of any size, windows of any number at once: the same figures."""
    documents = [
        {"title": f"t{i}", "text": f"document {i} " * (i % 7 + 1)} for i in range(30)
    ] + [{"text": "long " * 200}]
    write_jsonl(documents, "d.jsonl")
    save_checkpoint("m", MODEL, BYTES)
    found = []
    for size, at_once in ((2**21, 2**14), (50, 24), (1, 1)):
        monkeypatch.setattr(module._groups, "__defaults__", (size,))
        monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", at_once)
        evaluate(
            "--model m --data d.jsonl --heldout-fraction 1 --positions --json e.json"
        )
        (figures,) = json.loads(Path("e.json").read_text())["models"].values()
        found.append(figures)
    for other in found[1:]:
        assert (
            math.isclose(
                other["bits_per_byte"], found[0]["bits_per_byte"], rel_tol=1e-6
            )
            and other["tokens"] == found[0]["tokens"]
        )
        assert [b["tokens"] for b in other["loss_by_position"]] == [
            b["tokens"] for b in found[0]["loss_by_position"]
        ]


def test_one_model_that_fails_does_not_take_the_others_figures(capsys):
    write_jsonl([{"text": "one text"}, {"text": "and another"}], "d.jsonl")
    save_checkpoint("good", MODEL, BYTES)
    Path("bad").mkdir()
    Path("bad/checkpoint.pt").write_bytes(b"no checkpoint")
    models = ["bad", "good", "nowhere"]
    with pytest.raises(
        ValueError, match="2 of 3 models could not be evaluated: .*bad.*nowhere"
    ) as failed:
        evaluate("--data d.jsonl --heldout-fraction 1 --json e.json --model", *models)
    written = json.loads(Path("e.json").read_text())
    assert (
        list(written["models"]) == [models[1]]
        and list(written["failed"]) == [models[0], models[2]]
        and "\n" not in str(failed.value)
    )


def test_figures_that_cannot_be_written_are_refused_first(monkeypatch):
    monkeypatch.setattr(
        module, "load", lambda *a, **o: pytest.fail("a model is opened")
    )
    Path("file").touch()
    for name in (".", "file/e.json", "file/x/e.json"):
        with pytest.raises((ValueError, OSError), match="directory|exists"):
            evaluate("--json", name)
    with pytest.raises(ValueError, match="directory"):
        evaluate("--json", "")


def test_figures_are_replaced_whole_or_not_at_all(monkeypatch):
    write_jsonl([{"text": "one text"}], "d.jsonl")
    save_checkpoint("m", MODEL, BYTES)
    command = "--model m --data d.jsonl --heldout-fraction 1 --json e.json"
    Path("e.json").write_text("before")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.json, "dump", full)
        with pytest.raises(OSError, match="No space left on device: .*e.json"):
            evaluate(command)
    assert Path("e.json").read_text() == "before" and not list(Path().glob("*.partial"))
    evaluate(command)
    assert json.loads(Path("e.json").read_text())["models"]


def test_bad_lines_are_named_or_left_out(capsys):
    Path("d.jsonl").write_text(
        '{"text": "fine"}\n{"text": ""}\n{"text": "also fine"}\n'
    )
    save_checkpoint("m", MODEL, BYTES)
    command = "--model m --data d.jsonl --heldout-fraction 1"
    with pytest.raises(ValueError, match="line 2"):
        evaluate(command)
    evaluate(command, "--skip-bad-lines")
    assert "2 documents" in capsys.readouterr().out


def test_the_committed_figures_can_be_paired():
    """The comparison of the chapter stands on the sums of every document."""
    path = Path(__file__).parents[1] / "benchmarks" / "evaluation.json"
    written = json.loads(path.read_text())
    model, ngram = (
        written["models"]["checkpoints/final"],
        written["baselines"]["5-gram"],
    )
    rows = [
        Evaluation(**{name: np.array(v) for name, v in row["by_document"].items()})
        for row in (model, ngram)
    ]
    for row, found in zip((model, ngram), rows):
        assert len(found.nll) == row["documents"] == 513
        assert math.isclose(found.bits_per_byte, row["bits_per_byte"], rel_tol=1e-5)
        assert math.isclose(found.standard_error, row["standard_error"], rel_tol=1e-4)
    difference, error = paired_difference(*rows)
    assert error < 0.75 * model["standard_error"]
    assert difference < -3 * error


def test_models_answer_a_task(capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    from test_lm_eval_adapter import CHOICES

    questions = [
        {"title": f"no {i}", "answers": ["a", "bc"], "right": i % 2} for i in range(6)
    ]
    write_jsonl(questions, "questions.jsonl")
    Path("task.yaml").write_text(CHOICES)
    save_checkpoint("one", MODEL, BYTES)
    command = "--tasks task.yaml --json e.json --model one one"
    evaluate(command.replace("one one", "one ./one"))
    printed = capsys.readouterr().out
    assert "one: choices acc_norm" in printed and "6 questions" in printed
    assert "./one - one: choices acc +0.000 +- 0.000, question by question" in printed
    written = json.loads(Path("e.json").read_text())
    assert len(written["models"]["one"]["tasks"]["choices"]["by_question"]["acc"]) == 6
    assert written["settings"]["tasks"] == ["task.yaml"]


@pytest.mark.parametrize(
    "flags, flag, instead",
    [
        ("--tasks t.yaml --data d.jsonl", "--data", "--tasks"),
        ("--tasks t.yaml --pairs", "--pairs", "--tasks"),
        ("--limit 3", "--limit", "held-out text"),
        ("--num-fewshot 0", "--num-fewshot", "held-out text"),
    ],
)
def test_flags_without_effect_are_refused(flags, flag, instead):
    with pytest.raises(ValueError, match=f"{flag} means nothing with {instead}"):
        evaluate(flags)


def test_two_evaluations_with_one_file_do_not_take_each_others(monkeypatch):
    """The second begins and ends when the first has written and not yet renamed."""
    write_jsonl([{"text": "one text"}], "d.jsonl")
    save_checkpoint("m", MODEL, BYTES)
    command = "--model m --data d.jsonl --heldout-fraction 1 --json e.json"

    def meanwhile(_):
        second = fork(main, ["eval", *command.split()], ".", os.environ, "said")
        assert exit_code(second) == 0, Path("said").read_text()
        Path("e.json").write_text("the second")

    monkeypatch.setattr(module.os, "fsync", meanwhile)
    evaluate(command)
    assert json.loads(Path("e.json").read_text())["models"]
    assert not list(Path().glob("*.partial"))

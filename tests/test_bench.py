"""`qwen-analog bench`: the same results first, then the time; what it writes."""

import argparse
import json
import sys
from functools import partial

import pytest
import torch

from helpers import refused
from qwen_analog import bench as module
from qwen_analog.arguments import add_bench_arguments
from qwen_analog.bench import (
    Work,
    as_table,
    decode_work,
    off_by,
    prefill_work,
    train_work,
)
from qwen_analog.cli import main
from qwen_analog.config import QwenConfig, parameter_counts
from qwen_analog.memory import flops_per_token
from qwen_analog.plan import read_measured

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
CEILINGS = {
    "read": 1e10,
    "matmul": {"float32": {"2048 x 2048": 1e11}, "bfloat16": {"2048 x 2048": 4e11}},
    "matrix_vector": dict.fromkeys(module.BYTES, 8e9),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The machine's ceilings are not measured anew for each test."""
    monkeypatch.setattr(module, "measure_ceilings", lambda *_: CEILINGS)
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    monkeypatch.chdir(tmp_path)


def command(*words):
    sizes = "--config shape.json --prompt-tokens 8 --new-tokens 4 --repeats 2".split()
    return ["bench", *sizes, *words]


def cases_of(path, work):
    cases = json.loads(path.read_text())["cases"]
    return {case["who"]: case for case in cases if case["work"] == work}


def test_a_run_writes_its_file_its_table_and_its_plot(tmp_path, capsys):
    words = "--work prefill decode train --batch 1 2 --dtype float32 --no-compile"
    files = "--output o.json --plot o.svg"
    assert main(command(*words.split(), *files.split())) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    said = capsys.readouterr().out
    assert {"device", "torch", "threads", "waiting", "model", "ceilings"} <= set(found)
    assert found["weights"] == sum(parameter_counts(QwenConfig(**SHAPE)).values())
    groups = {(case["work"], case["rows"]) for case in found["cases"]}
    assert groups == {(w, n) for w in ("prefill", "decode", "train") for n in (1, 2)}
    for case in found["cases"]:
        assert len(case["all_seconds"]) == 2 and case["who"] in said
        assert case["tokens_per_second"] > 0 and case["of_limit"] > 0
        for name in case["times_as_fast_as"]:
            assert not name.startswith("qwen_analog")
    assert "transformers" in cases_of(tmp_path / "o.json", "decode")
    for name, check in found["checks"].items():
        assert check["off"] <= check["allowed"] and not check["refused"], name
    assert found["checks"]["logits: transformers"]["equal_tokens"] == "32 of 32"
    assert as_table(found) in said
    assert "decode" in (tmp_path / "o.svg").read_text()
    measured = read_measured("o.json")
    assert measured.mfu == found["training"]["mfu"] and measured.overlap is None
    plan = ["plan", "--bench", "o.json", "--model", "tiny", "--sequence-length", "64"]
    assert main(plan) == 0
    assert f"measured on {found['device']}" in capsys.readouterr().out


def test_without_training_a_plan_has_nothing_to_read():
    words = "--work decode --only qwen_analog --output o.json".split()
    assert main(command(*words)) == 0
    with pytest.raises(ValueError, match="training.mfu"):
        read_measured("o.json")


@pytest.fixture
def no_process(monkeypatch, tmp_path):
    """Memory is not measured, and the vocabulary has room for bytes."""
    monkeypatch.setattr(module, "in_a_process", lambda work: 5)
    shape = json.dumps({**SHAPE, "vocab_size": 320})
    (tmp_path / "shape.json").write_text(shape)


def test_clients_and_losses(no_process, tmp_path, capsys):
    words = "--work serve loss --clients 3 --dtype float32 --output o.json".split()
    assert main(command(*words)) == 0
    served = cases_of(tmp_path / "o.json", "serve")
    assert set(served) == {"qwen_analog served", "one batch"}
    assert {case["rows"] for case in served.values()} == {3}
    found = cases_of(tmp_path / "o.json", "loss")
    assert {"qwen_analog", "naive"} <= set(found)
    assert {case["peak_bytes"] for case in found.values()} == {5}
    assert "served" in capsys.readouterr().out


def test_the_memory_of_a_loss_is_of_a_process_of_its_own(tmp_path):
    place = module.Place(tmp_path, torch.device("cpu"), torch.float32)
    sizes = {"sizes": (4096, 8, 4096), "place": place}  # 67 MB of logits
    work = partial(module._loss_memory, name="naive", **sizes)
    assert module.in_a_process(work) > 1e8


@pytest.mark.mutant
def test_a_wrong_loss_is_refused_by_name(no_process, monkeypatch, capsys):
    wrong = lambda h, w, targets: module.cross_entropy(h @ w.T * 1.5, targets)
    monkeypatch.setattr(module, "_naive", wrong)
    assert "naive" in refused(capsys, *command("--work", "loss"))


@pytest.mark.mutant
@pytest.mark.parametrize("name", ["qwen_analog laid out", "transformers"])
def test_wrong_logits_are_refused_by_name_and_not_timed(name, monkeypatch, capsys):
    right = module.writers_for

    def writers_for(dtype, compiled=False):
        def wrong(place):
            writer = right(dtype)[name](place)
            return writer._replace(logits=lambda ids: writer.logits(ids.flip(1)))

        return {**right(dtype), name: wrong}

    monkeypatch.setattr(module, "writers_for", writers_for)
    words = "--work decode --output o.json".split()
    assert name in refused(capsys, *command(*words))
    cases = json.loads(open("o.json").read())["cases"]
    assert cases and name not in {case["who"] for case in cases}


@pytest.mark.mutant
def test_a_wrong_update_is_refused_by_name(monkeypatch, capsys):
    right = module.step_of

    def step_of(model, loss_of, batch, precision):
        return right(model, lambda a, b: 1.5 * loss_of(a, b), batch, precision)

    monkeypatch.setattr(module, "step_of", step_of)
    words = "--work train --dtype float32 --no-compile --only fp32".split()
    said = refused(capsys, *command(*words))
    assert "transformers fp32" in said and "qwen_analog" not in said.split("timed")[1]


def test_what_is_not_installed_is_left_out_in_one_line(monkeypatch, capsys):
    for name in ("transformers", "ctranslate2", "litgpt"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(command("--work", "decode")) == 0
    said = capsys.readouterr().out
    for name, library, extra in (
        ("transformers", "transformers", "hf"),
        ("litgpt", "litgpt", "bench"),
        ("CTranslate2 int8", "ctranslate2", "bench"),
    ):
        (line,) = (x for x in said.splitlines() if x.startswith(f"left out: {name}:"))
        assert library in line and f"qwen-analog[{extra}]" in line


def test_what_cannot_start_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    assert main(command("--work", "start", "--only", "CTranslate2")) == 0
    said = capsys.readouterr()
    assert "left out: CTranslate2 int8: " in said.out and not said.err


@pytest.mark.slow
def test_a_process_of_its_own_tells_its_memory(capsys):
    words = "--work start --only laid --output o.json".split()
    held = torch.ones(2**28)  # a gigabyte of ours is none of its
    assert main(command(*words)) == 0
    (case,) = json.loads(open("o.json").read())["cases"]
    assert case["who"] == "qwen_analog laid out"
    assert case["seconds"] > 0 and 2e7 < case["peak_bytes"] < held.nbytes


def test_the_limit_is_the_longer_of_two():
    assert Work(100.0, 10.0).seconds(10.0, 10.0) == 10.0
    assert Work(10.0, 100.0).seconds(10.0, 10.0) == 10.0


def test_the_work_of_a_model():
    c = QwenConfig(**SHAPE)
    counts = parameter_counts(c)
    weights = sum(counts.values()) - counts["norms"]  # the head is the embedding
    one = decode_work(c, 1, 0, 2.0, 2)
    assert one == Work(2 * weights, 2 * weights)
    three = decode_work(c, 3, 10, 2.0, 2)
    keys = 2 * 2 * 2 * 8 * 10  # layers, keys and values, heads, of 8 numbers, tokens
    assert three.traffic == one.traffic + 3 * 2 * keys
    assert three.flops == 3 * (one.flops + 4 * 2 * 4 * 8 * 10)
    read = prefill_work(c, 1, 10, 2.0)
    steps = sum(decode_work(c, 1, n, 2.0, 2).flops for n in range(1, 11))
    head = 2 * c.vocab_size * c.hidden_size
    assert read.flops == steps - 9 * head and read.traffic == one.traffic
    step = train_work(c, 2, 16, "bf16-pure")
    assert step.flops == 32 * flops_per_token(c, 16)
    assert step.traffic == 20 * sum(counts.values())


def test_the_higher_of_two_measurements_counts():
    twice = {"read": 2.0, "matmul": {"float32": {"n": 1.0}}}
    assert module._higher({}, twice) == twice
    again = {"read": 1.0, "matmul": {"float32": {"n": 5.0}}}
    assert module._higher(twice, again)["read"] == 2.0
    assert module._higher(twice, again)["matmul"] == again["matmul"]


def test_off_by_is_relative():
    x = torch.randn(2, 3, 5)
    assert off_by(x, x) == 0.0
    assert off_by(1.01 * x, x) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--work", "nothing"], "--work"),
        (["--batch", "0"], "--batch"),
        (["--prompt-tokens", "-1"], "--prompt-tokens"),
        (["--dtype", "int8"], "--dtype"),
        (["--prompt-tokens", "64"], "64"),
        (["--preset", "tiny"], "--preset"),
        (["--only", "nobody"], "--only"),
        (["--output", "nowhere/o.json"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, named, capsys):
    assert named in refused(capsys, *command(*words))


def test_a_wrong_shape_names_its_file(capsys, tmp_path):
    (tmp_path / "shape.json").write_text('{"hidden": 3}')
    assert "shape.json" in refused(capsys, *command())


def test_the_words_of_work_are_those_that_are_measured():
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    given = parser.parse_args(["--work", "prefill", "decode", "train", "start"])
    assert given.work == ["prefill", "decode", "train", "start"]
    assert parser.parse_args([]).batch == [1]

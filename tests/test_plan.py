"""The plan: what fits, what the command says, and what the guide says."""

import argparse
import json
import re
from pathlib import Path

import pytest

from qwen_analog import plan as module
from qwen_analog.arguments import add_plan_arguments
from qwen_analog.cli import main as cli
from qwen_analog.config import parameter_counts
from qwen_analog.hardware import GPUS
from qwen_analog.memory import estimate_for, flops_per_token
from qwen_analog.plan import cheapest_fit, extra_ms, fits, report, run
from qwen_analog.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = dict(
    vocab_size=3000,
    hidden_size=192,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=512,
    max_position_embeddings=512,
    rope_theta=1e4,
)


def settings(**changes):
    values = dict(
        model=MODEL,
        sequence_length=192,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        activation_checkpointing="none",
        precision="fp32",
    )
    return TrainConfig.create({**values, **changes})


def test_the_cheapest_settings_fit_and_keep_the_step():
    wide = TrainConfig().model_copy(
        update={
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "activation_checkpointing": "none",
        }
    )
    found = {gpus: cheapest_fit(wide, GPUS["H100"], gpus) for gpus in (1, 8, 32)}
    for gpus, config in found.items():
        assert (
            fits(estimate_for(config, gpus).total, GPUS["H100"])
            and config.micro_batch_size * config.gradient_accumulation_steps == 16
        )
        assert (
            config.precision == "bf16" and config.optimizer == "adamw"
        )  # what would change the result is not touched without need
    order = ["none", "selective", "full"]
    assert order.index(found[8].activation_checkpointing) <= order.index(
        found[1].activation_checkpointing
    )
    assert cheapest_fit(wide, GPUS["RTX 3090"], 1) is None
    small = settings()
    assert cheapest_fit(small, GPUS["RTX 3090"]) == small.model_copy(
        update={"parallel": "ddp"}
    )


@pytest.mark.parametrize("name", ["H100", "H200", "RTX 3090"])
@pytest.mark.parametrize("gpus", [1, 2, 8, 16])
def test_no_cheaper_settings_fit(name, gpus):
    """By the list of prices, and those of bfloat16 only where no others fit."""
    changes = {"micro_batch_size": 4, "gradient_accumulation_steps": 4}
    wide = TrainConfig().model_copy(update=changes)
    tried = module._alternatives(wide, gpus, 8)
    kept, smaller = tried[: len(tried) // 2], tried[len(tried) // 2 :]
    assert {c.precision for c in kept} == {"bf16"}
    assert {c.precision for c in smaller} == {"bf16-pure"}
    assert [extra_ms(c) for c in kept] == sorted(extra_ms(c) for c in kept)
    found = cheapest_fit(wide, GPUS[name], gpus)
    for choices in (kept, smaller):
        fitting = [c for c in choices if fits(estimate_for(c, gpus).total, GPUS[name])]
        if fitting:
            assert found in fitting
            assert extra_ms(found) == min(map(extra_ms, fitting))
            return
    assert found is None


def test_prices_are_those_measured():
    file = json.loads((ROOT / "benchmarks" / "gpu_h100.json").read_text())
    first, second = (
        {
            c["case"]: c
            for part in file[run]
            if part["part"] == "train"
            for c in part["cases"]
        }
        for run in ("first", "second")
    )
    steps = {
        mode: 1e3 * 4096 / first[f"none, {mode}"]["tokens_per_second"]
        for mode in ("none", "selective", "full")
    }
    passes = {name: case["milliseconds"]["passes"] for name, case in second.items()}
    one, four = passes["none, full, 4 x 1"] / 4, passes["none, full, 4 x 4"] / 4
    ddp, fsdp = passes["ddp, full, 1 x 1"], passes["fsdp, full, 1 x 1"]
    for mode, ms in steps.items():
        assert module.RECOMPUTING_MS[mode] == round(ms - steps["none"])
    assert module.PASS_MS == round(one - (four - one) / 3)
    assert module.SHARDING_MS == round(fsdp - ddp)


def test_a_plan_that_does_not_fit_says_what_does():
    big = settings(
        model={
            **MODEL,
            "vocab_size": 150_000,
            "hidden_size": 1536,
            "num_hidden_layers": 2,
        },
        micro_batch_size=4,
        sequence_length=512,
        gradient_accumulation_steps=2,
    )
    tight = module.Gpu(4.5e9, 1e14, 1e12)
    module.GPUS["tight"] = tight
    try:
        plan = report(big, "tight", 1, 0.4, 1e9)
    finally:
        del module.GPUS["tight"]
    assert not plan["fits"] and plan["instead"] is not None
    changes = {name: value for name, value in plan["instead"].items() if name != "gpus"}
    assert fits(
        estimate_for(big.model_copy(update=changes), plan["instead"]["gpus"]).total,
        tight,
    )


def test_the_command(capsys):
    arguments = [
        "plan",
        "--model",
        "tiny",
        "--sequence-length",
        "128",
        "--gpu",
        "A100",
        "--gpus",
        "2",
        "--parallel",
        "fsdp",
        "--tokens",
        "1e9",
    ]
    assert cli(arguments) == 0
    text = capsys.readouterr().out
    assert (
        "2 x A100, fsdp, bf16, adamw" in text
        and "fits: " in text
        and "all-gather" in text
    )
    assert cli([*arguments, "--precision", "auto"]) == 0
    assert capsys.readouterr().out == text  # on a GPU auto is bf16
    assert cli([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["days"] == pytest.approx(
        1e9 / plan["tokens_per_second"] / 86400
    ) and plan["simulated"].keys() >= {"parameters", "optimizer"}
    for wrong, message in (
        (["--mfu", "2"], "--mfu"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "6", "--parallel", "hsdp", "--shard-size", "4"], "does not divide"),
    ):
        assert cli(["plan", "--model", "tiny", "--sequence-length", "128", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_plan_of_adapters_stands_beside_all_weights(tmp_path, capsys):
    wide = {**MODEL, "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 8}
    wide |= {"num_attention_heads": 32, "intermediate_size": 14_336}
    config = {"model": wide, "sequence_length": 512, "gradient_accumulation_steps": 1}
    (tmp_path / "wide.json").write_text(json.dumps(config))
    words = ["plan", "--config", str(tmp_path / "wide.json"), "--json"]
    words += ["--gpu", "RTX 3090"]
    assert cli([*words, "--lora-rank", "16"]) == 0
    plan = json.loads(capsys.readouterr().out)
    full = plan["all_weights"]
    assert plan["fits"] and sum(full.values()) > plan["available"]
    assert plan["arithmetic"]["optimizer"] < full["optimizer"] / 50
    small = ["plan", "--model", "tiny", "--sequence-length", "64", "--lora-rank", "2"]
    assert cli(small) == 0
    said = capsys.readouterr().out
    assert "adapters of rank 2, " in said and "  all weights\n" in said
    assert cli(small[:-2]) == 0
    assert "all weights" not in capsys.readouterr().out


def test_a_plan_of_pairs_is_that_of_finetune(capsys):
    """With its adapters and its rows; what finetune refuses is refused here."""
    words = ["plan", "--model", "tiny", "--method", "dpo", "--sequence-length", "64"]
    assert cli([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens_per_step"] == 2 * 2 * 2 * 64 and plan["all_weights"]
    vocabulary = TrainConfig.create({"model": "tiny"}).qwen_config().vocab_size
    assert plan["arithmetic"]["logits"] >= 12 * 2 * 2 * 64 * vocabulary
    assert plan["drawing_seconds"] == 0
    assert cli([*words, "--reward", "number"]) == 2
    assert "reward: method dpo has no use for it" in capsys.readouterr().err


def test_a_plan_counts_the_drawing_of_answers(capsys):
    words = ["plan", "--model", "tiny", "--method", "grpo", "--gpu", "A100"]
    words += ["--sequence-length", "64", "--max-new-tokens"]

    def planned(*options):
        assert cli([*words, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    short, long = planned("8"), planned("40")
    config = TrainConfig.create({"model": "tiny"}).qwen_config()
    weights = sum(parameter_counts(config).values())  # 2 bytes each, at 2,039 GB/s
    assert short["drawing_seconds"] == pytest.approx(8 * weights * 2 / 2039e9)
    assert (
        planned("8", "--precision", "fp32")["drawing_seconds"]
        > 1.9 * (short["drawing_seconds"])
    )

    def seconds(plan):
        return plan["tokens_per_step"] / plan["tokens_per_second"]

    more = seconds(long) - seconds(short)
    assert more == pytest.approx(long["drawing_seconds"] - short["drawing_seconds"])
    learning = seconds(short) - short["drawing_seconds"]
    alone = ("8", "--beta", "0", "--updates-per-step")
    once, twice = seconds(planned(*alone, "1")), seconds(planned(*alone, "2"))
    update = once - short["drawing_seconds"]
    forward = learning - update  # the reference's, read once a step
    assert 0 < forward < update
    assert twice == pytest.approx(once + update + forward)  # the old log-probabilities
    twice = seconds(planned("8", "--updates-per-step", "2"))
    assert twice == pytest.approx(once + update + 2 * forward)
    assert cli([*words, "8"]) == 0
    assert "  drawing      at least " in capsys.readouterr().out


def test_a_plan_says_what_is_measured_and_what_assumed(tmp_path, capsys):
    bench = tmp_path / "bench.json"
    arguments = ["plan", "--model", "tiny", "--sequence-length", "128", "--gpu", "A100"]
    arguments += ["--gpus", "2"]

    def planned(device, overlap):
        found = {"device": device, "training": {"mfu": 0.3}, "overlap": overlap}
        bench.write_text(json.dumps(found))
        assert cli([*arguments, "--bench", str(bench), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert cli([*arguments, "--mfu", "0.3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["origins"].keys() == {"MFU", "sending", "recomputing"}
    origins = plan["origins"]
    assert all(origins[name].startswith("assumed") for name in ("MFU", "sending"))
    same = planned("NVIDIA A100-SXM4-80GB", 0.75)
    assert same["days"] == plan["days"]
    assert same["origins"]["MFU"] == "measured on NVIDIA A100-SXM4-80GB"
    assert "measured on NVIDIA A100" in same["origins"]["sending"]
    assert "75%" in same["origins"]["sending"]
    other = planned("NVIDIA H100", None)
    assert "measured on NVIDIA H100, assumed" in other["origins"]["MFU"]
    assert other["origins"]["sending"] == plan["origins"]["sending"]
    assert cli(arguments) == 0
    assert "  MFU          assumed\n" in capsys.readouterr().out
    alone = ["--gpus", "1", "--activation-checkpointing", "none"]
    assert cli([*arguments, *alone]) == 0  # sends nothing, computes nothing again
    text = capsys.readouterr().out
    assert "  MFU          assumed" in text and "hides" not in text
    assert "recomputing" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"device": "x"}',
        '{"device": "x", "training": {"mfu": 2}, "overlap": null}',
    ]
    + ['{"device": "x", "training": {"mfu": "0.4"}}']
    + ['{"device": "x", "training": {"mfu": 0.4}, "overlap": -1}'],
)
def test_a_bench_without_an_mfu_is_refused(text, tmp_path, capsys):
    (tmp_path / "b.json").write_text(text)
    bench = ["--bench", str(tmp_path / "b.json")]
    assert cli(["plan", "--model", "tiny", "--sequence-length", "128", *bench]) == 2
    error = capsys.readouterr().err
    assert "holds no measured figures" in error and error.count("\n") == 1


def test_the_guide_says_what_the_plan_says():
    """Each line of its table: the command's flags, memory of a GPU by arithmetic,
    tokens a second and days.
    """
    text = (ROOT / "docs" / "guide.md").read_text()
    rows = re.findall(
        r"^\| (\d+) x ([\w ]+?) \| `([^`]*)` \| ([\d.]+) GB \| ([\d,]+) \| ([\d.]+) \|",
        text,
        re.M,
    )
    assert len(rows) >= 4
    for gpus, name, flags, memory, speed, days in rows:
        parser = argparse.ArgumentParser()
        add_plan_arguments(parser)
        arguments = parser.parse_args(flags.split())
        arguments.config = str(ROOT / "qwen_analog" / "train_config.json")
        config = module.given_settings(arguments)
        ledger, gpu = estimate_for(config, int(gpus)).total, GPUS[name]
        rate = (
            0.4
            * gpu.flops
            / flops_per_token(config.qwen_config(), config.sequence_length)
            * int(gpus)
        )
        assert (
            f"{ledger / 1e9:.1f}",
            f"{rate:,.0f}",
            f"{64e9 / rate / 86400:.1f}",
        ) == (memory, speed, days), (gpus, name)
        assert fits(ledger, gpu)


@pytest.mark.parametrize(
    "settings, said",
    [
        (["--micro-batch-size", "100000000"], "micro_batch_size"),
        (["--sequence-length", "257"], "sequence_length 257"),
        (["--sequence-length", "1000000000"], "1000000000"),
        (["--init-from", "c"], "--init-from"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(settings, said, capsys):
    assert cli(["plan", "--model", "tiny", "--sequence-length", "16", *settings]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flag", [["--init-from", "smollm2"], ["--new-data"], ["--ignore-memory"]]
)
def test_a_plan_knows_no_flag_that_it_would_not_heed(flag, capsys):
    assert cli(["plan", *flag]) == 2
    assert f"unrecognized arguments: {flag[0]}" in capsys.readouterr().err


def test_run_needs_no_data_and_no_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    run(parser.parse_args(["--model", "tiny", "--sequence-length", "64"]))
    assert "H100" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("asked", "tried"), [(512, [512, 1024]), (1000, [1000])])
def test_advice_asks_for_at_most_1024_gpus(monkeypatch, asked, tried):
    seen = []
    monkeypatch.setattr(module, "cheapest_fit", lambda c, g, n, p: seen.append(n))
    assert module._instead(settings(), GPUS["A100"], asked, 8) is None
    assert seen == tried
    assert "1,024" in module._advice(None)

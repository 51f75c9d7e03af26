"""The simulated step against real processes and against arithmetic."""

import pytest
import torch
from helpers import ROOT
from test_plan import MODEL, settings
from training import run

from qwen_analog import QwenForCausalLM, simulation as module
from qwen_analog.memory import estimate_for, flops_per_token
from qwen_analog.simulation import simulate


def total(simulation):
    return sum(simulation.memory.values())


REAL = {
    "fsdp": settings(parallel="fsdp"),
    "fsdp, two micro-batches, full": settings(
        parallel="fsdp", gradient_accumulation_steps=2, activation_checkpointing="full"
    ),
    "fsdp, bf16": settings(parallel="fsdp", precision="bf16"),
    "ddp": settings(gradient_accumulation_steps=2),
    "fsdp, bf16, adapters": settings(parallel="fsdp", precision="bf16", lora_rank=8),
    "ddp, adapters": settings(lora_rank=8, lora_targets=["q_proj", "v_proj"]),
    "fsdp, untied, pure": settings(
        parallel="fsdp",
        precision="bf16-pure",
        optimizer="adamw-bf16",
        model={**MODEL, "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("parallel, gpus", [("ddp", 1), ("fsdp", 2), ("ddp", 2)])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_adapters_are_simulated(mode, parallel, gpus):
    config = settings(
        precision="bf16", parallel=parallel, activation_checkpointing=mode, lora_rank=8
    )
    found = simulate(config, gpus)
    assert total(found) == pytest.approx(estimate_for(config, gpus).total, rel=0.07)
    full = simulate(config.model_copy(update={"lora_rank": 0}), gpus)
    assert found.memory["optimizer"] < full.memory["optimizer"] / 10
    if parallel == "ddp":
        assert found.sent.get("all-reduce", 0) < full.sent.get("all-reduce", 1) / 10


@pytest.mark.slow
def test_two_real_processes_hold_what_was_planned(tmp_path):
    (tmp_path / "configs.jsonl").write_text(
        "".join(config.model_dump_json() + "\n" for config in REAL.values())
    )
    worker = ROOT / "tests" / "plan_worker.py"
    done = run(worker, tmp_path, processes=2, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, (name, config) in enumerate(REAL.items()):
        real = [
            int((tmp_path / f"peak_{number}_{rank}").read_text()) for rank in range(2)
        ]
        simulated, arithmetic = (
            total(simulate(config, 2)),
            estimate_for(config, 2).total,
        )
        print(
            f"{name:32} real {real}, simulated {simulated:,}, arithmetic {arithmetic:,}"
        )
        for peak in real:
            assert simulated == pytest.approx(peak, rel=0.1), name
            assert arithmetic == pytest.approx(peak, rel=0.1), name


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(gradient_accumulation_steps=5),
        dict(activation_checkpointing="full"),
        dict(lora_rank=8),
    ],
)
def test_operations_are_counted(changes):
    config = settings(**changes)
    thin = config.lora_rank, config.lora_targets
    tokens = (
        config.sequence_length
        * config.micro_batch_size
        * config.gradient_accumulation_steps
    )
    assert simulate(config).flops == pytest.approx(
        tokens
        * flops_per_token(
            config.qwen_config(), 192, config.activation_checkpointing, *thin
        ),
        rel=0.05 if config.lora_rank else 0.01,  # nothing lies before a first block
    )


@pytest.mark.slow
def test_what_is_sent_grows_with_micro_batches_only_where_it_is_sent_with_each():
    one, four = (
        simulate(
            settings(parallel="hsdp", shard_size=2, gradient_accumulation_steps=n), 8
        ).sent
        for n in (1, 4)
    )
    assert four["all-reduce"] == one["all-reduce"]
    for kind in ("all-gather", "reduce-scatter"):
        assert four[kind] == pytest.approx(4 * one[kind], rel=0.01)
    kept = simulate(settings(parallel="fsdp", reshard_after_forward=False), 4).sent
    freed = simulate(settings(parallel="fsdp"), 4).sent
    assert (
        kept["all-gather"] < 0.7 * freed["all-gather"]
        and kept["reduce-scatter"] == freed["reduce-scatter"]
    )


def fault(target, name, value):
    return lambda patch: patch.setattr(target, name, value)


def one_micro_batch(sequences, config, real=module.micro_batches):
    return real(sequences, config)[:1]


def without_state(self, category, tensors, real=module.StorageTracker.mark):
    real(self, "other" if category == "optimizer" else category, tensors)


def sent_once(name, args, replicas, real=module._ring_bytes):
    if name == "c10d::allreduce_":
        return {"all-reduce": real(name, args, replicas)["all-reduce"] // 2}
    return real(name, args, replicas)


def whole_tensors(name, args, replicas, real=module._ring_bytes):
    if name == "c10d::_allgather_base_":
        return {"all-gather": args[0].nbytes}
    return real(name, args, replicas)


def reduced_each_time(run, passes, update, real=module._bytes_of_a_step):
    sent = real(run, passes, update)
    return {kind: round(passes[kind] * run.repeats) or sent[kind] for kind in sent}


MUTANTS = {
    "one micro-batch for four": fault(module, "micro_batches", one_micro_batch),
    "optimizer states are activations": fault(
        module.StorageTracker, "mark", without_state
    ),
    "an all-reduce is sent once": fault(module, "_ring_bytes", sent_once),
    "a whole tensor a gather": fault(module, "_ring_bytes", whole_tensors),
    "gradients sent with every micro-batch": fault(
        module, "_bytes_of_a_step", reduced_each_time
    ),
    "attention is not counted": fault(module, "_FLOPS", {}),
}


def differs():
    """Compare a plan with what is known without it; True where it is wrong."""
    config = settings(optimizer="muon", gradient_accumulation_steps=4)
    plan, shape = simulate(config), config.qwen_config()
    with torch.device("meta"):
        parameters = QwenForCausalLM(shape).count_parameters()
    expected = flops_per_token(shape, 192) * 192 * 8
    states = plan.memory.get("optimizer", 0) / (4 * parameters)  # Muon 1, AdamW 2
    if abs(plan.flops / expected - 1) > 0.02 or not 1 < states < 2:
        return True
    spread = settings(parallel="hsdp", shard_size=4, gradient_accumulation_steps=4)
    sent = simulate(spread, 8).sent
    blocks = QwenForCausalLM(shape).model.layers
    outside = parameters - sum(p.numel() for p in blocks.parameters())
    by_hand = {
        "all-gather": 4 * 3 / 4 * 4 * (2 * parameters - outside),
        "reduce-scatter": 4 * 3 / 4 * 4 * parameters,
        "all-reduce": 2 * 1 / 2 * 4 * parameters / 4,
    }
    return any(abs(sent[kind] / by_hand[kind] - 1) > 0.02 for kind in by_hand)


def test_a_plan_is_what_is_known_without_it():
    assert not differs()


@pytest.mark.slow
@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_plan_is_noticed(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    assert differs()


@pytest.mark.slow
def test_more_processes_hold_less_each():
    sizes = [total(simulate(settings(parallel="fsdp"), n)) for n in (2, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_plan_is_made_by_one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(tmp_path / "store"), 1),
        rank=0,
        world_size=1,
    )
    try:
        with pytest.raises(ValueError, match="without torchrun"):
            simulate(settings())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method, rows", [("dpo", 2), ("grpo", 4)])
def test_a_step_of_answers_is_planned(method, rows):
    """Twice and more rows, logits of whole rows, and a pass of the reference."""
    wide = {**MODEL, "vocab_size": 30_000, "num_hidden_layers": 1}
    more = {} if method == "dpo" else {"group_size": rows}
    plain = dict(precision="bf16", model=wide, lora_rank=8, sequence_length=64)
    config = settings(method=method, format="chat", **plain, **more)
    found, arithmetic = simulate(config), estimate_for(config)
    assert total(found) == pytest.approx(arithmetic.total, rel=0.05)
    tokens = rows * config.micro_batch_size * config.sequence_length
    assert 12 <= arithmetic.logits / (tokens * 30_000) < 14
    taught = settings(**plain)
    learned = simulate(taught).flops * rows
    whole = flops_per_token(config.qwen_config(), config.sequence_length)
    assert found.flops == pytest.approx(learned + tokens * whole / 3, rel=0.05)


@pytest.mark.parametrize("parallel, gpus", [("ddp", 1), ("fsdp", 2)])
def test_a_frozen_copy_is_planned(parallel, gpus):
    small = {**MODEL, "num_hidden_layers": 1}
    shape = dict(model=small, method="dpo", format="chat", parallel=parallel)
    config = settings(sequence_length=32, **shape)
    found, arithmetic = simulate(config, gpus), estimate_for(config, gpus)
    weights = QwenForCausalLM(config.qwen_config()).count_parameters()
    assert arithmetic.parameters == pytest.approx(2 * 4 * weights / gpus, rel=0.01)
    assert found.memory["parameters"] == pytest.approx(arithmetic.parameters, rel=0.01)
    assert total(found) == pytest.approx(arithmetic.total, rel=0.07)


def test_a_whole_copy_to_draw_from_is_planned():
    """While GRPO draws it holds keys and values, and a copy of a sharded model."""
    small = {**MODEL, "vocab_size": 16, "num_hidden_layers": 8, "hidden_size": 768}
    config = settings(
        model=small, method="grpo", format="chat", lora_rank=2, sequence_length=8
    )
    weights = QwenForCausalLM(config.qwen_config()).count_parameters()
    alone = estimate_for(config)
    assert alone.communication == alone.kv_cache == 0
    shared = estimate_for(config.model_copy(update={"parallel": "fsdp"}), 64)
    assert shared.moment == "the drawing of answers"
    assert shared.communication == 4 * weights
    keys = 2 * 4 * 8 * config.qwen_config().head_dim * small["num_key_value_heads"]
    assert shared.kv_cache == keys * 8 * 2 * 8

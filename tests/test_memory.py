"""Activation checkpointing changes memory and work but no gradient; the ledger's
arithmetic is what a tracker measures.
"""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from qwen_analog.config import ACTIVATION_CHECKPOINTING, QwenConfig
from qwen_analog.lora import TARGETS, add_lora
from qwen_analog.memory import (
    MemoryEstimate,
    StorageTracker,
    adapter_parameters,
    estimate_memory,
    flops_per_token,
    saved_activations,
    set_activation_checkpointing,
)
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers

NARROW = QwenConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=176,
    max_position_embeddings=512,
)
WIDE = QwenConfig(
    vocab_size=256,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=1024,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
QWEN3 = replace(NARROW, qk_norm=True, attention_bias=False, head_dim=20)


def batch(config, B, T):
    ids = torch.arange(B * T).view(B, T) % config.vocab_size
    return ids, (torch.arange(T) // 20).repeat(B, 1)


def backward(model, ids, documents, precision):
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    ):
        loss = model(ids, ids, document_ids=documents)
    loss.backward()


def measured(
    model,
    optimizers,
    B,
    T,
    precision,
    micro_batches=1,
    documents=True,
    cast_by_autocast=True,
):
    """Bytes by category at the peak of a step after the first."""
    ids, document_ids = batch(model.config, B, T)
    for optimizer in optimizers:  # the states of a first step, without its cost
        for p in itertools.chain.from_iterable(
            group["params"] for group in optimizer.param_groups
        ):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    states = [
        v
        for optimizer in optimizers
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    ]
    with StorageTracker(parameters=model.parameters(), optimizer=states) as tracker:
        for _ in range(micro_batches):
            backward(
                model,
                ids,
                document_ids if documents else None,
                precision if cast_by_autocast else "fp32",
            )
        tracker.mark(
            "gradients", [p.grad for p in model.parameters() if p.requires_grad]
        )
    return tracker.peak


def test_tracker_counts_storages_not_views():
    held = torch.zeros(10)
    with StorageTracker(held=[held]) as tracker:
        a = torch.ones(100)  # 400 bytes
        b = a.view(10, 10).T + 1  # and 400 more
        del a
        c = (
            b[:5].contiguous() * 2
        )  # 200 (a view of b is not contiguous: copied), then 200
        tracker.mark("kept", [b])
        del b, c
        held.untyped_storage().resize_(0)
    sums = [sum(row.values()) for row in tracker.timeline()]
    assert sums == [
        40,
        440,
        840,
        440,
        640,
        840,
        640,
        240,
        40,
        0,
    ] and tracker.timeline()[-1] == {"held": 0, "kept": 0, "other": 0}
    assert tracker.peak == {"held": 40, "kept": 400, "other": 400}
    torch.zeros(3)  # outside: not seen, and `resize_` is PyTorch's own again
    assert (
        len(tracker.timeline()) == len(sums)
        and torch.UntypedStorage.resize_.__name__ == "resize_"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
def test_checkpointing_changes_no_bit_of_a_gradient(precision):
    from book import scramble_

    model = scramble_(QwenForCausalLM(NARROW))
    if precision == "bf16-pure":
        model.bfloat16()
    gradients = {}
    for mode in ("full", "selective", "none"):
        set_activation_checkpointing(model, mode)
        model.zero_grad()
        backward(model, *batch(NARROW, 2, 64), precision)
        gradients[mode] = [p.grad for p in model.parameters()]
    for mode in ("full", "selective"):
        assert all(
            torch.equal(a, b) for a, b in zip(gradients[mode], gradients["none"])
        ), mode


def test_an_unknown_mode_is_refused():
    for call in (
        lambda: set_activation_checkpointing(QwenForCausalLM(NARROW), "some"),
        lambda: flops_per_token(NARROW, 64, "some"),
        lambda: estimate_memory(NARROW, activation_checkpointing="some"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        modes = "none, selective, full"
        assert str(error.value) == (
            f"activation_checkpointing must be one of {modes}, not 'some'"
        )


def attention_forward(q, k, *_, out_shape=None, **__):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def attention_backward(upstream, q, k, *_, out_shape=None, **__):
    return 2 * attention_forward(q, k)


def counted(model, *passed):
    """The operations of both passes. PyTorch knows no formula for the CPU's kernel;
    backward is twice forward, as model FLOPs are counted.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {forward: attention_forward, back: attention_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        backward(model, *passed)
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize(
    "config", [NARROW, WIDE, QWEN3], ids=["tied", "untied", "qwen3"]
)
def test_flops_are_those_that_are_counted(config, mode):
    model = QwenForCausalLM(config)
    set_activation_checkpointing(model, mode)
    flops = counted(model, *batch(config, 2, 64), "bf16")
    assert flops == 2 * 64 * flops_per_token(config, 64, mode)


def test_the_card_in_numbers():
    card = QwenConfig()
    assert round(flops_per_token(card, 4096) / 1e9, 1) == 22.8
    training = estimate_memory(card, activation_checkpointing="full", micro_batches=2)
    assert (
        training.parameters == training.optimizer / 2 == 4 * 3_199_240_192
        and training.gradients >= training.parameters
    )
    one, two = (
        estimate_memory(card, optimizer=None, sequence_length=T) for T in (1000, 1001)
    )
    assert (
        one.parameters == 2 * 3_199_240_192 and two.kv_cache - one.kv_cache == 147_456
    )


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize(
    "config,B,T",
    [(NARROW, 2, 128), (WIDE, 2, 128), (WIDE, 1, 32), (QWEN3, 2, 128)],
    ids=["logits", "activations", "weights", "qwen3"],
)
def test_ledger_against_measured(config, B, T, precision, mode):
    for micro_batches, documents in ((1, True), (2, False)):
        model = QwenForCausalLM(config).to(
            torch.bfloat16 if precision == "bf16-pure" else torch.float32
        )
        set_activation_checkpointing(model, mode)
        got = measured(
            model,
            build_optimizers(model, 1e-3),
            B,
            T,
            precision,
            micro_batches,
            documents,
        )
        ledger = estimate_memory(
            config,
            precision=precision,
            activation_checkpointing=mode,
            batch_size=B,
            sequence_length=T,
            micro_batches=micro_batches,
            document_masks=documents,
        )
        assert ledger.parameters == got["parameters"]
        assert ledger.optimizer == pytest.approx(
            got["optimizer"], abs=4 * len(list(model.parameters()))
        )  # + step counters
        assert ledger.total == pytest.approx(sum(got.values()), rel=0.04), (
            f"{ledger}\n{got}"
        )


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
@pytest.mark.parametrize("config", [NARROW, QWEN3], ids=["qwen2", "qwen3"])
def test_what_a_block_keeps_is_what_is_listed(config, precision, documents):
    """The autograd hooks' list for one block, without weights, cos and sin, against
    `saved_activations`.
    """
    model = QwenForCausalLM(config).to(
        torch.bfloat16 if precision == "bf16-pure" else torch.float32
    )
    ids, document_ids = batch(config, 2, 48)
    marks, saved = [], []
    layers = model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: marks.append(len(saved)))
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t
        ),
        torch.autocast(
            "cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        ),
    ):
        model(ids, ids, document_ids=document_ids if documents else None)
    weights = {p.numel() for p in layers[1].parameters()}
    cos = config.head_dim * 48 * (2 if documents else 1)
    sizes = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in saved[marks[1] : marks[2]]
        if t.numel() not in weights | {cos}
    }
    assert sum(sizes.values()) == sum(
        saved_activations(
            config, 2, 48, precision=precision, document_masks=documents
        ).values()
    )


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("config", [NARROW, QWEN3], ids=["qwen2", "qwen3"])
def test_a_block_more_keeps_what_the_mode_keeps(config, mode):
    held = []
    for layers in (1, 2):
        model = QwenForCausalLM(
            QwenConfig.from_dict({**config.to_dict(), "num_hidden_layers": layers})
        )
        set_activation_checkpointing(model, mode)
        ids, documents = batch(NARROW, 2, 48)
        with StorageTracker(parameters=model.parameters()) as tracker:
            loss = model(ids, ids, document_ids=documents)
            held.append(tracker.timeline()[-1]["other"])
        del loss
    assert held[1] - held[0] == sum(
        saved_activations(
            config, 2, 48, precision="fp32", activation_checkpointing=mode
        ).values()
    )


@pytest.mark.parametrize("mode", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")], ids=["all", "qv"])
def test_the_ledger_of_adapters_against_measured(targets, precision, mode):
    """Within a tenth, and hardly ever too hopeful."""
    for config, B, T in ((NARROW, 2, 128), (WIDE, 1, 32), (QWEN3, 2, 128)):
        model = add_lora(QwenForCausalLM(config), 4, 8, targets)
        set_activation_checkpointing(model, mode)
        got = measured(model, build_optimizers(model, 1e-3), B, T, precision)
        thin = {"lora_rank": 4, "lora_targets": targets}
        ledger = estimate_memory(
            config,
            precision=precision,
            activation_checkpointing=mode,
            batch_size=B,
            sequence_length=T,
            **thin,
        )
        learned = [p.numel() for p in model.parameters() if p.requires_grad]
        assert adapter_parameters(config, **thin) == sum(learned)
        assert ledger.parameters == got["parameters"]
        assert ledger.optimizer == pytest.approx(got["optimizer"], abs=4 * len(learned))
        assert 0.96 < ledger.total / sum(got.values()) < 1.1, f"{ledger}\n{got}"


def test_muon_and_bfloat16_moments():
    model = QwenForCausalLM(NARROW)
    got = measured(model, build_optimizers(model, 1e-3, kind="muon"), 2, 64, "fp32")
    assert estimate_memory(NARROW, optimizer="muon").optimizer == pytest.approx(
        got["optimizer"], abs=4 * len(list(model.parameters()))
    )
    assert (
        estimate_memory(NARROW, optimizer="adamw-bf16").optimizer * 2
        == estimate_memory(NARROW, optimizer="adamw").optimizer
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_against_measured(precision):
    for B, T in ((2, 256), (1, 16)):
        model = (
            QwenForCausalLM(NARROW)
            .to(torch.float32 if precision == "fp32" else torch.bfloat16)
            .eval()
        )
        with torch.no_grad(), StorageTracker(parameters=model.parameters()) as tracker:
            cache = model.new_cache(B, T)
            tracker.mark("kv_cache", [cache.keys, cache.values])
            logits = (
                model(batch(NARROW, B, T)[0], cache=cache, logits_to_keep=1)
                .float()
                .softmax(-1)
            )
        ledger = estimate_memory(
            NARROW, precision=precision, optimizer=None, batch_size=B, sequence_length=T
        )
        assert (ledger.parameters, ledger.kv_cache) == (
            tracker.peak["parameters"],
            tracker.peak["kv_cache"],
        ) and logits.shape == (B, 1, 512)
        assert ledger.total == pytest.approx(sum(tracker.peak.values()), rel=0.03)


def test_ledger_at_the_cards_width():
    """Fake tensors have a size and no contents: two blocks of the card's model, 4,096
    tokens.

    The vocabulary is small, since autograd adds the tied weight's two fake gradients up
    in a third tensor and real ones in place.
    """
    config = QwenConfig(num_hidden_layers=2, vocab_size=8192)
    for mode, micro_batches in (("full", 2), ("selective", 1)):
        with FakeTensorMode():
            model = QwenForCausalLM(config)
            set_activation_checkpointing(model, mode)
            got = measured(model, [], 1, 4096, "bf16", micro_batches)
        ledger = estimate_memory(
            config, activation_checkpointing=mode, micro_batches=micro_batches
        )
        assert ledger.total - ledger.optimizer == pytest.approx(
            sum(got.values()), rel=0.06
        )


@pytest.fixture
def four_ranks():
    dist.init_process_group(
        "fake", rank=0, world_size=4, store=FakeStore()
    )  # collectives that do nothing
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_sharded_ledger_against_measured(four_ranks):
    for config, (precision, mode, B, T) in itertools.product(
        (NARROW, WIDE),
        (
            ("bf16", "none", 2, 128),
            ("bf16", "full", 1, 16),
            ("fp32", "selective", 2, 256),
            ("bf16-pure", "full", 2, 256),
        ),
    ):
        model = QwenForCausalLM(config).to(
            torch.bfloat16 if precision == "bf16-pure" else torch.float32
        )
        set_activation_checkpointing(model, mode)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
        )
        for layer in model.model.layers:
            fully_shard(layer, mesh=four_ranks, mp_policy=policy)
        fully_shard(
            model, mesh=four_ranks, mp_policy=policy, reshard_after_forward=False
        )
        backward(model, *batch(config, B, T), "fp32")  # the first pass sets FSDP up
        model.zero_grad()
        got = measured(model, [], B, T, precision, cast_by_autocast=False)
        ledger = estimate_memory(
            config,
            precision=precision,
            activation_checkpointing=mode,
            batch_size=B,
            sequence_length=T,
            strategy="fsdp",
            shards=4,
        )
        assert ledger.parameters == got["parameters"] and ledger.communication > 0
        assert ledger.total - ledger.optimizer == pytest.approx(
            sum(got.values()), rel=0.1
        ), f"{ledger}\n{got}"


def test_data_parallel_holds_the_gradients_all_the_time():
    alone, one_of_two = (
        estimate_memory(NARROW, batch_size=2, sequence_length=128, replicas=n)
        for n in (1, 2)
    )
    assert (
        one_of_two.total
        == estimate_memory(
            NARROW, batch_size=2, sequence_length=128, micro_batches=2
        ).total
        > alone.total
    )


@pytest.mark.parametrize(
    "given,message",
    [
        (
            {"precision": "fp16"},
            "precision must be one of bf16, bf16-pure, fp32, not 'fp16'",
        ),
        (
            {"optimizer": "sgd"},
            "optimizer must be one of adamw, adamw-bf16, muon, None, not 'sgd'",
        ),
        ({"strategy": "tp"}, "strategy must be one of ddp, fsdp, hsdp, not 'tp'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (
            {"shards": 8},
            "strategy 'ddp' keeps the whole model on each GPU: shards must be 1, not 8",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(given, message):
    with pytest.raises(ValueError) as error:
        estimate_memory(NARROW, **given)
    assert str(error.value) == message


def test_the_table_can_be_read():
    lines = str(
        MemoryEstimate(parameters=2_000_000_000, kv_cache=500_000_000, moment="noon")
    ).splitlines()
    assert lines == [
        "parameters         2.000 GB",
        "kv_cache           0.500 GB",
        "total              2.500 GB   at noon",
    ]


def test_the_selective_policy_compiles():
    model = QwenForCausalLM(
        QwenConfig.from_dict({**NARROW.to_dict(), "num_hidden_layers": 1})
    )
    gradients = {}
    for mode in ("none", "selective"):
        set_activation_checkpointing(model, mode)
        if mode == "selective":
            model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        backward(model, *batch(NARROW, 1, 32), "fp32")
        gradients[mode] = nn.utils.parameters_to_vector(
            p.grad for p in model.parameters()
        )
    torch.testing.assert_close(gradients["selective"], gradients["none"])


def check_ledger(ledger):
    """Weights and moments to the byte, but for step counters; the total within 4%."""
    for config, B, T in ((NARROW, 2, 128), (WIDE, 1, 48)):
        model = QwenForCausalLM(config)
        optimizers = build_optimizers(model, 1e-3)
        got = measured(model, optimizers, B, T, "fp32", micro_batches=2)
        predicted = ledger(
            config, precision="fp32", batch_size=B, sequence_length=T, micro_batches=2
        )
        assert predicted.parameters == got["parameters"], "parameters"
        counters = 4 * len(list(model.parameters()))
        assert 0 <= got["optimizer"] - predicted.optimizer <= counters, "optimizer"
        ratio = predicted.total / sum(got.values())
        assert abs(ratio - 1) < 0.04, f"total: {ratio:.3f} of what was measured"


def altered(name, change):
    """A ledger that is right but for one category."""

    def ledger(config, **settings):
        right = estimate_memory(config, **settings)
        return replace(right, **{name: change(getattr(right, name), config)})

    return ledger


LEDGERS = {
    "forgets gradients": altered("gradients", lambda size, config: 0),
    "counts a tied matrix twice": altered(
        "parameters",
        lambda size, config: size + 4 * config.vocab_size * config.hidden_size,
    ),
    "one moment": altered("optimizer", lambda size, config: size // 2),
    "forgets logits": altered("logits", lambda size, config: 0),
    "activations twice": altered("activations", lambda size, config: 2 * size),
}


def test_the_ledger_passes_its_own_check():
    check_ledger(estimate_memory)


@pytest.mark.mutant
@pytest.mark.parametrize("name", LEDGERS)
def test_a_ledger_with_a_mistake_is_noticed(name):
    with pytest.raises(AssertionError):
        check_ledger(LEDGERS[name])


def check_selective(switch):
    """Between "none" and "full" in memory; no matrix product twice."""
    held, work = [], []
    for set_mode in (
        partial(set_activation_checkpointing, mode="none"),
        switch,
        partial(set_activation_checkpointing, mode="full"),
    ):
        model = QwenForCausalLM(NARROW)
        set_mode(model)
        ids, documents = batch(NARROW, 2, 128)
        work.append(counted(model, ids, documents, "fp32"))
        with StorageTracker(parameters=model.parameters()) as tracker:
            loss = model(ids, ids)
            held.append(tracker.timeline()[-1]["other"])
        del loss
    assert work[1] == work[0], "computes matrix products again"
    assert held[2] < held[1] < 0.6 * held[0], f"keeps {held[1] / held[0]:.0%}"


def keeps_nothing(model):
    model.gradient_checkpointing_enable(
        partial(create_selective_checkpoint_contexts, [])
    )


def keeps_everything(model):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE

    model.gradient_checkpointing_enable(
        partial(create_selective_checkpoint_contexts, policy)
    )


def test_selective_passes_its_own_check():
    check_selective(partial(set_activation_checkpointing, mode="selective"))


@pytest.mark.mutant
@pytest.mark.parametrize("switch", [keeps_nothing, keeps_everything])
def test_a_policy_with_a_mistake_is_noticed(switch):
    with pytest.raises(AssertionError):
        check_selective(switch)

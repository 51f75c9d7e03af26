"""What `test_parallel.py` runs under torchrun: small trainings in every layout; each
process checks, and rank 0 writes what it found.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_analog.config import QwenConfig
from qwen_analog.distributed import DistributedContext
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.model import QwenForCausalLM
from qwen_analog.optim import build_optimizers
from qwen_analog.parallel import build_model, clip_grad_norm, gradient_sync, make_mesh

T, BLOCKS, STEPS = 16, 16, 5  # tokens a block, blocks a step, steps


def small(tied: bool, **changes) -> QwenConfig:
    """A vocabulary, a width and a depth that neither 2 nor 4 divides."""
    shape = dict(
        vocab_size=279,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        intermediate_size=51,
        max_position_embeddings=32,
        rope_theta=1e4,
        initializer_range=0.1,
    )
    return QwenConfig(**{**shape, **changes}, tie_word_embeddings=tied)


def batch(step: int) -> dict[str, torch.Tensor]:
    """The step's blocks, [16, T] each: two documents a block, and between one and T - 1
    real targets.
    """
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(279, (BLOCKS, T + 1), generator=g) // (
        1 + torch.arange(T + 1) % 3
    )  # not uniform: there is something to learn
    cut, length = (
        torch.randint(1, T, (BLOCKS, 1), generator=g),
        torch.randint(1, T, (BLOCKS, 1), generator=g) ** 2 // T + 1,
    )
    place = torch.arange(T)
    return {
        "input_ids": ids[:, :-1],
        "targets": ids[:, 1:].where(place < length, IGNORE_INDEX),
        "document_ids": (place >= cut).long(),
    }


def train(
    model, call, processes, accumulation=1, kind="adamw", precision="fp32", mutant=None
) -> list[float]:
    """Losses of `STEPS` steps; this process takes every world_size-th block. Clipped to
    half of the usual gradient norm.
    """
    optimizers = build_optimizers(
        model, 1e-2, eps=1e-3, kind=kind
    )  # a large eps: the step follows the gradient's size
    losses = []
    for step in range(STEPS):
        mine = {
            name: value[processes.rank :: processes.world_size]
            for name, value in batch(step % 2).items()
        }
        real = (mine["targets"] != IGNORE_INDEX).sum().item()
        (targets,) = processes.all_reduce_sum(real)
        nats = 0.0
        size = len(mine["targets"]) // accumulation
        exchange = {"never synchronised": None, "exchanged too early": 0}
        last = exchange.get(mutant, accumulation - 1)
        for i in range(accumulation):
            with (
                gradient_sync(call, i == last),
                torch.autocast(
                    "cpu",
                    torch.bfloat16,
                    enabled=precision == "bf16",
                    cache_enabled=False,
                ),
            ):
                loss = call(
                    **{
                        name: value[i * size : (i + 1) * size]
                        for name, value in mine.items()
                    },
                    reduction="sum",
                )
                scale = (
                    1 / real
                    if mutant == "mean of each process"
                    else processes.world_size / targets
                )
                (loss * scale).backward()
            nats += loss.item()
        losses.append(processes.all_reduce_sum(nats)[0] / targets)
        if mutant == "clipped by its own shard":
            torch.nn.utils.clip_grad_norm_(
                [p.grad.to_local() for p in model.parameters()], 1e9
            )
            own = torch.stack(
                [p.grad.to_local().norm() for p in model.parameters()]
            ).norm()
            for p in model.parameters():
                p.grad.mul_(min(1.0, 0.7 / own.item()))
        else:
            norm = clip_grad_norm(model, 0.7)
            assert norm > 0.7, f"nothing was clipped: {norm}"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .clone()
    )


def check_initial_weights(strategy, mesh, processes, tied, precision):
    """Bit-equal to the model made on one CPU; each process holds its part; the head
    stays tied; the generator goes on alike.
    """
    config = small(tied)
    torch.manual_seed(11)
    expected = QwenForCausalLM(config)
    after = torch.get_rng_state()
    model, call = build_model(
        config, 11, processes.device, strategy=strategy, mesh=mesh, precision=precision
    )
    assert torch.equal(torch.get_rng_state(), after)
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight
    ) == tied and model.count_parameters() == expected.count_parameters()
    dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
    for (name, p), q in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        assert p.dtype == dtype and torch.equal(whole(p), q.detach().to(dtype)), (
            f"{strategy} {precision}: {name}"
        )
    held = sum(
        p.to_local().numel() if isinstance(p, DTensor) else p.numel()
        for p in model.parameters()
    )
    share = held / expected.count_parameters()
    parts = 1 if mesh is None else mesh.size(-1)
    assert share == 1 if parts == 1 else 0.9 / parts < share < 1.15 / parts, (
        f"{strategy}: {share:.2f} of the weights, not 1/{parts}"
    )
    assert (call is model) == (strategy != "ddp")


def check_memory_of_initialisation(mesh, processes):
    """While a sharded model is made, the resident memory grows by much less than the
    whole model.
    """

    def peak():
        return next(
            int(line.split()[1]) << 10
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )

    config = small(
        True,
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
    )
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the high-water mark starts again from here
    before = peak()
    model, _ = build_model(
        config, 0, processes.device, strategy="fsdp", mesh=mesh, precision="fp32"
    )
    grown, size = peak() - before, 4 * model.count_parameters()
    # a shard and one whole parameter are a third; the allocator keeps some of what was
    # freed
    assert grown < 0.75 * size, (
        f"grew by {grown >> 20} MiB, the whole model is {size >> 20} MiB"
    )


class Messages(TorchDispatchMode):
    """While open, counts the collectives by name and type of number."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            tensor = next(
                leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)
            )
            self.sent[operation._opname.strip("_"), tensor.dtype] += 1
        return operation(*args, **(kwargs or {}))


def check_messages(strategy, mesh, processes, kept=False, precision="fp32"):
    """What two micro-batches of a step send: DDP exchanges once, HSDP sums between
    machines once, shards are scattered twice.
    """
    config = small(True)
    model, call = build_model(
        config,
        0,
        processes.device,
        strategy=strategy,
        mesh=mesh,
        precision=precision,
        reshard_after_forward=not kept,
    )
    with Messages() as record:
        for last in (False, True):
            with gradient_sync(call, last):
                call(**batch(0), reduction="sum").backward()
    groups = config.num_hidden_layers + 1
    gathered = 2 * groups + (0 if kept else 2 * config.num_hidden_layers)
    weights, gradients = (
        torch.bfloat16 if precision == "bf16" else torch.float32,
        torch.float32,
    )
    expected = {
        "ddp": {("allreduce", gradients): 1},
        "fsdp": {
            ("allgather_base", weights): gathered,
            ("reduce_scatter_base", gradients): 2 * groups,
        },
    }
    expected["hsdp"] = {**expected["fsdp"], ("allreduce", gradients): groups}
    assert record.sent == expected[strategy], (
        f"{strategy} sends {record.sent}, not {expected[strategy]}"
    )


def check_sharded_after_forward(strategy, mesh, processes):
    """A pass without gradients, an evaluation's or a sample's, leaves every parameter
    sharded, and the next step as it would have been.
    """
    ends = []
    for looks in (False, True):
        model, call = build_model(
            small(True),
            0,
            processes.device,
            strategy=strategy,
            mesh=mesh,
            precision="fp32",
            reshard_after_forward=False,
        )
        call(**batch(0), reduction="sum").backward()
        model.zero_grad()
        if looks:
            with torch.no_grad():
                call(**batch(1), reduction="sum")
            assert all(isinstance(p, DTensor) for p in model.parameters()), (
                f"{strategy}: an evaluation leaves gathered weights"
            )
            model.generate(
                batch(1)["input_ids"][:1, :4], max_new_tokens=3, temperature=0.0
            )
            assert all(isinstance(p, DTensor) for p in model.parameters()), (
                f"{strategy}: a sample leaves gathered weights"
            )
        call(**batch(0), reduction="sum").backward()
        ends.append([whole(p.grad) for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def check_mesh_of_machines(mesh):
    """Two machines of two processes each, by torchrun's variables alone."""
    assert mesh.shape == (2, 2) and mesh.mesh_dim_names == ("replicate", "shard")
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]


def check_one_compiled_block():
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1 and not counters["graph_break"], f"{graphs} graphs"


class Worker:
    """Trains in every layout, and tries claims; `found`, `claims` are the results."""

    def __init__(self, processes):
        self.processes, n = processes, processes.world_size
        self.meshes = {"ddp": None, "fsdp": make_mesh("fsdp", n, "cpu")}
        if n == 4:
            self.meshes["hsdp"] = make_mesh("hsdp", n, "cpu")
        self.found, self.claims = {}, {}

    def claim(self, name, check, *arguments, **options):
        """Try `check` on all processes, and note the first one's error."""
        try:
            check(*arguments, **options)
            error = None
        except AssertionError as failed:
            error = str(failed) or repr(failed)
        errors = self.processes.all_gather_object(error)
        self.claims[name] = next(filter(None, errors), None)

    def train(
        self,
        strategy,
        what,
        tied=True,
        checkpointing=False,
        precision="fp32",
        kind="adamw",
        accumulation=1,
        mutant=None,
        **options,
    ):
        mesh, device = self.meshes[strategy], self.processes.device
        options |= {"strategy": strategy, "mesh": mesh, "precision": precision}
        seed = self.processes.rank if mutant == "a seed for each process" else 0
        model, call = build_model(small(tied), seed, device, **options)
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = train(
            model, call, self.processes, accumulation, kind, precision, mutant
        )
        weights = {name: whole(p) for name, p in model.named_parameters()}
        self.found[strategy, what] = losses, weights, list(model.state_dict())

    def every_layout(self, strategy):
        n, mesh = self.processes.world_size, self.meshes[strategy]
        layout = strategy, mesh, self.processes
        self.claim(f"messages of {strategy}", check_messages, *layout)
        for tied, precision in ((True, "fp32"), (False, "bf16-pure")):
            name = f"initial weights of {strategy}, {precision}"
            self.claim(name, check_initial_weights, *layout, tied, precision)
            self.train(strategy, f"tied={tied}", tied, accumulation=2)
            if tied or n == 2:
                self.train(strategy, f"bf16 tied={tied}", tied, precision="bf16")
        for accumulation in (1, 4) if n == 2 else (4,):
            what = f"accumulation {accumulation}"
            self.train(strategy, what, accumulation=accumulation)
        self.train(strategy, "checkpointing", checkpointing=True)
        mutant = "mean of each process"
        self.train(strategy, mutant, mutant=mutant)

    def two_processes(self):
        mesh, processes = self.meshes["fsdp"], self.processes
        pairs = make_mesh("hsdp", 2, "cpu", 2)
        layout = "fsdp", mesh, processes
        options = {"kept": True, "precision": "bf16"}
        self.claim("messages of fsdp, kept", check_messages, *layout, **options)
        for strategy, each in (("fsdp", mesh), ("hsdp", pairs)):
            name = f"{strategy} is sharded after a forward pass"
            layout = strategy, each, processes
            self.claim(name, check_sharded_after_forward, *layout)
        options = {"reshard_after_forward": False, "prefetch": 0}
        self.train("fsdp", "kept after forward", **options)
        self.train("fsdp", "two ahead", prefetch=2, accumulation=2)
        self.train("fsdp", "muon", kind="muon")
        for strategy, mutant in (
            ("fsdp", "clipped by its own shard"),
            ("ddp", "never synchronised"),
        ):
            self.train(strategy, mutant, mutant=mutant)
        mutant = "exchanged too early"
        self.train("ddp", mutant, accumulation=2, mutant=mutant)
        self.train("fsdp", "compiled", checkpointing=True, compile=True)
        self.claim("one compiled block serves all", check_one_compiled_block)

    def two_machines(self):
        mesh = self.meshes["fsdp"]
        self.claim("machines are copies", check_mesh_of_machines, self.meshes["hsdp"])
        name = "no process holds the whole model while it is made"
        self.claim(name, check_memory_of_initialisation, mesh, self.processes)
        mutant = "a seed for each process"
        self.train("hsdp", mutant, mutant=mutant)


def main(words: list[str]) -> None:
    (out,) = words
    with DistributedContext() as processes:
        worker = Worker(processes)
        for strategy in worker.meshes:
            worker.every_layout(strategy)
        if processes.world_size == 4:
            worker.two_machines()
        else:
            worker.two_processes()
        if processes.rank == 0:
            torch.save({"found": worker.found, "claims": worker.claims}, out)


if __name__ == "__main__":
    main(sys.argv[1:])

"""One process of a real step: prints the bytes that the allocator handed out at the
fullest moment of the third step.
"""

import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from qwen_analog.data import TokenSequence
from qwen_analog.finetune import add_adapters
from qwen_analog.memory import set_activation_checkpointing
from qwen_analog.optim import build_optimizers
from qwen_analog.distributed import DistributedContext
from qwen_analog.parallel import build_model, make_mesh
from qwen_analog.step import micro_batches, train_step
from qwen_analog.train_config import TrainConfig

torch.set_num_threads(1)
done = torch.distributed.Work.wait


def wait(work, *timeout):
    """Wait for gloo's thread too: it holds a buffer until it comes to let it go."""
    result = done(work, *timeout)
    time.sleep(0.01)
    return result


torch.distributed.Work.wait = wait
output = Path(sys.argv[1])
with DistributedContext() as processes:
    for number, line in enumerate((output / "configs.jsonl").read_text().splitlines()):
        config = TrainConfig.create(json.loads(line))
        mesh = make_mesh(
            config.parallel, processes.world_size, "cpu", config.shard_size or None
        )
        model, wrapped = build_model(
            config.qwen_config(),
            0,
            processes.device,
            strategy=config.parallel,
            mesh=mesh,
            precision=config.precision,
            prepare=partial(add_adapters, config=config),
        )
        set_activation_checkpointing(model, config.activation_checkpointing)
        optimizers = build_optimizers(model, 1e-3, kind=config.optimizer)
        ids = torch.zeros(config.sequence_length, dtype=torch.int64)
        count = config.micro_batch_size * config.gradient_accumulation_steps
        batches = micro_batches([TokenSequence(ids, ids, ids, [])] * count, config)
        for _ in range(2):  # DDP arranges its buckets anew in the second step
            train_step(wrapped, optimizers, batches, config, processes)
        state = [
            value
            for optimizer in optimizers
            for values in optimizer.state.values()
            for value in values.values()
        ]
        tensors = [
            tensor.to_local() if hasattr(tensor, "to_local") else tensor
            for tensor in [*model.parameters(), *state]
            if isinstance(tensor, torch.Tensor)
        ]
        held = sum(tensor.nbytes for tensor in tensors)
        if wrapped is not model:  # DDP's buckets hold the gradients already
            held += sum(p.nbytes for p in model.parameters() if p.requires_grad)
        time.sleep(0.3)  # what gloo's threads still hold is not this step's
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            train_step(wrapped, optimizers, batches, config, processes)
        trace = output / f"trace_{processes.rank}.json"
        profile.export_chrome_trace(str(trace))
        changes = sorted(
            (e["ts"], e["args"]["Bytes"])
            for e in json.loads(trace.read_text())["traceEvents"]
            if e.get("name") == "[memory]"
        )
        peak = held + max(itertools.accumulate(size for _, size in changes))
        (output / f"peak_{number}_{processes.rank}").write_text(str(peak))
        del model, wrapped, optimizers, state, tensors

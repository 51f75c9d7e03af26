"""Changes that were expected to make the model faster, and what they did.

`python benchmarks/changes.py NAME ...` measures the named ones (default: all), A and
B by turns in one process, and keeps the results in changes.json beside this file. What
was expected, and why, was written before the first run.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import chain, product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from qwen_analog import QwenConfig, QwenForCausalLM, inference, load
from qwen_analog.bench import alternating, device_name
from qwen_analog.distributed import DistributedContext
from qwen_analog.optim import build_optimizers
from qwen_analog.quantize import QuantizedLinear
from qwen_analog.step import train_step
from qwen_analog.train_config import TrainConfig

FILE = Path(__file__).with_name("changes.json")
CPU = torch.device("cpu")
MEDIUM = json.loads(Path(__file__).with_name("medium.json").read_text())  # 27.8M


def gain(a, b, repeats=9) -> float:
    """How many times as fast b is, by the median of the turns' ratios."""
    times = alternating({"a": a, "b": b}, repeats, CPU)
    return median(x / y for x, y in zip(times["a"], times["b"]))


@torch.no_grad()
def folding() -> dict:
    ratios = {}
    for rows in (1, 16):
        q = torch.randn(rows, 9, 1, 64).bfloat16()
        k, v = (torch.randn(rows, 3, 1024, 64).bfloat16() for _ in range(2))
        plain = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        folded = lambda: F.scaled_dot_product_attention(q.view(rows, 3, 3, 64), k, v)
        assert (plain().view(-1) - folded().view(-1)).abs().max() < 1e-2
        many = lambda f: lambda: [f() for _ in range(30)]
        ratios[f"{rows} rows"] = gain(many(plain), many(folded), 15)
    return ratios


@torch.no_grad()
def freezing() -> dict:
    import torch._inductor.config as inductor

    inductor.freezing = True
    model, _ = load("smollm2", dtype=torch.bfloat16)
    laid_out, _ = load("smollm2", dtype=torch.bfloat16, inference=True)
    x = torch.randn(1, 1, 576).bfloat16()
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, dtype=torch.int64), x.dtype)
    blocks = model.model.layers[:6].eval()

    def plain(x):
        for layer in blocks:
            x = layer(x, cos, sin)
        return x

    def ours():
        y = x
        for layer in laid_out.model.layers[:6]:
            y = layer(y, cos[:, None], sin[:, None])
        return y

    compiled = torch.compile(plain)
    with torch.inference_mode():
        return {
            "over plain": gain(lambda: plain(x), lambda: compiled(x), 30),
            "over laid out": gain(ours, lambda: compiled(x), 30),
        }


WRITE = """
import time, torch
from qwen_analog import load
model, _ = load("smollm2", dtype=torch.bfloat16, inference=True)
ids = torch.full((1, 8), 11)
model.generate(ids, 4, temperature=0, eos_token_id=[])
began = time.perf_counter()
model.generate(ids, 24, temperature=0, eos_token_id=[])
print(time.perf_counter() - began)
"""


def written(policy: str, at_once: int) -> float:
    """The seconds in which processes that run at once write the same text."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-c", WRITE]
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **options) for _ in range(at_once)]
    return max(float(process.communicate()[0]) for process in running)


def waiting() -> dict:
    pairs = {"alone": (1, 2), "two at once": (2, 1)}
    return {
        name: median(
            written("PASSIVE", at_once) / written("ACTIVE", at_once)
            for _ in range(turns)
        )
        for name, (at_once, turns) in pairs.items()
    }


def training_step():
    values = {"micro_batch_size": 4, "sequence_length": 512, "precision": "bf16"}
    values |= {"model": MEDIUM, "activation_checkpointing": "none"}
    config, context = TrainConfig(**values), DistributedContext()
    torch.manual_seed(0)
    model = QwenForCausalLM(QwenConfig(**MEDIUM))
    optimizers = build_optimizers(model, 1e-3)
    ids = torch.randint(8192, (4, 513))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    return lambda: train_step(model, optimizers, [batch], config, context)


def memory() -> dict:
    libc, step, seconds = ctypes.CDLL(None), training_step(), {False: [], True: []}
    for _ in range(4):
        for keep in seconds:
            libc.mallopt(-1, 2**31 - 1 if keep else 2**17)  # M_TRIM_THRESHOLD
            libc.mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX
            step()  # the first after a change is not like the others
            began = time.perf_counter()
            step()
            seconds[keep].append(time.perf_counter() - began)
    return {"a step": median(a / b for a, b in zip(seconds[False], seconds[True]))}


def blocks_of_queries(q, k, v, size=128):
    """Causal attention by plain products, `size` queries at a time."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = []
    for start in range(0, q.shape[2], size):
        end = start + size
        scores = q[:, :, start:end] @ k[:, :, :end].mT / q.shape[-1] ** 0.5
        hidden = torch.ones(size, end, dtype=torch.bool).triu(start + 1)
        shares = scores.float().masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(shares.to(q.dtype) @ v[:, :, :end])
    return torch.cat(out, dim=2)


def attention() -> dict:
    q, k, v = (torch.randn(4, n, 512, 64).bfloat16() for n in (8, 4, 4))
    for x in (q, k, v):
        x.requires_grad_()
    kernel = lambda *x: F.scaled_dot_product_attention(
        *x, is_causal=True, enable_gqa=True
    )
    assert (kernel(q, k, v) - blocks_of_queries(q, k, v)).abs().max() < 0.05

    def both_ways(attend):
        attend(q, k, v).sum().backward()
        q.grad = k.grad = v.grad = None

    return {
        "both ways": gain(
            lambda: both_ways(kernel), lambda: both_ways(blocks_of_queries)
        )
    }


@torch.no_grad()
def compiling() -> dict:
    ratios = {}
    for form in (None, "int8", "int4"):
        options = {"dtype": torch.bfloat16, "quantize": form}
        models = [load("smollm2", inference=True, **options)[0]]
        models += [load("smollm2", compile=True, **options)[0]]
        for rows in (1, 16):
            ids = torch.full((rows, 16), 11)
            write = lambda m: m.generate(ids, 40, temperature=0, eos_token_id=[])
            a, b = (lambda m=m: write(m) for m in models)
            ratios[f"{form or 'bf16'}, {rows} row{'s' * (rows > 1)}"] = gain(a, b, 7)
    return ratios


@torch.no_grad()
def widening() -> dict:
    models = {"bf16": load("smollm2", dtype=torch.bfloat16, inference=True)[0]}
    models["int8"], _ = load("smollm2", dtype=torch.bfloat16, quantize="int8")
    ratios, asked = {}, inference.float32_is_faster
    for (form, model), tokens in product(models.items(), (512, 2048)):
        ids = torch.full((1, tokens), 11)

        def read(wide, model=model, ids=ids):
            inference.float32_is_faster = lambda: wide
            for layer in layers_of(model):
                layer.wide_dtype = torch.float32 if wide else torch.bfloat16
            model(ids, logits_to_keep=1)

        a, b = (partial(read, wide) for wide in (False, True))
        ratios[f"{form}, {tokens:,} tokens"] = gain(a, b, 5)
    inference.float32_is_faster = asked
    return ratios


def layers_of(model) -> list[QuantizedLinear]:
    """The layers of a model laid out, where they are quantized."""
    blocks = (vars(block).values() for block in model.model.layers)
    found = [model.lm_head, *chain(*blocks)]
    return [layer for layer in found if isinstance(layer, QuantizedLinear)]


CHANGES = {
    "folding": (
        folding,
        "Query heads of a group become rows of one query",
        "writing waits for memory, and three heads then read their keys once",
        "up to 3",
    ),
    "freezing": (
        freezing,
        "torch.compile with frozen weights, a written token",
        "the compiler packs the matrices and joins small operations",
        "more than 1.2, over our layout too",
    ),
    "compiling": (
        compiling,
        "A compiled step over a cache of fixed room, a written token",
        "small operations are joined, and the matrices stay packed; the fewer bytes a"
        " weight has, the more of a step they are",
        "1.2 in bf16, 1.4 in int8, 1.5 in int4; 1.1 for 16 rows",
    ),
    "widening": (
        widening,
        "Products of many rows in float32, a prompt read",
        "this processor multiplies float32 matrices 1.9 times as fast as bfloat16 ones,"
        " and a copy of the weights is cheap beside hundreds of rows",
        "1.5",
    ),
    "waiting": (
        waiting,
        "Threads that spin while they wait (OMP_WAIT_POLICY=ACTIVE)",
        "they are there at once when the next product comes; two processes on the same"
        " cores spin in each other's way",
        "1.5 alone, below 1 for two at once",
    ),
    "memory": (
        memory,
        "Freed memory is kept, a training step",
        "the system no longer clears the same pages at each step",
        "1.1",
    ),
    "attention": (
        attention,
        "Attention by plain products over 128 queries, forward and backward",
        "large products run nearer to the peak than the attention kernel does",
        "1.8",
    ),
}


def main() -> None:
    kept = json.loads(FILE.read_text())["changes"] if FILE.exists() else []
    found = {change["key"]: change for change in kept}
    for key in sys.argv[1:] or CHANGES:
        measure, name, why, expected = CHANGES[key]
        texts = {"name": name, "why": why, "expected": expected}
        device = device_name(CPU)
        found[key] = {"key": key, **texts, "ratios": measure(), "device": device}
        print(found[key])
        changes = [found[key] for key in CHANGES if key in found]
        head = {"torch": torch.__version__}
        text = json.dumps({**head, "changes": changes}, indent=1)
        FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""What one GPU can tell, part by part; see benchmarks/gpu.sh.

Each part is a process with a time limit of its own. Its JSON is written after every
case, so that a case that fails and a part that hangs cost nothing else.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from base64 import b64encode
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from qwen_analog.config import QwenConfig
from qwen_analog.loss import linear_cross_entropy
from qwen_analog.model import QwenForCausalLM

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
TINY = dict(
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=256,
)
SMALL = dict(
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=4096,
    max_position_embeddings=2048,
)
# seconds of the whole run; the last minute of nine is for starting and stopping
TOTAL = 500


class Sizes:
    """How large the work is: of analog-3b on a GPU, or tiny."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.shape = TINY if tiny else {}
        self.length = 64 if tiny else 4096  # tokens of a training sequence
        self.documents = 3 if tiny else 8  # in each
        self.steps = 2 if tiny else 5
        self.prompts = (16, 64) if tiny else (1024, 4096)
        self.new = 8 if tiny else 64  # tokens to write
        self.clients = 64
        self.compile = not tiny
        # of the run from the command line, beside analog-3b's
        self.small = TINY if tiny else {**TINY, **SMALL}
        self.small_steps = 12 if tiny else 60

    def config(self) -> QwenConfig:
        return QwenConfig(**self.shape)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(function, tries: int = 5) -> float:
    """The median time of a call, after one that warms up."""
    function()
    times = []
    for _ in range(tries):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def new_model(sizes: Sizes, dtype: torch.dtype) -> QwenForCausalLM:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return QwenForCausalLM(sizes.config())
    finally:
        torch.set_default_dtype(before)


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bandwidth(sizes: Sizes) -> float:
    """Bytes a second that a large sum reads."""
    count = 2**20 if sizes.tiny else 2**31
    data = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
    return data.nbytes / seconds(lambda: data.view(-1, 2**10).sum(-1))


# ------------------------------------------------------------------ parts: each yields
# its cases, dicts with a "case"


def unit_tests(sizes: Sizes):
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_gpu.py"]
    command += ["-o", "faulthandler_timeout=40", "-k"]
    command += ["bounds" if sizes.tiny else "cuda or gpu or recorded"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"case": lines[-1], "passed": process.wait() == 0, "failed": failed}


def machine(sizes: Sizes):
    n = 256 if sizes.tiny else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    yield {"case": f"matmul {n}", "tflops": 2 * n**3 / seconds(lambda: a @ a) / 1e12}
    yield {"case": "read bandwidth", "gb_per_second": bandwidth(sizes) / 1e9}
    V, D, N = (320, 64, 64) if sizes.tiny else (151_936, 2048, 4096)
    h = torch.randn(N, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(V, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V, (N,), device=DEVICE)
    for size in (16, 64) if sizes.tiny else (256, 512, 1024, 2048, 4096):

        def loss(size=size):
            linear_cross_entropy(h, w, targets, chunk_size=size).backward()
            h.grad = w.grad = None

        took = seconds(loss)
        yield {"case": f"loss, chunks of {size}", "milliseconds": 1e3 * took}


@contextlib.contextmanager
def one_process():
    """A process group of this process alone."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    backend = "nccl" if CUDA else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def laid_out(model: QwenForCausalLM, layout: str) -> nn.Module:
    """What training calls, as it is on several GPUs."""
    from torch.distributed.device_mesh import init_device_mesh

    from qwen_analog.parallel import _shard

    if layout == "ddp":
        ids = [0] if CUDA else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True
        )
    if layout == "fsdp":
        mesh = init_device_mesh(DEVICE.type, (1,), mesh_dim_names=("shard",))
        _shard(model, mesh, "bf16", True)
    return model


def predicted(config, copies: bool) -> float:
    from qwen_analog.memory import estimate_for

    # a copy of several keeps its gradients between steps
    return estimate_for(config, 2 if copies else 1).total


def note(marks: list[float], waits: bool) -> None:
    if waits:
        wait()
    marks.append(time.perf_counter())


def train_case(
    sizes: Sizes, layout: str, mode: str, rows: int = 1, passes: int = 1, float8=False
) -> dict:
    """A few steps of training on packed documents: `passes` of `rows` sequences."""
    from qwen_analog.float8 import to_float8
    from qwen_analog.hardware import peak_flops, peak_memory
    from qwen_analog.memory import flops_per_token, set_activation_checkpointing
    from qwen_analog.optim import build_optimizers
    from qwen_analog.parallel import clip_grad_norm, compile_layers
    from qwen_analog.step import accumulate_gradients
    from qwen_analog.train_config import TrainConfig

    T, config = sizes.length, sizes.config()
    settings = TrainConfig(
        model=config.to_dict(),
        sequence_length=T,
        micro_batch_size=rows,
        gradient_accumulation_steps=passes,
        activation_checkpointing=mode,
    )
    model = new_model(sizes, torch.float32)
    if float8:
        to_float8(model, emulate=not CUDA)
    if sizes.compile:
        compile_layers(model)
    set_activation_checkpointing(model, mode)
    wrapped = laid_out(model, layout)
    optimizers = build_optimizers(model, 1e-4)
    document = torch.arange(T) * sizes.documents // T
    batches = []
    for _ in range(passes):
        ids = torch.randint(config.vocab_size, (rows, T + 1))
        batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        batches.append(batch | {"document_ids": document.expand(rows, T).clone()})
    tokens = passes * rows * T
    losses, times = [], []
    steps = sizes.steps if tokens < 10 * T else 3
    for step in range(steps):
        last = step == steps - 1  # the device is waited for between its phases
        wait()
        marks = [time.perf_counter()]
        loss = accumulate_gradients(wrapped, batches, tokens, settings, DEVICE, 1)
        note(marks, last)
        clip_grad_norm(model, 1.0)
        note(marks, last)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 0 or layout != "ddp")
        note(marks, last)
        losses.append(loss.item() / tokens)
        times.append(time.perf_counter() - marks[0])
    phases = [1e3 * (end - begin) for begin, end in zip(marks, marks[1:])]
    speed = tokens / statistics.median(times[len(times) // 2 :])
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops_per_token(config, T) / peak_flops(DEVICE),
        "peak_gb": peak_memory(DEVICE) / 1e9,
        "planned_gb": predicted(settings, layout == "ddp") / 1e9,
        "first_seconds": times[0],
        "milliseconds": dict(zip(("passes", "clipping", "update"), phases)),
        "losses": [losses[0], losses[-1]],
    }


def guarded(case: str, function, *arguments) -> dict:
    """A case's numbers, or why there are none."""
    try:
        found = {"case": case, **function(*arguments)}
    except ImportError as error:
        found = {"case": case, "error": f"not available: {error}"}
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        found = {"case": case, "error": f"{type(error).__name__}: {reason:.300}"}
    free()
    return found


def train(sizes: Sizes):
    cases = [("none", "full", 1, 4), ("none", "full", 4, 4)]
    cases += [("none", "full", 4, 4, True), ("ddp", "full", 1, 1)]
    cases += [("fsdp", "full", 1, 1), ("none", "none", 1, 4), ("fsdp", "full", 4, 4)]
    cases += [("none", "selective", 1, 4)]
    for layout, *how in cases:
        with one_process() if layout != "none" else contextlib.nullcontext():
            mode, rows, passes, *float8 = how
            case = f"{layout}, {mode}, {passes} x {rows}{', float8' * len(float8)}"
            yield guarded(case, train_case, sizes, layout, *how)


def write_corpus(folder: Path) -> None:
    """Python's own library as documents, and its bytes as a vocabulary."""
    from qwen_analog.bpe import BYTE_ORDER
    from qwen_analog.jsonl import write_jsonl

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [{"text": file.read_text("utf-8", "replace")} for file in files]
    write_jsonl(texts, folder / "library.jsonl")
    lines = [f"{b64encode(t).decode()} {rank}" for rank, t in enumerate(BYTE_ORDER)]
    (folder / "bytes.tiktoken").write_text("\n".join(lines))


def metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start_training(folder: Path, run: str, launcher: list[str], **settings):
    """`qwen-analog train` as its user starts it."""
    settings = {
        "data": folder / "library.jsonl",
        "tokenizer": f"tiktoken:{folder / 'bytes.tiktoken'}",
        "output_dir": folder / run,
        "log_every": 1,
        **settings,
    }
    command = [sys.executable, *launcher, "-m", "qwen_analog.train"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}"]
        command += [] if value is None else [str(value)]
    print(*command, flush=True)
    return subprocess.Popen(command, cwd=ROOT)


def until_step(process, run: Path, step: int) -> list[dict]:
    """The metrics once that step is done."""
    while process.poll() is None:
        found = [line for line in metrics(run) if "loss" in line]
        if found and found[-1]["step"] >= step:
            return found
        time.sleep(0.2)
    raise RuntimeError(f"the run ended with {process.returncode}")


def numbers_of(lines: list[dict]) -> dict:
    late = lines[len(lines) // 2 :]
    speeds = [line["tokens_per_second"] for line in late]
    return {
        "tokens_per_second": statistics.median(speeds),
        "mfu": statistics.median(line["mfu"] for line in late),
        "losses": [lines[0]["loss"], lines[-1]["loss"]],
        "steps": len(lines),
    }


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]


def stopped_and_resumed(folder: Path, sizes: Sizes, layout: str) -> dict:
    """A small run; SIGTERM half-way; then its rest, and text from its model."""
    (folder / "model.json").write_text(json.dumps({"model": sizes.small}))
    run, half = folder / layout, sizes.small_steps // 2
    settings = {
        "config": folder / "model.json",
        "parallel": layout,
        "sequence_length": 64 if sizes.tiny else 2048,
        "micro_batch_size": 2 if sizes.tiny else 16,
        "gradient_accumulation_steps": 1,
        "max_steps": sizes.small_steps,
        "warmup_steps": 5,
        "learning_rate": 1e-3,
        "eval_every": half,
        "eval_sequences": 4,
    }
    launcher = TORCHRUN if layout == "fsdp" else []
    process = start_training(folder, layout, launcher, **settings)
    until_step(process, run, half)
    process.send_signal(signal.SIGTERM)
    statuses = [process.wait()]
    process = start_training(folder, layout, launcher, **settings, resume="auto")
    statuses.append(process.wait())
    lines = [line for line in metrics(run) if "loss" in line]
    steps = [line["step"] for line in lines]
    write = [sys.executable, "-m", "qwen_analog", "generate"]
    write += ["def read(self", "--model", str(run / "final")]
    write += ["--max-new-tokens", "60"]
    text = subprocess.run(write, cwd=ROOT, capture_output=True, text=True)
    return numbers_of(lines) | {
        "statuses": statuses,
        "every_step_once": steps == list(range(1, sizes.small_steps + 1)),
        "text": text.stdout[-200:] or text.stderr[-200:],
    }


def large(folder: Path, sizes: Sizes) -> dict:
    """The default model, by the default settings, for a few steps."""
    shape = {"vocab_size": TINY["vocab_size"], **sizes.shape}  # of bytes
    (folder / "large.json").write_text(json.dumps({"model": shape}))
    settings = {
        "config": folder / "large.json",
        "sequence_length": sizes.length,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 5,
        "ignore_memory": None,  # the run ends before it would need the disk
    }
    process = start_training(folder, "large", [], **settings)
    lines = until_step(process, folder / "large", 8)
    process.kill()
    process.wait()
    return numbers_of(lines)


def from_the_command_line(case: str, function, *arguments):
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name))
        yield guarded(case, function, Path(name), *arguments)


def run(sizes: Sizes):
    """`qwen-analog train` with text, checkpoints, a stop, and a resumed run."""
    return from_the_command_line("small", stopped_and_resumed, sizes, "ddp")


def torchrun(sizes: Sizes):
    """The same under torchrun, split by fsdp."""
    return from_the_command_line("small, fsdp", stopped_and_resumed, sizes, "fsdp")


def run_3b(sizes: Sizes):
    return from_the_command_line("analog-3b", large, sizes)


def random_prompt(sizes: Sizes, rows: int, length: int) -> torch.Tensor:
    return torch.randint(sizes.config().vocab_size, (rows, length), device=DEVICE)


def decode_numbers(
    step, sizes: Sizes, rows: int, nbytes: int, read: float, tries: int = 3
) -> dict:
    """Tokens a second of `step`, a function that writes `sizes.new` tokens a row."""
    speed = sizes.new / seconds(step, tries)  # steps a second
    return {
        "tokens_per_second": rows * speed,
        "gb_per_second": nbytes * speed / 1e9,
        "of_bandwidth": nbytes * speed / read,
    }


def weight_bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in model.parameters()}
    tensors |= {t.data_ptr(): t.nbytes for t in model.buffers()}
    return sum(tensors.values())


class StaticCache:
    """Keys and values of a fixed length, written at a position on the device."""

    def __init__(self, config: QwenConfig, length: int, dtype: torch.dtype):
        shape = 1, config.num_key_value_heads, length, config.head_dim
        make = lambda: torch.zeros(shape, dtype=dtype, device=DEVICE)
        self.layers = [(make(), make()) for _ in range(config.num_hidden_layers)]
        self.position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        # a CUDA graph may write to tensors only where it knows that they stay in place
        for tensor in (self.position, *sum(self.layers, ())):
            torch._dynamo.mark_static_address(tensor)

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor):
        k, v = self.layers[layer]
        k.index_copy_(2, self.position, keys)
        v.index_copy_(2, self.position, values)
        return k, v


@torch.no_grad()
def static_decode(model: QwenForCausalLM, sizes: Sizes, compiled: bool):
    """gpt-fast's recipe: one compiled step over a static cache, a graph on a GPU."""
    length = max(256, sizes.new) if not sizes.tiny else 64
    cache = StaticCache(model.config, length, model.model.embed_tokens.weight.dtype)
    keys = torch.arange(length, device=DEVICE)

    def one(token):
        mask = (keys <= cache.position)[None, None, None]  # [1, 1, 1, S]
        hidden = model.model(token, cache.position[None], mask, cache)
        return model.lm_head(hidden)[:, -1:].argmax(-1)

    if compiled:
        one = torch.compile(one, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def write():
        cache.position.zero_()
        token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        for _ in range(sizes.new):
            token = one(token).clone()
            cache.position += 1
        return token

    return write


def decode(sizes: Sizes):
    read = bandwidth(sizes)
    free()
    yield {"case": "read bandwidth", "gb_per_second": read / 1e9}
    greedy = {"temperature": 0, "eos_token_id": []}

    def eager(form: str, rows: int) -> dict:
        model = new_model(sizes, torch.bfloat16).eval()
        if form != "bf16":
            from qwen_analog.quantize import quantize

            model = quantize(model, form)
        prompt = random_prompt(sizes, rows, 4)
        write = lambda: model.generate(prompt, sizes.new, **greedy)
        return decode_numbers(write, sizes, rows, weight_bytes(model), read)

    def static(form: str) -> dict:
        model = new_model(sizes, torch.bfloat16).eval()
        if form != "bf16":
            from qwen_analog.quantize import quantize

            model = quantize(model, form)
        write = static_decode(model, sizes, sizes.compile)
        return decode_numbers(write, sizes, 1, weight_bytes(model), read)

    for form in ("bf16", "int8", "int4"):
        yield guarded(f"{form}, static cache, compiled", static, form)
    for form in ("bf16", "int8", "int4"):
        yield guarded(f"{form}, generate", eager, form, 1)
    yield guarded("bf16, generate, 16 rows", eager, "bf16", 16)


def compiled(sizes: Sizes):
    """The package's own compiled step, beside the layout alone, and its text."""
    from qwen_analog.inference import optimize_for_inference

    read = bandwidth(sizes)
    free()
    greedy = {"temperature": 0, "eos_token_id": []}
    if not sizes.compile:  # the same step, not translated
        torch.compile = lambda function, **how: function

    def both(form: str, rows: int) -> dict:
        quantize = None if form == "bf16" else form
        prompt, found, texts = random_prompt(sizes, rows, 4), {}, []
        for step in ("laid out", "compiled"):
            model = new_model(sizes, torch.bfloat16).eval()
            optimize_for_inference(model, quantize, compile=step == "compiled")
            in_python(model, sizes)
            nbytes = laid_out_bytes(model)
            began = time.perf_counter()
            write = lambda m=model: m.generate(prompt, sizes.new, **greedy)
            texts.append(write()[:, 4:])
            first = time.perf_counter() - began
            tries = 3 if step == "compiled" else 1
            numbers = decode_numbers(write, sizes, rows, nbytes, read, tries)
            found |= numbers
            found[f"{step}_tokens_per_second"] = numbers["tokens_per_second"]
            found[f"{step}_first_seconds"] = first
            print(form, step, first, numbers, flush=True)
            if step == "compiled":
                made = getattr(model.compiled_step, "made", {})
                graphs = [m.graph is not None for ms in made.values() for m in ms]
                found["recorded"] = bool(graphs) and all(graphs)
            del model, write
            free()
        same = (texts[0] == texts[1]).long().cumprod(1).sum().item()
        return found | {"equal_tokens": f"{same} of {texts[0].numel()}"}

    for form, rows in (("bf16", 1), ("bf16", 16), ("int8", 1), ("int4", 1)):
        yield guarded(f"{form}, {rows} rows", both, form, rows)


def in_python(model: nn.Module, sizes: Sizes) -> None:
    """Where nothing is to be compiled: the compiled step's blocks as they are."""
    if model.compiled_step is not None and not sizes.compile:
        model.compiled_step.use(lambda layer, *call: layer(*call))


def laid_out_bytes(model: nn.Module) -> int:
    """Bytes that a step reads: of the layers' modules, which are no submodules."""
    parts = [part for layer in model.model.layers for part in vars(layer).values()]
    modules = [model.lm_head, *(p for p in parts if isinstance(p, nn.Module))]
    total = 0
    for module in modules:
        tensors = [*module.buffers(), *module.parameters()] or vars(module).values()
        found = [t for t in tensors if isinstance(t, torch.Tensor)]
        total += sum(t.numel() * t.element_size() for t in found)
    return total


def prefill(sizes: Sizes):
    model = new_model(sizes, torch.bfloat16).eval()

    @torch.no_grad()
    def read(ids):
        cache = model.new_cache(1, ids.shape[1])
        return model(ids, cache=cache, logits_to_keep=1)

    for length in sizes.prompts:
        ids = random_prompt(sizes, 1, length)
        measure = lambda ids=ids: {
            "tokens_per_second": ids.numel() / seconds(lambda: read(ids))
        }
        yield guarded(f"{length} tokens", measure)


def serve(sizes: Sizes):
    from qwen_analog.bpe import BYTE_ORDER
    from qwen_analog.engine import Engine, Request
    from qwen_analog.inference import optimize_for_inference
    from qwen_analog.sampling import SamplingParams
    from qwen_analog.tokenizer import TiktokenTokenizer

    tokenizer = TiktokenTokenizer({token: n for n, token in enumerate(BYTE_ORDER)})
    context = 64 if sizes.tiny else 512
    if not sizes.compile:  # the same step, not translated
        torch.compile = lambda function, **how: function

    def clients(compile: bool) -> dict:
        model = new_model(sizes, torch.bfloat16).eval()
        optimize_for_inference(model, compile=compile)
        in_python(model, sizes)
        began = time.perf_counter()
        engine = Engine(
            model, tokenizer, max_batch=64, max_context=context, max_queue=64
        )
        made = time.perf_counter() - began
        rooms = getattr(engine.runner.forward, "rooms", {}).values()
        written, left = [0], [sizes.clients]

        def deliver(delta):
            if delta.finish_reason is not None:
                written[0] += delta.written
                left[0] -= 1

        new = sizes.new
        for client in range(sizes.clients):
            prompt = [(client + i) % 250 for i in range(8 + client % 8)]
            params = SamplingParams(temperature=0)
            request = Request(prompt=prompt, max_tokens=new, params=params)
            engine.add_request(request, deliver=deliver, client=str(client))
        wait()
        began = time.perf_counter()
        while left[0]:
            engine.step()
        took = time.perf_counter() - began
        found = {"tokens_per_second": written[0] / took, "tokens": written[0]}
        if not compile:
            return found
        recorded = bool(rooms) and all(room.graph is not None for room in rooms)
        return found | {"made_seconds": made, "recorded": recorded}

    yield guarded(f"{sizes.clients} clients", clients, False)
    yield guarded(f"{sizes.clients} clients, compiled", clients, True)


def transformers(sizes: Sizes):
    """Hugging Face's model, of the same shape and with random weights."""

    def measure(what: str) -> dict:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        fields = sizes.config().to_dict()
        names = [*TINY, "rope_theta", "rms_norm_eps", "tie_word_embeddings"]
        names = {*names, "vocab_size", "hidden_size", "num_hidden_layers"}
        config = Qwen2Config(**{name: fields[name] for name in names})
        with DEVICE:
            model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
        if what == "prefill":
            ids = random_prompt(sizes, 1, sizes.prompts[0])
            with torch.no_grad():
                took = seconds(lambda: model(ids, logits_to_keep=1))
            return {"tokens_per_second": ids.numel() / took}
        rows = 16 if what.endswith("16 rows") else 1
        ids = random_prompt(sizes, rows, 4)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        lengths = {"max_new_tokens": sizes.new, "min_new_tokens": sizes.new}
        write = lambda: model.generate(ids, **options, **lengths)
        return {"tokens_per_second": rows * sizes.new / seconds(write, 2)}

    for what in ("prefill", "decode", "decode, 16 rows"):
        yield guarded(what, measure, what)


# name: what runs, and the seconds that it may take
PARTS = {
    "machine": (machine, 40),
    "tests": (unit_tests, 120),
    "train": (train, 180),
    "run": (run, 110),
    "torchrun": (torchrun, 110),
    "run_3b": (run_3b, 110),
    "compiled": (compiled, 110),
    "prefill": (prefill, 30),
    "serve": (serve, 75),
    "transformers": (transformers, 60),
    "decode": (decode, 120),
}


def write_json(out: Path, part: str, values: dict) -> None:
    partial = out / f"{part}.json.partial"
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(out / f"{part}.json")


def run_part(part: str, out: Path, sizes: Sizes, fail: str | None) -> None:
    """Run one part, and write its cases as they come."""
    device = torch.cuda.get_device_name(DEVICE) if CUDA else "cpu"
    found = {"part": part, "device": device, "torch": torch.__version__, "cases": []}
    if part == fail:
        raise RuntimeError("this part was told to fail")
    began = time.perf_counter()
    for case in PARTS[part][0](sizes):
        found["cases"].append(case)
        found["seconds"] = time.perf_counter() - began
        write_json(out, part, found)
        print(part, case, flush=True)


def start_part(part: str, out: Path, limit: float, options: list[str]) -> None:
    """Run a part in a process of its own; note what ended it before its time."""
    command = [sys.executable, __file__, str(out), "--part", part, *options]
    error = None
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        try:
            if process.wait(limit):
                last = (out / f"{part}.log").read_text().strip().splitlines()[-1:]
                error = " ".join([f"ended with {process.returncode}", *last])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # each prints where it is
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            error = f"stopped after {limit:.0f} s"
    if error:
        file = out / f"{part}.json"
        values = {"part": part, "cases": []}
        if file.exists():
            values = json.loads(file.read_text())
        write_json(out, part, values | {"error": error[:400]})


def summary(out: Path) -> str:
    """The results as a table in Markdown."""
    parts = [
        json.loads((out / f"{p}.json").read_text())
        for p in PARTS
        if (out / f"{p}.json").exists()
    ]
    device = next((p["device"] for p in parts if "device" in p), "unknown")
    lines = [f"# {device}, torch {torch.__version__}", ""]
    lines += ["| part | case | result |", "|---|---|---|"]
    for part in parts:
        for case in part["cases"]:
            values = {n: v for n, v in case.items() if n != "case"}
            text = ", ".join(
                f"{n} {v:,.3g}" if isinstance(v, float) else f"{n} {v}"
                for n, v in values.items()
            )
            lines.append(f"| {part['part']} | {case['case']} | {text} |")
        if "error" in part:
            lines.append(f"| {part['part']} | | {part['error']} |")
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole run")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--fail", help="a part that is to fail, to see the others go on"
    )
    arguments = parser.parse_args()
    out, sizes = arguments.out.resolve(), Sizes(arguments.size == "tiny")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        run_part(arguments.part, out, sizes, arguments.fail)
        return
    options = ["--size", arguments.size]
    options += ["--fail", arguments.fail] if arguments.fail else []
    began = time.monotonic()
    for part in arguments.parts:
        left = arguments.seconds - (time.monotonic() - began)
        start_part(part, out, max(1.0, min(PARTS[part][1], left)), options)
        (out / "summary.md").write_text(summary(out))
    print(summary(out))


if __name__ == "__main__":
    main()

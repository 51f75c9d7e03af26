"""What a GPU computes beside what a CPU does: attention, a model, its cache, packed
documents, optimizers, checkpoints, sampling. What needs no GPU's kernel runs on both.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import BYTES, same, small_model
from torch.nn.attention import varlen

from qwen_analog import attention
from qwen_analog import compiled as compiled_module
from qwen_analog import model as model_module
from qwen_analog.attention import PackedDocuments, document_mask, packed_documents
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.engine import Engine
from qwen_analog.inference import optimize_for_inference
from qwen_analog.memory import set_activation_checkpointing
from qwen_analog.optim import build_optimizers
from qwen_analog.parallel import compile_layers
from qwen_analog.restore import restore_checkpoint
from qwen_analog.sampling import SamplingParams, new_generator, sample
from qwen_analog.scheduler import Request

no_gpu = not torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(no_gpu, reason="this machine has no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
HALF, FULL = torch.bfloat16, torch.float32
KERNEL_CALLS = []  # of the kernel that stands in for the GPU's
BOUND = {HALF: 2e-2, FULL: 1e-4}  # of the largest number


def gap(a, b):
    """The largest difference, beside the largest number."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


def by_documents(q, k, v, bounds, upstream=None):
    """The kernel's work, [T, heads, h], document by document in float32; with
    `upstream` its gradients.
    """
    dtype, group, scale = q.dtype, q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    copies = [x.repeat_interleave(group, 1) for x in (k, v)]
    q, k, v = (x.float().transpose(0, 1) for x in (q, *copies))  # [H, T, h]
    seen = document_mask(
        torch.bucketize(torch.arange(q.shape[1]), bounds, right=True)[None]
    )
    p = (q @ k.mT * scale).masked_fill(~seen[0], -torch.inf).softmax(-1)
    if upstream is None:
        return (p @ v).transpose(0, 1).to(dtype)
    up = upstream.float().transpose(0, 1)
    dp = up @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    results = [x.transpose(0, 1) for x in (ds @ k, ds.mT @ q, p.mT @ up)]
    results[1:] = [x.unflatten(1, (-1, group)).sum(2) for x in results[1:]]
    return tuple(x.to(dtype).contiguous() for x in results)


@varlen._varlen_attn.register_kernel("cpu")
def _(q, k, v, bounds, key_bounds, max_q, max_k, is_causal, scale, window, *rest, **_):
    longest = bounds.diff().max().item()
    assert q.dtype == HALF and bounds.dtype == torch.int32
    assert is_causal and list(window) == [-1, 0] and bounds.equal(key_bounds)
    assert max_q == max_k == longest and bounds[-1] == len(q) == len(k)
    out = by_documents(q, k, v, bounds).contiguous()
    KERNEL_CALLS.append(len(q))
    sums = torch.zeros(q.shape[1], len(q))  # log-sum-exp, [heads, T]
    return out, sums, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _(upstream, q, k, v, out, sums, bounds, *rest, **_):
    return by_documents(q, k, v, bounds, upstream)


def rows_of_unequal_length(T, S):
    mask = attention.causal_mask(T, S).expand(2, 1, T, S).clone()
    mask[1, :, :, :2] = False
    return mask


# T, S, mask
CASES = {
    "whole": (8, 8, None),
    "documents": (8, 8, "documents"),
    "masked": (8, 11, rows_of_unequal_length(8, 11)),
    "piece": (3, 8, None),
    "one": (1, 8, None),
    "one of each row": (1, 9, rows_of_unequal_length(1, 9)),
}


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_attention_on_a_gpu(device, case, dtype):
    """The function that a GPU uses, on a CPU as well; gradients too."""
    T, S, mask = CASES[case]
    g = torch.Generator().manual_seed(0)
    make = partial(torch.randn, generator=g)
    q, k, v = make(2, 8, T, 16), make(2, 2, S, 16), make(2, 2, S, 16)
    leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    visible = mask
    if case == "documents":
        mask, visible = document_mask(DOCUMENTS), packed_documents(DOCUMENTS.to(device))
    elif mask is not None:
        visible = mask.to(device)
    elif T > 1:
        mask = attention.causal_mask(T, S)
        visible = None if T == S else mask.to(device)
    out = attention._attend_on_gpu(*leaves, visible)
    wanted_leaves = [x.detach().cpu().float().requires_grad_() for x in leaves]
    group = 4
    copies = [x.repeat_interleave(group, 1) for x in wanted_leaves[1:]]
    wanted = F.scaled_dot_product_attention(wanted_leaves[0], *copies, attn_mask=mask)
    assert out.dtype == dtype and gap(out, wanted) < BOUND[dtype]
    upstream = make(out.shape)
    found = torch.autograd.grad(out, leaves, upstream.to(device, dtype))
    expected = torch.autograd.grad(wanted, wanted_leaves, upstream)
    for a, b in zip(found, expected):
        assert gap(a, b) < BOUND[dtype]
    with torch.no_grad():  # by other kernels
        assert gap(attention._attend_on_gpu(*leaves, visible), wanted) < BOUND[dtype]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@needs_gpu
@pytest.mark.parametrize("T, S", [(8, 8), (3, 8), (1, 8)])
def test_the_function_takes_the_gpus_way(T, S, monkeypatch):
    calls, real = [], attention._attend_on_gpu
    record = lambda *args: (calls.append(1), real(*args))[1]
    monkeypatch.setattr(attention, "_attend_on_gpu", record)
    q, k, v = (torch.randn(1, *shape, 16) for shape in ((8, T), (2, S), (2, S)))
    found = attention.grouped_query_attention(q.cuda(), k.cuda(), v.cuda())
    assert len(calls) == 1
    assert gap(found, attention.grouped_query_attention(q, k, v)) < 1e-4


def test_heads_are_folded_in_their_order():
    """A mask's row belongs to a query, not to a head."""
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = attention.causal_mask(3, 5)
    wanted = attention.grouped_query_attention(q, k, v, mask)
    assert gap(attention._attend_on_gpu(q, k, v, mask), wanted) < 1e-5
    wrong = attention._attend_on_gpu(q, k, v, torch.ones(3, 5, dtype=torch.bool))
    assert gap(wrong, wanted) > 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_bounds(device):
    ids = torch.tensor([[5, 5, 5, 7], [7, 7, 7, 7], [0, 1, 0, 0]], device=device)
    documents = packed_documents(ids)
    # an id that comes again is another document, and a sequence begins one
    assert documents.bounds.tolist() == [0, 3, 4, 8, 9, 10, 12]
    assert documents.bounds.dtype == torch.int32 and documents.longest == 4
    assert packed_documents(ids[:, :1]).bounds.tolist() == [0, 1, 2, 3]
    found = attention.separate_documents(ids)
    assert isinstance(found, PackedDocuments) == (device == "cuda")


def training(model, ids, device, precision="bf16-pure"):
    """The loss of packed documents, and the gradients by name."""
    inputs = {
        "input_ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "document_ids": DOCUMENTS,
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}
    model.zero_grad()
    with torch.autocast(device, HALF, precision == "bf16", cache_enabled=False):
        loss = model(**inputs)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def training_model(device, dtype):
    return small_model().to(device, dtype).train()


@pytest.fixture
def ids():
    return torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
@pytest.mark.parametrize("device", DEVICES)
def test_packed_documents_in_a_model(
    device, precision, mode, compiled, ids, monkeypatch
):
    """The kernel in place of the mask: with every checkpointing mode, and compiled."""
    if compiled and device == "cpu" and (mode, precision) != ("selective", "bf16"):
        pytest.skip("one compilation is enough on a CPU")
    dtype = HALF if precision == "bf16-pure" else FULL
    wanted, gradients = training(training_model("cpu", dtype), ids, "cpu", precision)
    monkeypatch.setattr(model_module, "separate_documents", packed_documents)
    model = training_model(device, dtype)
    set_activation_checkpointing(model, mode)
    if compiled:
        torch._dynamo.reset()
        compile_layers(model)
    KERNEL_CALLS.clear()
    loss, found = training(model, ids, device, precision)
    # two layers; what full checkpointing drops is computed twice
    wanted_calls = {"none": 2, "selective": 2, "full": 4}[mode]
    assert device == "cuda" or len(KERNEL_CALLS) == wanted_calls
    assert gap(loss, wanted) < 1e-2
    for name, gradient in found.items():
        assert gap(gradient, gradients[name]) < 0.1, name
    assert sum(gap(g, gradients[n]) for n, g in found.items()) / len(found) < 0.03


@pytest.mark.parametrize("device", DEVICES)
def test_float32_keeps_documents_apart_by_a_mask(device, ids, monkeypatch):
    wanted, gradients = training(training_model("cpu", FULL), ids, "cpu", "fp32")
    monkeypatch.setattr(model_module, "separate_documents", packed_documents)
    monkeypatch.setattr(attention, "_attend_documents", None)
    loss, found = training(training_model(device, FULL), ids, device, "fp32")
    assert gap(loss, wanted) < 1e-4
    assert max(gap(g, gradients[n]) for n, g in found.items()) < 1e-3


@pytest.mark.parametrize("dtype", [HALF, FULL])
@needs_gpu
def test_a_model_on_a_gpu(dtype, ids):
    cpu, gpu = (training_model(device, dtype) for device in ("cpu", "cuda"))
    assert gap(gpu(ids.cuda()), cpu(ids)) < 3 * BOUND[dtype]
    wanted, gradients = training(cpu, ids, "cpu")
    loss, found = training(gpu, ids, "cuda")
    assert gap(loss, wanted) < BOUND[dtype]
    bound = 0.1 if dtype == HALF else 1e-3
    assert all(gap(found[name], gradients[name]) < bound for name in gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_the_cache(device, ids):
    """In pieces, token by token, and in rows of unequal length."""
    model, ids = small_model().to(device), ids.to(device)
    whole = model(ids)
    cache = model.new_cache(2, 9)
    parts = [model(part, cache=cache) for part in ids.split([4, 3, 1, 1], dim=1)]
    assert gap(torch.cat(parts, 1), whole) < 1e-4
    padded = torch.cat((ids.new_zeros(1, 2), ids[:1, :7]), dim=1)
    rows = torch.cat((padded, ids[1:]))
    seen = torch.ones_like(rows)
    seen[0, :2] = 0
    options = {"max_new_tokens": 6, "temperature": 0, "eos_token_id": []}
    both = model.generate(rows, attention_mask=seen, **options)
    alone = model.generate(ids[:1, :7], **options)
    assert both[0, 2:].tolist() == alone[0].tolist()
    assert both[1:].tolist() == model.generate(ids[1:], **options).tolist()


@needs_gpu
def test_greedy_text_is_that_of_the_cpu(ids):
    options = {"max_new_tokens": 12, "temperature": 0, "eos_token_id": []}
    model = small_model().double()
    wanted = model.generate(ids, **options)
    assert model.cuda().generate(ids.cuda(), **options).tolist() == wanted.tolist()


def steps(model, optimizers, ids, count):
    """Training steps on the device of `model`."""
    ids = ids.to(model.lm_head.weight.device)
    for _ in range(count):
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "adamw-bf16", "muon"])
@pytest.mark.parametrize("device", DEVICES)
def test_optimizers(device, kind, ids):
    """Weights of a GPU are those of a CPU; AdamW is fused."""
    models = [training_model(where, FULL) for where in ("cpu", device)]
    for model in models:
        optimizers = build_optimizers(model, 1e-3, kind=kind)
        fused = [o for o in optimizers if isinstance(o, torch.optim.AdamW)]
        assert all(o.defaults["fused"] for o in fused)
        torch.manual_seed(0)
        steps(model, optimizers, ids, 3)
    wanted = models[0].state_dict()
    # adamw-bf16 rounds at random, and Muon's products are made in bfloat16
    bound = 1e-4 if kind == "adamw" else 2e-2
    for name, weight in models[1].state_dict().items():
        assert gap(weight, wanted[name]) < bound, name


@pytest.mark.parametrize("kind", ["adamw", "adamw-bf16", "muon"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(device, kind, ids, folder):
    def begin():
        model = training_model(device, FULL)
        return model, build_optimizers(model, 1e-3, kind=kind)

    model, optimizers = begin()
    steps(model, optimizers, ids, 2)
    save_checkpoint("c", model, BYTES, optimizers=optimizers, step=2)
    torch.manual_seed(1)
    steps(model, optimizers, ids, 2)
    again, its_optimizers = begin()
    assert restore_checkpoint("c", again, its_optimizers)["step"] == 2
    assert again.lm_head.weight.device.type == device
    torch.manual_seed(1)
    steps(again, its_optimizers, ids, 2)
    # a GPU adds some sums in another order at each run
    bound = 0 if device == "cpu" else 1e-3
    wanted = model.state_dict()
    for name, weight in again.state_dict().items():
        assert gap(weight, wanted[name]) <= bound, name


@pytest.mark.parametrize("device", DEVICES)
def test_sampling(device):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    there = logits.to(device)
    greedy = SamplingParams(temperature=0)
    assert sample(there, greedy).tolist() == logits.argmax(-1).tolist()
    params = [greedy, SamplingParams(top_k=3), SamplingParams(top_p=0.5, min_p=0.1)]
    best = logits[1].topk(3).indices.tolist()
    drawn = []
    for _ in range(2):
        generator = new_generator(device, 7)
        drawn.append([sample(there, params, None, None, generator) for _ in range(20)])
    assert same(*drawn)
    assert all(row[0] == logits[0].argmax() for row in drawn[0])
    assert {row[1].item() for row in drawn[0]} <= set(best)
    assert len({row[1].item() for row in drawn[0]}) > 1
    repeated = SamplingParams(temperature=0, repetition_penalty=1e6)
    history = logits.argmax(-1, keepdim=True)
    other = sample(there, repeated, history.to(device))
    assert not other.cpu().eq(history[:, 0]).any()


@needs_gpu
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_compiled_step_is_recorded_and_writes_the_same(format):
    plain, model = (
        optimize_for_inference(small_model().cuda(), format, compile=compiled)
        for compiled in (False, True)
    )
    ids = torch.randint(300, (2, 5), device="cuda")
    texts = [m.generate(ids, 8, temperature=0, eos_token_id=[]) for m in (plain, model)]
    made = [memory for rooms in model.compiled_step.made.values() for memory in rooms]
    assert made and all(memory.graph is not None for memory in made)
    assert format or torch.equal(*texts)


@needs_gpu
@pytest.mark.parametrize("memory", [{}, {"kv_pages": 20, "page_size": 4}])
def test_a_recorded_step_of_a_server_writes_the_same(memory, monkeypatch):
    """Requests come one by one, and outgrow the first room."""
    monkeypatch.setattr(compiled_module, "ROOM", 16)
    plain, model = (
        optimize_for_inference(small_model().cuda(), compile=compiled)
        for compiled in (False, True)
    )
    texts = []
    for m in (plain, model):
        engine = Engine(m, BYTES, max_batch=3, max_context=48, **memory)
        engine.stop_ids, found = set(), [[] for _ in range(5)]
        for i, answer in enumerate(found):
            request = Request(
                [*range(30 if i == 2 else 3 + i)],
                12,
                SamplingParams(temperature=0),
                logprobs=0,
            )
            take = lambda delta, answer=answer: answer.extend(delta.logprobs)
            engine.add_request(request, deliver=take)
            engine.step()
        while engine.step():
            pass
        texts.append([[entry.token for entry in answer] for answer in found])
    rooms = engine.runner.forward.rooms
    assert [*rooms] == [16, 32, 48] and all(room.graph for room in rooms.values())
    assert all(len(answer) == 12 for answer in texts[0]) and same(*texts)

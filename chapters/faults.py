"""Broken parts for the appendix on symptoms. Each is a line of a right function in
place of which stands a broken one, so that the two can be shown side by side.
"""

import copy
import inspect
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib.pyplot as plt
import regex
import torch
import torch.nn.functional as F
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from book import scramble_
from qwen_analog import QwenConfig, QwenForCausalLM, attention
from qwen_analog.attention import GQAttention, HeadProjections
from qwen_analog.generate import positions_and_mask
from qwen_analog.kv_cache import KVCache
from qwen_analog.mlp import SwiGLU
from qwen_analog.model import DecoderLayer, PreTrainedModel, QwenModel
from qwen_analog.norm import RMSNorm
from qwen_analog.optim import stochastic_round_


def draw(curves, healthy, levels):
    """Draw each curve in a small panel of its own, the healthy ones behind in grey,
    and a dotted line at each of `levels`, the losses that are known beforehand.
    """
    size = (2.1 * len(curves), 2.5)
    fig, axes = plt.subplots(1, len(curves), figsize=size, sharey=True)
    for ax, (name, losses) in zip(axes.flat, curves.items()):
        for behind in healthy:
            (grey,) = ax.plot(behind, color="0.8", linewidth=1)
        for level in levels:
            dotted = ax.axhline(level, color="0.4", linewidth=0.8, linestyle=":")
        (red,) = ax.plot(losses, color="#b5502f", linewidth=1)
        ax.set_title(name, fontsize=8)
        ax.set(yscale="log", xlabel="step")
        ax.minorticks_off()
    all_losses = [loss for losses in curves.values() for loss in losses]
    lowest, highest = min(0.02, *all_losses), max(5, *all_losses)
    axes.flat[0].set_ylim(lowest / 2, 2 * highest)
    axes.flat[0].set_ylabel("loss, nats")
    lines, names = (red, grey, dotted), ("broken", "healthy", "known beforehand")
    fig.legend(lines, names, ncols=3, loc="outside lower center", fontsize=8)
    plt.show()


def draw_apart(restarts, whole, first):
    """Draw by how much each restart's loss differs from the whole run's."""
    fig, ax = plt.subplots(figsize=(6, 2.6))
    for name, losses in restarts.items():
        apart = torch.tensor(losses) - torch.tensor(whole)
        ax.plot(range(first, first + len(whole)), apart, label=name, linewidth=1)
    ax.set(ylim=(-0.2, 0.4), xlabel="step", ylabel="loss minus the whole run's")
    ax.legend(title="forgotten", loc="upper left", bbox_to_anchor=(1, 1))
    plt.show()


def draw_grid(gallery, checks, low, high):
    """Draw which checks fail for each trained fault that has a program of its own; at
    the right its end loss, below `low`, above `high`, or as that of a healthy run.
    """
    names = list(gallery.fails)
    fig, ax = plt.subplots(figsize=(7, 0.24 * len(names) + 1.6))
    fails = [[check in gallery.fails[name] for check in checks] for name in names]
    ax.pcolormesh(fails, cmap="Oranges", vmax=1.4, edgecolor="0.85", linewidth=0.5)
    ax.set_xticks([i + 0.5 for i in range(len(checks))], checks, rotation=90)
    ax.set_yticks([i + 0.5 for i in range(len(names))], names)
    for row, name in enumerate(names):
        end = sum(gallery.losses[name][-10:]) / 10
        word = "too low" if end < low else "too high" if end > high else "as healthy"
        color = {"too low": "#b5502f", "too high": "0.5", "as healthy": "#2f6fb5"}[word]
        text = f"{end:.2f} {word}"
        ax.text(len(checks) + 0.3, row + 0.55, text, color=color, size=8, va="center")
    ax.text(len(checks) + 0.3, -0.3, "end loss", size=8)
    ax.invert_yaxis()
    ax.tick_params(length=0, labelsize=8)
    ax.grid(False)
    plt.show()


def best_loss(stories, rows):
    """Return the lowest possible loss, in nats a letter, on rows that begin anywhere
    in a text of equally frequent `stories`. The first letters are given.
    """
    letters = list("".join(stories))
    ends = torch.tensor([len(story) for story in stories]).cumsum(0) - 1
    is_letter = {a: torch.tensor([b == a for b in letters]) for a in set(letters)}
    losses = []
    for row in rows:
        belief = is_letter[row[0]].double()  # of each place, that it was just read
        belief /= belief.sum()
        for letter in row[1:]:
            ended = belief[ends].sum()
            belief = belief.roll(1)
            belief[(ends + 1) % len(letters)] = ended / len(stories)
            belief *= is_letter[letter]
            p = belief.sum()
            losses.append(-p.log().item())
            belief /= p
    return sum(losses) / len(losses)


def mystery(program):
    """Return a copy of a program in which two parts are broken."""
    both = "window[:, :-1], window[:, 1:]"
    broken = SimpleNamespace(**vars(program))
    broken.next_batch = edited(
        program.next_batch, both, "window[:, :-2], window[:, 2:]"
    )
    broken.make_optimizer = edited(program.make_optimizer, "AdamW", "SGD")
    return broken


def instead(owner, name, replacement) -> AbstractContextManager:
    """Return a context in which `replacement` stands in place of `owner.name`."""
    return patch.object(owner, name, replacement)


def source_of(function):
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def edited(function, right, wrong):
    """Return `function` with `wrong` where its source reads `right`."""
    source = source_of(function)
    assert source.count(right) == 1, f"{right!r}, {source.count(right)} times"
    function = inspect.unwrap(function)
    scope = dict(function.__globals__)
    exec(source.replace(right, wrong), scope)
    return scope[function.__name__]


def statements(code):
    lines = [line.split("  # ")[0] for line in textwrap.dedent(code).splitlines()]
    return [line for line in lines if line.strip(" ") not in ("", "pass")]


def beside(function, right, wrong):
    """Return the lines in which `function` has `right`, and those with `wrong`."""
    source = source_of(function)
    at = source.index(right)
    start, end = source.rindex("\n", 0, at), source.index("\n", at + len(right) - 1)
    lines = source[start:end]
    broken = statements(lines.replace(right, wrong))
    return statements(lines), broken or ["(line deleted)"]


def variants(function, edits) -> Iterator[tuple[str, Callable, str]]:
    """Yield each fault's name, the broken function, and its code: the function's name,
    the right lines and the broken ones.

    `edits` gives for right code the names of faults and their wrong code.
    """
    for right, broken in edits.items():
        for name, wrong in broken.items():
            removed, added = beside(function, right, wrong)
            code = [f"{inspect.unwrap(function).__qualname__}:"]
            code += ["    right   " + line for line in removed]
            code += ["    broken  " + line for line in added]
            yield name, edited(function, right, wrong), "\n".join(code)


def in_package(owner, name, edits, function=None):
    """`variants` of a function of the package, as contexts that put them in place."""
    function = function or getattr(owner, name)
    for fault, broken, code in variants(function, edits):
        yield fault, instead(owner, name, broken), code


def edit(function, right, wrong, owner=None):
    """Return parts of a program in which `function` reads `wrong` in place of `right`,
    a context, and the lines of both. A function of the package is replaced in its
    `owner` by the context; there are no parts then.
    """
    ((_, broken, code),) = variants(function, {right: {"": wrong}})
    name = function.__name__
    if owner is None:
        return {name: broken}, nullcontext(), code
    return {}, instead(owner, name, broken), code


class Gallery:
    """The faults of a program: each breaks it, and some check must notice.

    `train` and `failures` take broken parts as keywords. `healthy` are the runs
    behind each curve, `levels` the losses that are known beforehand.
    """

    def __init__(self, train, failures, print_run, healthy, levels):
        self.train, self.failures = train, failures
        self.print_run, self.levels = print_run, levels
        self.healthy = [run.losses for run in healthy]
        self.parts = {}  # of each fault: the broken parts of the program,
        self.found = {}  # the first check that fails,
        self.fails = {}  # and if it was trained, all checks that fail
        self.losses = {}  # and the losses
        self.findings = []  # check, name, what it says and code, if it was not trained

    def show(self, name, function, right, wrong, owner=None):
        """Train with an edit; print it, the losses, the samples, the checks."""
        parts, around, code = edit(function, right, wrong, owner)
        print(code)
        print(name.upper(), end=": ")
        with around:
            run = self.train(**parts)
            fails = dict(self.failures(**parts))
        assert fails, f"no check notices: {name}"
        self.print_run(run)
        first, *others = fails
        print(f"    found by {first}: {fails[first]}")
        if others:
            print(f"    and by {', '.join(others)}")
        print()
        self.parts[name], self.fails[name] = parts, list(fails)
        self.add_run(name, run.losses, first)

    def add_run(self, name, losses, check):
        """Keep the losses of a broken run, and the check that finds the fault."""
        self.losses[name], self.found[name] = losses, check

    def check(self, name, function, right, wrong, owner=None):
        """Print an edit and the check that notices it; return the broken parts, and a
        context that puts a function of the package in its place.
        """
        parts, around, code = edit(function, right, wrong, owner)
        self.record(name, *self.judge(name, around, parts), code)
        self.parts[name] = parts
        return parts, around

    def others(self, section, shown):
        """Check all faults of a section that are not trained; print those `shown`."""
        if section == "the model":
            for name, around, code in MODEL:
                self.record(name, *self.judge(name, around), code, name in shown)
        for name, *finding in findings(section):
            self.record(name, *finding, name in shown)

    def draw(self, *names, times=None):
        """Draw the curves of these; of a name in `times`, the losses times that."""
        curves = {}
        for name in names:
            factor = (times or {}).get(name, 1)
            title = name if factor == 1 else f"{name}, / {1 / factor:.0f}"
            curves[title] = [factor * loss for loss in self.losses[name]]
        draw(curves, self.healthy, self.levels)

    def judge(self, name, around, parts=None):
        with around:
            failure = next(self.failures(**(parts or {})), None)
        assert failure, f"no check notices: {name}"
        return failure

    def record(self, name, check, said, code, shown=True):
        self.found[name] = check
        self.findings.append((check, name, said, code))
        if shown:
            print(code, f"{name} ({check}): {said}", "", sep="\n")


# --- the model: changes of the package


def attend(q, k, v, mask=None):
    """Do as `grouped_query_attention`, step by step."""
    if mask is None:
        mask = attention.causal_mask(q.shape[2], k.shape[2])
    k = k.repeat_interleave(2, dim=1)
    v = v.repeat_interleave(2, dim=1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return p @ v


def forward(self, input_ids, position_ids=None, mask=None, cache=None):
    """Do as `QwenModel.forward`, with positions that follow the first block's cache."""
    x = self.embed_tokens(input_ids)
    start = 0 if cache is None else cache.lengths[0]
    positions = start + torch.arange(input_ids.shape[1])[None]
    cos, sin = self.rotary_emb(positions, x.dtype)
    for layer in self.layers:
        x = layer(x, cos, sin, mask, cache)
    return self.norm(x)


BRANCHES = (
    "x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)\n"
    "    return x + self.mlp(self.post_attention_layernorm(x))"
)
GATED = """gate = nn.functional.silu(self.gate_proj(x))  # [B, T, F]
    return self.down_proj(gate * self.up_proj(x))"""
OTHER_PAIRS = """even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None].chunk(2, -1)[0], sin[:, None].chunk(2, -1)[0]
    pairs = even * cos - odd * sin, odd * cos + even * sin
    return torch.stack(pairs, dim=-1).flatten(-2)"""

ROTATED = "return x * cos[:, None] + rotate_half(x) * sin[:, None]"
NORMED = "return self.weight * wide.to(x.dtype)"

# name, function, right, wrong, owner of those that are trained, too
TRAINED = [
    ("no rotation", attention.apply_rotary, ROTATED, "return x", attention),
    ("other pairs rotated", attention.apply_rotary, ROTATED, OTHER_PAIRS, attention),
    ("no norms", RMSNorm.forward, NORMED, "return x", RMSNorm),
    (
        "no residual path",
        DecoderLayer.add_branches,
        BRANCHES,
        BRANCHES.replace("x + self", "self"),
        DecoderLayer,
    ),
]
MODEL = [
    *in_package(
        attention,
        "grouped_query_attention",
        {
            "q @ k.mT / q.shape[-1] ** 0.5": {
                "scores not scaled": "q @ k.mT",
                "keys cut from the gradient": "q @ k.detach().mT / q.shape[-1] ** 0.5",
                "attention in bfloat16": "(q.bfloat16() @ k.bfloat16().mT).float()"
                " / q.shape[-1] ** 0.5",
            },
            "softmax(dim=-1)": {"softmax over the queries": "softmax(dim=-2)"},
            "k = k.repeat_interleave(2, dim=1)": {
                "key heads in another order": "k = k.repeat(1, 2, 1, 1)"
            },
        },
        attend,
    ),
    *in_package(
        attention,
        "document_mask",
        {"same & causal_mask": {"documents see each other": "causal_mask"}},
    ),
    *in_package(
        HeadProjections,
        "project",
        {
            "self.q_proj(x), self.k_proj(x)": {
                "no bias on queries and keys": "x @ self.q_proj.weight.T,"
                " x @ self.k_proj.weight.T"
            }
        },
    ),
    *in_package(
        GQAttention,
        "forward",
        {"k = apply_rotary(k, cos, sin)": {"keys not rotated": ""}},
    ),
    *in_package(
        RMSNorm,
        "forward",
        {
            NORMED: {
                "LayerNorm for RMSNorm": "return nn.functional.layer_norm("
                "x, x.shape[-1:], self.weight)"
            },
            ".mean(-1, keepdim=True)": {"one norm for all tokens": ".mean()"},
        },
    ),
    *in_package(
        SwiGLU,
        "forward",
        {
            GATED: {
                "no gate": "return self.down_proj(nn.functional.silu(self.up_proj(x)))",
                "GELU for SiLU": GATED.replace("silu", "gelu"),
                "gate and up swapped": GATED.replace("gate_proj", "other")
                .replace("up_proj", "gate_proj")
                .replace("other", "up_proj"),
            }
        },
    ),
    *in_package(
        DecoderLayer,
        "add_branches",
        {
            BRANCHES: {
                "norm after the branch": "x = self.input_layernorm("
                "x + self.self_attn(x, cos, sin, mask, cache))\n"
                "    return self.post_attention_layernorm(x + self.mlp(x))",
                "branches in parallel": "y = x + self.self_attn("
                "self.input_layernorm(x), cos, sin, mask, cache)\n"
                "    return y + self.mlp(self.post_attention_layernorm(x))",
            }
        },
    ),
    *in_package(
        QwenModel,
        "forward",
        {
            "in self.layers:": {
                "blocks in reverse order": "in reversed(self.layers):",
                "last block left out": "in self.layers[:-1]:",
            },
            "self.embed_tokens(input_ids)": {
                "embedding times sqrt(D)": "self.embed_tokens(input_ids)"
                " * self.embed_tokens.embedding_dim ** 0.5"
            },
            "self.norm(x)": {"no final norm": "x"},
        },
        forward,
    ),
    *in_package(
        PreTrainedModel,
        "tie_weights",
        {
            "self.lm_head.weight = self.model.embed_tokens.weight": {
                "head not tied": "pass"
            }
        },
    ),
    *in_package(
        KVCache,
        "update",
        {
            "start = self.lengths[layer_idx]": {
                "cache writes at its start": "start = 0",
                "cache overwrites the last": "start = max(0,"
                " self.lengths[layer_idx] - 1)",
            }
        },
    ),
]

# --- parts that are judged alone: a right one, its check, and its edits


def pack(documents, T):
    """An end token 0 before each document, then rows of T + 1 that share a token."""
    stream = [token for document in documents for token in [0, *document]]
    return [stream[i : i + T + 1] for i in range(0, len(stream) - 1, T)]


def packing(part):
    """Every token is a target once, documents are told apart, no row is lost."""
    rows = part([[1, 2, 3], [4, 5, 6, 7]], 4)
    targets = [token for row in rows for token in row[1:]]
    if targets != [1, 2, 3, 0, 4, 5, 6, 7]:
        return f"targets {targets}"


def order(epoch, rank):
    """Of 12 sequences, those that one of two processes reads in an epoch."""
    generator = torch.Generator().manual_seed(epoch)
    return torch.randperm(12, generator=generator).tolist()[rank::2]


def epochs(part):
    """All processes together read every sequence once, each epoch in another order."""
    read = [part(0, 0) + part(0, 1), part(1, 0) + part(1, 1)]
    if any(sorted(one) != list(range(12)) for one in read):
        return f"{len(set(read[0]))} of 12 sequences in an epoch"
    if read[0] == read[1]:
        return "two epochs in the same order"


def decode(ids):
    return bytes(ids).decode(errors="replace")


def round_trip(part):
    """Text to tokens and back is the same text."""
    text = "naïve 😀"
    if part(list(text.encode())) != text:
        return f"{text!r} comes back as {part(list(text.encode()))!r}"


def pieces_of(text):
    """Cut as Qwen2.5 does, but for English endings such as 's."""
    word = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    digit = r"\p{N}"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    text = unicodedata.normalize("NFC", text)
    return regex.findall(f"{word}|{digit}|{rest}", text)


def pieces(part):
    """Text is composed (NFC), then cut: a word with its blank, each digit alone."""
    found = part("in 2024 cafe\u0301")
    if found != ["in", " ", "2", "0", "2", "4", " café"]:
        return f"pieces {found}"


def join(piece, ranks):
    """Return the ids of a piece, whose neighbours are joined, the lowest rank first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:]) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        pair = min(pairs, key=ranks.get)
        i = [a + b for a, b in zip(parts, parts[1:])].index(pair)
        parts[i : i + 2] = [pair]


def merges(part):
    """Neighbours are joined in the order in which training learned the tokens."""
    found = part(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4})
    if found != [0, 3]:
        return f"ids {found}, not [0, 3]"


def split_loss(losses, counts):
    """The mean loss of micro-batches with sums `losses` over `counts` targets."""
    return sum(losses) / sum(counts)


def micro_batches(part):
    """Unequal micro-batches, or processes, give the loss of the whole batch."""
    found = part([15.0, 9.0], [6, 4])
    if found != 2.4:
        return f"loss {found}, not 2.4"


def masked_loss(logits, targets):
    return F.cross_entropy(logits, targets, ignore_index=-100)


def padding(part):
    """Targets of -100 change neither the sum nor the count."""
    logits, targets = torch.eye(8)[:4], torch.tensor([0, 1, -100, -100])
    found, wanted = part(logits, targets), F.cross_entropy(logits[:2], targets[:2])
    if abs(found - wanted) > 1e-4:
        return f"loss {found:.2f} with half padding, {wanted:.2f} without"


def by_logarithms(logits, targets):
    logits = logits - logits.amax(-1, keepdim=True)
    log_z = logits.exp().sum(-1).log()
    return (log_z - logits.gather(-1, targets[:, None])[:, 0]).mean()


def large_logits(part):
    """Logits of 1,000 have a finite loss."""
    found = part(torch.tensor([[1000.0, 0.0]]), torch.tensor([0])).item()
    if not math.isfinite(found):
        return f"the loss of large logits is {found}"


def with_z_loss(logits, targets, z):
    log_z = logits.logsumexp(-1)
    return F.cross_entropy(logits, targets) + z * log_z.square().mean()


def z_loss(part):
    """z_loss adds z ln(Z)^2 to the loss, and its slope to the gradient."""
    logits = torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1])
    losses = [part(logits, targets, z) for z in (0.0, 0.1)]
    (slope,) = torch.autograd.grad(losses[1] - losses[0], logits)
    log_z = math.log(math.e + math.e**3 + 1)
    found = (losses[1] - losses[0]).item(), slope.sum().item()
    wanted = 0.1 * log_z**2, 0.1 * 2 * log_z  # the shares add up to one
    if max(abs(a - b) for a, b in zip(found, wanted)) > 1e-6:
        return "adds {:.2f} with slope {:.2f}, by hand".format(*found) + (
            " {:.2f} with slope {:.2f}".format(*wanted)
        )


def in_chunks(hidden, weight, targets, size):
    total = torch.zeros(())
    for h, t in zip(hidden.split(size), targets.split(size)):
        logits = h @ weight.T
        total = total + F.cross_entropy(logits, t, reduction="sum") / len(targets)
    return total


def chunks(part):
    """Logits of a few tokens at a time: the loss and the gradients of the whole."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator).requires_grad_()
    weight = torch.randn(5, 4, generator=generator)
    targets = torch.arange(7) % 5
    losses = (
        part(hidden, weight, targets, 3),
        F.cross_entropy(hidden @ weight.T, targets),
    )
    if abs(losses[0] - losses[1]) > 1e-5:
        return f"loss {losses[0]:.3f} in chunks, {losses[1]:.3f} at once"
    ours, whole = (torch.autograd.grad(loss, hidden)[0] for loss in losses)
    if not torch.allclose(ours, whole, atol=1e-5):
        return f"gradient {ours.norm():.3f} in chunks, {whole.norm():.3f} at once"


def adamw(w, g, m, v, t, lr, decay, betas):
    """Step `t` of a weight with gradient `g` and averages `m`, `v`."""
    beta1, beta2 = betas
    w = w - lr * decay * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return w - lr * m_hat / v_hat**0.5, m, v


def by_hand(part):
    """Two steps of one weight are those of the formula."""
    w, m, v = 1.0, 0.0, 0.0
    for t, g in ((1, 1.0), (2, -2.0)):
        w, m, v = part(w, g, m, v, t, 0.1, 0.1, (0.9, 0.999))
    # averages -0.11 and 0.004999, divided by 1 - 0.9 ** 2 and 1 - 0.999 ** 2
    first = 1.0 * 0.99 - 0.1
    second = first * 0.99 + 0.1 * (0.11 / 0.19) / (0.004999 / 0.001999) ** 0.5
    if abs(w - second) > 1e-4:
        return f"after two steps {w:.4f}, by hand {second:.4f}"


def decayed(name, p):
    return p.ndim == 2


def groups(part):
    """Matrices decay; norms and biases do not."""
    names = {"norm.weight": (4,), "q_proj.bias": (4,), "q_proj.weight": (4, 4)}
    found = [name for name, shape in names.items() if part(name, torch.ones(shape))]
    if found != ["q_proj.weight"]:
        return f"decayed: {', '.join(found) or 'nothing'}"


def rounding(part):
    """Many steps of a tenth of a gap move a bfloat16 weight as far as in float32."""
    torch.manual_seed(0)
    weights = torch.ones(1000, dtype=torch.bfloat16)
    for _ in range(40):
        part(weights, weights.float() + 2**-7 / 10)
    moved = weights.float().mean().item() - 1
    if abs(moved / (40 * 2**-7 / 10) - 1) > 0.1:
        return f"40 small steps move a weight by {moved:.3f}, not 0.031"


def tiny():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = QwenForCausalLM(QwenConfig(intermediate_size=256, **sizes, **heads))
    return scramble_(model)


def with_muon(model):
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    muon = torch.optim.Muon(hidden, 0.01, 0.0, adjust_lr_fn="match_rms_adamw")
    rest = [p for _, p in named if all(p is not q for q in hidden)]
    return [muon, torch.optim.AdamW(rest, 0.01)]


def muon(part):
    """Muon turns a hidden matrix in all directions alike, by AdamW's size, and leaves
    the embedding alone.
    """
    torch.manual_seed(0)
    model = tiny()
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    uneven = torch.logspace(0, -2, 32)[:, None]  # rows of very different size
    model.model.layers[0].mlp.down_proj.weight.grad *= uneven
    for optimizer in part(model):
        optimizer.step()

    def step(matrix):
        return (matrix(before) - matrix(model)).detach() / 0.01

    hidden = step(lambda m: m.model.layers[0].mlp.down_proj.weight)  # [32, 256]
    strong = torch.linalg.svdvals(hidden)
    if strong[0] > 3 * strong[-1]:
        return f"one direction moves {strong[0] / strong[-1]:.0f} times as far"
    size = hidden.pow(2).mean().sqrt()
    if not 0.1 < size < 0.4:
        return f"a weight moves by {size:.2f} of the rate, not by about 0.2"
    signs = step(lambda m: m.model.embed_tokens.weight).abs()
    if signs.min() < 0.9:  # AdamW's first step has the size of the rate everywhere
        return "the embedding is stepped by Muon"


def drawable(p, top_k=4, top_p=1.0, min_p=0.0):
    """Which of the probabilities `p`, largest first, are kept."""
    keep = torch.arange(len(p)) < top_k
    keep &= p.cumsum(-1) - p < top_p
    keep &= p >= min_p * p.max()
    return keep


def cuts(part):
    """Top-k, top-p and min-p keep what a pencil keeps of 50, 30, 15 and 5 percent."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for option, kept in (({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"min_p": 0.2}, 3)):
        if (found := int(part(p, **option).sum())) != kept:
            return f"{option} keeps {found} tokens, not {kept}"


def penalize(logit):
    return logit / 2 if logit > 0 else logit * 2


def penalty(part):
    """A repetition penalty makes a logit smaller, whatever its sign."""
    if not (part(1.0) < 1.0 and part(-1.0) < -1.0):
        return f"-1 becomes {part(-1.0)}"


def draw_rows(seeds):
    """What each row draws in three steps, by one generator each."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = []
    for _ in range(3):
        steps.append([torch.rand(1, generator=row).item() for row in made])
    return list(zip(*steps))


def generators(part):
    """A row draws the same alone and in company, and something new at every step."""
    alone, (first, _) = part([1])[0], part([1, 2])
    if alone != first:
        return "a row's draws depend on its neighbour"
    if len(set(alone)) == 1:
        return "every step draws the same number"


def pads_left(rows, pad_id):
    T = max(map(len, rows))
    ids = [[pad_id] * (T - len(row)) + row for row in rows]
    padding = torch.tensor([T - len(row) for row in rows])
    positions, mask = positions_and_mask(padding, 0, T)
    return torch.tensor(ids), positions, mask


@torch.no_grad()
def left_padding(part):
    """A short prompt beside a long one has the next-token logits of itself alone."""
    model, short = tiny(), [5, 6, 7]
    ids, positions, mask = part([short, [9, 8, 7, 6, 5]], pad_id=0)
    found = model(ids, position_ids=positions, mask=mask)[0, -1]
    apart = (found - model(torch.tensor([short]))[0, -1]).abs().max().item()
    if apart > 1e-3:
        return f"logits of a padded row differ by {apart:.2g} from its own"


def until(tokens, stop):
    """Yield what may be shown of tokens that arrive: all up to `stop`."""
    text = ""
    for token in tokens:
        text += token
        if stop in text:
            yield text[: text.index(stop)]
            return
        begun = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
        yield text[: len(text) - begun]
        text = text[len(text) - begun :]
    yield text


def stop_strings(part):
    """A stop string ends the text wherever tokens divide it, and is not shown."""
    for texts, wanted in ((["a", "bE", "ND", "c"], "ab"), (["aE", "N"], "aEN")):
        found = "".join(part(texts, "END"))
        if found != wanted:
            return f"{'|'.join(texts)} shows {found!r}, not {wanted!r}"


def save(disk, text, killed):
    """Write beside the old file, then rename; who is killed has written a part."""
    disk["new"] = text[:2] if killed else text
    if not killed:
        disk["checkpoint"] = disk.pop("new")


def killed_while_saving(part):
    """Whoever is killed while saving keeps the checkpoint before."""
    disk = {"checkpoint": "step 1"}
    part(disk, "step 2", killed=True)
    if disk.get("checkpoint") != "step 1":
        return f"left on the disk: {disk.get('checkpoint')!r}"


@torch.no_grad()
def norm_to_the_bit(part):
    """In bfloat16 the norm is Hugging Face's to the bit: the same order of casts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).bfloat16()
    theirs = scramble_(Qwen2RMSNorm(64)).bfloat16()
    ours = RMSNorm(64).bfloat16()
    ours.weight.data = theirs.weight
    apart = (part(ours, x) != theirs(x)).float().mean()
    if apart > 0:
        return f"{apart:.1%} of the results differ in bfloat16"


SUM_OF_CHUNKS = 'F.cross_entropy(logits, t, reduction="sum") / len(targets)'
WIDE = "x.float() if x.dtype in (torch.float16, torch.bfloat16) else x"
MUON = 'torch.optim.Muon(hidden, 0.01, 0.0, adjust_lr_fn="match_rms_adamw")'
SUM_OF_LOSSES = "sum(losses) / sum(counts)"
PARTS = {
    "the model": [
        (
            RMSNorm.forward,
            norm_to_the_bit,
            {
                "self.weight * wide.to(x.dtype)": {
                    "norm casts after its weight": "(self.weight * wide).to(x.dtype)"
                },
                WIDE: {"norm squares in bfloat16": "x"},
            },
        )
    ],
    "the data": [
        (
            pack,
            packing,
            {
                "[0, *document]": {"no end token": "document"},
                "len(stream) - 1, T)": {"last row dropped": "len(stream) - T - 1, T)"},
                "i + T + 1": {"a token lost between rows": "i + T"},
            },
        ),
        (
            order,
            epochs,
            {
                "manual_seed(epoch)": {"same order each epoch": "manual_seed(0)"},
                "torch.randperm(12, generator=generator)": {
                    "drawn with replacement": "torch.randint("
                    "12, (12,), generator=generator)"
                },
                "[rank::2]": {"all processes read the same": "[0::2]"},
            },
        ),
        (
            decode,
            round_trip,
            {
                'bytes(ids).decode(errors="replace")': {
                    "decoded byte by byte": '"".join('
                    'bytes([i]).decode(errors="replace") for i in ids)'
                }
            },
        ),
        (
            pieces_of,
            pieces,
            {
                r'digit = r"\p{N}"': {"digits in threes": r'digit = r"\p{N}{1,3}"'},
                r'r"[^\r\n\p{L}\p{N}]?\p{L}+"': {
                    "blanks apart from words": r'r"\p{L}+"'
                },
                'text = unicodedata.normalize("NFC", text)': {
                    "accents not composed": ""
                },
            },
        ),
        (
            join,
            merges,
            {
                "min(pairs, key=ranks.get)": {
                    "longest token first": "max(pairs, key=len)"
                }
            },
        ),
    ],
    "the loss": [
        (
            split_loss,
            micro_batches,
            {
                SUM_OF_LOSSES: {
                    "mean of means": "sum("
                    "loss / n for loss, n in zip(losses, counts)) / len(losses)",
                    "first micro-batch only": "losses[0] / counts[0]",
                    "processes never add up": "losses[1] / counts[1]",
                }
            },
        ),
        (
            masked_loss,
            padding,
            {
                "F.cross_entropy(logits, targets, ignore_index=-100)": {
                    "padding counted": "F.cross_entropy(logits, targets, "
                    'ignore_index=-100, reduction="sum") / len(targets)',
                    "padding learned": "F.cross_entropy(logits, targets.clamp(min=0))",
                }
            },
        ),
        (
            by_logarithms,
            large_logits,
            {
                "logits = logits - logits.amax(-1, keepdim=True)": {
                    "maximum not subtracted": ""
                }
            },
        ),
        (
            with_z_loss,
            z_loss,
            {
                "+ z * log_z.square()": {
                    "z-loss not squared": "+ z * log_z",
                    "z-loss of the other sign": "- z * log_z.square()",
                    "z-loss without gradient": "+ z * log_z.detach().square()",
                }
            },
        ),
        (
            in_chunks,
            chunks,
            {
                "total + " + SUM_OF_CHUNKS: {
                    "mean of chunks": "total + F.cross_entropy(logits, t) / 3",
                    "only the last chunk": "total.detach() + " + SUM_OF_CHUNKS,
                }
            },
        ),
    ],
    "the optimizer": [
        (
            adamw,
            by_hand,
            {
                "w = w - lr * decay * w": {
                    "decay inside the gradient": "g = g + decay * w",
                    "no decay": "",
                },
                "beta1, beta2 = betas": {"betas swapped": "beta2, beta1 = betas"},
                "m / (1 - beta1**t), v / (1 - beta2**t)": {
                    "no bias correction": "m, v"
                },
            },
        ),
        (
            decayed,
            groups,
            {
                "return p.ndim == 2": {
                    "norms and biases decay": "return True",
                    "nothing decays": "return False",
                }
            },
        ),
        (
            stochastic_round_,
            rounding,
            {
                "torch.where(source.isfinite(), rounded, source)": {
                    "rounded to the nearest": "source"
                },
                "source.view(torch.int32) + noise": {
                    "rounded towards zero": "source.view(torch.int32) + 0"
                },
            },
        ),
        (
            with_muon,
            muon,
            {
                MUON: {
                    "Muon not orthogonalized": "torch.optim.SGD("
                    "hidden, 0.01, momentum=0.95)",
                    "Muon of another size": MUON.replace("match_rms_adamw", "original"),
                },
                ' and "embed" not in name': {"Muon on the embedding": ""},
            },
        ),
    ],
    "the sampler": [
        (
            drawable,
            cuts,
            {
                "< top_k": {"top-k keeps one less": "< top_k - 1"},
                "p.cumsum(-1) - p < top_p": {
                    "top-p drops the last": "p.cumsum(-1) < top_p"
                },
                "min_p * p.max()": {"min-p against one": "min_p"},
            },
        ),
        (
            penalize,
            penalty,
            {
                "logit / 2 if logit > 0 else logit * 2": {
                    "penalty only divides": "logit / 2"
                }
            },
        ),
        (
            draw_rows,
            generators,
            {
                "[torch.Generator().manual_seed(seed) for seed in seeds]": {
                    "rows share a generator": "[torch.Generator().manual_seed("
                    "seeds[0])] * len(seeds)"
                },
                "generator=row)": {
                    "seeded every step": "generator=row.manual_seed(7))"
                },
            },
        ),
        (
            pads_left,
            left_padding,
            {
                "[pad_id] * (T - len(row)) + row": {
                    "padded on the right": "row + [pad_id] * (T - len(row))"
                },
                "torch.tensor(ids), positions, mask": {
                    "padding is looked at": "torch.tensor(ids), positions, None"
                },
            },
        ),
        (
            until,
            stop_strings,
            {
                "stop in text": {"stop in one token": "stop in token"},
                "text.index(stop)]": {
                    "stop string shown": "text.index(stop) + len(stop)]"
                },
            },
        ),
    ],
    "resuming": [
        (
            save,
            killed_while_saving,
            {
                'disk["new"] = text': {
                    "saved in place": 'disk["checkpoint"] = text',
                    "deleted before saving": 'del disk["checkpoint"]\n'
                    '    disk["new"] = text',
                }
            },
        )
    ],
}


def findings(section):
    """Yield fault, check, what it says and the code of each of a section's `PARTS`."""
    for function, check, edits in PARTS[section]:
        assert check(function) is None, check.__name__
        for name, broken, code in variants(function, edits):
            said = check(broken)
            assert said, f"{check.__name__} does not notice: {name}"
            yield name, check.__name__, said, code

"""More broken parts for the appendix on symptoms: kinds that leave little trace in
a loss curve, each with the check that finds it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import matplotlib.pyplot as plt
import regex
import torch
import torch.nn.functional as F
from torch import nn

from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from book import scramble_
from qwen_analog import QwenConfig, QwenForCausalLM, attention, sampling
from qwen_analog.bpe import QWEN_PATTERN, encode_piece, split_text
from qwen_analog.generate import pad_left, positions_and_mask
from qwen_analog.kv_cache import KVCache
from qwen_analog.loss import linear_cross_entropy
from qwen_analog.mlp import SwiGLU
from qwen_analog.model import DecoderLayer, QwenModel
from qwen_analog.norm import RMSNorm
from qwen_analog.optim import build_optimizers, stochastic_round_
from qwen_analog.sampling import SamplingParams, distribution
from qwen_analog.text_stream import StopFinder

rotate, grouped, update, whole_forward = (
    attention.apply_rotary,
    attention.grouped_query_attention,
    KVCache.update,
    QwenModel.forward,
)


def draw(curves, healthy, best):
    """Draw each curve in a small panel of its own, the healthy ones behind in grey,
    and a dotted line at the lowest loss that a model can have which sees no answer.
    """
    size = (2.1 * len(curves), 2.2)
    fig, axes = plt.subplots(1, len(curves), figsize=size, sharey=True)
    for ax, (name, losses) in zip(axes.flat, curves.items()):
        for behind in healthy:
            ax.plot(behind, color="0.8", linewidth=1)
        ax.axhline(best, color="0.4", linewidth=0.8, linestyle=":")
        ax.plot(losses, color="#b5502f", linewidth=1)
        ax.set_title(name, fontsize=8)
        ax.set(yscale="log", xlabel="step")
        ax.minorticks_off()
    highest = max(loss for losses in curves.values() for loss in losses)
    axes.flat[0].set_ylim(0.01, max(10, 2 * highest))
    axes.flat[0].set_ylabel("loss, nats")
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


def instead(owner, name, replacement):
    """Parts of a program in which `replacement` stands in place of `owner.name`."""
    return {"around": patch.object(owner, name, replacement)}


def enlarged(model):
    for p in model.parameters():
        if p.ndim == 2:
            p.data *= 25
    return model


def untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


# --- the model: changes of the package, all found by a comparison with a reference


def keys_not_rotated(x, cos, sin):
    return x if x.shape[1] == 2 else rotate(x, cos, sin)  # 2 of the 4 heads are keys'


def heads_tiled(q, k, v, mask=None):
    return grouped(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask)


def keys_detached(q, k, v, mask=None):
    return grouped(q, k.detach(), v, mask)


def softmax_in_bfloat16(q, k, v, mask=None):
    return grouped(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask).float()


def over_queries(q, k, v, mask=None):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = ~attention.causal_mask(q.shape[2], k.shape[2])
    return scores.masked_fill(hidden, -1e9).softmax(dim=-2) @ v


def layer_norm(self, x):
    return F.layer_norm(x, x.shape[-1:], self.weight, None, 1e-6)


def one_size_for_all(self, x):
    return self.weight * x / x.pow(2).mean().sqrt()


def gelu(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def gate_and_up_swapped(self, x):
    return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


def post_norm(self, x, *rest):
    x = self.input_layernorm(x + self.self_attn(x, *rest))
    return self.post_attention_layernorm(x + self.mlp(x))


def branches_in_parallel(self, x, *rest):
    attended = self.self_attn(self.input_layernorm(x), *rest)
    return x + attended + self.mlp(self.post_attention_layernorm(x))


def decoder(order=lambda layers: layers, scale=False, norm=True):
    """`QwenModel.forward` with its blocks in another order, and so on."""

    def forward(self, input_ids, position_ids=None, mask=None, cache=None):
        x = self.embed_tokens(input_ids)
        x = x * x.shape[-1] ** 0.5 if scale else x
        layers = order(list(self.layers))
        start = 0 if cache is None else cache.lengths[layers[0].self_attn.layer_idx]
        positions = start + torch.arange(x.shape[1])[None]
        cos, sin = self.rotary_emb(positions, x.dtype)
        for layer in layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x) if norm else x

    return forward


def no_bias(self, x, cos, sin, mask=None, cache=None):
    q, k = (self.heads(F.linear(x, m.weight)) for m in (self.q_proj, self.k_proj))
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), self.heads(self.v_proj(x))
    if cache is not None:
        k, v = cache.update(self.layer_idx, k, v)
    return self.o_proj(grouped(q, k, v, mask).transpose(1, 2).flatten(2))


def writes_at_the_start(self, layer_idx, keys, values):
    self.crop(0)
    return update(self, layer_idx, keys, values)


def overwrites_the_last(self, layer_idx, keys, values):
    self.crop(max(0, self.length - 1))
    return update(self, layer_idx, keys, values)


def unscaled(q, k, v, mask=None):
    return grouped(q * q.shape[-1] ** 0.5, k, v, mask)


def no_rotation(x, cos, sin):
    return x


def neighbours(x, cos, sin):
    """Rotate components 0 and 1, 2 and 3 ..., as other models store them."""
    half = x.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)


def no_residual(self, x, cos, sin, mask=None, cache=None):
    x = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
    return self.mlp(self.post_attention_layernorm(x))


def no_gate(self, x):
    return self.down_proj(F.silu(self.up_proj(x)))


def no_norm(self, x):
    return x


def forgets_its_place(self, input_ids, position_ids=None, mask=None, cache=None):
    start = torch.arange(input_ids.shape[1])[None]
    return whole_forward(self, input_ids, start, mask, cache)


def cut_off(self, *inputs, **options):
    return whole_forward(self, *inputs, **options).detach()


def no_clipping(model, optimizer):
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # only measures
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()


def bad_batch_applied(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# these are trained, too
TRAINED = {
    "no rotation": (attention, "apply_rotary", no_rotation),
    "other pairs rotated": (attention, "apply_rotary", neighbours),
    "no norms": (RMSNorm, "forward", no_norm),
    "no residual path": (DecoderLayer, "forward", no_residual),
}
MODEL = {
    "scores not scaled": (attention, "grouped_query_attention", unscaled),
    "no gate": (SwiGLU, "forward", no_gate),
    "no bias on queries and keys": (attention.GQAttention, "forward", no_bias),
    "keys not rotated": (attention, "apply_rotary", keys_not_rotated),
    "key heads in another order": (attention, "grouped_query_attention", heads_tiled),
    "keys cut from the gradient": (attention, "grouped_query_attention", keys_detached),
    "softmax over the queries": (attention, "grouped_query_attention", over_queries),
    "attention in bfloat16": (
        attention,
        "grouped_query_attention",
        softmax_in_bfloat16,
    ),
    "LayerNorm for RMSNorm": (RMSNorm, "forward", layer_norm),
    "one norm for all tokens": (RMSNorm, "forward", one_size_for_all),
    "GELU for SiLU": (SwiGLU, "forward", gelu),
    "gate and up swapped": (SwiGLU, "forward", gate_and_up_swapped),
    "norm after the branch": (DecoderLayer, "forward", post_norm),
    "branches in parallel": (DecoderLayer, "forward", branches_in_parallel),
    "blocks in reverse order": (QwenModel, "forward", decoder(lambda x: x[::-1])),
    "last block left out": (QwenModel, "forward", decoder(lambda x: x[:-1])),
    "embedding times sqrt(D)": (QwenModel, "forward", decoder(scale=True)),
    "no final norm": (QwenModel, "forward", decoder(norm=False)),
    "documents see each other": (
        attention,
        "grouped_query_attention",
        lambda q, k, v, mask=None: grouped(q, k, v),
    ),
    "cache writes at its start": (KVCache, "update", writes_at_the_start),
    "cache overwrites the last": (KVCache, "update", overwrites_the_last),
}
# --- parts that are judged alone: a healthy one, a check, and what it refuses


@dataclass
class Subject:
    section: str
    healthy: object
    check: Callable
    broken: dict[str, object]


def pack(documents, T):
    """An end token 0 before each document, then rows of T + 1 that share a token."""
    stream = [token for document in documents for token in [0, *document]]
    return [stream[i : i + T + 1] for i in range(0, len(stream) - 1, T)]


def without_end(documents, T):
    stream = [token for document in documents for token in document]
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


def drawn_with_replacement(epoch, rank):
    generator = torch.Generator().manual_seed(2 * epoch + rank)
    return torch.randint(12, (6,), generator=generator).tolist()


def epochs(part):
    """All processes together read every sequence once, each epoch in another order."""
    read = [part(0, 0) + part(0, 1), part(1, 0) + part(1, 1)]
    if any(sorted(one) != list(range(12)) for one in read):
        return f"{len(set(read[0]))} of 12 sequences in an epoch"
    if read[0] == read[1]:
        return "two epochs in the same order"


def decode(ids):
    return bytes(ids).decode(errors="replace")


def byte_by_byte(ids):
    return "".join(bytes([i]).decode(errors="replace") for i in ids)


def round_trip(part):
    """Text to tokens and back is the same text."""
    text = "naïve 😀"
    if part(list(text.encode())) != text:
        return f"{text!r} comes back as {part(list(text.encode()))!r}"


def split_loss(losses, counts):
    """The mean loss of micro-batches with sums `losses` over `counts` targets."""
    return sum(losses) / sum(counts)


def mean_of_means(losses, counts):
    return sum(loss / count for loss, count in zip(losses, counts)) / len(losses)


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


def naive_loss(logits, targets):
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -shares.gather(-1, targets[:, None]).log().mean()


def large_logits(part):
    """Logits of 1,000 have a finite loss."""
    found = part(torch.tensor([[1000.0, 0.0]]), torch.tensor([0])).item()
    if not math.isfinite(found):
        return f"the loss of large logits is {found}"


def adamw(p, lr, decay, betas):
    return torch.optim.AdamW([p], lr=lr, weight_decay=decay, betas=betas)


def l2(p, lr, decay, betas):
    return torch.optim.Adam([p], lr=lr, weight_decay=decay, betas=betas)


class NoCorrection(torch.optim.AdamW):
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = torch.tensor(1e6)  # as if the averages were full
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("exp_avg", torch.zeros_like(p))
            state.setdefault("exp_avg_sq", torch.zeros_like(p))
        super().step()


def no_correction(p, lr, decay, betas):
    return NoCorrection([p], lr=lr, weight_decay=decay, betas=betas)


def by_hand(part):
    """Two steps of one weight are those of the formula."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = part(p, 0.1, 0.1, (0.9, 0.999))
    for gradient in (1.0, -2.0):
        p.grad = torch.tensor([gradient])
        optimizer.step()
    # averages -0.11 and 0.004999, divided by 1 - 0.9 ** 2 and 1 - 0.999 ** 2
    first = 1.0 * 0.99 - 0.1
    second = first * 0.99 + 0.1 * (0.11 / 0.19) / (0.004999 / 0.001999) ** 0.5
    if abs(p.item() - second) > 1e-4:
        return f"after two steps {p.item():.4f}, by hand {second:.4f}"


def decayed(name, p):
    return p.ndim == 2


def groups(part):
    """Matrices decay; norms and biases do not."""
    names = {"norm.weight": (4,), "q_proj.bias": (4,), "q_proj.weight": (4, 4)}
    found = [name for name, shape in names.items() if part(name, torch.ones(shape))]
    if found != ["q_proj.weight"]:
        return f"decayed: {', '.join(found) or 'nothing'}"


def cuts(part):
    """Top-k, top-p and min-p keep what a pencil keeps of 50, 30, 15 and 5 percent."""
    with part:
        logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        for option, kept in (
            ({"top_k": 2}, 2),
            ({"top_p": 0.7}, 2),
            ({"min_p": 0.2}, 3),
        ):
            shares = distribution(logits, SamplingParams(**option))[0]
            if (found := int((shares > 0).sum())) != kept:
                return f"{option} keeps {found} tokens, not {kept}"


def top_p_without_crossing(logits, top_p):
    shares, order = logits.softmax(-1).sort(descending=True)
    dropped = shares.cumsum(-1) > torch.tensor(top_p)[:, None]
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def top_k_one_less(logits, top_k):
    kth = logits.topk(top_k[0]).values[:, -1:]
    return logits.masked_fill(logits <= kth, -math.inf)


def min_p_of_one(logits, min_p):
    return logits.masked_fill(logits.softmax(-1) < 0.2, -math.inf)


def lowest(choose):
    def least_likely(logits, generator):
        worst = logits.topk(len(logits) // 2, largest=False).indices
        return worst[choose(logits[worst], generator)].item()

    return least_likely


def penalize(logit):
    return logit / 2 if logit > 0 else logit * 2


def penalty(part):
    """A repetition penalty makes a logit smaller, whatever its sign."""
    if not (part(1.0) < 1.0 and part(-1.0) < -1.0):
        return f"-1 becomes {part(-1.0)}"


def two_rows(seeds):
    """What two rows draw, one generator each."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.rand(3, generator=generator).tolist() for generator in made]


def one_generator(seeds):
    generator = torch.Generator().manual_seed(seeds[0])
    rows = torch.rand(3, len(seeds), generator=generator)
    return rows.T.tolist()


def seed_at_every_step(seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.rand(1, generator=generator).tolist() * 3 for generator in made]


def generators(part):
    """A row draws the same alone and in company, and something new at every step."""
    alone, (first, _) = part([1])[0], part([1, 2])
    if alone != first:
        return "a row's draws depend on its neighbour"
    if len(set(alone)) == 1:
        return "every step draws the same number"


def save_beside(disk, text, killed):
    disk["new"] = text[:2] if killed else text
    if not killed:
        disk["checkpoint"] = disk.pop("new")


def save_in_place(disk, text, killed):
    disk["checkpoint"] = text[:2] if killed else text


def delete_then_save(disk, text, killed):
    del disk["checkpoint"]
    if not killed:
        disk["checkpoint"] = text


def killed_while_saving(part):
    """Whoever is killed while saving keeps the checkpoint before."""
    disk = {"checkpoint": "step 1"}
    part(disk, "step 2", killed=True)
    if disk.get("checkpoint") != "step 1":
        return f"left on the disk: {disk.get('checkpoint')!r}"


def half_norm(x, weight):
    norm = RMSNorm(64).bfloat16()
    norm.weight.data = weight
    return norm(x)


def weight_before_the_cast(x, weight):
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight.float() * wide).to(x.dtype)


def squares_in_bfloat16(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@torch.no_grad()
def norm_to_the_bit(part):
    """In bfloat16 the norm is Hugging Face's to the bit: the same order of casts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).bfloat16()
    theirs = scramble_(Qwen2RMSNorm(64)).bfloat16()
    apart = (part(x, theirs.weight) != theirs(x)).float().mean()
    if apart > 0:
        return f"{apart:.1%} of the results differ in bfloat16"


def cut_by(pattern):
    return lambda text: split_text(text, pattern)


def not_composed(text):
    return regex.findall(QWEN_PATTERN, text)


def pieces(part):
    """Text is composed (NFC), then cut: a word with its blank, each digit alone."""
    found = part("in 2024 cafe\u0301")
    if found != ["in", " ", "2", "0", "2", "4", " café"]:
        return f"pieces {found}"


def longest_first(piece, ranks):
    ids = []
    while piece:
        token = max(filter(piece.startswith, ranks), key=len)
        ids.append(ranks[token])
        piece = piece[len(token) :]
    return ids


def merges(part):
    """Neighbours are joined in the order in which training learned the tokens."""
    found = part(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4})
    if found != [0, 3]:
        return f"ids {found}, not [0, 3]"


def from_logits(logits, targets, z):
    weight = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return linear_cross_entropy(logits, weight, targets, z_loss=z)


def z_variant(change):
    def part(logits, targets, z):
        log_z = logits.logsumexp(-1)
        return F.cross_entropy(logits, targets) + z * change(log_z).mean()

    return part


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


def mean_of_chunks(hidden, weight, targets, size):
    parts = zip(hidden.split(size), targets.split(size))
    return torch.stack([F.cross_entropy(h @ weight.T, t) for h, t in parts]).mean()


def last_chunk_learns(hidden, weight, targets, size):
    rest = (len(hidden) - 1) // size * size
    held = torch.cat([hidden[:rest].detach(), hidden[rest:]])
    return F.cross_entropy(held @ weight.T, targets)


def in_chunks(hidden, weight, targets, size):
    return linear_cross_entropy(hidden, weight, targets, chunk_size=size)


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


def to_nearest(target, source):
    return target.copy_(source)


def downwards(target, source):
    bits = source.view(torch.int32).bitwise_and(-1 << 16)
    return target.copy_(bits.view(torch.float32))


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
    return build_optimizers(model, 0.01, weight_decay=0.0, kind="muon")


def muon_for_every_matrix(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, 0.01, **options), torch.optim.AdamW(rest)]


def with_momentum_alone(model):
    return [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.95)]


def muon_of_another_size(model):
    optimizers = with_muon(model)
    optimizers[0].param_groups[0]["adjust_lr_fn"] = "original"
    return optimizers


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


def pads_right(rows, pad_id):
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids, None, None


def pads_left(rows, pad_id):
    ids, real = pad_left(rows, pad_id)
    padding = (real == 0).sum(-1)
    return ids, *positions_and_mask(padding, 0, ids.shape[1])


def looks_at_padding(rows, pad_id):
    ids, positions, _ = pads_left(rows, pad_id)
    return ids, positions, None


@torch.no_grad()
def left_padding(part):
    """A short prompt beside a long one has the next-token logits of itself alone."""
    model, short = tiny(), [5, 6, 7]
    ids, positions, mask = part([short, [9, 8, 7, 6, 5]], pad_id=0)
    found = model(ids, position_ids=positions, mask=mask)[0, -1]
    apart = (found - model(torch.tensor([short]))[0, -1]).abs().max().item()
    if apart > 1e-3:
        return f"logits of a padded row differ by {apart:.2g} from its own"


def until(texts, stop):
    """Yield what may be shown of texts that arrive: up to `stop`, and no part of it."""
    finder, held = StopFinder([stop]), ""
    for character in "".join(texts):
        held += character
        if finder.push(character):
            yield held[: -len(stop)]
            return
        ready = len(held) - finder.begun
        yield held[:ready]
        held = held[ready:]
    yield held


def stop_in_one_token(texts, stop):
    for text in texts:
        if stop in text:
            return
        yield text


def shown_at_once(texts, stop):
    shown = ""
    for text in texts:
        yield text
        shown += text
        if stop in shown:
            return


def stop_strings(part):
    """A stop string ends the text wherever tokens divide it, and is not shown."""
    for texts, wanted in ((["a", "bE", "ND", "c"], "ab"), (["aE", "N"], "aEN")):
        found = "".join(part(texts, "END"))
        if found != wanted:
            return f"{'|'.join(texts)} shows {found!r}, not {wanted!r}"


def cut(name, replacement):
    return patch.object(sampling, name, replacement)


PARTS = [
    Subject(
        "the model",
        half_norm,
        norm_to_the_bit,
        {
            "norm casts after its weight": weight_before_the_cast,
            "norm squares in bfloat16": squares_in_bfloat16,
        },
    ),
    Subject(
        "the data",
        pack,
        packing,
        {
            "no end token": without_end,
            "last row dropped": lambda documents, T: pack(documents, T)[:-1],
            "a token lost between rows": lambda d, T: [r[:-1] for r in pack(d, T)],
        },
    ),
    Subject(
        "the data",
        order,
        epochs,
        {
            "same order each epoch": lambda epoch, rank: order(0, rank),
            "drawn with replacement": drawn_with_replacement,
            "all processes read the same": lambda epoch, rank: order(epoch, 0),
        },
    ),
    Subject("the data", decode, round_trip, {"decoded byte by byte": byte_by_byte}),
    Subject(
        "the data",
        split_text,
        pieces,
        {
            "digits in threes": cut_by(
                QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
            ),
            "blanks apart from words": cut_by(
                QWEN_PATTERN.replace(r"[^\r\n\p{L}\p{N}]?", "")
            ),
            "accents not composed": not_composed,
        },
    ),
    Subject("the data", encode_piece, merges, {"longest token first": longest_first}),
    Subject(
        "the loss",
        split_loss,
        micro_batches,
        {
            "mean of means": mean_of_means,
            "first micro-batch only": lambda losses, counts: losses[0] / counts[0],
            "processes never add up": lambda losses, counts: losses[1] / counts[1],
        },
    ),
    Subject(
        "the loss",
        masked_loss,
        padding,
        {
            "padding counted": lambda x, t: masked_loss(x, t) / 2,
            "padding learned": lambda x, t: masked_loss(x, t.clamp(min=0)),
        },
    ),
    Subject(
        "the loss", masked_loss, large_logits, {"maximum not subtracted": naive_loss}
    ),
    Subject(
        "the loss",
        from_logits,
        z_loss,
        {
            "z-loss not squared": z_variant(lambda log_z: log_z),
            "z-loss of the other sign": z_variant(lambda log_z: -log_z.square()),
            "z-loss without gradient": z_variant(lambda log_z: log_z.detach() ** 2),
        },
    ),
    Subject(
        "the loss",
        in_chunks,
        chunks,
        {"mean of chunks": mean_of_chunks, "only the last chunk": last_chunk_learns},
    ),
    Subject(
        "the optimizer",
        adamw,
        by_hand,
        {
            "decay inside the gradient": l2,
            "betas swapped": lambda p, lr, d, b: adamw(p, lr, d, b[::-1]),
            "no bias correction": no_correction,
            "no decay": lambda p, lr, d, b: adamw(p, lr, 0.0, b),
        },
    ),
    Subject(
        "the optimizer",
        decayed,
        groups,
        {
            "norms and biases decay": lambda name, p: True,
            "nothing decays": lambda name, p: False,
        },
    ),
    Subject(
        "the optimizer",
        stochastic_round_,
        rounding,
        {"rounded to the nearest": to_nearest, "rounded towards zero": downwards},
    ),
    Subject(
        "the optimizer",
        with_muon,
        muon,
        {
            "Muon not orthogonalized": with_momentum_alone,
            "Muon of another size": muon_of_another_size,
            "Muon on the embedding": muon_for_every_matrix,
        },
    ),
    Subject(
        "the sampler",
        cut("_keep_top_k", sampling._keep_top_k),
        cuts,
        {
            "top-k keeps one less": cut("_keep_top_k", top_k_one_less),
            "top-p drops the last": cut("_keep_top_p", top_p_without_crossing),
            "min-p against one": cut("_keep_min_p", min_p_of_one),
        },
    ),
    Subject(
        "the sampler", penalize, penalty, {"penalty only divides": lambda x: x / 2}
    ),
    Subject(
        "the sampler",
        two_rows,
        generators,
        {
            "rows share a generator": one_generator,
            "seeded every step": seed_at_every_step,
        },
    ),
    Subject(
        "the sampler",
        pads_left,
        left_padding,
        {"padded on the right": pads_right, "padding is looked at": looks_at_padding},
    ),
    Subject(
        "the sampler",
        until,
        stop_strings,
        {"stop in one token": stop_in_one_token, "stop string shown": shown_at_once},
    ),
    Subject(
        "resuming",
        save_beside,
        killed_while_saving,
        {"saved in place": save_in_place, "deleted before saving": delete_then_save},
    ),
]


def findings(section):
    """Yield fault, check and what it says, for each of `PARTS` of a section."""
    for subject in PARTS:
        if subject.section != section:
            continue
        check = subject.check
        assert check(subject.healthy) is None, check.__name__
        for name, part in subject.broken.items():
            said = check(part)
            assert said, f"{check.__name__} does not notice: {name}"
            yield name, check.__name__, said

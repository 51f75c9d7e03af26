"""Train small models that differ in one of Qwen3's changes each, and write their losses
and largest attention scores to qwen3.json, which a chapter reads.

    python benchmarks/qwen3.py
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.mlp import SwiGLU
from qwen_analog.rope import apply_rotary

BASE = dict(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=64,
    rope_theta=1e4,
    initializer_range=0.1,
    tie_word_embeddings=False,
    attention_bias=False,
)
KINDS = {
    "biases": dict(attention_bias=True),
    "neither": dict(),
    "norms": dict(qk_norm=True),
    "norms and biases": dict(attention_bias=True, qk_norm=True),
    # half and twice as wide heads; F makes the number of weights equal again
    "narrow heads": dict(qk_norm=True, head_dim=8, intermediate_size=160),
    "wide heads": dict(qk_norm=True, head_dim=32, intermediate_size=64),
    # as wide in all as the wide heads, by number
    "more heads": dict(
        qk_norm=True,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=64,
    ),
    # F is smaller still, and pays for the larger scores, too
    "wide heads, equal work": dict(qk_norm=True, head_dim=32, intermediate_size=42),
    # a token meets two of eight feed-forward layers, each with half of F; without and
    # with a term in the loss that rewards an even spread
    "experts": dict(qk_norm=True),
    "experts, even": dict(qk_norm=True),
}
EVEN = 0.01  # the weight of that term
RATES, SEEDS, STEPS = (3e-3, 1e-2, 3e-2), 8, 200
TEXT = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()))
TRAINING, HELD_OUT = TEXT[:-16_384], TEXT[-16_384:].view(-1, 64)


class Experts(nn.Module):
    """Feed-forward layers, of which a router lets `chosen` answer each token."""

    def __init__(self, hidden_size: int, width: int, number: int, chosen: int):
        super().__init__()
        self.router = nn.Linear(hidden_size, number, bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, width) for _ in range(number))
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # [N, D]
        scores = self.router(tokens)  # [N, experts]
        best, chosen = scores.topk(self.chosen)
        shares = best.softmax(dim=-1)
        answers = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            answer = shares[rows, places, None] * expert(tokens[rows])
            answers = answers.index_add(0, rows, answer)
        # what a router gives each expert, in choices and in probability (Fedus 2021)
        picked = chosen.flatten().bincount(minlength=len(self.experts))
        self.load = picked / picked.sum()
        self.unevenness = len(self.load) * (
            self.load @ scores.softmax(dim=-1).mean(dim=0)
        )
        return answers.view(x.shape)


def with_experts(model: QwenForCausalLM) -> list[Experts]:
    """Put two of eight experts, each half as wide, for each feed-forward layer."""
    made = []
    for layer in model.model.layers:
        made.append(Experts(64, 64, number=8, chosen=2))
        for p in made[-1].parameters():
            nn.init.normal_(p, std=BASE["initializer_range"])
        layer.mlp = made[-1]
    return made


@torch.no_grad()
def largest_score(model: QwenForCausalLM, ids: torch.Tensor) -> float:
    """Return the largest |q k| / sqrt(h) of all heads that the mask lets through."""
    found = []
    x = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(torch.arange(ids.shape[1])[None], x.dtype)
    for layer in model.model.layers:
        attention = layer.self_attn
        q, k, _ = attention.project(layer.input_layernorm(x))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.mT / attention.head_dim**0.5  # [B, H, T, T]
        found.append(scores.tril().abs().max().item())
        x = layer(x, cos, sin)
    return max(found)


def run(seed: int, rate: float, kind: str) -> dict:
    """Train one model; return its loss on held-out text and its scores on the way."""
    torch.manual_seed(seed)
    model = QwenForCausalLM(QwenConfig(**{**BASE, **KINDS[kind]}))
    experts = with_experts(model) if kind.startswith("experts") else []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    batches = torch.Generator().manual_seed(seed)  # the same for each kind
    scores = [largest_score(model, HELD_OUT[:16])]
    for step in range(STEPS):
        starts = torch.randint(len(TRAINING) - 64, (16,), generator=batches)
        window = TRAINING[starts[:, None] + torch.arange(65)]  # [B, T + 1]
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20)
        loss = model(window[:, :-1], targets=window[:, 1:])
        if kind == "experts, even":
            loss = loss + EVEN * sum(layer.unevenness for layer in experts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            scores.append(largest_score(model, HELD_OUT[:16]))
    with torch.no_grad():
        loss = model(HELD_OUT[:, :-1], targets=HELD_OUT[:, 1:]).item()
    found = {
        "loss": round(loss, 4),
        "scores": [round(score, 2) for score in scores],
        "weights": model.count_parameters(),
    }
    if experts:  # the share of the held-out tokens that each expert answers, by layer
        loads = [layer.load.tolist() for layer in experts]
        found["loads"] = [[round(share, 3) for share in load] for load in loads]
    return found


def main() -> None:
    torch.set_num_threads(1)
    runs = []
    for rate in RATES:
        for kind in KINDS:
            for seed in range(SEEDS):
                found = run(seed, rate, kind)
                runs.append({"kind": kind, "rate": rate, "seed": seed, **found})
                print(runs[-1]["kind"], rate, seed, found["loss"], flush=True)
    target = Path(__file__).with_name("qwen3.json")
    lines = ",\n ".join(json.dumps(row) for row in runs)
    target.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()

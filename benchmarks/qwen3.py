"""Train small models with and without one of Qwen3's changes, and write their losses to
qwen3.json, which a chapter reads.

    python benchmarks/qwen3.py
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.mlp import SwiGLU

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
    "norms": dict(qk_norm=True),
    "norms and biases": dict(attention_bias=True, qk_norm=True),
    # a token meets two of eight feed-forward layers, each with half of F; a term in the
    # loss rewards an even spread
    "experts, even": dict(qk_norm=True),
}
EVEN = 0.01  # the weight of that term
RATE, SEEDS, STEPS = 1e-2, 8, 200
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
        load = picked / picked.sum()
        self.unevenness = len(load) * (load @ scores.softmax(dim=-1).mean(dim=0))
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


def run(seed: int, kind: str) -> dict:
    """Train one model; return its loss on held-out text and its number of weights."""
    torch.manual_seed(seed)
    model = QwenForCausalLM(QwenConfig(**{**BASE, **KINDS[kind]}))
    experts = with_experts(model) if kind.startswith("experts") else []
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    batches = torch.Generator().manual_seed(seed)  # the same for each kind
    for step in range(STEPS):
        starts = torch.randint(len(TRAINING) - 64, (16,), generator=batches)
        window = TRAINING[starts[:, None] + torch.arange(65)]  # [B, T + 1]
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20)
        loss = model(window[:, :-1], targets=window[:, 1:])
        if kind == "experts, even":
            loss = loss + EVEN * sum(layer.unevenness for layer in experts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        loss = model(HELD_OUT[:, :-1], targets=HELD_OUT[:, 1:]).item()
    return {"loss": round(loss, 4), "weights": model.count_parameters()}


def main() -> None:
    torch.set_num_threads(1)
    runs = []
    for kind in KINDS:
        for seed in range(SEEDS):
            found = run(seed, kind)
            runs.append({"kind": kind, "seed": seed, **found})
            print(kind, seed, found["loss"], flush=True)
    target = Path(__file__).with_name("qwen3.json")
    lines = ",\n ".join(json.dumps(row) for row in runs)
    target.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()

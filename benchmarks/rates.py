"""Train small models of several widths, and with several sizes of batch, each at many
learning rates, and write their losses to rates.json, which a chapter reads.

    python benchmarks/rates.py
"""

import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn

from qwen_analog import QwenConfig, QwenForCausalLM

BASE_WIDTH = 32  # the width at which both ways of setting the rates agree
WIDTHS = (16, 64, 128)  # and the base
BATCHES = (4, 16, 64)  # sequences in a step
SEQUENCES, T = 2_400, 64  # of a run, whatever its batch
RATES = [2.0**power for power in range(-10, -2)]
SEEDS = 3
TEXT = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()))
TRAINING, HELD_OUT = TEXT[:-16_384], TEXT[-16_384:].view(-1, T)


def new_model(width: int) -> QwenForCausalLM:
    """Two blocks whose heads have 16 numbers, whatever the width."""
    config = QwenConfig(
        vocab_size=256,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        intermediate_size=width * 11 // 4,
        max_position_embeddings=T,
        rope_theta=1e4,
        initializer_range=0.8 / math.sqrt(width),
        tie_word_embeddings=False,
        attention_bias=False,
    )
    return QwenForCausalLM(config)


def shares(model: QwenForCausalLM, by_width: bool) -> list[dict]:
    """The optimizer's groups. `by_width`: matrices that sum over the width take a
    smaller rate in a wider model."""
    summing = [p for p in model.model.layers.parameters() if p.ndim == 2]
    summing.append(model.lm_head.weight)
    chosen = {id(p) for p in summing}
    others = [p for p in model.parameters() if id(p) not in chosen]
    share = BASE_WIDTH / model.config.hidden_size if by_width else 1.0
    return [{"params": summing, "share": share}, {"params": others, "share": 1.0}]


def schedule(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps, then a cosine down to a tenth."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def run(seed: int, width: int, B: int, rate: float, by_width: bool = False) -> dict:
    """Train one model; return its loss on held-out text, in nats a byte."""
    torch.manual_seed(seed)
    model = new_model(width)
    groups = shares(model, by_width)
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    draws = torch.Generator().manual_seed(seed)
    steps = SEQUENCES // B
    for step in range(steps):
        starts = torch.randint(len(TRAINING) - T, (B, 1), generator=draws)
        window = TRAINING[starts + torch.arange(T + 1)]  # [B, T + 1]
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"] * schedule(step, steps)
        loss = model(window[:, :-1], targets=window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        loss = model(HELD_OUT[:, :-1], targets=HELD_OUT[:, 1:]).item()
    chosen = {"width": width, "batch": B, "by_width": by_width, "rate": rate}
    return chosen | {"seed": seed, "loss": round(loss, 4)}


def main() -> None:
    torch.set_num_threads(1)
    target = Path(__file__).with_name("rates.json")
    settings = [(BASE_WIDTH, B, False) for B in BATCHES]
    settings += [(width, 16, way) for width in WIDTHS for way in (False, True)]
    runs = []
    for width, B, by_width in settings:
        for rate in RATES:
            for seed in range(SEEDS):
                runs.append(run(seed, width, B, rate, by_width))
        print(f"width {width}, batch {B}, by width {by_width}: done", flush=True)
        lines = ",\n ".join(json.dumps(row) for row in runs)
        target.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Draw the matrices of one layer to scale, and the parameters of every preset by part:
writes config.svg beside this file.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from qwen_analog.config import QwenConfig, parameter_counts

plt.style.use(HERE / "book.mplstyle")
COLOURS = {
    "embedding": "#5f6b73",
    "attention": "#0b63a5",
    "mlp": "#e0a100",
    "lm_head": "#d1495b",
}
SIZES = [
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "analog-2.5b",
    "qwen2.5-3b",
    "analog-3b",
    "qwen2.5-7b",
]

config = QwenConfig()
D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
q, kv = config.num_attention_heads * h, config.num_key_value_heads * h
rows = [
    ("attention", [("q", q), ("k", kv), ("v", kv), ("o", q)]),
    ("mlp", [("gate", F)]),
    ("mlp", [("up", F)]),
    ("mlp", [("down", F)]),
]

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), width_ratios=(1.35, 1))
gap = 220
for row, (part, matrices) in enumerate(rows):
    x, y = 0, -row * (D + gap)
    for name, side in matrices:
        left.add_patch(
            plt.Rectangle(
                (x, y),
                side,
                -D,
                facecolor=COLOURS[part],
                edgecolor="white",
                linewidth=1.2,
            )
        )
        left.text(
            x + side / 2,
            y - D / 2,
            f"{name}\n{side}",
            ha="center",
            va="center",
            color="white",
            fontsize=9,
        )
        x += side
    if part == "attention":
        left.text(
            x + 250,
            y - D / 2,
            "drawn to scale; biases and norms\nwould be thinner than a pixel",
            va="center",
            fontsize=8.5,
            color="#444444",
        )
left.text(-180, -D / 2, f"{D}", rotation=90, ha="right", va="center", fontsize=9)
left.set(
    xlim=(-700, F + 50),
    ylim=(-4 * (D + gap) + gap - 60, 60),
    title="the matrices of one layer of analog-3b",
)
left.set_aspect("equal")
left.axis("off")

for y, name in enumerate(reversed(SIZES)):
    ledger, start = parameter_counts(QwenConfig.from_preset(name)), 0.0
    for part, colour in COLOURS.items():
        right.barh(
            y,
            ledger[part] / 1e9,
            left=start,
            color=colour,
            height=0.68,
            label=part if y == 0 else None,
        )
        start += ledger[part] / 1e9
    right.text(
        start + 0.1, y, f"{sum(ledger.values()) / 1e9:.2f}", va="center", fontsize=8.5
    )
right.set_yticks(range(len(SIZES)), reversed(SIZES))
right.set(
    xlabel="parameters, billions", xlim=(0, 8.8), title="the whole model, by part"
)
right.grid(axis="y", visible=False)
right.legend(loc="upper right", fontsize=8.5)
figure.savefig(HERE / "config.svg", metadata={"Date": None})

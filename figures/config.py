"""Draw the matrices of one layer to scale: writes config.svg beside this file."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from qwen_analog.config import QwenConfig

plt.style.use(HERE / "book.mplstyle")
COLOURS = {"attention": "#0b63a5", "mlp": "#e0a100"}

config = QwenConfig()
D, F, h = config.hidden_size, config.intermediate_size, config.head_dim
q, kv = config.num_attention_heads * h, config.num_key_value_heads * h
rows = [
    ("attention", [("q", q), ("k", kv), ("v", kv), ("o", q)]),
    ("mlp", [("gate", F)]),
    ("mlp", [("up", F)]),
    ("mlp", [("down", F)]),
]

figure, axes = plt.subplots(figsize=(6, 3.9))
gap = 220
for row, (part, matrices) in enumerate(rows):
    x, y = 0, -row * (D + gap)
    for name, side in matrices:
        axes.add_patch(
            plt.Rectangle(
                (x, y),
                side,
                -D,
                facecolor=COLOURS[part],
                edgecolor="white",
                linewidth=1.2,
            )
        )
        axes.text(
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
        axes.text(
            x + 250,
            y - D / 2,
            "drawn to scale; biases and norms\nwould be thinner than a pixel",
            va="center",
            fontsize=8.5,
            color="#444444",
        )
axes.text(-180, -D / 2, f"{D}", rotation=90, ha="right", va="center", fontsize=9)
axes.set(
    xlim=(-700, F + 50),
    ylim=(-4 * (D + gap) + gap - 60, 60),
    title="the matrices of one layer of analog-3b",
)
axes.set_aspect("equal")
axes.axis("off")
figure.savefig(HERE / "config.svg", metadata={"Date": None})

"""Draw the map of the model and the book: writes map.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
MODEL, PART, SIDE = "#0b63a5", "#a9c9e4", "#e9edf0"

figure, ax = plt.subplots(figsize=(9.5, 8.2))
ax.set(xlim=(0, 12), ylim=(0, 12.4))
ax.axis("off")


x = 4.3
centre = x + 1.7
rows = [
    (0.2, "text", "white"),
    (1.2, "tokenizer", PART),
    (2.2, "token embedding", PART),
    (3.75, "RMSNorm", PART),
    (4.75, "attention", PART),
    (6.55, "RMSNorm", PART),
    (7.55, "SwiGLU", PART),
    (9.6, "RMSNorm", PART),
    (10.6, "language-model head", PART),
    (11.6, "logits", "white"),
]
ax.add_patch(
    FancyBboxPatch(
        (3.35, 3.35),
        5.3,
        5.75,
        boxstyle="round,pad=0.02,rounding_size=0.15",
        facecolor="none",
        edgecolor=MODEL,
        linewidth=1.5,
    )
)
ax.text(
    8.5,
    8.75,
    "block, L times",
    ha="right",
    va="center",
    fontsize=9.5,
    color=MODEL,
    fontweight="bold",
)
for y, text, face in rows:
    box(ax, x, y, text, 3.4, face=face)
for low, high in (
    (0.9, 1.18),
    (1.9, 2.18),
    (2.9, 3.73),
    (4.45, 4.73),
    (7.25, 7.53),
    (8.95, 9.58),
    (10.3, 10.58),
    (11.3, 11.58),
):
    arrow(ax, (centre, low), (centre, high))
for bottom, top in ((3.15, 5.95), (6.25, 8.72)):
    ax.text(
        centre,
        top,
        "+",
        ha="center",
        va="center",
        fontsize=12,
        bbox={
            "boxstyle": "circle,pad=0.15",
            "facecolor": "white",
            "edgecolor": "#5f6b73",
        },
    )
    arrow(ax, (centre, bottom), (3.75, bottom), (3.75, top), (centre - 0.25, top))
    arrow(ax, (centre, top - (0.5 if top < 6 else 0.47)), (centre, top - 0.22))
arrow(ax, (centre, 6.2), (centre, 6.53))
box(ax, 8.95, 4.35, "RoPE", 2.6, face=PART)
box(ax, 8.95, 5.2, "KV cache", 2.6, face=PART)
arrow(ax, (8.93, 4.7), (7.75, 5.0))
arrow(ax, (8.93, 5.55), (7.75, 5.25))
box(ax, 8.95, 6.4, "configuration", 2.6, face=SIDE)
arrow(ax, (8.93, 6.75), (8.7, 6.75))
ax.text(
    1.6, 12.05, "training", ha="center", va="center", fontsize=11, fontweight="bold"
)
ax.text(10.25, 12.05, "use", ha="center", va="center", fontsize=11, fontweight="bold")
for y, text in (
    (1.2, "data"),
    (10.6, "loss"),
    (9.4, "optimizer"),
    (8.2, "memory, GPUs"),
    (7.0, "checkpoints"),
    (5.8, "watching"),
    (4.6, "pretraining"),
):
    box(ax, 0.3, y, text, 2.6, face=SIDE)
for y, text in (
    (10.6, "sampling, generation"),
    (9.6, "real weights"),
    (8.6, "conversation"),
    (7.6, "evaluation"),
    (3.1, "serving"),
):
    box(ax, 8.95, y, text, 2.6, face=SIDE)
arrow(ax, (4.28, 1.55), (2.95, 1.55))
arrow(ax, (4.28, 10.95), (2.95, 10.95))
arrow(ax, (7.72, 10.95), (8.93, 10.95))
for y in (10.58, 9.38, 8.18, 6.98, 5.78):
    arrow(ax, (1.6, y), (1.6, y - 0.46))
for y in (10.58, 9.58, 8.58):
    arrow(ax, (10.25, y), (10.25, y - 0.26))
figure.savefig(HERE / "map.svg", metadata={"Date": None})

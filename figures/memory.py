"""Draw what a weight costs in training: writes memory.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, GREEN, RED = "#0b63a5", "#2a9d60", "#d1495b"  # as in the chapter's plots

figure, axes = plt.subplots(figsize=(7, 2.4))

rows = [
    ("bf16", [("weight", 4), ("gradient", 4), ("moment", 4), ("moment", 4)]),
    ("bf16-pure", [("weight", 2), ("gradient", 2), ("moment", 2), ("moment", 2)]),
]
for y, (name, parts) in zip((1, 0), rows):
    start = 0
    for i, (label, size) in enumerate(parts):
        axes.barh(
            y,
            size,
            left=start,
            height=0.55,
            color=(BLUE, GREEN, RED, RED)[i],
            edgecolor="white",
            linewidth=2,
        )
        axes.text(
            start + size / 2,
            y,
            label,
            ha="center",
            va="center",
            fontsize=8.5,
            color="white",
        )
        start += size
    axes.text(-0.3, y, name, ha="right", va="center", fontsize=10)
axes.set(
    xlim=(0, 16.3),
    ylim=(-0.6, 1.6),
    xticks=[0, 4, 8, 12, 16],
    yticks=[],
    xlabel="bytes a weight",
    title="held after a backward pass",
)
axes.grid(False)
axes.spines["left"].set_visible(False)
figure.savefig(HERE / "memory.svg", metadata={"Date": None})

"""Draw the shift by one, and which logits exist at once in the obvious and in the
chunked loss: writes loss.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, MIDDLE, PALE = "#0b63a5", "#a9c9e4", "#e9edf0"

words = ["the", "cat", "sat", "on", "the", "mat"]
tokens, vocabulary, width, chunk = 12, 20, 4, slice(6, 9)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), width_ratios=[1.25, 1, 1])

ax = axes[0]
box = {"boxstyle": "round,pad=0.25", "linewidth": 0}
for i, word in enumerate(words):
    ax.text(
        i,
        1,
        word,
        ha="center",
        va="center",
        color="white",
        bbox={**box, "facecolor": DARK},
    )
    last = i == len(words) - 1
    ax.text(
        i,
        0,
        "none" if last else words[i + 1],
        ha="center",
        va="center",
        color="#5f6b73" if last else "black",
        bbox={**box, "facecolor": PALE if last else MIDDLE},
    )
    if not last:
        ax.annotate(
            "",
            (i + 0.12, 0.17),
            (i + 0.88, 0.83),
            arrowprops={"arrowstyle": "->", "color": "#5f6b73", "linewidth": 1},
        )
ax.text(-0.5, 1.38, "inputs", color="#5f6b73", fontsize=9)
ax.text(-0.5, -0.5, "targets", color="#5f6b73", fontsize=9)
ax.set(
    xlim=(-0.6, 5.6),
    ylim=(-1.1, 2.0),
    title="targets are the inputs, one place to the left",
)

for ax, title in zip(axes[1:], ("all logits at once", "a chunk at a time")):
    chunked = ax is axes[2]
    table = torch.zeros(tokens, vocabulary)  # 0 not in memory, 1 kept, 2 in use
    table[chunk if chunked else slice(None)] = 2
    ax.imshow(
        table,
        cmap=ListedColormap([PALE, MIDDLE, DARK]),
        vmin=0,
        vmax=2,
        extent=(0, vocabulary, tokens, 0),
        aspect="auto",
    )
    if chunked:
        side = torch.zeros(tokens, 1)
        side[: chunk.stop] = 1
        kept = {
            "cmap": ListedColormap([PALE, MIDDLE]),
            "vmin": 0,
            "vmax": 1,
            "aspect": "auto",
        }
        ax.imshow(
            side, extent=(vocabulary + 1, vocabulary + 1 + width, tokens, 0), **kept
        )
        ax.imshow(
            torch.ones(1, 1),
            extent=(0, vocabulary, tokens + 1 + width / 2, tokens + 1),
            **kept,
        )
        ax.text(
            vocabulary + 1 + width / 2,
            -0.4,
            "grad h",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        ax.text(
            vocabulary / 2,
            tokens + 1 + width / 4,
            "grad W",
            ha="center",
            va="center",
            fontsize=8,
        )
    ax.set(
        xlim=(-0.2, vocabulary + width + 1.2),
        ylim=(tokens + 1.2 + width / 2, -1.6),
        title=title,
    )
    ax.text(
        vocabulary / 2,
        -0.4,
        "vocabulary",
        ha="center",
        va="bottom",
        fontsize=9,
        color="#5f6b73",
    )
    ax.text(
        -0.6,
        tokens / 2,
        "tokens",
        rotation=90,
        ha="right",
        va="center",
        fontsize=9,
        color="#5f6b73",
    )
for ax in axes:
    ax.axis("off")
figure.savefig(HERE / "loss.svg", metadata={"Date": None})

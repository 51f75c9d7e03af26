"""Draw the shift by one: writes loss.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, MIDDLE, PALE = "#0b63a5", "#a9c9e4", "#e9edf0"

words = ["the", "cat", "sat", "on", "the", "mat"]

figure, ax = plt.subplots(figsize=(5, 2.4))
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

ax.axis("off")
figure.savefig(HERE / "loss.svg", metadata={"Date": None})

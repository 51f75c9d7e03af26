"""Draw the two orders of a head's rows: writes real_weights.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COLORS = ["#0b63a5", "#d1495b", "#2a9d60", "#e0a100"]
HALF = 4

figure, ax = plt.subplots(figsize=(8.4, 4.4))
ax.set(xlim=(-2.3, 8.3), ylim=(7.7, -1.2))
ax.axis("off")
file_rows = [
    (pair, half) for pair in range(HALF) for half in range(2)
]  # neighbours form a pair
our_rows = [
    (pair, half) for half in range(2) for pair in range(HALF)
]  # row i and row i + h/2 form a pair
for x, rows, title in (
    (0.5, file_rows, "in the file: pairs (2i, 2i+1)"),
    (5.5, our_rows, "in this book: pairs (i, i + h/2)"),
):
    ax.text(x, -0.75, title, ha="center", fontsize=10.5)
    for y, (pair, half) in enumerate(rows):
        ax.add_patch(
            FancyBboxPatch(
                (x - 0.9, y - 0.34),
                1.8,
                0.68,
                boxstyle="round,pad=0.02",
                facecolor=COLORS[pair],
                edgecolor="none",
                alpha=1.0 if half == 0 else 0.6,
            )
        )
        ax.text(
            x,
            y,
            f"pair {pair}, {'second' if half else 'first'}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if half == 0 else "black",
        )
        ax.text(
            x - 1.15 if x < 3 else x + 1.15,
            y,
            f"row {y}",
            ha="right" if x < 3 else "left",
            va="center",
            fontsize=9,
            color="#5f6b73",
        )
for y, row in enumerate(file_rows):
    ax.annotate(
        "",
        (4.5, our_rows.index(row)),
        (1.5, y),
        arrowprops={
            "arrowstyle": "-|>",
            "color": COLORS[row[0]],
            "linewidth": 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )
figure.savefig(HERE / "real_weights.svg", metadata={"Date": None})

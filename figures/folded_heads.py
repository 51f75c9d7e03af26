"""Draw two query heads that share their keys: one after the other, and folded into rows
of one head: writes folded_heads.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
HEADS, KEYS, HIDDEN = ["#cfe3f3", "#f6d3d7"], "#d9ead7", "#f3f4f5"


def row(ax, x, y, head, query):
    """A query, and beside it what it may see of two keys."""
    box(ax, x, y, f"head {head}, query {query}", 1.9, 0.5, HEADS[head])
    for key in (0, 1):
        seen = key <= query
        face = HEADS[head] if seen else HIDDEN
        box(ax, x + 2.1 + 0.6 * key, y, "1" if seen else "0", 0.5, 0.5, face)


def keys(ax, x, y):
    box(ax, x, y, "keys 0 and 1", 1.5, 0.7, KEYS)


figure, ax = plt.subplots(figsize=(8.6, 2.7))
ax.set(xlim=(0, 11.8), ylim=(-0.1, 3.75))
ax.axis("off")
ax.text(0, 3.45, "head by head: keys read twice", fontsize=10, weight="bold")
ax.text(6.2, 3.45, "folded: keys read once", fontsize=10, weight="bold")
for x, gap in ((0, 0.5), (6.2, 0.0)):
    ax.text(x + 2.65, 2.95, "mask", fontsize=9, color=GREY, ha="center")
    for head in (0, 1):
        for query in (0, 1):
            row(ax, x, 2.3 - 0.6 * query - (1.2 + gap) * head, head, query)
for y in (1.9, 0.2):
    keys(ax, 4.1, y)
    arrow(ax, (4.07, y + 0.35), (3.4, y + 0.35))
keys(ax, 10.1, 1.3)
arrow(ax, (10.07, 1.65), (9.6, 1.65))
figure.savefig(HERE / "folded_heads.svg", metadata={"Date": None})

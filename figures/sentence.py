"""Draw the way of one sentence through a model: tokens, their numbers, their vectors,
the blocks, the probabilities. Writes sentence.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

TOKENS = {"The": 504, " capital": 3575, " of": 282, " France": 4649, " is": 314}
BEST = {" Paris": 0.77, " the": 0.07, " London": 0.01}
BLOCKS = (5.15, 7.05)  # where the first and the last block stand
WIDTH = 1.25

rng = np.random.default_rng(0)
figure, ax = plt.subplots(figsize=(11, 3.6))
rows = [4 - i for i in range(len(TOKENS))]


def vector(x, y):
    """Eight cells of different darkness."""
    for i, dark in enumerate(rng.random(8)):
        cell = plt.Rectangle((x + 0.13 * i, y + 0.15), 0.12, 0.4)
        cell.set(facecolor=plt.colormaps["Blues"](0.15 + 0.7 * dark))
        ax.add_patch(cell)


for x, title in (
    (0.0, "tokens"),
    (1.45, "numbers"),
    (3.0, "vectors"),
    (BLOCKS[0], "30 blocks"),
    (9.5, "vectors"),
    (11.7, "next token"),
):
    ax.text(x, 5.0, title, fontsize=10, color=GREY)

for y, (word, token_id) in zip(rows, TOKENS.items()):
    box(ax, 0, y, repr(word), 1.15, fontsize=9, family="monospace")
    box(ax, 1.45, y, str(token_id), 0.9, fontsize=9)
    arrow(ax, (1.18, y + 0.35), (1.42, y + 0.35))
    arrow(ax, (2.4, y + 0.35), (2.95, y + 0.35))
    vector(3.0, y)
    arrow(ax, (4.1, y + 0.35), (BLOCKS[0] - 0.05, y + 0.35))
    arrow(ax, (BLOCKS[1] + WIDTH + 0.05, y + 0.35), (9.4, y + 0.35))
    vector(9.5, y)

for x, name in zip(BLOCKS, ("block 1", "block 30")):
    box(ax, x, 0, "", WIDTH, height=4.7, face="#cfe0ef")
    ax.text(x + WIDTH / 2, 4.4, name, ha="center", fontsize=9)
    for i, y in enumerate(rows):  # each token looks at itself and at those before it
        for earlier in rows[:i]:
            ends = (x + 0.15, earlier + 0.2), (x + 0.7, y + 0.2)
            ax.plot(*zip(*ends), color="#0b63a5", linewidth=0.7)
        ax.plot(x + 0.15, y + 0.2, "o", color="#0b63a5", markersize=4)
        ax.plot(x + 0.7, y + 0.2, "o", color="#0b63a5", markersize=4)
        ax.plot(x + 1.05, y + 0.2, "s", color="#2a9d60", markersize=6)
        ax.plot([x + 0.15, x + 1.05], [y + 0.2] * 2, color="#0b63a5", linewidth=0.7)
ax.text((BLOCKS[0] + BLOCKS[1] + WIDTH) / 2, 2.2, "...", ha="center", fontsize=14)
for x, shape in (
    (1.45, "[1, 5]"),
    (3.0, "[1, 5, 576]"),
    (9.5, "[1, 5, 576]"),
    (11.7, "[49152]"),
):
    ax.text(x, -0.5, shape, fontsize=9, color=GREY, family="monospace")
ax.text(BLOCKS[0], -0.5, "lines: tokens look at earlier ones", fontsize=8, color=GREY)
ax.text(BLOCKS[0], -0.9, "squares: each computes alone", fontsize=8, color=GREY)

arrow(ax, (10.6, 0.35), (11.1, 0.35), (11.1, 2.35), (11.6, 2.35))
for y, (word, share) in zip((3.0, 2.0, 1.0), BEST.items()):
    bar = plt.Rectangle((11.7, y + 0.1), 1.6 * share, 0.5, facecolor="#d1495b")
    ax.add_patch(bar)
    label = f"{share:.2f}  {word!r}"
    ax.text(11.8 + 1.6 * share, y + 0.35, label, va="center", fontsize=9)

ax.set(xlim=(-0.1, 14.6), ylim=(-1.0, 5.4))
ax.axis("off")
figure.savefig(HERE / "sentence.svg", metadata={"Date": None})

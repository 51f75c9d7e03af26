"""Draw the endless stream over two epochs, and the sequences that are cut from it:
writes epochs.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

DOCUMENTS, T, SEED = ("the cat sat", "a hat", "in the hat ."), 5, 2  # the chapter's
COLORS = ("#a9c9e4", "#f0b5bd", "#a8d9bf")
MARK, RED = "#2b3640", "#d1495b"

figure, ax = plt.subplots(figsize=(9.5, 2.1))
x = 0
for epoch in (0, 1):
    start = x
    for number in np.random.default_rng((SEED, epoch)).permutation(3):
        for word in ["|", *DOCUMENTS[number].split()]:
            mark = word == "|"
            color = MARK if mark else COLORS[number]
            ax.add_patch(plt.Rectangle((x, 0), 0.92, 0.92, facecolor=color))
            ink = "white" if mark else "black"
            ax.text(x + 0.46, 0.46, word, ha="center", va="center", color=ink)
            x += 1
    ax.plot([start + 0.02, x - 0.1], [1.3, 1.3], color=MARK, linewidth=1.5)
    ax.text((start + x) / 2, 1.45, f"epoch {epoch}", ha="center", fontsize=11)
for k in range(x // T):
    left, right = k * T + 0.02, (k + 1) * T - 0.1
    ax.plot([left, left, right, right], [-0.2, -0.4, -0.4, -0.2], color=RED)
    name = f"sequence {k}"
    ax.text((left + right) / 2, -1.0, name, ha="center", color=RED, fontsize=11)
ax.text(x + 0.1, 0.3, "…", fontsize=14)
ax.set(xlim=(-0.2, x + 0.9), ylim=(-1.3, 2.1))
ax.set_aspect("equal")
ax.axis("off")
figure.savefig(HERE / "epochs.svg", metadata={"Date": None})

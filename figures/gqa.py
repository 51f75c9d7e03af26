"""Draw which key-value head each query head reads in MHA, GQA and MQA: writes gqa.svg
beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

H = 4
COLOURS = ["#0b63a5", "#d1495b", "#2a9d60", "#6a4c93"]
panels = [
    ("multi-head: K = 4", 4),
    ("grouped-query: K = 2", 2),
    ("multi-query: K = 1", 1),
]


def row(ax, places, y, colours):
    for i, (x, colour) in enumerate(zip(places, colours)):
        ax.add_patch(
            plt.Rectangle((x - 0.3, y - 0.26), 0.6, 0.52, color=colour, zorder=2)
        )
        ax.text(x, y, i, color="white", ha="center", va="center", zorder=3)


figure, axes = plt.subplots(1, 3, figsize=(8, 2))
for ax, (title, K) in zip(axes, panels):
    group_size = H // K
    below = [(j + 0.5) * group_size - 0.5 for j in range(K)]
    colours = [COLOURS[i // group_size] for i in range(H)]
    for i in range(H):
        ends = [i, below[i // group_size]]
        ax.plot(ends, [2, 0], color=colours[i], linewidth=1.6, zorder=1)
    row(ax, range(H), 2, colours)
    row(ax, below, 0, COLOURS)
    ax.set(xlim=(-0.5, H - 0.5), ylim=(-0.4, 2.4), xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set_visible(False)
axes[0].set_yticks([0, 2], ["keys,\nvalues", "queries"])
axes[0].tick_params(length=0)
figure.savefig(HERE / "gqa.svg", metadata={"Date": None})

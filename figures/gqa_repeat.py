"""Draw two key-value heads, their copies for four query heads in two orders, and who
reads which copy: writes gqa_repeat.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

COLOURS = ["#0b63a5", "#d1495b"]
panels = [("repeat_interleave: right", [0, 0, 1, 1]), ("repeat: wrong", [0, 1, 0, 1])]
CACHED = [0.5, 2.5]  # places of the two heads


def box(ax, x, y, text, colour):
    ax.add_patch(plt.Rectangle((x - 0.3, y - 0.26), 0.6, 0.52, color=colour, zorder=2))
    ax.text(x, y, text, color="white", ha="center", va="center", zorder=3)


figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.5))
for ax, (title, order) in zip(axes, panels):
    for i, kv_head in enumerate(order):
        colour = COLOURS[kv_head]
        ax.plot([i, i], [4, 2], color=colour, linewidth=1.6, zorder=1)
        ends = [i, CACHED[kv_head]]
        ax.plot(ends, [2, 0], color=colour, linewidth=1.2, linestyle=":", zorder=1)
        box(ax, i, 4, i, "#5f6b73")
        box(ax, i, 2, kv_head, colour)
    for kv_head, x in enumerate(CACHED):
        box(ax, x, 0, kv_head, COLOURS[kv_head])
    ax.set(xlim=(-0.5, 3.5), ylim=(-0.4, 4.4), xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set_visible(False)
axes[0].set_yticks([0, 2, 4], ["cached", "copies", "queries"])
axes[0].tick_params(length=0)
figure.savefig(HERE / "gqa_repeat.svg", metadata={"Date": None})

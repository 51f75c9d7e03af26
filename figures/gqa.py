"""Draw which key-value head each query head reads in MHA, GQA, MQA and under the wrong
repeat: writes gqa.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

H = 8
COLOURS = [
    "#0b63a5",
    "#d1495b",
    "#2a9d60",
    "#e0a100",
    "#6a4c93",
    "#5f6b73",
    "#4fa3d1",
    "#a0522d",
]
panels = [
    ("multi-head: K = 8", 8, lambda i: i),
    ("grouped-query: K = 4", 4, lambda i: i // 2),
    ("multi-query: K = 1", 1, lambda i: 0),
    ("the wrong repeat: K = 4", 4, lambda i: i % 4),
]


def row(ax, places, y, colours, labels):
    for x, colour, label in zip(places, colours, labels):
        ax.add_patch(
            plt.Rectangle((x - 0.36, y - 0.24), 0.72, 0.48, color=colour, zorder=2)
        )
        ax.text(
            x, y, label, color="white", ha="center", va="center", fontsize=8, zorder=3
        )


figure, axes = plt.subplots(1, 4, figsize=(11, 2.3))
for ax, (title, K, reads) in zip(axes, panels):
    below = [(j + 0.5) * H / K - 0.5 for j in range(K)]
    for i in range(H):
        ax.plot(
            [i, below[reads(i)]],
            [2, 0],
            color=COLOURS[reads(i)],
            linewidth=1.4,
            zorder=1,
        )
    row(ax, range(H), 2, [COLOURS[reads(i)] for i in range(H)], range(H))
    row(ax, below, 0, COLOURS, range(K))
    ax.set(xlim=(-0.6, H - 0.4), ylim=(-0.4, 2.4), xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set_visible(False)
axes[0].set_yticks([0, 2], ["keys,\nvalues", "queries"])
axes[0].tick_params(length=0)
figure.savefig(HERE / "gqa.svg", metadata={"Date": None})

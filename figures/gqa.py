"""Draw the keys and values of three words in MHA, GQA and MQA, and which query head
reads which: writes gqa.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

H = 4
WORDS = ["old", "dogs", "sleep"]
COLOURS = ["#0b63a5", "#d1495b", "#2a9d60", "#6a4c93"]
KEYS = [[1, 0, 2], [0, 1, 1]]  # those of the case by hand
VALUES = [[9, 3, 6], [0, 3, 6]]
panels = [
    ("multi-head, K = 4\n12 keys, 12 values", 4),
    ("grouped-query, K = 2\n6 keys, 6 values", 2),
    ("multi-query, K = 1\n3 keys, 3 values", 1),
]


def table(ax, left, colour, rows):
    """A key/value head: a row of keys above a row of values, a column for each word."""
    for line, numbers in enumerate(rows):
        for column, number in enumerate(numbers):
            corner = (left + column, -line)
            ax.add_patch(
                plt.Rectangle(
                    corner, 1, -1, facecolor=colour, edgecolor="white", linewidth=1.5
                )
            )
            ax.text(
                left + column + 0.5,
                -line - 0.5,
                number,
                color="white",
                ha="center",
                va="center",
                fontsize=8,
            )
    for column, word in enumerate(WORDS):
        ax.text(
            left + column + 0.5,
            -2.2,
            word,
            rotation=90,
            ha="center",
            va="top",
            fontsize=7,
        )


figure, axes = plt.subplots(1, 3, figsize=(9, 2.9))
for ax, (title, K) in zip(axes, panels):
    group_size = H // K
    for head in range(H):
        kv_head = head // group_size
        x = 4 * head + 1.5
        below = 4 * (kv_head + 0.5) * group_size - 0.5
        colour = COLOURS[kv_head]
        ax.plot([x, below], [2.6, 0], color=colour, linewidth=1.6, zorder=1)
        ax.add_patch(plt.Rectangle((x - 0.8, 2.6), 1.6, 1.3, color=colour, zorder=2))
        ax.text(x, 3.25, head, color="white", ha="center", va="center", zorder=3)
    for kv_head in range(K):
        left = 4 * (kv_head + 0.5) * group_size - 2
        rows = [[""] * 3] * 2
        if K == 2:
            rows = [KEYS[kv_head], VALUES[kv_head]]
        table(ax, left, COLOURS[kv_head], rows)
    ax.set(xlim=(-0.6, 15.6), ylim=(-4.4, 4.1), xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title, fontsize=10)
    if K == 2:
        ax.set_xlabel("computed by hand below", fontsize=9)
    for spine in ax.spines.values():
        spine.set_visible(False)
axes[0].set_yticks([-1.5, -0.5, 3.25], ["values", "keys", "query heads"])
axes[0].tick_params(length=0)
figure.savefig(HERE / "gqa.svg", metadata={"Date": None})

"""Draw the scores of four query heads and two key heads: head by head, and with the
queries of a group as rows of one product. Writes gqa_rows.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

COLOURS = ["#0b63a5", "#d1495b"]
QUERIES = [1, 2, 3, 4]  # those of the case by hand
KEYS = [[1, 0, 2], [0, 1, 1]]


def cells(ax, left, top, rows, colour, text):
    for line, numbers in enumerate(rows):
        for column, number in enumerate(numbers):
            x, y = left + column, top - line
            ax.add_patch(
                plt.Rectangle(
                    (x, y), 1, -1, facecolor=colour, edgecolor="white", linewidth=1.5
                )
            )
            ax.text(
                x + 0.5, y - 0.5, number, color=text, ha="center", va="center", size=9
            )


def product(ax, top, rows, kv_head):
    """The queries `rows`, times the keys of a head, equals their scores."""
    colour = COLOURS[kv_head]
    middle = top - len(rows) / 2
    scores = [[query * key for key in KEYS[kv_head]] for (query,) in rows]
    cells(ax, 0, top, rows, "#5f6b73", "white")
    cells(ax, 2, middle + 0.5, [KEYS[kv_head]], colour, "white")
    cells(ax, 6, top, scores, "#dfe5e9", "black")
    ax.text(1.5, middle, "×", ha="center", va="center")
    ax.text(5.5, middle, "=", ha="center", va="center")


figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.7))
for head, query in enumerate(QUERIES):
    product(axes[0], 5.4 - 1.4 * head, [[query]], head // 2)
product(axes[1], 5, [[1], [2]], 0)
product(axes[1], 2.2, [[3], [4]], 1)
titles = ("head by head: each row of keys read twice", "a group as rows: read once")
for ax, title in zip(axes, titles):
    ax.set(xlim=(-0.3, 9.3), ylim=(0, 6.4), xticks=[], yticks=[])
    for x, name in ((0.5, "queries"), (3.5, "keys"), (7.5, "scores")):
        ax.text(x, 5.75, name, ha="center", size=9)
    ax.grid(False)
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set_visible(False)
figure.savefig(HERE / "gqa_rows.svg", metadata={"Date": None})

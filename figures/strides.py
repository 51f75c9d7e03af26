"""Draw six numbers in memory and three tables that read them: as `view` cuts them, and
transposed. Writes strides.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COLOURS = ["#b9d3e0", "#f0c9c4"]  # the numbers 0 to 2, and 3 to 5
LINE = "#5f6b73"


def numbers(ax, left, top, table):
    """Write a table's numbers in boxes, and a line through them in memory's order."""
    places = {}
    for r, row in enumerate(table.tolist()):
        for c, number in enumerate(row):
            places[number] = (left + c, top - r)
            corner = (left + c - 0.42, top - r - 0.36)
            colour = COLOURS[number // 3]
            ax.add_patch(plt.Rectangle(corner, 0.84, 0.72, facecolor=colour, zorder=2))
            ax.text(*places[number], number, ha="center", va="center", zorder=4)
    xs, ys = zip(*(places[number] for number in range(6)))
    ax.plot(xs, ys, color=LINE, linewidth=1.2, zorder=1)


memory = torch.arange(6)
turned = memory.view(2, 3).transpose(0, 1)
figure, ax = plt.subplots(figsize=(7.2, 3.3))
numbers(ax, 3, 3.2, memory[None])
ax.text(2.3, 3.2, "memory", ha="right", va="center")
tables = [
    (0.5, "view(3, 2)", memory.view(3, 2)),
    (4.5, "view(2, 3)", memory.view(2, 3)),
    (9.5, "view(2, 3).transpose(0, 1)", turned),
]
for left, title, table in tables:
    middle = left + (table.shape[1] - 1) / 2
    numbers(ax, left, 1, table)
    ax.text(middle, 1.75, title, ha="center", size=9, family="monospace")
    ax.text(middle, -1.95, f"strides {table.stride()}", ha="center", size=9)
ax.set(xlim=(-1, 12.2), ylim=(-2.2, 3.8))
ax.axis("off")
figure.savefig(HERE / "strides.svg", metadata={"Date": None})

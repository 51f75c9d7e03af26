"""Draw the way of three word vectors through two heads: cut, attend, join, project.
Writes heads.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
HEADS, GREY, MIXED = ["#0b63a5", "#d1495b"], "#5f6b73", "#6a4c93"
T, H, h = 3, 2, 2

figure, axes = plt.subplots(figsize=(11, 3.3))


def table(left, top, colours, texts=None):
    """Cells of 0.8 x 0.7: `colours[row][column]`, a word a row."""
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            x, y = left + 0.8 * column, top - 0.7 * row
            axes.add_patch(plt.Rectangle((x, y), 0.74, 0.62, color=colour))
            if texts is not None:
                label = texts[row][column]
                style = {"color": "white", "fontsize": 8, "ha": "center"}
                axes.text(x + 0.37, y + 0.31, label, va="center", **style)


def arrow(x, y, to_x, to_y, colour=GREY):
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4}
    axes.annotate("", xy=(to_x, to_y), xytext=(x, y), arrowprops=style)


middle, tops = 2.6, (4.05, 1.15)  # of a table's first row: all heads, each head
numbers = [[10 * t + i for i in range(H * h)] for t in range(T)]
both = [HEADS[0]] * h + [HEADS[1]] * h

table(0, middle, [both] * T, numbers)
for t in range(T):
    axes.text(-0.2, middle + 0.31 - 0.7 * t, f"word {t}", ha="right", va="center")
for n, (top, colour) in enumerate(zip(tops, HEADS)):
    arrow(3.35, middle - 0.4, 4.35, top - 0.4, colour)
    part = [row[n * h : (n + 1) * h] for row in numbers]
    table(4.5, top, [[colour] * h] * T, part)
    axes.text(5.27, top + 0.8, f"head {n}", ha="center", color=colour)
    arrow(6.25, top - 0.4, 7.15, top - 0.4, colour)
    table(7.3, top, [[colour] * T] * T)
    arrow(9.85, top - 0.4, 10.75, top - 0.4, colour)
    table(10.9, top, [[colour] * h] * T)
    arrow(12.65, top - 0.4, 13.65, middle - 0.4, colour)
table(13.8, middle, [both] * T)
arrow(17.1, middle - 0.4, 18.3, middle - 0.4)
axes.text(17.7, middle - 0.05, "o_proj", ha="center", color=GREY, fontsize=9)
table(18.45, middle, [[MIXED] * H * h] * T)

for x, text in (
    (1.57, "q, and so k, v\n[T, D]"),
    (5.27, "cut\n[H, T, h]"),
    (8.47, "weights\n[H, T, S]"),
    (11.67, "mixed values\n[H, T, h]"),
    (15.37, "side by side\n[T, D]"),
    (20.02, "both heads in each\n[T, D]"),
):
    axes.text(x, -1.25, text, ha="center", color=GREY, fontsize=9)
axes.set(xlim=(-1.6, 21.8), ylim=(-1.4, 5.4), xticks=[], yticks=[])
for spine in axes.spines.values():
    spine.set_visible(False)
figure.savefig(HERE / "heads.svg", metadata={"Date": None})

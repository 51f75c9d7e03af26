"""Draw every weight of the smallest model of the chapter as a square: writes
config_small.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
GREEN, BLUE, ORANGE, GREY = "#2a9d60", "#0b63a5", "#e0a100", "#5f6b73"
V, D, H, K, h, F = 5, 4, 2, 1, 2, 8

figure, axes = plt.subplots(figsize=(11, 2.9))


def table(left, rows, columns, colour):
    """Squares, a weight each; the highest row of all tables is at the top."""
    for row in range(rows):
        for column in range(columns):
            corner = (left + column, -row)
            axes.add_patch(plt.Rectangle(corner, 0.84, -0.84, color=colour))


def matrix(left, name, rows, columns, colour, bias=False):
    """Draw a matrix, with a bias at its right; return where it ends."""
    table(left, rows, columns, colour)
    size = f"{rows} · {columns}"
    if bias:
        table(left + columns + 0.5, rows, 1, colour)
        size += f" + {rows}"
    end = left + columns + (1.5 if bias else 0)
    axes.text((left + end) / 2, 0.4, name, ha="center", fontsize=9)
    axes.text((left + end) / 2, -rows - 0.9, size, ha="center", fontsize=8.5)
    return end


def group(left, right, text, colour):
    axes.plot([left, right], [2.1, 2.1], color=colour, linewidth=2)
    axes.text((left + right) / 2, 2.4, text, ha="center", color=colour)


end = matrix(0, "embedding", V, D, GREEN)
group(0, end, "embedding: 20", GREEN)
start = left = end + 2.5
for name, rows, bias in (("q", H * h, True), ("k", K * h, True), ("v", K * h, True)):
    left = matrix(left, name, rows, D, BLUE, bias) + 1.5
end = matrix(left, "o", D, H * h, BLUE)
group(start, end, "attention: 20 + 10 + 10 + 16 = 56", BLUE)
start = left = end + 2.5
for name, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
    end = matrix(left, name, rows, columns, ORANGE)
    left = end + 1.5
group(start, end, "mlp: 3 · 32 = 96", ORANGE)
start = left = end + 2.5
for _ in range(3):
    table(left, D, 1, GREY)
    end = left + 1
    left = end + 0.8
axes.text((start + end) / 2, -D - 0.9, "3 · 4", ha="center", fontsize=8.5)
group(start, end, "norms: 12", GREY)
axes.set(xlim=(-0.5, end + 1.2), ylim=(-9.4, 3.8))
axes.set_aspect("equal")
axes.axis("off")
figure.savefig(HERE / "config_small.svg", metadata={"Date": None})

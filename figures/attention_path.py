"""Draw how one word, sleep, receives from four: vectors, query, keys, scores, weights,
values, result. Writes attention_path.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from drawing import GREY, arrow

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREEN = "#0b63a5", "#d1495b", "#2a9d60"

words = ["old", "dogs", "sleep", "late"]
x = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 2.0]])
W_q = np.array([[0, 1.5, 1.5, 0], [0, 0, 0, 0.75]])
W_k = np.array([[2.0, 0, 0, 0], [0, 2, 0, 0]])
W_v = np.array([[9.0, 3, 0, 0], [0, 3, 4.5, 4.5]])
query = W_q @ x[2]
keys, values = x @ W_k.T, x @ W_v.T
scores = keys @ query
weights = np.exp(scores) / np.exp(scores).sum()
result = weights @ values

figure, ax = plt.subplots(figsize=(11, 4.4))
SIDE = 0.46


def cells(left, y, numbers, color, digits=1):
    """Draw a row of numbers as cells that begin at `left`."""
    for i, number in enumerate(numbers):
        width = SIDE if digits == 1 else 1.2 * SIDE
        place = (left + i * width, y - SIDE / 2)
        cell = plt.Rectangle(place, width, SIDE, facecolor="white", edgecolor=color)
        ax.add_patch(cell)
        text = f"{number:g}" if digits == 1 else f"{number:.{digits}f}"
        middle = place[0] + width / 2
        ax.text(middle, y, text, ha="center", va="center", fontsize=8, color=color)


rows = [3.6, 2.8, 2.0, 1.2]
X, K, S, W, V = 0.9, 4.0, 5.9, 7.0, 8.3  # where the columns begin
for left, title in (
    (X, "vector x"),
    (K, "key"),
    (S, "score"),
    (W, "weight"),
    (V, "value"),
):
    ax.text(left, 4.1, title, fontsize=9, color=GREY)
for word, y, *parts in zip(words, rows, x, keys, scores, weights, values):
    vector, key, score, weight, value = parts
    ax.text(0.7, y, word, ha="right", va="center", fontsize=10)
    cells(X, y, vector, GREY)
    arrow(ax, (X + 4.2 * SIDE, y), (K - 0.1, y))
    cells(K, y, key, BLUE)
    arrow(ax, (K + 2.2 * SIDE, y), (S - 0.1, y))
    cells(S, y, [score], RED)
    cells(W, y, [weight], RED, digits=2)
    ax.text((W + 1.2 * SIDE + V) / 2, y, "x", ha="center", va="center", fontsize=9)
    cells(V, y, value, GREEN)
    arrow(ax, (V + 2.2 * SIDE, y), (10.2, y), (10.2, 2.4), (10.55, 2.4), style="-")
ax.text(3.5, 3.68, "$W_k$", fontsize=10, color=BLUE, ha="center")
ax.text((K + 2.2 * SIDE + S) / 2, 3.68, "· query", fontsize=8, color=RED, ha="center")
ax.text((S + SIDE + W) / 2, 2.4, "soft-\nmax", fontsize=8, color=RED, ha="center")
arrow(ax, (10.2, 2.4), (10.6, 2.4))
ax.text(10.38, 2.52, "sum", fontsize=8, color=GREEN, ha="center")
cells(10.7, 2.4, result, GREEN, digits=2)
ax.text(10.7, 2.85, "sleep receives", fontsize=9)

arrow(ax, (X + 4.5 * SIDE, 2.0), (X + 4.5 * SIDE, 0.3), (K - 0.1, 0.3))
ax.text(3.5, 0.42, "$W_q$", fontsize=10, color=RED, ha="center")
cells(K, 0.3, query, RED)
ax.text(K, -0.2, "query of sleep", fontsize=9, color=RED)
arrow(ax, (K + 2.2 * SIDE, 0.3), (S + SIDE / 2, 0.3), (S + SIDE / 2, 0.9))
ax.text(V, 0.72, "value = $W_v\\,x$", fontsize=9, color=GREEN)

ax.set(xlim=(-0.2, 12.2), ylim=(-0.4, 4.4), aspect="equal")
ax.axis("off")
figure.savefig(HERE / "attention_path.svg", metadata={"Date": None})

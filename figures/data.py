"""Draw documents, the stream they are laid into, one sequence of it and its mask:
writes data.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

LENGTHS, T = {"A": 5, "B": 3, "C": 7, "D": 4}, 8
COLORS = {"A": "#a9c9e4", "B": "#f0b5bd", "C": "#a8d9bf", "D": "#f3dd9c"}
ORDERS = ["BCDA", "CADB"]  # of two epochs
END = "#2b3640"


def squares(ax, x, y, tokens, width=0.92):
    """One square a token, (document, place); the end token, place 0, is dark."""
    for i, (document, place) in enumerate(tokens):
        color = COLORS[document] if place else END
        ax.add_patch(plt.Rectangle((x + i, y), width, width, facecolor=color))
        ax.text(
            x + i + width / 2,
            y + width / 2,
            f"{document.lower()}{place}" if place else document,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if place == 0 else "black",
        )


stream = [
    (document, place)
    for order in ORDERS
    for document in order
    for place in range(LENGTHS[document])
][: 3 * T + 2]
block = stream[T : 2 * T + 1]
documents = np.cumsum([place == 0 for _, place in block[:T]])
documents -= documents[0]
positions = [
    i - max(j for j in range(i + 1) if j == 0 or documents[j] != documents[j - 1])
    for i in range(T)
]

figure = plt.figure(figsize=(9.5, 5.2))
grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.15], width_ratios=[2.2, 1])
top, left, right = (
    figure.add_subplot(grid[0, :]),
    figure.add_subplot(grid[1, 0]),
    figure.add_subplot(grid[1, 1]),
)

x = 0
for document in LENGTHS:
    squares(top, x, 2.1, [(document, place) for place in range(LENGTHS[document])])
    x += LENGTHS[document] + 1.2
squares(top, 0, 0, stream)
epoch = sum(LENGTHS.values())
for cut in range(0, len(stream), T):
    top.plot([cut - 0.04] * 2, [-0.35, 1.3], color="#d1495b", linewidth=1.6)
top.annotate(
    "",
    (epoch - 0.04, -0.15),
    (epoch - 0.04, -0.8),
    arrowprops={"arrowstyle": "->", "color": END},
)
top.text(
    epoch - 0.4,
    -0.8,
    "the next epoch begins in the same sequence",
    fontsize=8,
    ha="right",
    va="center",
)
top.text(0, 3.25, "documents, each opened by its end token (dark)", fontsize=9)
top.text(0, 1.45, "shuffled, laid end to end, cut every T = 8 tokens (red)", fontsize=9)
top.set(xlim=(-0.2, len(stream) + 0.3), ylim=(-1.2, 3.8))

for y, name in ((3, "tokens"), (2, "targets"), (1, "document"), (0, "position")):
    left.text(-0.4, y + 0.46, name, ha="right", va="center", fontsize=9)
squares(left, 0, 3, block[:T])
squares(left, 0, 2, block[1:])
for i in range(T):
    left.text(i + 0.46, 1.46, str(documents[i]), ha="center", va="center", fontsize=9)
    left.text(i + 0.46, 0.46, str(positions[i]), ha="center", va="center", fontsize=9)
left.set(xlim=(-2.2, T + 0.2), ylim=(-0.2, 4.2))
left.set_title("the second sequence", fontsize=10)

visible = np.tril(documents[:, None] == documents[None])
right.imshow(
    np.where(visible, documents[None] + 1, 0),
    cmap=ListedColormap(["#eef1f3", COLORS["C"], COLORS["D"], COLORS["A"]]),
    vmin=0,
    vmax=3,
)
right.set_xticks(np.arange(T - 1) + 0.5, minor=True)
right.set_yticks(np.arange(T - 1) + 0.5, minor=True)
right.grid(False)
right.grid(which="minor", color="white", linewidth=1.5, alpha=1)
right.tick_params(which="both", length=0)
right.set(xlabel="may be seen", ylabel="token", xticks=[], yticks=[])
right.set_title("its mask", fontsize=10)
for ax in (top, left):
    ax.set_aspect("equal")
    ax.axis("off")
figure.savefig(HERE / "data.svg", metadata={"Date": None})

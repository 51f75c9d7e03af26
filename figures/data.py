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

DOCUMENTS, T = ("the cat sat", "a hat", "in the hat ."), 5  # those of the chapter
COLORS = ("#a9c9e4", "#f0b5bd", "#a8d9bf")
MARK = "#2b3640"


def squares(ax, x, y, tokens, width=0.92):
    """One square a token, (number of its document, word); the mark is dark."""
    for i, (document, word) in enumerate(tokens):
        mark = word == "|"
        color = MARK if mark else COLORS[document]
        ax.add_patch(plt.Rectangle((x + i, y), width, width, facecolor=color))
        ax.text(
            x + i + width / 2,
            y + width / 2,
            word,
            ha="center",
            va="center",
            fontsize=10,
            color="white" if mark else "black",
        )


documents = []
for number, text in enumerate(DOCUMENTS):
    documents.append([(number, word) for word in ["|", *text.split()]])
stream = [token for document in documents for token in document]
block = stream[T : 2 * T + 1]
numbers = np.array([number for number, _ in block[:T]])

figure = plt.figure(figsize=(9.5, 5.6))
grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1], width_ratios=[2, 1])
top, left, right = (
    figure.add_subplot(grid[0, :]),
    figure.add_subplot(grid[1, 0]),
    figure.add_subplot(grid[1, 1]),
)

x = 0
for document in documents:
    squares(top, x, 2.0, document)
    x += len(document) + 0.6
squares(top, 0, 0, stream)
for cut in range(0, len(stream), T):
    top.plot([cut - 0.04] * 2, [-0.25, 1.17], color="#d1495b", linewidth=2)
top.text(0, 3.1, "documents, each opened by its mark (dark)", fontsize=10)
top.text(0, 1.25, f"laid end to end, cut every T = {T} tokens (red)", fontsize=10)
top.set(xlim=(-0.2, x), ylim=(-0.4, 3.6))

for y, name in ((2, "tokens"), (1, "targets"), (0, "document")):
    left.text(-0.3, y + 0.46, name, ha="right", va="center", fontsize=10)
squares(left, 0, 2, block[:T])
squares(left, 0, 1, block[1:])
for i in range(T):
    left.text(i + 0.46, 0.46, str(numbers[i]), ha="center", va="center", fontsize=10)
left.set(xlim=(-1.8, T + 0.2), ylim=(-0.1, 3.1))
left.set_title("the second sequence", fontsize=11)

visible = np.tril(numbers[:, None] == numbers[None])
right.imshow(
    np.where(visible, numbers[None], 0),
    cmap=ListedColormap(["#eef1f3", *COLORS[1:]]),
    vmin=0,
    vmax=2,
)
words = [word for _, word in block[:T]]
right.set_xticks(range(T), words)
right.set_yticks(range(T), words)
right.set_xticks(np.arange(T - 1) + 0.5, minor=True)
right.set_yticks(np.arange(T - 1) + 0.5, minor=True)
right.grid(False)
right.grid(which="minor", color="white", linewidth=1.5, alpha=1)
right.tick_params(which="both", length=0)
right.set(xlabel="may be seen", ylabel="token")
right.set_title("its mask", fontsize=11)
for ax in (top, left):
    ax.set_aspect("equal")
    ax.axis("off")
figure.savefig(HERE / "data.svg", metadata={"Date": None})

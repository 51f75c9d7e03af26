"""Draw a causal mask of two queries and five keys, aligned at the lower right and at
the top left: writes mask_corner.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
WORDS = ["old", "dogs", "sleep", "late", "today"]
blue, red, pale = "#0b63a5", "#d1495b", "#e8edf1"

figure, (right, left) = plt.subplots(1, 2, figsize=(9.5, 2.0))
for axes, shift, colour, title in (
    (right, 3, blue, "lower right: each sees itself and all before"),
    (left, 0, red, "top left: nearly everything is hidden"),
):
    for query in range(2):
        for key in range(5):
            seen = key <= query + shift
            face = colour if seen else pale
            cell = plt.Rectangle((key, 1 - query), 0.92, 0.92, facecolor=face)
            axes.add_patch(cell)
        axes.text(-0.2, 1.46 - query, WORDS[query + 3], ha="right", va="center")
    for key, word in enumerate(WORDS):
        axes.text(key + 0.46, -0.3, word, ha="center", va="center")
    axes.text(1.46, 2.15, "held before", ha="center", fontsize=8)
    axes.text(3.96, 2.15, "new", ha="center", fontsize=8)
    axes.plot([2.96, 2.96], [-0.05, 2.4], color="black", linewidth=1.2, linestyle="--")
    axes.set_title(title, fontsize=10)
    axes.set(xlim=(-1.1, 5.1), ylim=(-0.6, 2.5))
    axes.axis("off")
figure.savefig(HERE / "mask_corner.svg", metadata={"Date": None})

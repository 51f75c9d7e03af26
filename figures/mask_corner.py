"""Draw a causal mask of three queries and eight keys, aligned at the lower right and at
the top left: writes mask_corner.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, pale = "#0b63a5", "#d1495b", "#e8edf1"

figure, (right, left) = plt.subplots(1, 2, figsize=(9.5, 2.4))
for axes, shift, colour, title in (
    (right, 5, blue, "lower right: each sees itself and all before"),
    (left, 0, red, "top left: nearly everything is hidden"),
):
    for query in range(3):
        for key in range(8):
            seen = key <= query + shift
            face = colour if seen else pale
            cell = plt.Rectangle((key, 2 - query), 0.92, 0.92, facecolor=face)
            axes.add_patch(cell)
        axes.text(-0.2, 2.46 - query, f"query {query + 5}", ha="right", va="center")
    for key in range(8):
        axes.text(key + 0.46, -0.4, str(key), ha="center", va="center")
    axes.text(-0.2, -0.4, "key", ha="right", va="center")
    axes.plot([4.96, 4.96], [-0.05, 3.0], color="black", linewidth=1.2, linestyle="--")
    axes.set_title(title, fontsize=10)
    axes.set(xlim=(-1.8, 8.1), ylim=(-0.8, 3.1), aspect="equal")
    axes.axis("off")
figure.savefig(HERE / "mask_corner.svg", metadata={"Date": None})

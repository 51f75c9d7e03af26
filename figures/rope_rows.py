"""Draw where each row of a query or key matrix goes when interleaved pairs become
half-split ones: writes rope_rows.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
colours = ["#0b63a5", "#d1495b", "#2a9d60", "#e0a100"]

figure, axes = plt.subplots(figsize=(7.5, 2.7))


def box(place, y, row):
    """Row number `row` of the matrix at a place: its colour is its pair."""
    axes.add_patch(plt.Rectangle((place, y), 0.9, 0.55, color=colours[row // 2]))
    middle = {"ha": "center", "va": "center", "color": "white", "fontsize": 10}
    axes.text(place + 0.45, y + 0.27, str(row), **middle)


for row in range(8):
    target = row // 2 + 4 * (row % 2)  # 2i goes to i, 2i + 1 to i + 4
    box(row, 2.0, row)
    box(target, 0.0, row)
    line = {"color": colours[row // 2], "linewidth": 1.5}
    axes.plot([row + 0.45, target + 0.45], [1.95, 0.6], **line)
axes.text(-0.2, 2.27, "interleaved", ha="right", va="center", fontsize=10)
axes.text(-0.2, 0.27, "half-split", ha="right", va="center", fontsize=10)
axes.text(2.0, -0.3, "first half", ha="center", va="center", fontsize=9)
axes.text(6.0, -0.3, "second half", ha="center", va="center", fontsize=9)
axes.set(xlim=(-2.2, 8.1), ylim=(-0.5, 2.7))
axes.axis("off")
figure.savefig(HERE / "rope_rows.svg", metadata={"Date": None})

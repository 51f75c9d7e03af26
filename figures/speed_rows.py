"""Draw what one row and four rows read of the weights, and of their caches: writes
speed_rows.svg here.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED = "#0b63a5", "#d1495b"

figure, ax = plt.subplots(figsize=(8.6, 3.1))
ax.set(xlim=(0, 17.6), ylim=(-1.7, 4.9), aspect="equal")
ax.axis("off")


def rows(x: float, count: int) -> None:
    """Draw the vectors of so many rows, one below the other."""
    for i in range(count):
        box(ax, x, 2.5 - 0.75 * i, "", 1.4, 0.45, face=RED)


def caption(x: float, title: str, read: str, intensity: str) -> None:
    """Write a title above and two lines below."""
    ax.text(x, 4.4, title, ha="center", fontsize=11)
    ax.text(x, -0.75, read, ha="center", fontsize=9.5, color=BLUE)
    ax.text(x, -1.45, intensity, ha="center", fontsize=9.5, color=GREY)


rows(0.2, 1)
arrow(ax, (1.8, 2.72), (2.4, 2.2))
box(ax, 2.5, 0, "weights", 2.6, 3.2, face=BLUE, ink="white", fontsize=11)
caption(2.7, "one row", "read once", "1 operation a byte")
rows(6.2, 4)
for i in range(4):
    arrow(ax, (7.8, 2.72 - 0.75 * i), (8.4, 2.2 - 0.4 * i))
box(ax, 8.5, 0, "weights", 2.6, 3.2, face=BLUE, ink="white", fontsize=11)
caption(8.7, "four rows", "read once for all", "4 operations a byte")
rows(12.4, 4)
for i in range(4):
    y = 2.72 - 0.75 * i
    arrow(ax, (14.0, y), (14.6, y))
    box(ax, 14.7, y - 0.27, "its cache", 2.5, 0.54, face=BLUE, ink="white")
caption(
    14.9, "four rows, attention", "each reads its own", "operations a byte: as with one"
)
figure.savefig(HERE / "speed_rows.svg", metadata={"Date": None})

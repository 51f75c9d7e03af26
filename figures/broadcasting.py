"""Draw a column plus a row, each repeated to a square. Writes broadcasting.svg beside
this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

COLUMN = [0, 10, 20]
ROW = [1, 2, 3]
SOLID, COPY, SUM = "#b9d3e0", "#f0f2f4", "#f0c9c4"


def box(ax, x, y, number, face, ink="black"):
    corner = (x - 0.44, y - 0.38)
    ax.add_patch(plt.Rectangle(corner, 0.88, 0.76, facecolor=face))
    ax.text(x, y, number, ha="center", va="center", color=ink)


figure, ax = plt.subplots(figsize=(7.2, 2.3))
for r, ten in enumerate(COLUMN):
    for c, one in enumerate(ROW):
        copies = ((COPY, "0.5"), (SOLID, "black"))
        box(ax, c, -r, ten, *copies[c == 0])
        box(ax, 4.4 + c, -r, one, *copies[r == 0])
        box(ax, 8.8 + c, -r, ten + one, SUM)
for x, sign in ((3.2, "+"), (7.6, "=")):
    ax.text(x, -1, sign, ha="center", va="center", size=16)
titles = ("[3, 1], repeated to the right", "[3], repeated downwards", "[3, 3]")
for x, title in zip((1, 5.4, 9.8), titles):
    ax.text(x, 0.75, title, ha="center", size=9)
ax.set(xlim=(-0.6, 11.4), ylim=(-2.5, 1.1))
ax.axis("off")
figure.savefig(HERE / "broadcasting.svg", metadata={"Date": None})

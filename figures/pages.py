"""Draw two conversations that share a page: writes pages.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
ONE, TWO, BOTH, FREE = "#cfe3f3", "#f6d3d7", "#d9ead7", "#f3f4f5"
PAGES = [
    ("abcd", BOTH, "two holders"),
    ("efxx", ONE, "one holder"),
    ("efy", TWO, "one holder; e and f were copied"),
    ("", FREE, "free"),
]

figure, ax = plt.subplots(figsize=(8.6, 3.4))
ax.set(xlim=(0, 11.2), ylim=(-0.1, 4.9))
ax.axis("off")
ax.text(0.1, 4.5, "tables", fontsize=10, weight="bold")
ax.text(5.2, 4.5, "memory: pages of four places", fontsize=10, weight="bold")
for number, (tokens, face, holders) in enumerate(PAGES):
    y = 3.3 - 1.05 * number
    ax.text(5.05, y + 0.35, f"page {number}", ha="right", va="center", fontsize=9)
    for place in range(4):
        token = tokens[place : place + 1]
        box(ax, 5.2 + 0.72 * place, y, token, 0.62, face=face, fontsize=11)
    ax.text(8.2, y + 0.35, holders, va="center", fontsize=9, color=GREY)
for name, y, pages, face in (("one", 3.0, (0, 1), ONE), ("two", 1.0, (0, 2), TWO)):
    ax.text(0.1, y + 0.35, name, va="center", fontsize=10)
    for i, page in enumerate(pages):
        shade = BOTH if page == 0 else face
        box(ax, 0.9 + 0.8 * i, y, str(page), 0.7, face=shade, fontsize=11)
arrow(ax, (1.25, 3.75), (1.25, 3.95), (4.0, 3.95), (4.25, 3.78))
arrow(ax, (2.45, 3.35), (4.25, 2.7))
arrow(ax, (1.25, 1.75), (1.25, 2.1), (3.6, 3.2), (4.25, 3.5))
arrow(ax, (2.45, 1.35), (4.25, 1.5))
figure.savefig(HERE / "pages.svg", metadata={"Date": None})

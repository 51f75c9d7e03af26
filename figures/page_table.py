"""Draw a table and the pages that it names: writes page_table.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
TABLE, SIZE, TEXT = [12, 5, 3], 4, "abcdefghij"
FACES = ["#cfe3f3", "#d9ead7", "#f6d3d7"]
EMPTY = "#f3f4f5"

figure, ax = plt.subplots(figsize=(9.2, 3.1))
ax.set(xlim=(0, 14.2), ylim=(-0.2, 4.4))
ax.axis("off")
ax.text(0, 4.05, "text", fontsize=10, weight="bold")
ax.text(5.6, 4.05, "table", fontsize=10, weight="bold")
for i, (page, face) in enumerate(zip(TABLE, FACES)):
    for place, letter in enumerate(TEXT[i * SIZE : (i + 1) * SIZE]):
        box(ax, 0.4 * (i * SIZE + place), 3.2, letter, 0.34, 0.6, face, fontsize=10)
    box(ax, 5.6 + 0.8 * i, 3.2, str(page), 0.7, 0.6, face=face, fontsize=10)
ax.text(8.2, 3.5, "the pages in the order of the text", va="center", color=GREY)
ax.text(0, 2.3, "memory: sixteen pages of four places", fontsize=10, weight="bold")
for page in range(16):
    x, y = 1.78 * (page % 8), 1.3 - 1.35 * (page // 8)
    ax.text(x, y + 0.62, f"page {page}", fontsize=8, color=GREY)
    for place in range(SIZE):
        letter, face = "", EMPTY
        if page in TABLE:
            first = TABLE.index(page) * SIZE
            letter, face = TEXT[first + place : first + place + 1], FACES[first // SIZE]
        box(ax, x + 0.4 * place, y, letter, 0.34, 0.5, face=face, fontsize=10)
figure.savefig(HERE / "page_table.svg", metadata={"Date": None})

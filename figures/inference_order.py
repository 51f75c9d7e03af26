"""Draw what a register of two numbers holds if a matrix is stored row after row, and as
a strip: writes inference_order.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED = "#0b63a5", "#d1495b"

figure, ax = plt.subplots(figsize=(8.4, 3.1))
ax.set(xlim=(-3.2, 9.6), ylim=(-1.0, 4.6))
ax.axis("off")


def memory(y, title, numbers, result):
    """Draw eight numbers (number, row), and a frame around every two."""
    ax.text(-0.3, y + 0.35, title, ha="right", va="center", fontsize=10)
    for i, (number, row) in enumerate(numbers):
        x = i * 1.2
        face = BLUE if row == 0 else RED
        box(ax, x, y, str(number), 0.8, 0.7, face, "white", fontsize=11)
        if i % 2 == 0:
            frame = plt.Rectangle((x - 0.14, y - 0.18), 2.28, 1.06)
            frame.set(fill=False, edgecolor=GREY, linewidth=1.6)
            ax.add_patch(frame)
            ax.text(x + 1.0, y + 1.0, "register", ha="center", fontsize=8, color=GREY)
    ax.text(4.6, y - 0.55, result, ha="center", fontsize=9.5, color=GREY)


ax.text(4.6, 4.4, "blue: row 0, red: row 1", ha="center", fontsize=9.5)
rows = [(3, 0), (1, 0), (4, 0), (1, 0), (5, 1), (9, 1), (2, 1), (6, 1)]
strip = [number for pair in zip(rows[:4], rows[4:]) for number in pair]
memory(3.0, "row after row", rows, "two sums of one row: they must be added")
memory(0.4, "as a strip", strip, "one sum of each row: two results")
figure.savefig(HERE / "inference_order.svg", metadata={"Date": None})

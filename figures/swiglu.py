"""Draw the wiring of two feed-forward layers, with the numbers that flow through them:
writes swiglu.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREEN = "#0b63a5", "#d1495b", "#2a9d60"
WIDTH, HEIGHT = 1.4, 0.5

figure, ax = plt.subplots(figsize=(7.2, 3.5))


def box(x, y, text, colour):
    """Draw a matrix or a function; (x, y) is the middle of the left edge."""
    corner = (x, y - HEIGHT / 2)
    ax.add_patch(plt.Rectangle(corner, WIDTH, HEIGHT, facecolor=colour))
    ax.text(x + WIDTH / 2, y, text, ha="center", va="center", color="white", size=9)


def arrow(start, end, numbers=""):
    style = {"arrowstyle": "->", "color": "#444444", "lw": 1.2}
    ax.annotate("", end, start, arrowprops=style)
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    ax.text(x, y + 0.1, numbers, ha="center", va="bottom", size=9)


ax.text(0, 4.55, "MLP: two matrices", fontsize=10)
box(1.2, 3.75, "up", BLUE)
box(4.3, 3.75, "ReLU", GREEN)
box(7.4, 3.75, "down", BLUE)
arrow((0, 3.75), (1.2, 3.75), "3, 2")
arrow((2.6, 3.75), (4.3, 3.75), "3, 2, -1")
arrow((5.7, 3.75), (7.4, 3.75), "3, 2, 0")
arrow((8.8, 3.75), (9.8, 3.75), "6")

ax.text(0, 2.75, "SwiGLU: three matrices, one of them a gate", fontsize=10)
box(1.2, 1.9, "gate", RED)
box(1.2, 0.5, "up", BLUE)
box(4.3, 1.9, "SiLU", GREEN)
box(9.2, 1.2, "down", BLUE)
ax.text(7.4, 1.2, "×", ha="center", va="center", fontsize=16)
ax.text(0.1, 1.2, "3, 2", ha="center", va="center", size=9)
arrow((0.4, 1.35), (1.2, 1.9))
arrow((0.4, 1.05), (1.2, 0.5))
arrow((2.6, 1.9), (4.3, 1.9), "3, -3")
arrow((5.7, 1.9), (7.2, 1.35))
ax.text(6.4, 1.85, "2.86, -0.14", ha="left", va="bottom", size=9)
arrow((2.6, 0.5), (7.2, 1.05))
ax.text(4.9, 0.5, "2, 2", ha="left", va="center", size=9)
arrow((7.6, 1.2), (9.2, 1.2), "5.72, -0.28")
arrow((10.6, 1.2), (11.6, 1.2), "6, 0")
ax.set(xlim=(-0.3, 11.9), ylim=(0, 5))
ax.axis("off")
figure.savefig(HERE / "swiglu.svg", metadata={"Date": None})

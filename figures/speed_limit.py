"""Draw reading and calculating at the same time, one after the other, and a measured
step with a gap: writes speed_limit.svg here.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREY = "#0b63a5", "#d1495b", "#5f6b73"
READ, CALCULATE, REST = 3.0, 1.4, 3.6

figure, ax = plt.subplots(figsize=(7.2, 2.7))
ax.set(xlim=(-3.1, 8.4), ylim=(-1.0, 4.3))
ax.axis("off")


def bar(left: float, y: float, width: float, height: float, color: str, text: str):
    """Draw a span of time with a word in it."""
    ax.barh(y, width, height, left=left, color=color)
    ax.text(left + width / 2, y, text, ha="center", va="center", color="white")


ax.text(-3, 3.2, "at best:\nat the same time", va="center")
bar(0, 3.45, READ, 0.46, BLUE, "read")
bar(0, 2.95, CALCULATE, 0.46, RED, "calculate")
ax.text(-3, 1.6, "at worst:\none after the other", va="center")
bar(0, 1.6, READ, 0.7, BLUE, "read")
bar(READ, 1.6, CALCULATE, 0.7, RED, "calculate")
ax.text(-3, 0, "measured", va="center")
bar(0, 0, READ + CALCULATE, 0.7, GREY, "read, calculate")
bar(READ + CALCULATE, 0, REST, 0.7, "#b9c1c6", "something else")
for x, top, text in ((READ, 3.8, "the limit"), (2 * READ, 2.2, "twice the limit")):
    ax.plot([x, x], [-0.6, top], color="black", linestyle=":", linewidth=1.2, zorder=0)
    ax.text(x, top + 0.08, text, ha="center", va="bottom")
ax.annotate("", (8.2, -0.75), (0, -0.75), arrowprops={"arrowstyle": "-|>"})
ax.text(8.2, -0.85, "time", ha="right", va="top", color=GREY)
figure.savefig(HERE / "speed_limit.svg", metadata={"Date": None})

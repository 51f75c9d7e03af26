"""Draw which thread works when two requests come, without an engine and with one:
writes serving_threads.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, AMBER, PALE, GREY = "#0b63a5", "#e0a100", "#e9edf0", "#5f6b73"
LONG, SHORT = DARK, AMBER

figure, axes = plt.subplots(figsize=(10, 3.1))


def lane(y, name):
    axes.barh(y, 20, height=0.5, color=PALE)
    axes.text(-0.3, y, name, ha="right", va="center", fontsize=9)


def piece(y, start, length, color, height=0.5):
    axes.barh(y, length, left=start, height=height, color=color, edgecolor="white")


def mark(x, y, text):
    axes.annotate(
        text,
        (x, y + 0.25),
        (x, y + 0.62),
        ha="center",
        fontsize=8.5,
        color=GREY,
        arrowprops={"arrowstyle": "-|>", "color": GREY},
    )


lane(3.3, "the only thread")
piece(3.3, 0.4, 14, LONG)
piece(3.3, 14.6, 2, SHORT)
axes.text(7.4, 3.3, "the long answer is computed", color="w", ha="center", va="center")
axes.text(15.6, 3.3, "short", ha="center", va="center", fontsize=8.5)
mark(2, 3.3, "the short request arrives")
mark(16.6, 3.3, "and is answered")

lane(1.6, "event loop")
lane(0.8, "engine's thread")
for step in range(14):
    start = 0.6 + 1.3 * step
    rows = [LONG, SHORT] if step in (2, 3) else [LONG]
    for row, color in enumerate(rows):
        height = 0.5 / len(rows)
        y = 0.8 + (0.125 - 0.25 * row) * (len(rows) == 2)
        piece(y, start, 1.2, color, height)
        piece(1.6, start + 1.2 + 0.16 * row, 0.14, color)
axes.text(19.2, 0.8, "…", ha="center", va="center")
mark(2, 1.6, "the short request arrives")
mark(5.9, 1.6, "and is answered")
axes.text(12, 2.15, "each thin line: a piece is sent", fontsize=8.5, color=GREY)
axes.set(xlim=(-0.2, 20.2), ylim=(0.4, 4.2))
axes.axis("off")
figure.savefig(HERE / "serving_threads.svg", metadata={"Date": None})

"""Draw averages that go back by number, by name, and to other processes: writes
checkpoint_names.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREY = "#0b63a5", "#d1495b", "#5f6b73"
PALE, TINT = "#e9edf0", "#cfe1f0"
SAVED = [("embedding", "0.1"), ("norm", "0.2"), ("head", "0.3")]
TODAY = ["embedding", "head", "norm"]


def connect(ax, start, end, color):
    shape = {"arrowstyle": "-|>", "color": color, "linewidth": 1.6}
    ax.annotate("", end, start, arrowprops={**shape, "shrinkA": 2, "shrinkB": 2})


figure, axes = plt.subplots(1, 3, figsize=(10.4, 2.9), width_ratios=(1, 1, 1.1))
titles = "by number", "by name", "five rows: two wrote, three read"
for ax, title in zip(axes, titles):
    ax.set(xlim=(-0.1, 6.3), ylim=(-0.25, 4.1))
    ax.axis("off")
    ax.set_title(title, fontsize=10)

for ax, by_name in zip(axes[:2], (False, True)):
    ax.text(1.2, 3.7, "in the file", ha="center", fontsize=9, color=GREY)
    ax.text(5.1, 3.7, "today", ha="center", fontsize=9, color=GREY)
    for place, (name, average) in enumerate(SAVED):
        y = 2.6 - 1.25 * place
        words = f"{name} {average}" if by_name else f"number {place}: {average}"
        box(ax, 0, y, words, 2.4, face=TINT)
        box(ax, 4.1, y, TODAY[place], 2.0)
        goal = TODAY.index(name) if by_name else place
        right = by_name or TODAY[place] == name
        end = 2.6 - 1.25 * goal + 0.35
        connect(ax, (2.45, y + 0.35), (4.05, end), BLUE if right else RED)

ax = axes[2]
files = [(0, 3), (3, 5)]
readers = [(0, 2), (2, 4), (4, 5)]
for number, (first, last) in enumerate(files):
    y = 2.35 - 1.7 * number
    words = f"file {number}: head\nrows {first} to {last - 1}"
    box(ax, 0, y, words, 2.4, 0.95, face=TINT)
    for place, (low, high) in enumerate(readers):
        if max(first, low) < min(last, high):
            end = 2.6 - 1.25 * place + 0.35
            connect(ax, (2.45, y + 0.48), (3.75, end), BLUE)
for place, (first, last) in enumerate(readers):
    rows = f"rows {first}, {last - 1}" if last - first > 1 else f"row {first}"
    box(ax, 3.8, 2.6 - 1.25 * place, f"reader {place}: {rows}", 2.4)
figure.savefig(HERE / "checkpoint_names.svg", metadata={"Date": None})

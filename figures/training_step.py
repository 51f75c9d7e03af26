"""Draw one training step, in one piece and in two micro-batches, with what each keeps
in memory below it: writes training_step.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, MIDDLE, PALE, GREEN, RED = "#0b63a5", "#a9c9e4", "#e9edf0", "#2a9d60", "#c8553d"
COLORS = {"forward": MIDDLE, "backward": DARK, "step": GREEN, "clear": PALE}

whole = [("forward", 2), ("backward", 4), ("step", 1), ("clear", 1)]
pieces = [
    ("forward", 1),
    ("backward", 2),
    ("forward", 1),
    ("backward", 2),
    ("step", 1),
    ("clear", 1),
]

figure, axes = plt.subplots(figsize=(9.5, 4.6))


def lane(y, phases, label):
    axes.text(-0.2, y, label, ha="right", va="center", weight="bold")
    start = 0
    for name, length in phases:
        axes.barh(y, length, 0.6, start, color=COLORS[name], edgecolor="white")
        ink = "white" if COLORS[name] in (DARK, GREEN) else "black"
        axes.text(start + length / 2, y, name, ha="center", va="center", color=ink)
        start += length


def memory(y, label, times, heights, color):
    """Fill the area below the heights, each at its time, on the base line y."""
    axes.text(-0.2, y + 0.3, label, ha="right", va="center")
    axes.plot([0, 8], [y, y], color="black", linewidth=0.6)
    axes.fill_between(times, y, [y + height for height in heights], color=color)


def note(x, y, text, ink="black", ha="center"):
    axes.text(x, y, text, fontsize=9, ha=ha, va="center", color=ink)


kept, gradient = "results of forward,\nkept for backward", "gradient"

lane(6.45, whole, "in one piece")
memory(4.8, kept, [0, 2, 6], [0, 0.9, 0], RED)
note(2.1, 5.87, "peak", ha="left")
memory(3.9, gradient, [2, 6, 7, 7], [0, 0.6, 0.6, 0], MIDDLE)

lane(2.4, pieces, "in two micro-batches")
memory(1.0, kept, [0, 1, 3, 4, 6], [0, 0.45, 0, 0.45, 0], RED)
note(1.25, 1.5, "half the peak", ha="left")
note(4.25, 1.5, "half the peak", ha="left")
times, heights = [1, 3, 4, 6, 7, 7], [0, 0.3, 0.3, 0.6, 0.6, 0]
memory(0.1, gradient, times, heights, MIDDLE)
note(3.5, 0.21, "of the first")
note(6.5, 0.35, "the sum")

axes.set(xlim=(-0.1, 8.1), ylim=(-0.1, 6.95), xticks=[], yticks=[], xlabel="time")
axes.grid(False)
axes.spines["left"].set_visible(False)
figure.savefig(HERE / "training_step.svg", metadata={"Date": None})

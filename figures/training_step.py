"""Draw one training step, plain and in two micro-batches, with the gradient buffer
below: writes training_step.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, MIDDLE, PALE, GREY = "#0b63a5", "#a9c9e4", "#e9edf0", "#5f6b73"
COLORS = {"forward": MIDDLE, "backward": DARK, "step": "#2a9d60"}

plain = [("forward", 2), ("backward", 4), ("step", 1), ("clear", 1)]
pieces = [
    ("forward", 1),
    ("backward", 2),
    ("forward", 1),
    ("backward", 2),
    ("step", 1),
    ("clear", 1),
]

figure, axes = plt.subplots(figsize=(9.5, 3.2))


def lane(y, phases, label):
    axes.text(-0.2, y, label, ha="right", va="center")
    start = 0
    for name, length in phases:
        color = COLORS.get(name, PALE)
        axes.barh(y, length, left=start, height=0.6, color=color, edgecolor="white")
        dark = color in (DARK, "#2a9d60")
        axes.text(
            start + length / 2,
            y,
            name,
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if dark else "black",
        )
        start += length


lane(2, plain, "in one piece")
lane(1, pieces, "in two micro-batches")
time = [0, 1, 3, 4, 6, 7, 7, 8]
filled = [0, 0, 0.35, 0.35, 0.7, 0.7, 0, 0]
axes.fill_between(time, [-0.35 + f for f in filled], -0.35, color=DARK, alpha=0.35)
axes.text(-0.2, -0.1, "gradient meanwhile", ha="right", va="center")
axes.text(3.5, -0.18, "the first's", fontsize=8, ha="center", va="center")
axes.text(6.5, -0.05, "the sum", fontsize=8, ha="center", va="center")
axes.annotate(
    "next batch",
    (8.15, 2),
    (9.6, 2),
    va="center",
    ha="center",
    color=GREY,
    arrowprops={"arrowstyle": "<-", "color": GREY},
)
axes.set(xlim=(-0.1, 10.2), ylim=(-0.5, 2.6), xticks=[], yticks=[], xlabel="time")
axes.grid(False)
axes.spines["left"].set_visible(False)
figure.savefig(HERE / "training_step.svg", metadata={"Date": None})

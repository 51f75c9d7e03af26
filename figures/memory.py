"""Draw what a weight costs in training, and what a block keeps for the backward pass in
three modes: writes memory.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
# weights, gradients, moments, activations: as in the chapter's plots
BLUE, GREEN, RED, ORANGE = "#0b63a5", "#2a9d60", "#d1495b", "#e0a100"
PALE, GREY = "#e9edf0", "#5f6b73"

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[1, 1.55])

rows = [
    ("bf16", [("weight", 4), ("gradient", 4), ("moment", 4), ("moment", 4)]),
    ("bf16-pure", [("w", 2), ("g", 2), ("m", 2), ("m", 2)]),
]
for y, (name, parts) in zip((1, 0), rows):
    start = 0
    for i, (label, size) in enumerate(parts):
        left.barh(
            y,
            size,
            left=start,
            height=0.55,
            color=(BLUE, GREEN, RED, RED)[i],
            edgecolor="white",
            linewidth=2,
        )
        left.text(
            start + size / 2,
            y,
            label,
            ha="center",
            va="center",
            fontsize=8.5,
            color="white",
        )
        start += size
    left.text(-0.3, y, name, ha="right", va="center", fontsize=10)
left.set(
    xlim=(0, 16.3),
    ylim=(-0.6, 1.6),
    xticks=[0, 4, 8, 12, 16],
    yticks=[],
    xlabel="bytes a weight",
    title="held after a backward pass",
)
left.grid(False)
left.spines["left"].set_visible(False)

modes = [
    ("none", "everything is kept"),
    ("selective", "results of the big products are kept"),
    ("full", "each block's input is kept"),
]
for y, (mode, text) in zip((2, 1, 0), modes):
    right.text(-0.25, y, mode, ha="right", va="center", fontsize=10)
    for i in range(6):
        again = mode != "none" and i == 4
        height = {"none": 0.6, "selective": 0.28, "full": 0.06}[mode]
        height = 0.6 if again else 0 if i > 4 else height
        right.bar(i + 0.45, 0.6, width=0.8, bottom=y - 0.3, color=PALE)
        right.bar(
            i + 0.45,
            height,
            width=0.8,
            bottom=y - 0.3,
            color="#f6e3b3" if again else ORANGE,
            edgecolor=ORANGE if again else "none",
            hatch="///" if again else None,
        )
    right.text(6.15, y, text, va="center", fontsize=8.5, color=GREY)
right.annotate(
    "", (3.6, 2.5), (5.9, 2.5), arrowprops={"arrowstyle": "-|>", "color": GREY}
)
right.text(6.15, 2.5, "backward pass", va="center", fontsize=8.5, color=GREY)
right.text(
    4.45,
    -0.5,
    "computed again",
    ha="center",
    va="center",
    fontsize=8.5,
    color="#8a6300",
)
right.set(
    xlim=(-0.1, 9.4),
    ylim=(-0.65, 2.7),
    title="held by six blocks, the sixth of them done",
)
right.axis("off")
figure.savefig(HERE / "memory.svg", metadata={"Date": None})

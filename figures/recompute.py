"""Draw what six blocks keep for the backward pass in three modes: writes recompute.svg
beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
ORANGE, PALE, GREY = "#e0a100", "#e9edf0", "#5f6b73"

figure, axes = plt.subplots(figsize=(7, 3.2))
modes = [
    ("none", "everything is kept"),
    ("selective", "results of the big products are kept"),
    ("full", "each block's input is kept"),
]
for y, (mode, text) in zip((2, 1, 0), modes):
    axes.text(-0.25, y, mode, ha="right", va="center", fontsize=10)
    for i in range(6):
        again = mode != "none" and i == 4
        height = {"none": 0.6, "selective": 0.28, "full": 0.06}[mode]
        height = 0.6 if again else 0 if i > 4 else height
        axes.bar(i + 0.45, 0.6, width=0.8, bottom=y - 0.3, color=PALE)
        axes.bar(
            i + 0.45,
            height,
            width=0.8,
            bottom=y - 0.3,
            color="#f6e3b3" if again else ORANGE,
            edgecolor=ORANGE if again else "none",
            hatch="///" if again else None,
        )
    axes.text(6.15, y, text, va="center", fontsize=8.5, color=GREY)
axes.annotate(
    "", (3.6, 2.5), (5.9, 2.5), arrowprops={"arrowstyle": "-|>", "color": GREY}
)
axes.text(6.15, 2.5, "backward pass", va="center", fontsize=8.5, color=GREY)
axes.text(
    4.45,
    -0.5,
    "computed again",
    ha="center",
    va="center",
    fontsize=8.5,
    color="#8a6300",
)
axes.set(
    xlim=(-0.1, 9.4),
    ylim=(-0.65, 2.7),
    title="held by six blocks, the sixth of them done",
)
axes.axis("off")
figure.savefig(HERE / "recompute.svg", metadata={"Date": None})

"""Draw one optimizer step on two processes into pretraining.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COLOURS = [
    ["#0b63a5", "#7fb0d8"],
    ["#d1495b", "#eba9b2"],
]  # by process, then by micro-batch

figure, ax = plt.subplots(figsize=(9.5, 4.3))
ax.set(xlim=(0, 12), ylim=(-0.3, 5.2))
ax.axis("off")
ax.grid(False)


for process, y in ((0, 3.9), (1, 2.2)):
    ax.text(0.05, y + 0.35, f"process {process}", va="center", fontsize=10)
    for i in range(2):
        box(
            ax,
            1.3 + 2.0 * i,
            y,
            f"micro-batch {i + 1}",
            1.6,
            face=COLOURS[process][i],
            ink="white" if i == 0 else "black",
        )
    arrow(ax, (2.95, y + 0.35), (3.25, y + 0.35))
    arrow(ax, (4.95, y + 0.35), (5.25, y + 0.35))
    box(ax, 5.3, y, "summed\ngradient", 1.35)
    arrow(ax, (6.7, y + 0.35), (8.05, y + 0.35))
    box(ax, 8.1, y, "clip", 0.9)
    arrow(ax, (9.05, y + 0.35), (9.35, y + 0.35))
    box(ax, 9.4, y, "step", 0.9)
    arrow(ax, (10.35, y + 0.35), (10.65, y + 0.35))
    box(ax, 10.7, y, "same\nweights", 1.15)
arrow(ax, (7.35, 2.6), (7.35, 4.2), style="<|-|>")
ax.text(7.25, 3.4, "all-reduce:\nadd, once", ha="right", va="center", fontsize=9)

ax.text(0.05, 0.85, "the\nsequences", va="center", fontsize=10)
for block in range(8):
    face = COLOURS[block % 2][block // 4]
    box(
        ax,
        1.3 + 1.1 * block,
        0.5,
        str(block),
        0.95,
        0.7,
        face,
        "white" if block < 4 else "black",
    )
ax.text(10.2, 0.85, "next step …", va="center", fontsize=9)
ax.text(
    1.3,
    0.1,
    "sequences are dealt to the processes in turn; here a micro-batch has two",
    va="center",
    fontsize=9,
    color="#5f6b73",
)
figure.savefig(HERE / "pretraining.svg", metadata={"Date": None})

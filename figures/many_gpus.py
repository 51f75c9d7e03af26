"""Draw what each of four processes holds under DDP, FSDP and HSDP: writes
many_gpus.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COLOURS = ["#0b63a5", "#d1495b", "#2a9d60", "#e0a100"]  # the four quarters of the model
ROWS = ("optimizer\nstates", "gradients", "weights")
LAYOUTS = {
    "DDP": ({0, 1, 2, 3},) * 4,
    "FSDP": ({0}, {1}, {2}, {3}),
    "HSDP, 2 x 2": ({0, 1}, {2, 3}, {0, 1}, {2, 3}),
}
SENT = (
    "gradients: all-reduce over 4",
    "weights: all-gather over 4, twice\ngradients: reduce-scatter over 4",
    (
        "weights: all-gather over 2, twice\ngradients: reduce-scatter over 2,\nthen"
        " all-reduce over the other 2"
    ),
)

figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.9))
for ax, (title, held), sent in zip(axes, LAYOUTS.items(), SENT):
    ax.set(
        xlim=(-1.25 if title == "DDP" else -0.15, 4.75),
        ylim=(-1.25, 3.6),
        xticks=[],
        yticks=[],
    )
    ax.axis("off")
    ax.set_title(title, fontsize=12)
    for process, quarters in enumerate(held):
        x = 1.2 * process
        ax.text(x + 0.45, 3.2, str(process), ha="center", fontsize=10)
        for row in range(3):
            for quarter in range(4):
                inside = quarter in quarters
                ax.add_patch(
                    Rectangle(
                        (x, row + 0.04 + 0.22 * (3 - quarter)),
                        0.9,
                        0.2,
                        facecolor=COLOURS[quarter] if inside else "#f1f3f5",
                        edgecolor="none",
                    )
                )
        if title.startswith("HSDP") and process == 1:
            ax.plot(
                [2.25, 2.25],
                [-0.05, 3.5],
                color="#5f6b73",
                linestyle=":",
                linewidth=1.2,
            )
    if title == "DDP":
        for row, name in enumerate(ROWS):
            ax.text(-0.15, row + 0.47, name, ha="right", va="center", fontsize=9)
        ax.text(-0.15, 3.2, "process", ha="right", fontsize=9)
    ax.text(0, -0.25, sent, va="top", fontsize=9, color="#3b454c")
figure.savefig(HERE / "many_gpus.svg", metadata={"Date": None})

"""Draw the shift by one, and the surprise at each target: writes loss.svg beside this
file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, MIDDLE, GREY = "#0b63a5", "#a9c9e4", "#5f6b73"

inputs = ["Buy:", "milk", "water"]
targets = ["milk", "water", "juice"]
logits = torch.tensor(
    [[2.0, 1.0, 0.0, -1.0], [4.0, 2.0, 0.0, -2.0], [1.0, 0.5, 0.0, -0.5]]
)  # [T, V]
came = torch.tensor([0, 1, 3])  # [T]
surprise = -logits.log_softmax(-1)[torch.arange(3), came]

figure, ax = plt.subplots(figsize=(6, 2.6))
centred = {"ha": "center", "va": "center"}
box = {"boxstyle": "round,pad=0.25", "linewidth": 0}
for i in range(3):
    ax.text(i, 2, inputs[i], color="white", bbox={**box, "facecolor": DARK}, **centred)
    ax.text(i, 1, targets[i], bbox={**box, "facecolor": MIDDLE}, **centred)
    ax.text(i, 0.2, f"{surprise[i]:.3f}", **centred)
    if i < 2:
        shape = {"arrowstyle": "->", "color": GREY, "linewidth": 1}
        ax.annotate("", (i + 0.13, 1.2), (i + 0.85, 1.8), arrowprops=shape)
for y, name in ((2, "inputs"), (1, "targets"), (0.2, "surprise")):
    ax.text(-1.1, y, name, color=GREY, va="center", fontsize=9)
ax.text(2.5, 0.2, f"mean {surprise.mean():.3f}", va="center", weight="bold")
ax.set(
    xlim=(-1.15, 3.4),
    ylim=(-0.2, 2.5),
    title="targets are the inputs, one place to the left",
)
ax.axis("off")
figure.savefig(HERE / "loss.svg", metadata={"Date": None})

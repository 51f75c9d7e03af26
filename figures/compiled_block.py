"""Draw the tensors of a compiled block: writes compiled_block.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
GROUPS = {
    "constants: the packed matrices": (["qkv", "o", "gate, up", "down"], "#f6d3d7"),
    "inputs of the block": (["bias", "norm", "norm"], "#cfe3f3"),
    "inputs of its slot": (["keys", "values", "position"], "#d9ead7"),
    "inputs of the call": (["x", "cos", "sin", "mask"], "#e9edf0"),
}

figure, ax = plt.subplots(figsize=(8.4, 3.9))
ax.set(xlim=(0, 11.6), ylim=(-0.1, 5.1))
ax.axis("off")
for i, (label, (names, face)) in enumerate(GROUPS.items()):
    y = 3.9 - 1.3 * i
    ax.text(0, y + 0.72, label, fontsize=9, color=GREY)
    for j, name in enumerate(names):
        box(ax, 1.5 * j, y, name, 1.3, 0.55, face)
    end = 1.5 * len(names) - 0.1
    if "slot" in label:
        arrow(ax, (end, y + 0.4), (7.3, y + 0.4))
        arrow(ax, (7.3, y + 0.12), (end, y + 0.12))
        ax.text(5.9, y - 0.2, "written in place", ha="center", fontsize=8, color=GREY)
    else:
        arrow(ax, (end, y + 0.28), (7.3, y + 0.28))
box(ax, 7.4, 0, "the library", 2.1, 4.45, "#fbe5c8", fontsize=10)
arrow(ax, (9.6, 2.2), (10.2, 2.2))
box(ax, 10.3, 1.93, "new x", 1.2, 0.55)
figure.savefig(HERE / "compiled_block.svg", metadata={"Date": None})

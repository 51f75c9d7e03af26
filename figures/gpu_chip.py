"""Draw a GPU: memory, the chip that multiplies, the way between them, and the host that
launches kernels: writes gpu_chip.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, PALE = "#0b63a5", "#a9c9e4"

figure, ax = plt.subplots(figsize=(9, 3))
box(ax, 0, 0.9, "host\n(the CPU)", 1.6, 1.2, fontsize=11)
box(ax, 4.2, 0, "", 4.3, 3, "#f4f6f7")
for row in range(6):
    for column in range(22):
        x, y = 4.42 + 0.178 * column, 0.2 + 0.27 * row
        ax.add_patch(Rectangle((x, y), 0.14, 0.2, facecolor=PALE, edgecolor="none"))
middle = {"ha": "center", "va": "center", "fontsize": 11}
ax.text(6.35, 2.6, "chip: 132 multiprocessors", **middle)
ax.text(6.35, 2.1, "989 TFLOP/s in bfloat16", **middle, color=BLUE)
box(ax, 11.3, 0.5, "memory\n80 GB", 1.9, 2, fontsize=11)
arrow(ax, (1.7, 1.5), (4.1, 1.5))
ax.text(2.9, 1.65, "launches kernels", ha="center", fontsize=10, color=GREY)
ax.text(2.9, 1.15, "one by one", ha="center", fontsize=10, color=GREY)
arrow(ax, (8.6, 1.5), (11.2, 1.5), style="<|-|>")
ax.text(9.9, 1.65, "3,350 GB/s", ha="center", fontsize=11, color=BLUE)
ax.set(xlim=(-0.2, 13.4), ylim=(-0.15, 3.15))
ax.axis("off")
figure.savefig(HERE / "gpu_chip.svg", metadata={"Date": None})

"""Draw a ring through two machines of four GPUs each: writes links.svg beside this
file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED = "#0b63a5", "#d1495b"
SIZE = 1.1


def connect(ax, start, end, color, bend=0.0):
    shape = {"arrowstyle": "-|>", "color": color, "linewidth": 2}
    shape |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 2, "shrinkB": 2}
    ax.annotate("", end, start, arrowprops=shape)


figure, ax = plt.subplots(figsize=(9.0, 2.5))
ax.set(xlim=(-0.4, 19.2), ylim=(-2.35, 3.0))
ax.axis("off")
for machine in range(2):
    left = 10.6 * machine
    box(ax, left - 0.3, -0.45, "", 8.8, 2.5, face="#f1f3f5")
    ax.text(left + 4.1, 2.4, f"machine {machine}", ha="center", fontsize=11)
    for local in range(4):
        x = left + 2.35 * local
        number = 4 * machine + local
        box(ax, x, 0, f"rank\n{number}", SIZE, SIZE, face=BLUE, ink="white")
        if local < 3:
            connect(ax, (x + SIZE, 0.55), (x + 2.35, 0.55), BLUE)
    ax.text(left + 4.1, 1.55, "inside: NVLink", ha="center", fontsize=9, color=BLUE)
connect(ax, (8.15, 0.55), (10.6, 0.55), RED)
ax.text(9.38, 0.85, "link out", ha="center", fontsize=9, color=RED)
connect(ax, (18.2, 0.0), (0.55, 0.0), RED, bend=-0.16)
words = "the link out of a machine carries what one of its ranks sends"
ax.text(9.38, -2.3, words, ha="center", fontsize=10, color=RED)
figure.savefig(HERE / "links.svg", metadata={"Date": None})

"""Draw many small weights beside four levels near 0, with an offset that may be any
number and with an offset of whole levels: writes quantization_zero_lost.svg beside
this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey = "#0b63a5", "#d1495b", "#5f6b73"

scale = (5.5 + 1.0) / 15
small = [-0.05, -0.03, -0.02, -0.008, 0.004, 0.012, 0.02, 0.035, 0.05]
panels = [  # title, levels near 0
    ("an offset of -1.00: no level at 0", [-1.0 + scale * i for i in (1, 2, 3)]),
    ("a zero point: 0 is a level", [-scale, 0.0, scale]),
]
figure, lines = plt.subplots(2, 1, figsize=(8.2, 3.2))
for axes, (title, levels) in zip(lines, panels):
    axes.plot([-0.66, 0.6], [0, 0], color=grey, linewidth=1)
    nearest = min(levels, key=abs)
    for level in levels:
        colour = red if level == nearest else grey
        axes.plot([level, level], [-0.12, 0.12], color=colour, linewidth=1.8)
        axes.text(
            level, -0.2, f"{level:.2f}", ha="center", va="top", fontsize=9, color=colour
        )
    if nearest:
        axes.plot([0, 0], [-0.08, 0.08], color="#c2c9ce", linewidth=1.2)
        axes.text(0, -0.2, "0", ha="center", va="top", fontsize=9, color="#9aa4ab")
    for weight in small:
        line = {"arrowstyle": "-|>", "color": blue, "linewidth": 0.8}
        line |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
        axes.annotate("", (nearest, 0.12), (weight, 0.75), arrowprops=line)
        axes.plot(weight, 0.75, "o", color=blue, markersize=3.5)
    axes.set(xlim=(-0.85, 0.65), ylim=(-0.6, 1.1))
    axes.text(-0.84, 0.75, "small weights", color=blue, fontsize=9, va="center")
    axes.text(-0.84, -0.31, "levels", fontsize=9, va="center")
    axes.set_title(title, fontsize=10)
    axes.axis("off")
figure.savefig(HERE / "quantization_zero_lost.svg", metadata={"Date": None})

"""Draw a group of four weights on levels -7 to 7 and on levels 0 to 15: writes
quantization_zero.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey = "#0b63a5", "#d1495b", "#5f6b73"

group = [-0.12, 0.2, 0.48, 0.78]
panels = [  # title, levels, the weight at level 0, scale
    ("levels -7 to 7: 0.111 apart, six are never used", range(-7, 8), 0.0, 0.78 / 7),
    ("levels 0 to 15: 0.06 apart, all lie among the weights", range(16), -0.12, 0.06),
]
figure, lines = plt.subplots(2, 1, figsize=(8.2, 3.6))
for axes, (title, levels, start, scale) in zip(lines, panels):
    axes.plot([-0.84, 0.84], [0, 0], color=grey, linewidth=1)
    for level in levels:
        place = start + level * scale
        colour = "#c2c9ce" if place < -0.2 else grey
        axes.plot([place, place], [-0.12, 0.12], color=colour, linewidth=1.5)
        axes.text(
            place, -0.2, str(level), ha="center", va="top", fontsize=9, color=colour
        )
    for weight in group:
        place = start + round((weight - start) / scale) * scale
        line = {"arrowstyle": "-|>", "color": blue, "linewidth": 1.2}
        line |= {"shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (place, 0.03), (weight, 0.75), arrowprops=line)
        axes.plot(weight, 0.75, "o", color=blue, markersize=6)
        axes.text(weight, 0.95, f"{weight:g}", ha="center", fontsize=8, color=blue)
    axes.set(xlim=(-1.08, 0.9), ylim=(-0.75, 1.35))
    axes.text(-1.07, 0.75, "weights", color=blue, fontsize=9, va="center")
    axes.text(-1.07, -0.31, "levels", fontsize=9, va="center")
    axes.set_title(title, fontsize=10)
    axes.axis("off")
low, middle = lines
for x, name in ((0, "zero point"), (0.36, "zero: 0.36, at level 8"), (0.78, "largest")):
    middle.text(x, -0.55, name, ha="center", va="top", fontsize=9, color=red)
figure.savefig(HERE / "quantization_zero.svg", metadata={"Date": None})

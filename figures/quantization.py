"""Draw eight weights and their levels on a number line, without an outlier and with
one: writes quantization.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey = "#0b63a5", "#d1495b", "#5f6b73"
reach = 2.0

row = [0.314, -0.521, 0.083, 1.27, -0.946, 0.152, -0.035, 0.668]
figure, lines = plt.subplots(2, 1, figsize=(8.2, 3.6))
for axes, largest in zip(lines, (1.27, 12.7)):
    weights = [*row[:-1], 12.7] if largest > 2 else row
    scale = largest / 7
    axes.plot([-reach, reach], [0, 0], color=grey, linewidth=1)
    for level in range(-7, 8):
        place = level * scale
        if abs(place) < reach:
            axes.plot([place, place], [-0.12, 0.12], color=grey, linewidth=1.5)
            axes.text(place, -0.2, str(level), ha="center", va="top", fontsize=9)
    for weight in weights:
        if weight < reach:
            place = round(weight / scale) * scale
            line = {"arrowstyle": "-|>", "color": blue, "linewidth": 1.2}
            line |= {"shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (place, 0.03), (weight, 0.75), arrowprops=line)
            axes.plot(weight, 0.75, "o", color=blue, markersize=6)
    axes.set(xlim=(-2.35, 2.6), ylim=(-0.62, 1.35))
    axes.text(-2.3, 0.75, "weights", color=blue, fontsize=9, va="center")
    axes.text(-2.3, -0.31, "levels", fontsize=9, va="center")
    axes.axis("off")
for weight in (-0.946, -0.521, 0.314, 0.668, 1.27):  # the others stand too close
    lines[0].text(weight, 0.95, f"{weight:g}", ha="center", fontsize=8, color=blue)
lines[0].set_title("the largest is 1.27: levels stand 0.18 apart", fontsize=10)
lines[1].set_title("one weight is 12.7: levels stand 1.81 apart", fontsize=10)
away = {"arrowstyle": "-|>", "color": red, "linewidth": 1.3}
lines[1].annotate("", (2.5, 0.75), (1.85, 0.75), arrowprops=away)
lines[1].text(2.2, 0.92, "12.7, level 7", ha="center", fontsize=9, color=red)
figure.savefig(HERE / "quantization.svg", metadata={"Date": None})

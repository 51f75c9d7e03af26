"""Draw one round of speculative decoding into speculation.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey, green = "#0b63a5", "#d1495b", "#d5dade", "#2a9d60"

words = ["In", "the", "morning", "the", "old", "fisherman", "was", "at", "the", "dead"]
rows = ["keeps was", "refuses at,\ndraws gone", "useless", "useless", "useless"]
colors = [blue, green, "0.5", "0.5", "0.5"]

figure, ax = plt.subplots(figsize=(10, 3.3))
for place, word in enumerate(words):
    style = {"edgecolor": "0.5", "facecolor": grey}
    if place == 6:
        style["facecolor"] = blue
    if place > 6:
        style = {"edgecolor": "0.5", "facecolor": "white", "hatch": "///"}
    ax.add_patch(Rectangle((place, 0), 0.92, 0.7, **style))
    color = "white" if place == 6 else "black"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if place > 6 else None
    text = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
    ax.text(place + 0.46, 0.35, word, bbox=box, **text)
    ax.text(place + 0.46, 0.85, place, ha="center", fontsize=9)
ax.text(-0.15, 0.85, "place", ha="right", fontsize=9)
ax.text(-0.15, 0.35, "read", ha="right", va="center", fontsize=9)
ax.text(-0.15, -0.63, "judged by", ha="right", va="center", fontsize=9)
ax.text(10.46, 0.85, 10, ha="center", fontsize=9)
for row, (what, color) in enumerate(zip(rows, colors), 5):
    arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.5}
    arrow["connectionstyle"] = "arc3,rad=0.5"
    start, end = (row + 0.55, -0.05), (row + 1.4, -0.05)
    ax.annotate("", end, start, arrowprops=arrow)
    label = f"row {row}\n{what}"
    ax.text(row + 1, -0.5, label, ha="center", va="top", fontsize=8, color=color)
ax.add_patch(Rectangle((7, -2), 0.92, 0.6, facecolor=green))
ax.text(7.46, -1.7, "gone", ha="center", va="center", fontsize=9, color="white")
ax.add_patch(Rectangle((6, -2), 0.92, 0.6, facecolor=blue))
ax.text(6.46, -1.7, "was", ha="center", va="center", fontsize=9, color="white")
ax.text(-0.15, -1.7, "written", ha="right", va="center", fontsize=9)
for x, text in ((2.73, "the text"), (7.96, "four guesses")):
    ax.text(x, 1.3, text, ha="center", fontsize=10)
for left, right in ((0, 5.92), (6, 9.92)):
    ax.plot([left, right], [1.2, 1.2], color="0.5", linewidth=1)
ax.plot([6.96, 6.96], [-0.1, 1.6], color=red, linestyle="--", linewidth=1.5)
ax.text(6.96, 1.68, "crop(7)", ha="center", color=red, fontsize=9)
ax.set(xlim=(-1.4, 11), ylim=(-2.1, 1.95))
ax.axis("off")
figure.savefig(HERE / "speculation.svg", metadata={"Date": None})

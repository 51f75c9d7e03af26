"""Draw one rotated pair and the two ways of pairing components: writes rope.svg
beside this file.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
colours = ["#0b63a5", "#d1495b", "#2a9d60", "#e0a100"]

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 3.4), gridspec_kw={"width_ratios": [1, 1.7]}
)
left.add_patch(plt.Circle((0, 0), 1, fill=False, color="#999999"))
for m in range(5):
    angle = 0.35 + 0.5 * m
    left.annotate(
        "",
        (math.cos(angle), math.sin(angle)),
        (0, 0),
        arrowprops={"arrowstyle": "->", "color": colours[0], "lw": 1.6},
    )
    left.text(
        1.14 * math.cos(angle),
        1.14 * math.sin(angle),
        f"m={m}",
        ha="center",
        va="center",
        fontsize=9,
    )
left.set(xlim=(-1.35, 1.35), ylim=(-1.1, 1.35), aspect="equal", xticks=[], yticks=[])
left.set_title("one pair at positions m = 0 … 4", fontsize=10)
left.axis("off")

for row, (name, partner) in enumerate(
    (
        ("interleaved: (2i, 2i+1)", lambda j: j // 2),
        ("half-split: (i, i+h/2)", lambda j: j % 4),
    )
):
    y = 1.0 - 1.5 * row
    right.text(-0.1, y + 0.75, name, fontsize=10)
    for j in range(8):
        right.add_patch(
            plt.Rectangle((j, y), 0.9, 0.55, color=colours[partner(j)], alpha=0.85)
        )
        right.text(
            j + 0.45,
            y + 0.27,
            str(j),
            ha="center",
            va="center",
            color="white",
            fontsize=10,
        )
right.set(xlim=(-0.3, 8.2), ylim=(-0.8, 2.1))
right.set_title("components of one colour rotate together (h = 8)", fontsize=10)
right.axis("off")
figure.savefig(HERE / "rope.svg", metadata={"Date": None})

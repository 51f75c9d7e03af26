"""Draw the two ways of pairing components: writes rope.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
colours = ["#0b63a5", "#d1495b", "#2a9d60", "#e0a100"]

figure, axes = plt.subplots(figsize=(7, 3))
for row, (name, partner) in enumerate(
    (
        ("interleaved: (2i, 2i+1)", lambda j: j // 2),
        ("half-split: (i, i+h/2)", lambda j: j % 4),
    )
):
    y = 1.0 - 1.5 * row
    axes.text(-0.1, y + 0.75, name, fontsize=11)
    for j in range(8):
        axes.add_patch(
            plt.Rectangle((j, y), 0.9, 0.55, color=colours[partner(j)], alpha=0.85)
        )
        axes.text(
            j + 0.45,
            y + 0.27,
            str(j),
            ha="center",
            va="center",
            color="white",
            fontsize=11,
        )
axes.set(xlim=(-0.3, 8.2), ylim=(-0.8, 2.1))
axes.set_title("numbers of one colour turn together (h = 8)", fontsize=11)
axes.axis("off")
figure.savefig(HERE / "rope.svg", metadata={"Date": None})

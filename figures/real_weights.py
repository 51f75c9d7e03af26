"""Draw the search for the first place that differs, in two steps: first the layer, then
the place in it. Writes real_weights.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
EQUAL, FIRST, LATER = "#dfe5e9", "#d1495b", "#f3d3d8"

figure, ax = plt.subplots(figsize=(9.2, 3.5))
ax.set(xlim=(-0.1, 12.6), ylim=(-1.1, 4.25))
ax.axis("off")


def row(places, y, width):
    """Draw places in the order of computation: [(text, color), ...]."""
    step = 12.4 / len(places)
    for i, (text, face) in enumerate(places):
        ink = "white" if face == FIRST else "black"
        box(ax, i * step, y, text, width, 0.8, face, ink, fontsize=8.5)
        if i:
            arrow(ax, ((i - 1) * step + width + 0.05, y + 0.4), (i * step, y + 0.4))
    return step


ax.text(0, 3.75, "1. the model, layer by layer", fontsize=10)
modules = [("embed", EQUAL), ("layer 0", FIRST), ("layer 1", LATER)]
modules += [("...", LATER), ("layer 29", LATER), ("norm", LATER), ("head", LATER)]
step = row(modules, 2.75, 1.35)
ax.text(1.9, 1.6, "2. inside layer 0", fontsize=10)
inside = [("norm", EQUAL), ("q_proj", FIRST), ("k_proj", LATER), ("v_proj", EQUAL)]
inside += [("input of\no_proj", LATER), ("o_proj", LATER), ("...", LATER)]
row(inside, 0.6, 1.35)
for x0, x1 in ((step, 0.0), (step + 1.35, 12.4 - step + 1.35)):
    ax.plot([x0, x1], [2.7, 1.45], color=GREY, linewidth=0.8, linestyle=":")
for x, face, text in (
    (0.0, EQUAL, "equal in both programs"),
    (4.0, FIRST, "the first that differs: the accused"),
    (9.0, LATER, "differs, too"),
):
    box(ax, x, -0.75, "", 0.4, 0.35, face)
    ax.text(x + 0.6, -0.6, text, va="center", fontsize=9)
figure.savefig(HERE / "real_weights.svg", metadata={"Date": None})

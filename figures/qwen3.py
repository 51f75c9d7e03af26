"""Draw the way of queries, keys and values through Qwen2.5's attention and Qwen3's:
writes qwen3.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
new, old, plain = "#0b63a5", "#d1495b", "#e9edf0"

figure, panels = plt.subplots(1, 2, figsize=(8.0, 4.7))
for ax, name in zip(panels, ("Qwen2.5", "Qwen3")):
    norms = name == "Qwen3"
    box(ax, 1.6, 0.0, "x, from the stream: D numbers", 6.6, fontsize=10)
    for place, letter in ((0.4, "q"), (3.7, "k"), (7.0, "v")):
        middle = place + 1.2
        arrow(ax, (4.9, 0.74), (4.9, 1.0), (middle, 1.0), (middle, 1.26))
        box(ax, place, 1.3, f"{letter}_proj", 2.4, fontsize=10)
        top = 2.04
        if not norms:
            arrow(ax, (middle, top), (middle, 2.26))
            box(ax, place, 2.3, "+ bias", 2.4, 0.55, old, "white", 10)
            top = 2.89
        elif letter != "v":
            arrow(ax, (middle, top), (middle, 2.96))
            box(ax, place, 3.0, f"{letter}_norm", 2.4, 0.55, new, "white", 10)
            top = 3.59
        if letter != "v":
            arrow(ax, (middle, top), (middle, 3.96))
            box(ax, place, 4.0, "rotation", 2.4, 0.55, fontsize=10)
            arrow(ax, (middle, 4.59), (middle, 5.06))
        else:
            arrow(ax, (middle, top), (middle, 5.06))
    box(ax, 0.4, 5.1, "scores, softmax, mix of values", 9.0, fontsize=10)
    arrow(ax, (4.9, 5.84), (4.9, 6.06))
    box(ax, 3.7, 6.1, "o_proj", 2.4, fontsize=10)
    ax.set(xlim=(0, 9.8), ylim=(-0.2, 7.0))
    ax.set_title(name, fontsize=11)
    ax.axis("off")
figure.savefig(HERE / "qwen3.svg", metadata={"Date": None})

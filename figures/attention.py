"""Draw one word's query among the keys of four words. Writes attention.svg beside this
file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED = "#0b63a5", "#d1495b"

keys = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
query = torch.tensor([1.5, 0.0])

figure, plane = plt.subplots(figsize=(4.6, 3.3))
plane.annotate(
    "",
    xy=query,
    xytext=(0, 0),
    arrowprops={"arrowstyle": "-|>", "color": RED, "linewidth": 2.5},
)
plane.text(0.75, -0.32, "query of sleep", color=RED, ha="center")
plane.scatter(*keys.T, color=BLUE, s=45, zorder=3)
for place, text, align in (
    ((0.1, 0.18), "old, late", "left"),
    ((2.0, 0.18), "dogs", "center"),
    ((0.12, 1.95), "sleep", "left"),
):
    plane.text(*place, text, color=BLUE, ha=align)
plane.set(
    xlim=(-0.3, 2.6),
    ylim=(-0.6, 2.4),
    xticks=[0, 1, 2],
    yticks=[0, 1, 2],
    xlabel="how much of a thing",
    ylabel="how much of an action",
    title="keys (points) and one query (arrow)",
)
figure.savefig(HERE / "attention.svg", metadata={"Date": None})

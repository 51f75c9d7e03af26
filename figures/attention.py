"""Draw how one word looks at four: its query among the keys, the weights, and the mix
of the values. Writes attention.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED, GREY = "#0b63a5", "#d1495b", "#5f6b73"

words = ["old", "dogs", "sleep", "late"]
keys = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
query = torch.tensor([1.5, 0.0])
weights = (keys @ query).softmax(dim=0)

figure, (plane, looks) = plt.subplots(
    1, 2, figsize=(9.5, 3.3), gridspec_kw={"width_ratios": [1, 1.5]}
)
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

for i, (word, weight) in enumerate(zip(words, weights.tolist())):
    line = {"color": BLUE, "linewidth": 1 + 9 * weight, "alpha": 0.8}
    looks.plot([2, i], [0.25, 1.55], solid_capstyle="round", **line)
    looks.text(i, 1.78, word, ha="center", fontsize=12)
    looks.text(i, 2.12, f"{weight:.2f}", ha="center", color=BLUE)
looks.text(2, -0.1, "sleep", ha="center", color=RED, fontsize=12)
looks.text(-0.62, 2.12, "weight", ha="right", color=GREY, fontsize=9)
looks.text(-0.62, 1.78, "value of", ha="right", color=GREY, fontsize=9)
looks.text(-0.62, -0.1, "receives", ha="right", color=GREY, fontsize=9)
looks.set(xlim=(-1.5, 3.4), ylim=(-0.35, 2.4), xticks=[], yticks=[])
looks.set_title("sleep receives the values, mixed by these weights")
for spine in looks.spines.values():
    spine.set_visible(False)
looks.grid(False)
figure.savefig(HERE / "attention.svg", metadata={"Date": None})

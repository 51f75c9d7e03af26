"""Draw one word as a mix of the values of four. Writes attention_mix.svg beside this
file.
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

figure, looks = plt.subplots(figsize=(5.6, 3.1))
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
figure.savefig(HERE / "attention_mix.svg", metadata={"Date": None})

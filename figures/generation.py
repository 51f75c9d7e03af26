"""Draw the way from logits to a drawn token into generation.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey = "#0b63a5", "#d1495b", "#d5dade"

names = list("ABCDEFGHIJ")
logits = torch.tensor([2.6, 2.2, 1.6, 1.3, 0.7, 0.5, 0.2, -0.4, -0.9, -1.6])
temperature, top_k, top_p, u = 0.7, 6, 0.9, 0.62
cold = (logits / temperature).softmax(0)
after_k = torch.where(torch.arange(10) < top_k, cold, 0)
after_k = after_k / after_k.sum()
mass_before = after_k.cumsum(0) - after_k
kept = mass_before < top_p
final = torch.where(kept, after_k, 0)
final = final / final.sum()

figure, axes = plt.subplots(
    1, 5, figsize=(11.5, 2.9), gridspec_kw={"width_ratios": [1, 1, 1, 1, 0.5]}
)
axes[0].bar(names, logits, color=blue)
axes[0].set_title("1  logits", fontsize=10)
axes[1].bar(names, cold, color=blue)
axes[1].bar(names, logits.softmax(0), fill=False, edgecolor="black", linewidth=0.9)
axes[1].set_title(f"2  temperature {temperature}", fontsize=10)
axes[2].bar(names, cold, color=[blue if i < top_k else grey for i in range(10)])
axes[2].axvline(top_k - 0.5, color=red, linestyle="--", linewidth=1.2)
axes[2].set_title(f"3  top-k, k = {top_k}", fontsize=10)
axes[3].bar(names, after_k, color=[blue if k else grey for k in kept])
axes[3].step(
    torch.arange(-0.5, 10),
    torch.cat((torch.zeros(1), after_k.cumsum(0))),
    where="pre",
    color="black",
    linewidth=0.9,
)
axes[3].axhline(top_p, color=red, linestyle="--", linewidth=1.2)
axes[3].set_title(f"4  top-p, p = {top_p}", fontsize=10)
axes[3].set_ylim(0, 1.05)
for ax in axes[:4]:
    ax.tick_params(length=0, labelsize=8)
    ax.grid(axis="x", visible=False)
bottom = 0.0
for name, p in zip(names, final.tolist()):
    if p:
        axes[4].bar(
            0,
            p,
            bottom=bottom,
            width=0.9,
            color=red if bottom <= u < bottom + p else blue,
            edgecolor="white",
        )
        axes[4].text(
            0, bottom + p / 2, name, color="white", ha="center", va="center", fontsize=9
        )
    bottom += p
axes[4].annotate(
    f"u = {u}",
    (0.45, u),
    (0.8, u),
    va="center",
    fontsize=9,
    arrowprops={"arrowstyle": "->", "color": "black"},
)
axes[4].set(xlim=(-0.5, 1.6), ylim=(0, 1), xticks=[])
axes[4].tick_params(labelsize=8)
axes[4].grid(False)
axes[4].spines["bottom"].set_visible(False)
axes[4].set_title("5  draw", fontsize=10)
figure.savefig(HERE / "generation.svg", metadata={"Date": None})

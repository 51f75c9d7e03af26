"""Draw the way from five words' logits to a drawn word into generation.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey = "#0b63a5", "#d1495b", "#d5dade"

words = ["mat", "sofa", "roof", "moon", "verb"]
logits = torch.tensor([5, 2.5, 1.5, 0.8, 0.2]).log()
temperature, top_k, top_p, height = 0.5, 4, 0.9, 0.85
cold = (logits / temperature).softmax(0)
after_k = torch.where(torch.arange(5) < top_k, cold, 0)
after_k = after_k / after_k.sum()
sum_before = after_k.cumsum(0) - after_k
kept = sum_before < top_p
final = torch.where(kept, after_k, 0)
final = final / final.sum()


def label(ax, values, tops, digits=2):
    for x, (value, top) in enumerate(zip(values.tolist(), tops.tolist())):
        y = max(top, 0) + 0.02 * (ax.get_ylim()[1] - ax.get_ylim()[0])
        ax.text(x, y, f"{value:.{digits}f}", ha="center", fontsize=8)


figure, axes = plt.subplots(
    1, 5, figsize=(11.5, 2.9), gridspec_kw={"width_ratios": [1, 1, 1, 1, 0.6]}
)
axes[0].bar(words, logits, color=blue)
axes[0].set_ylim(-1.8, 2)
label(axes[0], logits, logits)
axes[0].set_title("1  logits", fontsize=10)
probs = logits.softmax(0)
axes[1].bar(words, cold, color=blue)
axes[1].bar(words, probs, fill=False, edgecolor="black", linewidth=0.9)
axes[1].set_title(f"2  temperature {temperature}", fontsize=10)
axes[1].set_ylim(0, 1.05)
label(axes[1], cold, torch.maximum(cold, probs), 3)
axes[2].bar(words, cold, color=[blue if i < top_k else grey for i in range(5)])
axes[2].axvline(top_k - 0.5, color=red, linestyle="--", linewidth=1.2)
axes[2].set_title(f"3  top-k, k = {top_k}", fontsize=10)
axes[2].set_ylim(0, 1.05)
label(axes[2], after_k, cold, 3)
colors = [blue if k else grey for k in kept]
axes[3].bar(words[:4], after_k[:4], bottom=sum_before[:4], color=colors)
axes[3].axhline(top_p, color=red, linestyle="--", linewidth=1.2)
axes[3].set_title(f"4  top-p, p = {top_p}", fontsize=10)
axes[3].set_ylim(0, 1.05)
for x, before in enumerate(sum_before[:4].tolist()):
    y = min(before, top_p) - 0.02 if before else 0.02
    color, side = ("black", "top") if before else ("white", "bottom")
    axes[3].text(x, y, f"{before:.3f}", ha="center", va=side, fontsize=8, color=color)
for ax in axes[:4]:
    ax.tick_params(length=0, labelsize=8)
    ax.grid(axis="x", visible=False)
bottom = 0.0
for word, p in zip(words, final.tolist()):
    if p:
        hit = bottom <= height < bottom + p
        color = red if hit else blue
        axes[4].bar(0, p, bottom=bottom, width=0.9, color=color, edgecolor="white")
        style = {"ha": "center", "va": "center", "fontsize": 9, "color": "white"}
        axes[4].text(0, bottom + p / 2, f"{word}\n{p:.2f}", **style)
    bottom += p
arrow = {"arrowstyle": "->", "color": "black"}
place = {"va": "center", "fontsize": 9, "arrowprops": arrow}
axes[4].annotate(f"dart\n{height}", (0.45, height), (0.85, height), **place)
axes[4].set(xlim=(-0.5, 1.7), ylim=(0, 1), xticks=[])
axes[4].tick_params(labelsize=8)
axes[4].grid(False)
axes[4].spines["bottom"].set_visible(False)
axes[4].set_title("5  draw", fontsize=10)
figure.savefig(HERE / "generation.svg", metadata={"Date": None})

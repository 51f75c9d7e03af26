"""Draw three masks as tables of who sees whom: writes attention.svg beside this
file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

T = 8
document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
causal = torch.ones(T, T).tril()
masks = [
    ("causal: T = S = 8", causal),
    ("3 queries after 5 cached keys", torch.ones(3, T).tril(5)),
    ("three packed documents", causal * (document[:, None] == document[None])),
]
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.4))
for ax, (title, mask) in zip(axes, masks):
    ax.imshow(
        mask,
        cmap=matplotlib.colors.ListedColormap(["#e9edf0", "#0b63a5"]),
        vmin=0,
        vmax=1,
    )
    ax.set_title(title, fontsize=10)
    rows = range(len(mask))
    ax.set(
        xlabel="key",
        ylabel="query",
        xticks=range(T),
        yticks=rows,
        yticklabels=[T - len(mask) + r for r in rows],
    )
    ax.set_xticks([x - 0.5 for x in range(1, T)], minor=True)
    ax.set_yticks([y - 0.5 for y in range(1, len(mask))], minor=True)
    ax.grid(False)
    ax.grid(which="minor", color="white", linewidth=1.5, alpha=1)
    ax.tick_params(which="both", length=0)
figure.savefig(HERE / "attention.svg", metadata={"Date": None})

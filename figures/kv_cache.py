"""Draw what is computed at each step of decoding with and without a cache: writes
kv_cache.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

steps, prompt = 6, 3
position, step = torch.arange(prompt + steps), torch.arange(steps)[:, None]
exists = position <= prompt + step - 1
new = (position == prompt + step - 1) | ((step == 0) & exists)
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.1))
for ax, title, table in zip(
    axes,
    ("without a cache: every position, every step", "with a cache: new positions only"),
    (exists.int() * 2, exists.int() + new.int()),
):
    ax.imshow(
        table,
        cmap=matplotlib.colors.ListedColormap(["#e9edf0", "#a9c9e4", "#0b63a5"]),
        vmin=0,
        vmax=2,
    )
    ax.set_title(title, fontsize=10)
    ax.set(
        xlabel="position",
        ylabel="step",
        xticks=range(prompt + steps),
        yticks=range(steps),
    )
    ax.set_xticks([x - 0.5 for x in range(1, prompt + steps)], minor=True)
    ax.set_yticks([y - 0.5 for y in range(1, steps)], minor=True)
    ax.grid(False)
    ax.grid(which="minor", color="white", linewidth=1.5, alpha=1)
    ax.tick_params(which="both", length=0)
figure.savefig(HERE / "kv_cache.svg", metadata={"Date": None})

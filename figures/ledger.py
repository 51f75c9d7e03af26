"""Draw what three blocks hold while they go backward, for small, middle and large
activations: writes ledger.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
GREEN, ORANGE, GREY = "#2a9d60", "#e0a100", "#5f6b73"  # as in the chapter's plots
BLOCKS, GRADIENTS = 3, 400  # bytes of one block's gradients

figure, panels = plt.subplots(1, 3, figsize=(10, 3.1), sharey=True)
done = range(BLOCKS + 1)
for axes, activations in zip(panels, (100, 400, 900)):
    kept = [(BLOCKS - n) * activations for n in done]
    made = [n * GRADIENTS for n in done]
    axes.bar(done, made, color=GREEN, width=0.7, label="gradients")
    axes.bar(done, kept, bottom=made, color=ORANGE, width=0.7, label="activations")
    fullest = max(a + b for a, b in zip(kept, made))
    axes.axhline(fullest, color="black", linewidth=1)
    axes.text(3.4, fullest + 60, f"fullest: {fullest:,}", ha="right", color="black")
    naive = BLOCKS * (activations + GRADIENTS)
    axes.axhline(naive, color=GREY, linewidth=1, linestyle=":")
    axes.text(3.4, naive + 60, f"sum of all: {naive:,}", ha="right", color=GREY)
    axes.set(
        title=f"{activations} bytes of activations a block",
        xlabel="blocks that have gone backward",
        xticks=list(done),
        ylim=(0, 4400),
    )
    axes.grid(False)
panels[0].set_ylabel("bytes, 400 of gradients a block")
panels[2].text(0, 1350, "activations", ha="center", fontsize=8.5, rotation=90)
panels[2].text(
    3, 600, "gradients", ha="center", va="center", fontsize=8.5, rotation=90, color="w"
)
figure.savefig(HERE / "ledger.svg", metadata={"Date": None})

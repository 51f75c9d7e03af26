"""Draw the forward pass of four micro-batches through four ranks: writes pipeline.svg
beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

figure, ax = plt.subplots(figsize=(8.0, 2.5))
ax.set(xlim=(-1.0, 7.3), ylim=(-3.9, 1.3))
ax.axis("off")
for rank in range(4):
    ax.text(-0.2, 0.4 - rank, f"rank {rank}", va="center", ha="right", fontsize=10)
    for turn in range(7):
        micro_batch = turn - rank
        works = 0 <= micro_batch < 4
        text = str(micro_batch) if works else ""
        face = "#0b63a5" if works else "#e9edf0"
        box(ax, turn + 0.06, 0.06 - rank, text, 0.88, 0.68, face=face, ink="white")
for turn in range(7):
    ax.text(turn + 0.5, 0.95, f"round {turn}", ha="center", fontsize=9)
words = "forward pass of micro-batches 0 to 3; grey is waiting"
ax.text(3.5, -3.75, words, ha="center", fontsize=10)
figure.savefig(HERE / "pipeline.svg", metadata={"Date": None})

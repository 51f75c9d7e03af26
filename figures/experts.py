"""Draw a token that meets two of four experts: writes experts.svg beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, PALE = "#0b63a5", "#e9edf0"

scores = torch.tensor([0.1, 2.0, -1.0, 1.0])
answers = torch.tensor([10.0, 20.0, 30.0, 40.0])
best = scores.topk(2)
shares = dict(zip(best.indices.tolist(), best.values.softmax(dim=0).tolist()))
total = sum(share * answers[expert].item() for expert, share in shares.items())

figure, ax = plt.subplots(figsize=(9, 3.2))
box(ax, 0, 1.75, "a token", 1.2)
box(ax, 2.1, 1.75, "router", 1.2, face="#f3d9b1")
arrow(ax, (1.25, 2.1), (2.05, 2.1))
for expert in range(4):
    y = 3.6 - 1.2 * expert
    chosen = expert in shares
    face, ink = (BLUE, "white") if chosen else (PALE, GREY)
    box(ax, 5.2, y, f"expert {expert}", 1.5, face=face, ink=ink)
    score = f"score {scores[expert]:.1f}"
    ax.text(5.05, y + 0.45, score, ha="right", fontsize=9, color=GREY)
    if chosen:
        arrow(ax, (3.35, 2.1), (4.05, y + 0.35), (5.15, y + 0.35))
        arrow(ax, (6.75, y + 0.35), (8.1, y + 0.35), (8.9, 2.15))
        ax.text(
            6.85,
            y + 0.45,
            f"{answers[expert]:.0f}, times {shares[expert]:.2f}",
            fontsize=9,
        )
    else:
        ax.text(6.85, y + 0.28, "computes nothing", fontsize=9, color=GREY)
box(ax, 8.95, 1.75, f"sum: {total:.1f}", 1.3)
ax.set(xlim=(-0.1, 10.4), ylim=(-0.2, 4.5))
ax.axis("off")
figure.savefig(HERE / "experts.svg", metadata={"Date": None})

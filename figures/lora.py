"""Draw the two ways through a layer with an adapter: writes lora.svg here."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, RED = "#0b63a5", "#d1495b"

figure, ax = plt.subplots(figsize=(8.2, 3.4))
ax.set(xlim=(0, 16.4), ylim=(0, 6.8), aspect="equal")
ax.axis("off")
box(ax, 0, 1.4, "x", 0.5, 4, fontsize=12)
ax.text(0.25, 0.9, "K numbers", ha="center", fontsize=9, color=GREY)
box(ax, 3.2, 3.6, "W  [N, K]\nfrozen", 3, 3, fontsize=10)
box(ax, 3.2, 0.5, "A  [r, K]", 3, 0.75, face=BLUE, ink="white", fontsize=10)
box(ax, 7.6, 0.5, "A x", 0.5, 0.75, fontsize=9)
ax.text(7.85, 0.05, "r numbers", ha="center", va="top", fontsize=9, color=GREY)
box(ax, 9.6, 0.1, "B\n[N, r]", 1.1, 3, face=BLUE, ink="white", fontsize=10)
ax.text(11.95, 2.05, r"times $\alpha\,/\,r$", ha="center", fontsize=10, color=GREY)
arrow(ax, (0.7, 4.4), (3.0, 5.1))
arrow(ax, (0.7, 2.4), (3.0, 0.95))
arrow(ax, (6.4, 0.88), (7.4, 0.88))
arrow(ax, (8.3, 0.88), (9.4, 0.88))
arrow(ax, (6.4, 5.1), (13.2, 5.1), (13.2, 4.0))
arrow(ax, (10.9, 1.6), (13.2, 1.6), (13.2, 2.9))
ax.text(13.2, 3.42, "+", ha="center", va="center", fontsize=16)
arrow(ax, (13.6, 3.42), (15.0, 3.42))
box(ax, 15.2, 1.92, "y", 0.5, 3, fontsize=12)
ax.text(15.45, 1.42, "N numbers", ha="center", fontsize=9, color=GREY)
ax.text(4.7, 0.05, "drawn at random", ha="center", va="top", fontsize=9, color=BLUE)
ax.text(10.15, 3.3, "zero at first", ha="center", fontsize=9, color=BLUE)
figure.savefig(HERE / "lora.svg", metadata={"Date": None})

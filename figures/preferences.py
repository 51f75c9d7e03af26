"""Draw how a pair of answers becomes one number, the margin: writes preferences.svg
beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
GREEN, RED, BLUE = "#2a9d60", "#d1495b", "#0b63a5"
ROWS = (  # answer, its log-probability under policy and reference, log-ratio
    ("chosen", GREEN, "-1.2", "-1.4", "+0.2"),
    ("rejected", RED, "-0.8", "-0.7", "-0.1"),
)

figure, ax = plt.subplots(figsize=(10, 3.6))
ax.set(xlim=(0, 20), ylim=(0, 7.2))
ax.axis("off")
box(ax, 0, 2.6, "question", 2.6, 1.4, fontsize=12)
titles = (("policy", 10.0), ("reference", 13.0), ("log-ratio", 15.6))
for title, x in titles:
    ax.text(x, 6.6, title, ha="center", fontsize=12)
ax.text(10.0, 6.0, "learns", ha="center", fontsize=10, color=GREY)
ax.text(13.0, 6.0, "is frozen", ha="center", fontsize=10, color=GREY)
for (name, color, policy, reference, log_ratio), y in zip(ROWS, (4.0, 1.2)):
    box(ax, 4.2, y, f"{name} answer", 3.9, 1.4, face=color, ink="white", fontsize=12)
    arrow(ax, (2.75, 3.3), (4.05, y + 0.7))
    arrow(ax, (8.25, y + 0.7), (9.0, y + 0.7))
    ax.text(10.0, y + 0.7, policy, ha="center", va="center", fontsize=14)
    ax.text(11.5, y + 0.7, "–", ha="center", va="center", fontsize=14)
    ax.text(13.0, y + 0.7, reference, ha="center", va="center", fontsize=14)
    ax.text(14.3, y + 0.7, "=", ha="center", va="center", fontsize=14)
    ax.text(
        15.6, y + 0.7, log_ratio, ha="center", va="center", fontsize=14, color=color
    )
    arrow(ax, (16.4, y + 0.7), (17.3, 3.6 if y > 2 else 3.0))
box(ax, 17.4, 2.6, "margin\n0.3", 2.4, 1.4, face=BLUE, ink="white", fontsize=12)
ax.text(11.5, 0.3, "log-probabilities of whole answers", ha="center", fontsize=10)
figure.savefig(HERE / "preferences.svg", metadata={"Date": None})

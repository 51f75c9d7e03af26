"""Draw the loop of learning from rewards: question, answers, check, advantages, step.
Writes rewards.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
GREEN, RED, BLUE = "#2a9d60", "#d1495b", "#0b63a5"
ROWS = (("7.", 1, "+0.87"), ("8.", 0, "-0.87"), ("10.", 0, "-0.87"), ("7.", 1, "+0.87"))

figure, ax = plt.subplots(figsize=(10, 4.2))
ax.set(xlim=(0, 20), ylim=(-1.4, 7))
ax.axis("off")
box(ax, 0, 2.4, "question\n3+4=", 2.7, 1.4, fontsize=12)
box(ax, 4.1, 2.4, "policy", 2.6, 1.4, face=BLUE, ink="white", fontsize=12)
arrow(ax, (2.85, 3.1), (3.95, 3.1))
for x, title in ((9.1, "answers"), (12.7, "rewards"), (16.5, "advantages")):
    ax.text(x, 6.4, title, ha="center", fontsize=12)
for i, (answer, reward, advantage) in enumerate(ROWS):
    y = 4.9 - 1.3 * i
    color = GREEN if reward else RED
    arrow(ax, (6.85, 3.1), (8.1, y + 0.4))
    box(ax, 8.2, y, answer, 1.8, 0.85, fontsize=12)
    arrow(ax, (10.15, y + 0.4), (11.85, y + 0.4))
    box(ax, 12.0, y, str(reward), 1.4, 0.85, face=color, ink="white", fontsize=12)
    arrow(ax, (13.55, y + 0.4), (15.3, y + 0.4))
    ax.text(
        16.5, y + 0.4, advantage, ha="center", va="center", fontsize=13, color=color
    )
ax.text(7.35, 5.55, "draw", ha="center", fontsize=10, color=GREY)
ax.text(11.0, 5.95, "check", ha="center", fontsize=10, color=GREY)
ax.text(14.4, 5.95, "compare", ha="center", fontsize=10, color=GREY)
arrow(ax, (17.6, 3.1), (18.9, 3.1), (18.9, -0.5), (5.4, -0.5), (5.4, 2.25))
text = "one step: more of what was better than its group, less of what was worse"
ax.text(12.1, -1.1, text, ha="center", fontsize=11)
figure.savefig(HERE / "rewards.svg", metadata={"Date": None})

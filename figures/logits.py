"""Draw which numbers of the logits' tables are in memory, for three tokens and four
words: all at once, and a token at a time. Writes logits.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK, MIDDLE, PALE, GREY = "#0b63a5", "#a9c9e4", "#e9edf0", "#5f6b73"

h = torch.tensor([[1.0], [2.0], [0.5]])  # [T, D]
W = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])  # [V, D]
came = torch.tensor([0, 1, 3])  # [T]
log_p = (h @ W.T).log_softmax(-1)  # [T, V]
one_hot = torch.zeros(3, 4)
one_hot[torch.arange(3), came] = 1
error = log_p.exp() - one_hot
grad_h = error @ W  # [T, D]


figure, ax = plt.subplots(figsize=(9.5, 4.6))


def number(x):
    return "0" if x == 0 else f"{x:+.2f}".replace("-", "−")


def cell(x, y, color, text="", ink="white"):
    ax.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", lw=1.5))
    ax.text(x + 0.5, y + 0.52, text, color=ink, ha="center", va="center", fontsize=8.5)


def frame(left, top, title):
    """Write the names of a table's columns and rows, and what it is."""
    ax.text(left, top - 0.85, title, va="bottom", fontsize=10)
    for x, word in enumerate(("milk", "water", "tea", "juice")):
        ax.text(left + x + 0.5, top - 0.15, word, ha="center", fontsize=8, color=GREY)
    for y in range(3):
        where = left - 0.12, top + y + 0.5
        ax.text(*where, f"token {y + 1}", ha="right", va="center", fontsize=8)


LEFTS = (1.2, 8.0, 14.8)
tables = (
    ("log-probabilities", log_p),
    ("and their gradient", -one_hot),
    ("and the gradient of the logits", error),
)
for left, (title, table) in zip(LEFTS, tables):
    frame(left, 0, title)
    for y in range(3):
        for x in range(4):
            cell(left + x, y, DARK, number(table[y, x].item()))

TOP = 6.6
for step, left in enumerate(LEFTS):
    frame(left, TOP, f"step {step + 1}: error of token {step + 1}")
    for y in range(3):
        done = y <= step
        for x in range(4):
            now = y == step
            text = number(error[y, x].item()) if now else ""
            cell(left + x, TOP + y, DARK if now else PALE, text)
        text = number(grad_h[y].item()) if done else ""
        cell(left + 4.25, TOP + y, MIDDLE if done else PALE, text, "black")
    ax.text(left + 4.75, TOP - 0.15, "grad h", ha="center", fontsize=8, color=GREY)
    grad_w = error[: step + 1].T @ h[: step + 1]
    for x in range(4):
        cell(left + x, TOP + 3.25, MIDDLE, number(grad_w[x].item()), "black")
    where = left - 0.12, TOP + 3.75
    ax.text(*where, "grad W", ha="right", va="center", fontsize=8, color=GREY)

bold = {"fontsize": 11, "weight": "bold"}
ax.text(0, -2.1, "All at once: three tables, 36 numbers in memory", **bold)
ax.text(
    0,
    TOP - 2.1,
    "One token at a time: its log-probabilities and its error, 8 numbers",
    **bold,
)
ax.set(xlim=(0, 20.1), ylim=(TOP + 4.4, -2.8))
ax.axis("off")
figure.savefig(HERE / "logits.svg", metadata={"Date": None})

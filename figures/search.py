"""Draw a beam search with two beams on a tree of words: writes search.svg beside this
file.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, red, grey, green = "#0b63a5", "#d1495b", "#9aa3aa", "#2a9d60"
tree = {
    "I": {"am": 0.5, "like": 0.3, "saw": 0.2},
    "I am": {"late": 0.4, "here": 0.3, "tired": 0.3},
    "I like": {"tea": 0.6, "rain": 0.4},
    "I saw": {"you": 0.9, "her": 0.1},
    "I am late": {"again": 0.5, "today": 0.3, "now": 0.2},
    "I like tea": {"hot": 0.7, "cold": 0.3},
    "I saw you": {"leave": 0.9, "there": 0.1},
}
heights = {
    "I": 0,
    "I am": 2.4,
    "I like": 0,
    "I saw": -2.4,
    "I am late": 2.7,
    "I am here": 1.9,
    "I am tired": 1.3,
    "I like tea": 0.2,
    "I like rain": -0.6,
    "I saw you": -2.1,
    "I saw her": -2.9,
    "I am late again": 3.0,
    "I am late today": 2.6,
    "I am late now": 2.2,
    "I like tea hot": 0.5,
    "I like tea cold": -0.2,
    "I saw you leave": -1.8,
    "I saw you there": -2.5,
}
greedy = {"I am", "I am late", "I am late again"}
kept = {"I am", "I like", "I am late", "I like tea", "I like tea hot"}
kept |= {"I am late again"}
best = {"I saw", "I saw you", "I saw you leave"}

figure, ax = plt.subplots(figsize=(9.5, 4.4))
products = {"I": 1.0}
ax.text(0, 0, "I", ha="center", va="center", fontweight="bold")
for start, nexts in tree.items():
    for word, share in nexts.items():
        text = f"{start} {word}"
        products[text] = products[start] * share
        step = text.count(" ")
        x0, y0, x, y = step - 1, heights[start], step, heights[text]
        color = blue if text in kept else green if text in best else grey
        ends = [x0 + (0.5 if step > 1 else 0.06), x - 0.04]
        style = "--" if text in best else "-"
        ax.plot(ends, [y0, y], style, color=color, linewidth=2 if color != grey else 1)
        label = f"{word} {products[text]:.3g}"
        weight = "normal" if color == grey else "bold"
        ax.text(x, y, label, va="center", color=color, fontsize=10, fontweight=weight)
        if text in greedy:
            ax.plot(x - 0.04, y, "o", color=red, markersize=5)
notes = [(3.0, "greedy decoding", red), (0.5, "two beams", blue)]
for y, note, color in [*notes, (-1.8, "the most probable", green)]:
    ax.text(3.62, y, note, va="center", color=color, fontsize=10)
for x, title in ((1, "first word"), (2, "second"), (3, "third")):
    ax.text(x, 3.7, title, fontsize=10)
ax.set(xlim=(-0.1, 4.4), ylim=(-3.3, 4))
ax.axis("off")
figure.savefig(HERE / "search.svg", metadata={"Date": None})
if len(sys.argv) > 1:
    figure.savefig(sys.argv[1])

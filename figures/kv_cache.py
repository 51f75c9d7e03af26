"""Draw which keys and values each step computes with and without a cache: writes
kv_cache.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
blue, pale, empty = "#0b63a5", "#a9c9e4", "#f1f4f6"
words = ["old", "dogs", "sleep", "late", "today"]

figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.3))
for axes, cached, title in (
    (panels[0], False, "without a cache: 15 pairs are computed"),
    (panels[1], True, "with a cache: 5 pairs are computed"),
):
    for step in range(5):
        for word in range(5):
            computed = word == step or (word < step and not cached)
            kept = cached and word < step
            face = blue if computed else pale if kept else empty
            axes.add_patch(plt.Rectangle((word, 4 - step), 0.94, 0.94, facecolor=face))
            text = "k, v" if computed else "kept" if kept else ""
            ink = "white" if computed else "#23415c"
            place = (word + 0.47, 4.47 - step)
            axes.text(*place, text, ha="center", va="center", color=ink, fontsize=9)
        axes.text(-0.15, 4.47 - step, f"step {step + 1}", ha="right", va="center")
    for column, word in enumerate(words):
        axes.text(column + 0.47, -0.3, word, ha="center", va="center")
    axes.set_title(title, fontsize=10)
    axes.set(xlim=(-1.1, 5), ylim=(-0.6, 5.05))
    axes.axis("off")
figure.savefig(HERE / "kv_cache.svg", metadata={"Date": None})

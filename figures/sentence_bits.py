"""Draw what one sentence costs two models, as boxes as wide as their bits: writes
sentence_bits.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

WORDS = ["the", "cat", "drank", "milk"]
rows = [(WORDS, [2, 3, 3, 1]), (" ".join(WORDS), [1] * 18)]

figure, ax = plt.subplots(figsize=(8, 1.9))
for row, (pieces, bits) in enumerate(rows):
    left = 0
    for piece, cost in zip(pieces, bits):
        ax.barh(row, cost, left=left, color="#c9dcec", edgecolor="#0b63a5")
        ax.text(left + cost / 2, row, piece, ha="center", va="center")
        left += cost
    ax.text(left + 0.2, row, f"{left} bits", va="center")
ax.set(xticks=range(0, 21, 2), xlabel="bits", title="What the sentence costs")
ax.set_yticks([0, 1], ["A, words", "B, bytes"])
ax.invert_yaxis()
ax.grid(False)
figure.savefig(HERE / "sentence_bits.svg", metadata={"Date": None})

"""Draw "then that is the other bat" before and after each of three merges: writes
bpe.svg beside this file.
"""

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

TEXT = "then that is the other bat"
NEW, OLD = "#2f6690", "#e9edf0"


def merged(tokens, pair):
    """Tokens with each occurrence of a pair glued together."""
    result = []
    while tokens:
        if tuple(tokens[:2]) == pair:
            result.append(tokens[0] + tokens[1])
            tokens = tokens[2:]
        else:
            result.append(tokens[0])
            tokens = tokens[1:]
    return result


rows = [(None, list(TEXT))]
for _ in range(3):
    tokens = rows[-1][1]
    pairs = Counter(zip(tokens, tokens[1:]))
    best = max(pairs, key=pairs.get)
    rows.append((best[0] + best[1], merged(tokens, best)))

figure, ax = plt.subplots(figsize=(10, 2.2))
for y, (newest, tokens) in enumerate(rows):
    x = 0
    for token in tokens:
        fresh = token == newest
        color = NEW if fresh else OLD
        box = plt.Rectangle(
            (x + 0.05, -y - 0.36), len(token) - 0.1, 0.72, facecolor=color
        )
        ax.add_patch(box)
        for k, letter in enumerate(token):
            ax.text(
                x + k + 0.5,
                -y,
                letter.replace(" ", "␣"),
                ha="center",
                va="center",
                family="monospace",
                fontsize=11,
                color="white" if fresh else "black",
            )
        x += len(token)
    label = "letters" if newest is None else f"+ {newest.replace(' ', '␣')}"
    ax.text(-0.4, -y, label, ha="right", va="center", fontsize=10)
    ax.text(x + 0.4, -y, f"{len(tokens)} tokens", ha="left", va="center", fontsize=10)
ax.set(xlim=(-3, len(TEXT) + 3.2), ylim=(-len(rows) + 0.4, 0.6))
ax.axis("off")
figure.savefig(HERE / "bpe.svg", metadata={"Date": None})

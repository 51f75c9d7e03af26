"""Draw three rounds of a reduce-scatter on a ring of four ranks: writes ring.svg beside
this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
COLOURS = ("#0b63a5", "#d1495b", "#2a9d60", "#b07d00")  # of the four pieces
DIGITS = (1, 10, 100, 1000)
SIZE = 0.86

figure, ax = plt.subplots(figsize=(10.0, 4.1))
ax.set(xlim=(-2.5, 18.3), ylim=(-5.0, 1.5))
ax.axis("off")
vectors = [[(rank + 1) * digit for digit in DIGITS] for rank in range(4)]
for row, title in enumerate(("at first", "round 1", "round 2", "round 3")):
    y = -1.6 * row
    ax.text(-2.5, y + SIZE / 2, title, va="center", fontsize=10)
    arrived = {}
    if row > 0:
        for piece in range(4):
            sender = (piece + row) % 4
            receiver = (sender + 1) % 4
            vectors[receiver][piece] += vectors[sender][piece]
            arrived[receiver] = piece
    for rank in range(4):
        left = 4.7 * rank
        if row == 0:
            ax.text(left + 2.0, 1.15, f"rank {rank}", ha="center", fontsize=11)
        for piece in range(4):
            new = arrived.get(rank) == piece
            box(
                ax,
                left + piece,
                y,
                str(vectors[rank][piece]),
                SIZE,
                SIZE,
                face=COLOURS[piece] if new else "#e9edf0",
                ink="white" if new else COLOURS[piece],
                fontsize=8.5,
            )
        if row < 3:  # what this rank sends in the next round, and to whom
            piece = (rank - 1 - row) % 4
            start = left + piece + SIZE / 2
            receiver = (rank + 1) % 4
            end = 4.7 * receiver + piece + SIZE / 2
            if receiver == 0:  # off the right edge, and in again at the left one
                arrow(ax, (start, y - 0.04), (18.3, y - 0.3))
                arrow(ax, (-0.9, y - 0.47), (end, y - 0.72))
            else:
                arrow(ax, (start, y - 0.04), (end, y - 0.72))
figure.savefig(HERE / "ring.svg", metadata={"Date": None})

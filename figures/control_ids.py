"""Draw Qwen2.5's ids in a row: bytes, joined tokens, control tokens, and who may write
which. Writes control_ids.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from drawing import GREY, arrow, box

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
DARK = "#2f6690"

figure, ax = plt.subplots(figsize=(9, 2.5))
parts = (
    (0.0, 2.6, "0 ... 255", "256 single bytes", "H  is  39"),
    (2.8, 5.6, "256 ... 151,642", "tokens joined from them", "Hi  is  13048"),
    (8.6, 3.8, "151,643 ... 151,664", "22 control tokens", "<|im_end|>  is  151645"),
)
for x, width, ids, what, example in parts:
    dark = what.endswith("control tokens")
    face, ink = (DARK, "white") if dark else ("#e9edf0", "black")
    box(ax, x, 1.4, ids, width, 0.7, face, ink)
    middle = x + width / 2
    ax.text(middle, 2.75, what, ha="center", fontsize=9)
    ax.text(middle, 2.32, example, ha="center", fontsize=8, family="monospace")
box(ax, 2.0, 0, "whatever a user types", 4.2, 0.6, "#f6e3c5")
arrow(ax, (4.1, 0.62), (1.3, 1.36))
arrow(ax, (4.1, 0.62), (5.6, 1.36))
box(ax, 8.6, 0, "what the program puts in", 3.8, 0.6, "#f6e3c5")
arrow(ax, (10.5, 0.62), (10.5, 1.36))
ax.plot([8.5, 8.5], [-0.1, 3.1], color=GREY, linewidth=1.2, linestyle="--")
ax.set(xlim=(-0.2, 12.6), ylim=(-0.2, 3.2))
ax.axis("off")
figure.savefig(HERE / "control_ids.svg", metadata={"Date": None})

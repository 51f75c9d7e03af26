"""Draw a run that is not disturbed, one that is killed and one that is asked to stop:
writes stopped_runs.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
plt.style.use(HERE / "book.mplstyle")
BLUE, ORANGE = "#0b63a5", "#e0a100"

figure, axes = plt.subplots(figsize=(8, 2.9))
for y, first, last, words, saved in (
    (4, 0, 60, "", (20, 40, 60)),
    (3, 0, 30, "", (20,)),
    (2, 20, 60, "from the checkpoint of step 20", (40, 60)),
    (1, 0, 34, "", (20, 34)),
    (0, 34, 60, "from the checkpoint of step 34", (40, 60)),
):
    axes.barh(y, last - first, left=first, height=0.62, color=BLUE)
    axes.vlines(saved, y - 0.45, y + 0.45, color="black", linewidth=2.5)
    if words:
        axes.text(first - 0.8, y, words, ha="right", va="center", fontsize=9)
axes.barh(3, 10, left=20, height=0.62, color=ORANGE)
axes.vlines(20, 2.55, 3.45, color="black", linewidth=2.5)
axes.text(25, 3, "lost", ha="center", va="center", fontsize=9)
axes.text(30.8, 3, "killed", ha="left", va="center", fontsize=9)
axes.text(34.8, 1, "saves, and ends", ha="left", va="center", fontsize=9)
names = ["undisturbed", "killed", "… and resumed", "asked to stop", "… and resumed"]
axes.set_yticks([4, 3, 2, 1, 0], names)
axes.set_xticks([0, 10, 20, 30, 34, 40, 50, 60])
axes.set(xlabel="steps taken", xlim=(0, 61))
axes.grid(False)
figure.savefig(HERE / "stopped_runs.svg", metadata={"Date": None})

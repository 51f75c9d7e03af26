"""The scaling law of the chapter on scoring, which no module exports."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from chapter_code import from_chapter

_LAW = {"np": np, "dataclass": dataclass, "Sequence": Sequence}
for beginning in (
    "@dataclass\nclass ScalingLaw",
    "def fit_power_law",
    "def fit_scaling_law",
):
    _LAW |= from_chapter("*_scoring.ipynb", beginning, _LAW)
fit_scaling_law = _LAW["fit_scaling_law"]


def test_scaling_law_is_recovered():
    sizes = np.array([1e4, 3e4, 1e5, 3e5, 1e6, 1e7])
    law = fit_scaling_law(sizes, 1.7 + 80 * sizes**-0.45)
    assert (
        abs(law.alpha - 0.45) < 0.01
        and abs(law.floor - 1.7) < 0.02
        and law.noise < 1e-3
    )
    assert np.allclose(law.predict(sizes), 1.7 + 80 * sizes**-0.45, rtol=2e-3)
    rising = fit_scaling_law(sizes, [1, 2, 3, 4, 5, 6])
    assert (
        rising.scale == 0 and abs(rising.floor - 3.5) < 1e-9
    )  # no law of this form: the mean
    falling = fit_scaling_law([1, 2, 4, 8, 16, 32], [6, 5, 4, 3, 2, 1])
    assert falling.floor == 0 and falling.scale > 0  # a floor is never below 0
    assert np.sum((falling.predict([1, 2, 4, 8, 16, 32]) - [6, 5, 4, 3, 2, 1]) ** 2) < 2


def test_scaling_intervals_cover():
    rng = np.random.default_rng(0)
    sizes = np.repeat([1e4, 3e4, 1e5, 3e5], 2)
    truth = lambda n: 1.5 + 30 * np.asarray(n) ** -0.3
    inside = {"seen": [], "ten times": []}
    for i in range(80):
        law = fit_scaling_law(
            sizes, truth(sizes) + 0.02 * rng.standard_normal(8), draws=300, seed=i
        )
        for name, n in (("seen", 1e5), ("ten times", 3e6)):
            (low,), (high,) = law.interval([n])
            inside[name].append(low < truth(n) + 0.02 * rng.standard_normal() < high)
    assert all(0.8 < np.mean(hits) < 0.99 for hits in inside.values()), {
        k: np.mean(v) for k, v in inside.items()
    }
    widths = np.subtract(*law.interval([1e5, 3e6])[::-1])
    assert widths[1] > 1.5 * widths[0]  # far away it says less


@pytest.mark.parametrize(
    "sizes,losses",
    [
        ([1, 2, 3], [3, 2, 1]),
        ([1, 1, 2, 2], [3, 2, 1, 1]),
        ([1, 2, 3, 4], [3, 2, 1]),
        ([1, 2, 3, 0], [4, 3, 2, 1]),
        ([1, 2, 3, 4], [4, 3, 2, math.nan]),
    ],
)
def test_impossible_scaling(sizes, losses):
    with pytest.raises(ValueError, match="scaling law|positive finite"):
        fit_scaling_law(sizes, losses)

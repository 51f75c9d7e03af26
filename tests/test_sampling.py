"""Sampling: filters and penalty equal to Hugging Face's; one draw for all rows, each of
which gets what it would get alone; extremes of every setting; broken rows.
"""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_analog import sampling
from qwen_analog.sampling import (
    LogitsError,
    SamplingParams,
    check_ids,
    distribution,
    filter_logits,
    new_generator,
    penalize_repetition,
    sample,
)


def warpers(
    temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None
):
    chain = (
        []
        if repetition_penalty is None
        else [RepetitionPenaltyLogitsProcessor(float(repetition_penalty))]
    )
    chain += [TemperatureLogitsWarper(float(temperature))]
    chain += [] if top_k is None else [TopKLogitsWarper(top_k)]
    chain += [] if top_p is None else [TopPLogitsWarper(top_p)]
    chain += [] if min_p is None else [MinPLogitsWarper(min_p)]
    return LogitsProcessorList(chain)


def chi_squared(draws, probabilities):
    """(statistic, df); tokens expected fewer than ten times are pooled; an impossible
    token is infinite.
    """
    observed, expected = (
        draws.bincount(minlength=len(probabilities)).double(),
        len(draws) * probabilities.double(),
    )
    if observed[expected == 0].any():
        return math.inf, 0
    rare = expected < 10
    observed, expected = (
        torch.cat((x[~rare], x[rare].sum()[None])) for x in (observed, expected)
    )
    cells = expected > 0
    return ((observed - expected)[cells] ** 2 / expected[cells]).sum().item(), int(
        cells.sum()
    ) - 1


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    rows=st.integers(1, 3),
    scale=st.sampled_from([0.5, 0.137]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 80),
    top_p=st.none() | st.floats(1e-9, 1.0),
    min_p=st.none() | st.floats(0, 1),
)
def test_filters_equal_hugging_face(
    values, rows, scale, dtype, temperature, top_k, top_p, min_p
):
    """Integers times a scale: ties everywhere."""
    logits = (
        torch.stack([torch.tensor(values, dtype=dtype).roll(i) for i in range(rows)])
        * scale
    )
    before = logits.clone()
    got = filter_logits(logits, temperature, top_k, top_p, min_p)
    assert torch.equal(
        got, warpers(temperature, top_k, top_p, min_p)(None, logits)
    ) and torch.equal(logits, before)
    assert got.isfinite().any(-1).all()


@settings(max_examples=150, deadline=None)
@given(
    V=st.integers(1, 40),
    rows=st.integers(1, 3),
    length=st.integers(1, 30),
    penalty=st.floats(0.1, 10),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_repetition_penalty_equals_hugging_face(
    V, rows, length, penalty, seed, dtype
):
    dice = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, V, generator=dice, dtype=dtype) * 3).round(
        decimals=1
    )  # zeros too
    ids = torch.randint(
        V + 5, (rows, length), generator=dice
    )  # also ids beyond the logits' columns
    before = logits.clone()
    got = penalize_repetition(logits, ids, penalty)
    assert torch.equal(
        got, RepetitionPenaltyLogitsProcessor(float(penalty))(ids, logits.clone())
    ) and torch.equal(logits, before)
    mask = (
        torch.arange(length) >= torch.randint(length, (rows, 1), generator=dice)
    ).long()
    masked = penalize_repetition(logits, ids, penalty, mask)
    for row in range(rows):
        alone = penalize_repetition(
            logits[row : row + 1],
            ids[row : row + 1, length - int(mask[row].sum()) :],
            penalty,
        )
        assert torch.equal(masked[row : row + 1], alone)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("min_p", 2),
    ],
)
def test_filter_logits_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        filter_logits(torch.zeros(1, 4), **{name: value})


def hostile_logits():
    """[12, 31] float32: finite largest values, whatever else."""
    dice, number = torch.Generator().manual_seed(0), torch.finfo(torch.float32)
    logits = torch.randn(12, 31, generator=dice) * torch.logspace(-40, 37, 12)[:, None]
    logits[1] = 0
    logits[3] = number.min
    logits[4, :16], logits[4, 16:] = number.max, number.min
    logits[5, 5:] = -math.inf
    logits[6] = -number.tiny
    logits[7, 1:] = -math.inf
    return logits


EXTREMES = [
    dict(temperature=t)
    for t in (5e-324, 1e-310, 1e-300, 1e-40, 1e-20, 1e20, 1e40, 1e300, 10**300)
]
EXTREMES += [dict(repetition_penalty=p) for p in (5e-324, 1e-300, 1e-40, 1e40, 1e300)]
EXTREMES += [
    dict(top_p=1e-300),
    dict(top_p=5e-324),
    dict(min_p=1),
    dict(min_p=1e-300),
    dict(top_k=10**30),
]
EXTREMES += [
    dict(temperature=1e-40, top_k=10**9, top_p=1e-300, min_p=1.0, repetition_penalty=p)
    for p in (1e-300, 1e300)
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_every_legal_setting_draws_from_finite_logits(settings):
    logits, seen = (
        hostile_logits(),
        torch.randint(31, (12, 6), generator=torch.Generator().manual_seed(1)),
    )
    for options in (
        settings,
        {**settings, "temperature": 0},
        {"repetition_penalty": 1e-40, **settings},
    ):
        p = distribution(logits, SamplingParams(**options), seen)
        assert (
            p.isfinite().all()
            and (p >= 0).all()
            and torch.allclose(p.sum(-1), torch.ones(12))
        )
        assert not p[logits == -math.inf].any()  # what is forbidden stays so
        assert sample(logits, SamplingParams(**options), seen).shape == (12,)


def test_extremes_are_limits():
    logits = torch.tensor([[3.0, 1.0, 3.0, -2.0]])
    for temperature in (5e-324, 1e-40, 1e-20):
        assert distribution(logits, SamplingParams(temperature)).tolist() == [
            [0.5, 0, 0.5, 0]
        ]
    for temperature in (1e30, 1e300):
        assert distribution(logits, SamplingParams(temperature)).tolist() == [
            [0.25] * 4
        ]
    for penalty in (5e-324, 1e-40):  # of what has occurred the largest positive one
        assert distribution(
            logits,
            SamplingParams(repetition_penalty=penalty),
            torch.tensor([[1, 2, 3]]),
        ).tolist() == [[0, 0, 1, 0]]
    for penalty in (1e40, 1e300):
        expected = torch.tensor([[3.0, 0.0, 0.0, -math.inf]]).softmax(-1)
        torch.testing.assert_close(
            distribution(
                logits,
                SamplingParams(repetition_penalty=penalty),
                torch.tensor([[1, 2, 3]]),
            ),
            expected,
        )


BROKEN = [math.nan, math.inf, "nothing"]
PARAMS = [
    SamplingParams(0),
    SamplingParams(),
    SamplingParams(top_p=0.5, repetition_penalty=1.3),
]


def broken_logits(bad):
    """[5, 9], of which rows 1 and 4 allow no choice."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    for row in (1, 4):
        if bad == "nothing":
            logits[row] = -math.inf
        else:
            logits[row, 3] = bad
    return logits


@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_rows_without_a_choice_get_no_id(bad, params):
    logits, history = broken_logits(bad), torch.zeros(5, 2, dtype=torch.int64)
    generators = [new_generator("cpu", seed) for seed in range(5)]
    ids = sample(logits, params, history, generators=generators)
    assert ids[[1, 4]].tolist() == [-1, -1]
    sound = [0, 2, 3]
    generators = [new_generator("cpu", seed) for seed in sound]
    alone = sample(logits[sound], params, history[sound], generators=generators)
    assert ids[sound].tolist() == alone.tolist() and (alone >= 0).all()
    assert sample(logits[4:], params).tolist() == [-1]


def test_the_error_names_the_rows():
    assert check_ids([3, 0, 5]) == [3, 0, 5]
    for ids, rows, where in (
        ([0, -1, 4, 2, -1], [1, 4], " in 2 of 5 rows"),
        ([0, -1, 4, 2], [1], " in row 1 of 4"),
        ([-1], [0], ""),
    ):
        with pytest.raises(
            LogitsError, match=f"^the logits are not finite{where}: "
        ) as error:
            check_ids(ids)
        assert error.value.rows == rows and isinstance(error.value, ValueError)


WISHES = [
    SamplingParams(0),
    SamplingParams(),
    SamplingParams(0.6),
    SamplingParams(1.7, top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.3),
    SamplingParams(repetition_penalty=6.0),
    SamplingParams(0, repetition_penalty=3.0),
    SamplingParams(1.3, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.5),
    SamplingParams(1e-40, top_k=10**30, top_p=1e-300),
    SamplingParams(top_k=1),
]


def wishes(rows, seed=0):
    """Logits [rows, 60], histories, masks and settings that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, 60, generator=generator)
    history = torch.randint(60, (rows, 8), generator=generator)
    padding = torch.randint(8, (rows, 1), generator=generator)
    params = [WISHES[(seed + row) % len(WISHES)] for row in range(rows)]
    return logits, params, history, torch.arange(8) >= padding


@pytest.mark.parametrize("seed", range(4))
def test_rows_with_different_wishes_are_what_they_are_alone(seed):
    logits, params, history, mask = wishes(23, seed)
    p = distribution(logits, params, history, mask)
    generators = [new_generator("cpu", row) for row in range(23)]
    ids = sample(logits, params, history, mask, generators)
    for row in range(23):
        one = slice(row, row + 1)
        options = logits[one], params[row], history[one], mask[one]
        assert torch.equal(p[one], distribution(*options))
        assert ids[one].tolist() == sample(*options, new_generator("cpu", row)).tolist()
        generators = [new_generator("cpu", row)]
        assert ids[one].tolist() == sample(*options, generators).tolist()
    assert len(ids.unique()) > 8


@pytest.mark.parametrize("params", WISHES, ids=str)
def test_one_setting_for_all_rows_and_one_a_row(params):
    logits, _, history, mask = wishes(7)
    p = distribution(logits, params, history, mask)
    assert torch.equal(p, distribution(logits, [params] * 7, history, mask))


@pytest.mark.parametrize("params", WISHES, ids=str)
def test_draws_are_those_of_multinomial(params):
    logits, _, history, mask = wishes(300)
    p = distribution(logits, params, history, mask)
    ids = sample(logits, params, history, mask, torch.Generator().manual_seed(3))
    expected = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))
    if params.temperature == 0:
        expected = p.argmax(-1, keepdim=True)
    assert torch.equal(ids, expected[:, 0])


def test_random_numbers_are_taken_from_each_rows_own_generator():
    logits, params, history, mask = wishes(11)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    generators = [new_generator("cpu", 5) for _ in range(11)]
    states = [generator.get_state() for generator in generators]
    sample(logits, params, history, mask, generators)
    assert torch.equal(torch.get_rng_state(), before)
    for row, generator, state in zip(params, generators, states):
        assert torch.equal(generator.get_state(), state) == (row.temperature == 0)
    sample(logits, SamplingParams(0))  # greedy: no random numbers at all
    assert torch.equal(torch.get_rng_state(), before)
    sample(logits, params, generators=[None] * 11)
    assert not torch.equal(torch.get_rng_state(), before)


class Waits(TorchDispatchMode):
    """Lists what is computed and counts what makes the host wait for a GPU: a number
    that is read, a shape that depends on numbers, and a list that is copied out.
    """

    def __init__(self):
        super().__init__()
        self.names, self.count = [], 0

    def __enter__(self):
        self.tolist = torch.Tensor.tolist
        torch.Tensor.tolist = lambda tensor: self.copied(tensor)
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def copied(self, tensor):
        self.count += 1
        return self.tolist(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        self.count += name.startswith(waits)
        self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_and_no_row_is_computed_by_itself():
    counts = []
    for rows in (11, 55):
        logits, params, history, mask = wishes(rows)
        generators = [new_generator("cpu", row) for row in range(rows)]
        with Waits() as waits:
            sample(logits, params, history, mask, generators)
        assert waits.count == 0
        per_row = ("exponential_", "select", "unbind")  # each row's own noise
        shared = [name for name in waits.names if not name.startswith(per_row)]
        counts.append(len(shared))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", True),
        ("top_p", 0),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", torch.ones(2, 2)),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
    ],
    ids=lambda value: repr(value)[:25].replace("\n", ""),
)
def test_settings_check_themselves(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_a_generator_without_a_seed_is_new():
    states = [new_generator("cpu").get_state() for _ in range(2)]
    assert not torch.equal(*states)
    seeded = [new_generator("cpu", 2**64 - 1).get_state() for _ in range(2)]
    assert torch.equal(*seeded)


def draws_have_the_distribution():
    """Draws against what Hugging Face's filters leave."""
    logits = torch.tensor([[40, 20, 12, 10, 8, 5, 3, 1.5, 0.5]]).log()
    rows = logits.expand(100_000, -1)
    for wish in (dict(), dict(temperature=0.9, top_p=0.9)):
        target = warpers(**wish)(None, logits).softmax(-1)[0]
        ids = sample(rows, SamplingParams(**wish), generators=new_generator("cpu", 1))
        statistic, df = chi_squared(ids, target)
        assert statistic < df + 5 * math.sqrt(2 * df), f"{statistic:.0f}, df {df}"


def test_draws_have_the_distribution():
    draws_have_the_distribution()


def draws_of_one_byte(p, greedy, generators):
    """Noise that lets a dart of 256 levels choose."""
    u = torch.randint(256, (len(p), 1), generator=generators) / 256
    ids = (p.cumsum(-1) <= u).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return torch.ones_like(p).scatter(-1, ids, 1e-9)


def crossing_token_dropped(logits, top_p):
    p = logits.softmax(-1)
    ordered, order = p.sort(descending=True)
    dropped = (ordered.cumsum(-1) > torch.tensor(top_p)[:, None]).scatter(
        -1, order, ordered.cumsum(-1) > torch.tensor(top_p)[:, None]
    )
    return logits.masked_fill(dropped, -math.inf)


@pytest.mark.mutant
@pytest.mark.parametrize(
    "part, broken",
    [("_exponential", draws_of_one_byte), ("_keep_top_p", crossing_token_dropped)],
)
def test_broken_dice_are_noticed(part, broken, monkeypatch):
    monkeypatch.setattr(sampling, part, broken)
    with pytest.raises(AssertionError):
        draws_have_the_distribution()

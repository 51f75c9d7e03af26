"""Generation: the same tokens as Hugging Face, with and without a cache; samplers as
random processes; ends, padding rows, refusals.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from book import scramble_
from helpers import SETTINGS
from hypothesis import given, settings, strategies as st
from test_parity import BASE, SHAPES, pair
from test_sampling import EXTREMES, Waits, chi_squared, warpers

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.generate import (
    decode_steps,
    generate,
    own_stop_ids,
    pad_left,
    positions_and_mask,
    sampling_defaults,
)
from qwen_analog.sampling import SamplingParams
from qwen_analog.search import beam_search

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MIXED = dict(temperature=0.8, top_k=30, top_p=0.95, min_p=0.02)


def model_of(dtype=torch.float64, **overrides):
    return (
        scramble_(QwenForCausalLM(QwenConfig(**{**BASE, **overrides}))).to(dtype).eval()
    )


def prompt(rows=3, length=9, seed=0):
    return torch.randint(
        BASE["vocab_size"],
        (rows, length),
        generator=torch.Generator().manual_seed(seed),
    )


def test_contract():
    model, ids = model_of(torch.float32), prompt(2)
    torch.manual_seed(0)
    output = model.generate(ids, max_new_tokens=100, temperature=0.7)
    assert (
        output.shape == (2, 109)
        and output.dtype == torch.int64
        and torch.equal(output[:, :9], ids)
    )
    assert model.generate(ids).shape == (2, 109)
    assert torch.equal(
        model.generate(ids, 5, temperature=0),
        generate(model, ids, max_new_tokens=5, temperature=0.0),
    )
    same = model.generate(ids, 0)
    assert torch.equal(same, ids) and same.data_ptr() != ids.data_ptr()


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_hugging_face(shape, length):
    ours, theirs = pair(torch.float64, **SHAPES[shape])
    ids = prompt(3, length)
    # Hugging Face would take the pad id in a prompt for padding: the mask is given
    expected = theirs.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(ours.generate(ids, 24, temperature=0), expected)
    assert len(expected[:, length:].unique()) > 5


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str
)
def test_draws_equal_a_loop_over_hugging_face_warpers(dtype):
    """Our own uncached logits, so that a sixteen-bit model sees the same roundings; the
    rest is theirs, in float32.
    """
    model, ids = model_of(dtype), prompt()
    dice, expected = torch.Generator().manual_seed(5), ids
    with torch.no_grad():
        for _ in range(24):
            scores = warpers(**MIXED)(
                expected, model(expected, logits_to_keep=1)[:, -1].float()
            )
            expected = torch.cat(
                (expected, torch.multinomial(scores.softmax(-1), 1, generator=dice)),
                dim=1,
            )
    assert torch.equal(
        model.generate(ids, 24, seed=5, use_cache=False, **MIXED), expected
    )


def test_draws_equal_hugging_face_logits_and_warpers():
    ours, theirs = pair(torch.float64)
    dice, expected = torch.Generator().manual_seed(5), prompt()
    with torch.no_grad():
        for _ in range(24):
            scores = warpers(**MIXED)(expected, theirs(expected).logits[:, -1].float())
            expected = torch.cat(
                (expected, torch.multinomial(scores.softmax(-1), 1, generator=dice)),
                dim=1,
            )
    assert torch.equal(ours.generate(prompt(), 24, seed=5, **MIXED), expected)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    new=st.integers(0, 12),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 5]),
    top_p=st.sampled_from([None, 0.5, 0.95]),
    penalty=st.sampled_from([1.0, 1.3]),
    copies=st.sampled_from([1, 3]),
    eos=st.sampled_from([None, 3, list(range(40))]),
    valid=st.sampled_from([None, 60]),
)
def test_cached_equals_uncached(
    shape,
    rows,
    length,
    new,
    seed,
    temperature,
    top_k,
    top_p,
    penalty,
    copies,
    eos,
    valid,
):
    model, ids = model_of(**SHAPES[shape]), prompt(rows, length, seed)
    mask = (
        torch.arange(length)
        >= torch.randint(
            length, (rows, 1), generator=torch.Generator().manual_seed(seed)
        )
    ).long()
    for attention_mask in (None, mask):
        cached, literal = (
            model.generate(
                ids,
                new,
                attention_mask=attention_mask,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=penalty,
                eos_token_id=eos,
                seed=seed,
                valid_vocab_size=valid,
                num_return_sequences=copies,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached, literal) and torch.equal(
            cached[::copies, :length], ids
        )


def test_cached_logits_and_the_work_of_a_step():
    model, ids, hidden, rows = model_of(), prompt(), [], []
    model.model.register_forward_hook(
        lambda module, inputs, output: hidden.append(output.shape[1])
    )
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: rows.append(output)
    )
    written = model.generate(ids, 20, temperature=0)
    hook.remove()
    assert (
        hidden == [9] + [1] * 19
        and [row.shape[1] for row in rows] == [1] * 20
        and not any(row.requires_grad for row in rows)
    )
    with torch.no_grad():
        assert (torch.cat(rows, dim=1) - model(written)[:, 8:-1]).abs().max() < 1e-10


SAMPLERS = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.3),
    dict(repetition_penalty=6.0),
    dict(temperature=1.3, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.5),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_have_the_right_distribution(sampler, device):
    model, ids = (
        model_of(torch.float32, tie_word_embeddings=False).to(device),
        prompt(1, 12).to(device),
    )
    with torch.no_grad():
        logits = model(ids)[:, -1] / 4
        model.lm_head.weight /= 4  # flatter: more tokens are possible
    draws = model.generate(ids, 1, num_return_sequences=20_000, seed=0, **sampler)[
        :, -1
    ].cpu()
    for other in SAMPLERS:
        statistic, df = chi_squared(
            draws, warpers(**other)(ids, logits).softmax(-1)[0].cpu()
        )
        print(f"drawn with {sampler}, held against {other}: {statistic:.1f}, df {df}")
        assert (statistic < df + 5 * math.sqrt(2 * df)) == (other == sampler)


def test_successive_draws_are_independent():
    model = model_of(torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely, whatever came before
    pairs = model.generate(
        prompt(1, 1).expand(20_000, 1), 2, seed=0, valid_vocab_size=20
    )[:, 1:]
    statistic, df = chi_squared(
        pairs[:, 0] * 20 + pairs[:, 1], torch.full((400,), 1 / 400)
    )
    assert df == 399 and statistic < df + 5 * math.sqrt(2 * df)


@pytest.mark.parametrize("sampler", [dict(temperature=0), dict(seed=4)], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_rows_end_are_filled_up_and_stop_together(sampler, several):
    model, ids = model_of(), prompt()
    free = model.generate(ids, 30, **sampler)
    eos = [int(free[0, 12]), int(free[1, 20])] if several else int(free[0, 12])
    first = eos[0] if several else eos
    expected = free.clone()
    for row in expected:
        ends = torch.isin(row[9:], torch.tensor(eos)).nonzero()
        if len(ends):
            row[10 + int(ends[0]) :] = first
    got = model.generate(ids, 30, eos_token_id=eos, **sampler)
    assert torch.equal(got, expected[:, : got.shape[1]])
    done = torch.isin(expected[:, 9:], torch.tensor(eos)).cummax(-1).values.all(0)
    assert got.shape[1] == (9 + int(done.nonzero()[0]) + 1 if done.any() else 39)


def test_stops_early_and_keeps_the_end_token():
    model, ids = model_of(), prompt(1)
    free = model.generate(ids, 30, temperature=0)[0]
    eos = int(free[20])
    end = 10 + int((free[9:] == eos).nonzero()[0])
    assert (
        torch.equal(
            model.generate(ids, 30, temperature=0, eos_token_id=eos)[0], free[:end]
        )
        and end < 39
    )


def test_an_end_token_in_the_prompt_does_not_end():
    model, ids = model_of(), prompt()
    eos = int(ids[0, 3])
    written = model.generate(ids, 1, temperature=0, eos_token_id=eos)
    assert torch.equal(written, model.generate(ids, 1, temperature=0))
    assert torch.equal(
        model.generate(ids, 10, temperature=0, eos_token_id=[]),
        model.generate(ids, 10, temperature=0),
    )


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "sampler",
    [
        dict(temperature=0),
        dict(temperature=4.0, seed=0),
        dict(temperature=4.0, top_k=50, top_p=0.99, seed=0),
    ],
    ids=str,
)
def test_padding_rows_are_never_chosen(sampler, use_cache):
    model, ids = model_of(), prompt()
    assert (model.generate(ids, 60, use_cache=use_cache, **sampler)[:, 9:] >= 40).any()
    assert (
        model.generate(ids, 60, use_cache=use_cache, valid_vocab_size=40, **sampler)[
            :, 9:
        ].max()
        < 40
    )
    with torch.no_grad():
        model.lm_head.weight[40:] = (
            math.nan
        )  # not even looked at (the model is tied: the prompt stays below 40)
    assert (
        model.generate(
            ids % 40, 5, use_cache=use_cache, valid_vocab_size=40, **sampler
        ).max()
        < 40
    )


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("greedy", [True, False])
def test_hugging_faces_own_generate(greedy, penalty):
    """Everything at once, their loop: the global random state serves both."""
    ours, theirs = pair(torch.float64)
    options = (
        dict(temperature=0.9, top_k=60, top_p=0.97, min_p=0.01) if not greedy else {}
    )
    ids, ragged = (
        prompt(),
        pad_left([prompt(1, n, n)[0].tolist() for n in (1, 7, 9)], 0),
    )
    for input_ids, mask in (
        ((ids, torch.ones_like(ids)), ragged)
        if penalty == 1
        else ((ids, torch.ones_like(ids)),)
    ):  # they penalise padding
        torch.manual_seed(3)
        expected = theirs.eval().generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=24,
            do_sample=not greedy,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=penalty,
            num_return_sequences=1 if greedy else 2,
            **(options if greedy else {"typical_p": 1.0, **options}),
        )
        torch.manual_seed(3)
        got = ours.generate(
            input_ids,
            24,
            attention_mask=mask,
            repetition_penalty=penalty,
            num_return_sequences=1 if greedy else 2,
            **(dict(temperature=0) if greedy else options),
        )
        assert torch.equal(got, expected) and len(got[:, 9:].unique()) > 8


ROWS = [prompt(1, n, n)[0].tolist() for n in (1, 40, 7, 2, 13)]


def test_pad_left():
    input_ids, mask = pad_left([[5], [1, 2, 3], [7, 8]], 9)
    assert input_ids.tolist() == [
        [9, 9, 5],
        [1, 2, 3],
        [9, 7, 8],
    ] and mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert input_ids.dtype == mask.dtype == torch.int64
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            pad_left(rows, 0)


@pytest.mark.parametrize(
    "shape, options",
    [
        *((shape, {}) for shape in SHAPES),
        ("plain", dict(repetition_penalty=1.3)),
        ("plain", dict(use_cache=False)),
        ("plain", dict(valid_vocab_size=90)),
    ],
    ids=str,
)
def test_each_row_of_a_ragged_batch_is_that_row_alone(shape, options):
    model = model_of(torch.float32, **SHAPES[shape])
    alone = [
        model.generate(
            torch.tensor([ids]), 15, temperature=0, return_logprobs=True, **options
        )
        for ids in ROWS
    ]
    for pad_id in (0, 77):  # what stands in the padding does not matter
        input_ids, mask = pad_left(ROWS, pad_id)
        got, logprobs = model.generate(
            input_ids,
            15,
            attention_mask=mask,
            temperature=0,
            return_logprobs=True,
            **options,
        )
        for row, (ids, (its_tokens, its_logprobs)) in enumerate(zip(ROWS, alone)):
            assert got[row, 40 - len(ids) :].tolist() == its_tokens[0].tolist(), (
                pad_id,
                len(ids),
            )
            assert (logprobs[row] - its_logprobs[0]).abs().max() < 1e-4
        assert torch.equal(got[:, :40], input_ids) and len(got[:, 40:].unique()) > 20


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_count_from_each_rows_own_beginning(use_cache):
    """A shift of all positions of a row changes rotary attention by rounding only, so
    that the tokens do not show it: look at the positions.
    """
    model, positions, logits = model_of(), [], []
    input_ids, mask = pad_left(ROWS, 0)
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, inputs: positions.append(inputs[0])
    )
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: logits.append(output[:, -1])
    )
    model.generate(
        input_ids, 4, attention_mask=mask, temperature=0, use_cache=use_cache
    )
    got, seen = (
        torch.stack(logits, 1),
        torch.cat(positions[:1] + [new[:, -1:] for new in positions[1:]], dim=1),
    )
    for row, ids in enumerate(ROWS):
        assert seen[row, 40 - len(ids) :].tolist() == list(range(len(ids) + 3))
        logits.clear()
        model.generate(torch.tensor([ids]), 4, temperature=0)
        assert (
            got[row] - torch.stack(logits, 1)[0]
        ).abs().max() < 1e-11  # an angle is float32: a shift would show here


def test_every_token_sees_something():
    """A softmax over nothing is nan (PyTorch's attention gives 0 there, which no
    documentation promises).
    """
    for start, end in ((0, 9), (3, 9), (8, 9)):
        positions, mask = positions_and_mask(torch.tensor([0, 5, 8]), start, end)
        assert (
            positions.shape == (3, end - start)
            and mask.shape == (3, 1, end - start, end)
            and mask.any(-1).all()
        )


def test_padding_as_bool_and_a_mask_of_ones():
    model = model_of()
    input_ids, mask = pad_left(ROWS, 0)
    expected = model.generate(input_ids, 5, attention_mask=mask, temperature=0)
    assert torch.equal(
        model.generate(input_ids, 5, attention_mask=mask.bool(), temperature=0),
        expected,
    )
    assert torch.equal(
        model.generate(input_ids, 5, attention_mask=mask.float(), temperature=0),
        expected,
    )
    assert not torch.equal(model.generate(input_ids, 5, temperature=0), expected)
    assert torch.equal(
        model.generate(prompt(), 5, attention_mask=torch.ones_like(prompt()), seed=0),
        model.generate(prompt(), 5, seed=0),
    )


def test_rows_of_a_ragged_batch_end_and_are_filled_up():
    model = model_of()
    input_ids, mask = pad_left(ROWS, 0)
    free = model.generate(input_ids, 30, attention_mask=mask, temperature=0)
    eos = int(free[0, 45])
    got = model.generate(
        input_ids, 30, attention_mask=mask, temperature=0, eos_token_id=eos
    )
    stops = [
        int((row == eos).nonzero()[0]) + 1 if (row == eos).any() else 30
        for row in free[:, 40:]
    ]
    assert got.shape[1] == 40 + max(stops) and min(stops) < max(stops)
    for stop, row, free_row in zip(stops, got[:, 40:], free[:, 40:]):
        assert torch.equal(row[:stop], free_row[:stop]) and (row[stop:] == eos).all()


def test_samples_of_a_row_stand_together_and_read_the_prompt_once():
    model, ids, read = model_of(), prompt(3), []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: read.append(tuple(output.shape[:2]))
    )
    got = model.generate(ids, 6, num_return_sequences=4, seed=0)
    hook.remove()
    assert read == [(3, 9)] + [(12, 1)] * 5
    assert got.shape == (12, 15) and torch.equal(
        got[:, :9], ids.repeat_interleave(4, 0)
    )
    assert len(got[:4].unique(dim=0)) == 4  # the samples of one row differ
    assert torch.equal(got, model.generate(ids.repeat_interleave(4, 0), 6, seed=0))
    input_ids, mask = pad_left(ROWS, 0)
    ragged = model.generate(
        input_ids, 6, attention_mask=mask, num_return_sequences=2, seed=0
    )
    again = model.generate(
        input_ids.repeat_interleave(2, 0),
        6,
        attention_mask=mask.repeat_interleave(2, 0),
        seed=0,
    )
    assert torch.equal(ragged, again)
    same = model.generate(ids, 6, num_return_sequences=2, temperature=0)
    assert torch.equal(same[::2], same[1::2])


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0),
        dict(seed=1, **MIXED),
        dict(seed=1, repetition_penalty=1.5, valid_vocab_size=90),
        dict(seed=1, num_return_sequences=3),
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_a_plain_forward(options):
    model, ids = model_of(torch.float32), prompt()
    tokens, logprobs = model.generate(ids, 20, return_logprobs=True, **options)
    assert (
        torch.equal(tokens, model.generate(ids, 20, **options))
        and logprobs.shape == (len(tokens), 20)
        and not logprobs.requires_grad
    )
    with torch.no_grad():
        expected = (
            model(tokens)[:, 8:-1]
            .log_softmax(-1)
            .gather(-1, tokens[:, 9:, None])[..., 0]
        )
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    assert (logprobs < -0.1).any()
    eos = int(tokens[0, 14])
    ended, its = model.generate(
        ids, 20, return_logprobs=True, eos_token_id=eos, **options
    )
    filled = (
        torch.isin(ended[:, 9:], torch.tensor(eos)).cumsum(-1)
        - (ended[:, 9:] == eos).long()
        > 0
    )
    assert (
        filled.any()
        and (its[filled] == 0).all()
        and torch.equal(its[~filled], logprobs[:, : its.shape[1]][~filled])
    )
    none, empty = model.generate(ids, 0, return_logprobs=True)
    assert torch.equal(none, ids) and empty.shape == (3, 0)


def test_a_penalised_model_repeats_less():
    model, ids = model_of(), prompt()
    for temperature in (0, 1.0):
        plain, penalised = (
            model.generate(
                ids, 60, temperature=temperature, seed=0, repetition_penalty=p
            )[:, 9:]
            for p in (1.0, 1.5)
        )
        assert len(penalised.unique()) > len(plain.unique())


REFUSED = [
    *(
        (name, value)
        for name in (
            *SETTINGS,
            "eos_token_id",
            "num_return_sequences",
            "valid_vocab_size",
        )
        for value in (
            True,
            False,
            math.nan,
            math.inf,
            -math.inf,
            -1,
            "1",
            [[1]],
            torch.ones(2, 2),
            10**400 if name != "top_k" else 1j,
        )
    ),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("temperature", None),
    ("top_k", 0),
    ("top_k", -1),
    ("top_k", 2.0),
    ("top_k", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_p", math.nan),
    ("top_p", "0.9"),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2.5),
    ("max_new_tokens", 120),
    ("input_ids", torch.zeros(1, 0, dtype=torch.int64)),
    ("input_ids", torch.zeros(0, 3, dtype=torch.int64)),
    ("input_ids", torch.zeros(3, dtype=torch.int64)),
    ("input_ids", torch.zeros(1, 3, dtype=torch.int32)),
    ("input_ids", torch.zeros(1, 3)),
    ("input_ids", [[1, 2]]),
    ("input_ids", torch.full((1, 3), 131)),
    ("input_ids", torch.full((1, 3), -1)),
    ("input_ids", torch.zeros(1, 125, dtype=torch.int64)),
    ("eos_token_id", 131),
    ("eos_token_id", -1),
    ("eos_token_id", [1, 1.5]),
    ("eos_token_id", "2"),
    ("seed", -1),
    ("seed", 0.5),
    ("seed", 2**64),
    ("valid_vocab_size", 0),
    ("valid_vocab_size", 132),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", "0.1"),
    ("min_p", math.nan),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("repetition_penalty", None),
    ("num_return_sequences", 0),
    ("num_return_sequences", 1.5),
    ("attention_mask", torch.ones(3, 8)),
    ("attention_mask", [[1] * 9] * 3),
    ("attention_mask", torch.ones(9)),
    ("attention_mask", torch.zeros(3, 9)),
    ("attention_mask", torch.full((3, 9), 2)),
    ("attention_mask", torch.tensor([[1] * 8 + [0]] * 3)),
    ("attention_mask", torch.tensor([[0, 1, 0, 1, 1, 1, 1, 1, 1]] * 3)),
    ("attention_mask", torch.full((3, 9), math.nan)),
    ("attention_mask", torch.tensor([[0] * 9, [1] * 9, [1] * 9])),
]


@pytest.mark.parametrize(
    "name, value",
    REFUSED,
    ids=lambda v: v if isinstance(v, str) else repr(v)[:25].replace("\n", ""),
)
def test_wrong_arguments_are_named(name, value):
    model = model_of()
    model.forward = None  # refused before any work
    with pytest.raises(ValueError, match=name) as error:
        generate(model, **{"input_ids": prompt(), "max_new_tokens": 4, name: value})
    assert "\n" not in str(error.value)


def test_an_end_token_among_the_padding_rows_is_refused():
    with pytest.raises(ValueError, match="eos_token_id"):
        model_of().generate(prompt(), 4, eos_token_id=100, valid_vocab_size=100)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampler", [dict(temperature=0), dict(), dict(top_k=2), dict(top_p=0.5)], ids=str
)
def test_logits_that_are_not_finite(sampler, bad):
    model = model_of(tie_word_embeddings=False).train()
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([7]), bad)
    )
    with pytest.raises(ValueError, match="logits"):
        model.generate(prompt(), 4, **sampler)
    assert model.training


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_every_legal_setting_generates(settings):
    model = model_of(torch.float32)
    assert model.generate(prompt(), 3, seed=0, **settings).shape == (3, 12)


def test_the_models_own_end_tokens_end():
    model, ids = model_of(), prompt()
    free = model.generate(ids, 30, temperature=0)
    own = [int(free[0, 12]), int(free[1, 20])]
    expected = model.generate(ids, 30, temperature=0, eos_token_id=own)
    assert expected.shape[1] <= free.shape[1] and not torch.equal(
        expected, free[:, : expected.shape[1]]
    )
    for names in (own, own[:1]):
        model.generation_config = {
            "eos_token_id": names if len(names) > 1 else names[0]
        }
        assert torch.equal(
            model.generate(ids, 30, temperature=0),
            model.generate(ids, 30, temperature=0, eos_token_id=names),
        )
        assert torch.equal(
            model.generate(ids, 30, temperature=0, eos_token_id=[]), free
        )  # the caller's word counts
        other = model.generate(ids, 30, temperature=0, eos_token_id=own[1])
        assert (
            torch.equal(other[1, :21], free[1, :21]) and (other[1, 21:] == own[1]).all()
        )
    model.generation_config = {"eos_token_id": [100, own[0]]}
    assert torch.equal(
        model.generate(ids % 40, 9, seed=0, valid_vocab_size=100),
        model.generate(
            ids % 40,
            9,
            seed=0,
            valid_vocab_size=100,
            eos_token_id=[own[0]] if own[0] < 100 else [],
        ),
    )
    for wrong in (131, -1, "2", [1.5], True):
        with pytest.raises(ValueError, match="generation_config: eos_token_id"):
            model.generation_config = {"eos_token_id": wrong}
    for nothing in ({}, {"eos_token_id": None}, {"eos_token_id": []}):
        model.generation_config = nothing
        assert torch.equal(model.generate(ids, 30, temperature=0), free)


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, {}),
        ({"eos_token_id": [1], "max_length": 20}, {}),
        (
            {"temperature": 0.7, "top_k": 20, "do_sample": True},
            {"temperature": 0.7, "top_k": 20},
        ),
        (
            {
                "temperature": 0.7,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            },
            {"temperature": 0.7},
        ),
        (
            {
                "temperature": 0.7,
                "top_k": None,
                "top_p": None,
                "min_p": None,
                "repetition_penalty": None,
            },
            {"temperature": 0.7},
        ),
        (
            {"do_sample": False, "temperature": 1.5, "top_k": 5, "top_p": 0.8},
            {"temperature": 0},
        ),
        (
            {"do_sample": False, "repetition_penalty": 1.1},
            {"temperature": 0, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "top_k": 0, "top_p": 0.5},
            {"temperature": 1.0, "top_p": 0.5},
        ),
        ({"do_sample": None, "temperature": None}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"do_sample": True, "top_p": 0}, {"temperature": 0}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ],
    ids=str,
)
def test_what_generation_settings_mean(own, expected):
    model = model_of()
    model.generation_config = own
    assert sampling_defaults(model) == expected
    SamplingParams(**expected)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 2),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", [1.1]),
        ("do_sample", "no"),
        ("do_sample", 1),
    ],
)
def test_settings_that_mean_nothing_are_named(name, value):
    model = model_of()
    with pytest.raises(
        ValueError, match=f"generation_config: {name} must be "
    ) as error:
        model.generation_config = {"temperature": 0.5, name: value}
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", DEVICES)
def test_the_seed_repeats_and_touches_nothing_else(device):
    model, ids = model_of(torch.float32).to(device), prompt().to(device)
    get_state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    torch.manual_seed(1)
    states = torch.get_rng_state(), get_state()
    runs = [model.generate(ids, 20, seed=seed) for seed in (7, 7, 8)]
    model.generate(ids, 20, temperature=0)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(
        get_state(), states[1]
    )
    torch.manual_seed(7)
    assert torch.equal(model.generate(ids, 20), runs[0]) and not torch.equal(
        get_state(), states[1]
    )


@pytest.mark.parametrize("interruption", [None, KeyboardInterrupt, RuntimeError])
def test_every_module_gets_its_mode_back(interruption):
    model = model_of().train()
    model.gradient_checkpointing_enable()
    model.model.norm.eval()
    seen = []

    def hook(module, inputs, output):
        seen.append(module.training)
        if interruption and len(seen) == 3:
            raise interruption

    model.model.layers[0].register_forward_hook(hook)
    if interruption:
        with pytest.raises(interruption):
            model.generate(prompt(), 6)
    else:
        model.generate(prompt(), 6)
    assert not any(seen) and len(seen) == (3 if interruption else 6)
    assert (
        model.training
        and model.model.layers[0].training
        and not model.model.norm.training
    )


def test_generated_tokens_can_be_trained_on():
    model = model_of().train()
    tokens = model.generate(prompt(), 6, seed=0)
    model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    assert (
        all(p.grad is not None for p in model.parameters()) and torch.is_grad_enabled()
    )


def beams_of(model, ids, n, **options):
    """Each prompt's beams by `beam_search` itself, filled up with the end token 7."""
    found = [
        beam.tokens
        for row in ids
        for beam in beam_search(model, row[None], n, **options)
    ]
    longest = max(map(len, found))
    return torch.stack([F.pad(row, (0, longest - len(row)), value=7) for row in found])


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_generate_with_beams_is_beam_search(length_penalty):
    model, ids = model_of(torch.float32), prompt(2)
    for options in (dict(), dict(eos_token_id=[7, 11], valid_vocab_size=100)):
        options = dict(options, num_beams=3, length_penalty=length_penalty)
        assert torch.equal(
            model.generate(ids, 12, num_return_sequences=2, **options),
            beams_of(model, ids, 12, num_return_sequences=2, **options),
        )
    neutral = dict(temperature=0, top_k=None, seed=None, use_cache=True)
    assert torch.equal(
        model.generate(ids, 5, num_beams=2, **neutral),
        beams_of(model, ids, 5, num_beams=2),
    )
    own = model.generate(ids, 12, num_beams=3, eos_token_id=[7])
    model.generation_config = {"eos_token_id": 7}
    assert torch.equal(model.generate(ids, 12, num_beams=3), own)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(top_k=5),
        dict(top_p=0.9),
        dict(min_p=0.1),
        dict(repetition_penalty=1.2),
        dict(seed=1),
        dict(attention_mask=torch.ones(3, 9)),
        dict(use_cache=False),
        dict(return_logprobs=True),
    ],
    ids=str,
)
def test_beams_refuse_what_belongs_to_drawing(options):
    with pytest.raises(ValueError, match="leave out " + "".join(options)) as error:
        model_of().generate(prompt(), 4, num_beams=2, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_beams", 0),
        ("num_beams", 2.0),
        ("num_beams", True),
        ("length_penalty", 2.0),
        ("length_penalty", math.nan),
    ],
)
def test_beam_options_without_beams_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        model_of().generate(prompt(), 4, **{name: value})


@pytest.mark.parametrize("copies", [1, 4])
def test_one_wait_for_the_device_a_step(copies):
    """What makes the host wait for a GPU, counted between two steps."""
    model = model_of(torch.float32)
    ids, mask = pad_left(ROWS, 0)
    steps = decode_steps(
        model,
        ids,
        8,
        attention_mask=mask,
        copies=copies,
        eos_token_id=[5, 6],
        seed=1,
        **{**MIXED, "repetition_penalty": 1.2},
    )
    next(steps)
    for _ in range(5):
        with Waits() as waits:
            next(steps)
        assert waits.count == 1


def test_own_stop_ids_are_those_of_the_settings():
    model = model_of()
    assert own_stop_ids(model) == []
    model.generation_config = {"eos_token_id": [5, 7, 5]}
    assert own_stop_ids(model) == [5, 7]

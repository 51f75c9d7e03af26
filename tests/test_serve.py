"""Serving: rows of the cache keep apart, every answer is that of the request alone, and
the HTTP layer as the openai package sees it.
"""

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import openai
import pytest
import torch
import uvicorn
from book import scramble_

from qwen_analog import QwenConfig, QwenForCausalLM, memory, serve
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.generate import generate
from qwen_analog.hf import save_pretrained
from qwen_analog.serve import (
    Engine,
    Piece,
    QueueFull,
    Request,
    RowCache,
    build_app,
    build_server,
)
from qwen_analog.tokenizer import (
    BYTE_ORDER,
    QWEN_SPECIAL_TOKENS,
    TiktokenTokenizer,
    encode_chat,
)

TOKENIZER = TiktokenTokenizer({token: rank for rank, token in enumerate(BYTE_ORDER)})
EOS = TOKENIZER.eos_token_id
CONFIG = QwenConfig(
    vocab_size=288,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=4096,
)
MODEL = scramble_(QwenForCausalLM(CONFIG)).eval()
NAME = "tiny"


class Log:
    """What the server has written into its log, stack traces included."""

    def __init__(self):
        self.lines = []

    @property
    def text(self):
        return "\n".join(self.lines)


@pytest.fixture
def log(monkeypatch):
    found, handle = Log(), logging.Logger.callHandlers

    def keep(logger, record):
        found.lines.append(logging.Formatter().format(record))
        handle(logger, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", keep)
    return found


class Scripted(QwenForCausalLM):
    """Writes `script`, token i at position i, and logits of nan where the script says
    None; computes as much as the others.
    """

    def __init__(self, script):
        super().__init__(CONFIG)
        self.script = script

    def forward(self, input_ids, *, position_ids, **rest):
        logits = torch.zeros_like(
            super().forward(input_ids, position_ids=position_ids, **rest)
        )
        for row, position in enumerate(position_ids[:, -1].tolist()):
            token = self.script[(position + 1) % len(self.script)]
            if token is None:
                logits[row] = torch.nan
            else:
                logits[row, :, token] = 30
        return logits


def spell(text, prompt=1):
    """A script that writes `text` after a prompt of `prompt` tokens, and ends."""
    return [0] * prompt + TOKENIZER.encode(text) + [EOS]


def requests(number=16, seed=4):
    """Prompts and answers of different lengths, settings of every kind."""
    rng = random.Random(seed)
    settings = [
        dict(temperature=0),
        dict(temperature=1.0),
        dict(temperature=0.8, top_k=20),
        dict(temperature=1.3, top_p=0.9),
        dict(temperature=0, repetition_penalty=1.3),
        dict(temperature=2.0, min_p=0.05),
    ]
    return [
        Request(
            [rng.randrange(94) for _ in range(rng.choice([1, 3, 9, 30]))],
            rng.choice([1, 4, 12, 25]),
            seed=100 + i,
            logprobs=0,
            **settings[i % len(settings)],
        )
        for i in range(number)
    ]


def alone(request, model=MODEL):
    """Token ids that `generate` writes for the request."""
    options = {
        name: getattr(request, name)
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "seed",
        )
    }
    ids = torch.tensor([request.prompt])
    written = generate(
        model,
        ids,
        request.max_tokens,
        eos_token_id=[EOS, EOS + 2],
        valid_vocab_size=TOKENIZER.vocab_size,
        **options,
    )
    return written[0, ids.shape[1] :].tolist()


def together(engine, wanted, every=3):
    """Token ids that a stepped engine writes for `wanted`, of which one more is added
    at each `every`-th step.
    """
    written = [[] for _ in wanted]
    todo, steps = list(enumerate(wanted)), 0
    while True:
        if todo and steps % every == 0:
            index, request = todo.pop(0)

            def deliver(piece, index=index):
                assert piece.finish_reason != "error", piece.text
                written[index] += [token for token, _, _ in piece.logprobs]

            engine.add(request, deliver=deliver)
        if engine.step() is None and not todo:
            return written
        steps += 1


def answers(engine, *wanted):
    """All pieces of each of the requests, on a stepped engine."""
    found = [[] for _ in wanted]
    engine.add(*wanted, deliver=lambda piece: found[piece.index].append(piece))
    while engine.step():
        pass
    return found


def endless(**options):
    """An engine whose answers end at max_tokens only."""
    engine = Engine(MODEL, TOKENIZER, **options)
    engine.stop_ids = set()
    return engine


def text_of(pieces):
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


# the cache
# ---------------------------------------------------------------------------------------------------------------------------------


def check_rows(cache_class):
    """Four rows filled in turns, in chunks of different lengths, one freed and used
    again: the logits of each are those of its tokens alone.
    """
    rng = torch.Generator().manual_seed(0)
    cache = cache_class(
        CONFIG.num_hidden_layers, 4, CONFIG.num_key_value_heads, CONFIG.head_dim, 64
    )
    held = [[] for _ in range(4)]

    def expect(row, logits):
        with torch.no_grad():
            torch.testing.assert_close(
                logits,
                MODEL(torch.tensor([held[row]]))[0, -len(logits) :],
                atol=2e-5,
                rtol=1e-4,
            )

    def feed(rows, T, counted):
        ids = torch.randint(256, (rows.stop - rows.start, T), generator=rng)
        positions, mask = cache.begin(rows, T)
        assert mask.shape == (len(ids), 1, T, max(map(len, held[rows])) + T)
        with torch.no_grad():
            logits = MODEL(ids, position_ids=positions, mask=mask, cache=cache)
        for i, row in enumerate(range(rows.start, rows.stop)):
            if row in counted:
                cache.advance(row, T)
                held[row] += ids[i].tolist()
                expect(row, logits[i])

    feed(slice(1, 2), 7, [1])
    feed(slice(3, 4), 2, [3])
    feed(slice(0, 4), 1, [1, 3])
    feed(slice(0, 1), 12, [0])
    feed(slice(0, 4), 3, [0, 1, 3])
    cache.free(1)
    held[1] = []
    feed(slice(1, 2), 4, [1])
    feed(slice(0, 4), 1, [0, 1, 2, 3])
    feed(slice(0, 2), 1, [0, 1])
    assert cache.lengths == [len(tokens) for tokens in held]
    # what a row leaves behind reaches nobody, not even where it was nan
    for store in (cache.keys, cache.values):
        store[:, 0, :, 5:] = torch.nan
    cache.free(0)
    held[0] = []
    feed(slice(0, 4), 1, [0, 1, 2, 3])


class SharedPositions(RowCache):
    def begin(self, rows, T):
        positions, mask = super().begin(rows, T)
        return positions.amax(0, keepdim=True).expand_as(positions), mask


class SharedPlaces(RowCache):
    def begin(self, rows, T):
        result = super().begin(rows, T)
        self._positions = self._positions.amax(0, keepdim=True).expand_as(
            self._positions
        )
        return result


class MaskOfFirstRow(RowCache):
    def begin(self, rows, T):
        positions, mask = super().begin(rows, T)
        return positions, mask[:1].expand_as(mask)


class MaskOfLongestRow(RowCache):
    def begin(self, rows, T):
        positions, mask = super().begin(rows, T)
        return positions, mask.any(0, keepdim=True).expand_as(mask)


class NoCausalMask(RowCache):
    def begin(self, rows, T):
        positions, mask = super().begin(rows, T)
        return positions, mask[:, :, -1:].expand_as(mask)


class FirstRowsAlways(RowCache):
    def begin(self, rows, T):
        result = super().begin(rows, T)
        self._rows = slice(0, rows.stop - rows.start)
        return result


class LengthKeptWhenFreed(RowCache):
    def free(self, row):
        self.keys[:, row], self.values[:, row] = 0, 0


class ContentKeptWhenFreed(RowCache):
    def free(self, row):
        self.lengths[row] = 0


class FreshMemory(RowCache):
    def __init__(self, *args):
        super().__init__(*args)
        self.values.fill_(torch.nan)


def test_rows():
    check_rows(RowCache)


@pytest.mark.parametrize(
    "mutant",
    [
        SharedPositions,
        SharedPlaces,
        MaskOfFirstRow,
        MaskOfLongestRow,
        NoCausalMask,
        FirstRowsAlways,
        LengthKeptWhenFreed,
        ContentKeptWhenFreed,
        FreshMemory,
    ],
)
def test_rows_kill(mutant):
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check_rows(mutant)


def test_a_full_row():
    cache = RowCache(1, 2, 1, 4, 8)
    cache.begin(slice(0, 1), 8)
    cache.advance(0, 8)
    assert cache.length == 8
    cache.begin(slice(1, 2), 8)
    with pytest.raises(ValueError, match="holds 8 tokens; 9 are needed"):
        cache.begin(slice(0, 2), 1)
    cache.free(0)
    cache.advance(0, 5)
    cache.begin(slice(0, 2), 1)
    assert cache.length == 0 and cache.lengths == [
        5,
        0,
    ]  # what every row of the pass holds


# the engine
# --------------------------------------------------------------------------------------------------------------------------------

EXPECTED = [alone(request) for request in requests()]


def test_the_requests_differ():
    assert len({tuple(tokens) for tokens in EXPECTED}) > 12 and {
        len(tokens) for tokens in EXPECTED
    } >= {1, 4, 12, 25}
    assert any(
        EXPECTED[i][-1] in (EOS, EOS + 2) and len(EXPECTED[i]) < request.max_tokens
        for i, request in enumerate(requests())
    )


@pytest.mark.parametrize("rows, chunk", [(1, 128), (3, 4), (5, 1), (16, 128), (16, 7)])
def test_each_answer_is_that_of_the_request_alone(rows, chunk):
    engine = Engine(
        MODEL, TOKENIZER, max_batch=rows, max_context=64, prefill_chunk=chunk
    )
    assert together(engine, requests()) == EXPECTED
    assert engine.rows == [None] * rows and engine.cache.lengths == [0] * rows


def test_arrivals_at_once():
    engine = Engine(MODEL, TOKENIZER, max_batch=16, max_context=64)
    assert together(engine, requests(), every=1) == EXPECTED


class SettingsOfFirstRow(Engine):
    def _draw(self, job, logits):
        first = next(other for other in self.rows if other is not None)
        mixed = types.SimpleNamespace(
            request=first.request,
            written=job.written,
            dice=job.dice,
            logprobs=job.logprobs,
        )
        return super()._draw(mixed, logits)


class OneGenerator(Engine):
    def _draw(self, job, logits):
        job.dice = next(other for other in self.rows if other is not None).dice
        return super()._draw(job, logits)


class LogitsOfFirstRow(Engine):
    def _forward(self, rows, ids):
        logits = super()._forward(rows, ids)
        return logits[:1].expand_as(logits)


class RowNotFreed(Engine):
    def _free(self, job):
        self.rows[job.row] = None


class LastTokenReadTwice(Engine):
    def _write(self, job, logits):
        if not job.written:
            self.cache.advance(job.row, 1)
        super()._write(job, logits)


class WrongModel(Engine):
    def _forward(self, rows, ids):
        return super()._forward(rows, ids) * 1.05


@pytest.mark.parametrize(
    "mutant",
    [
        SettingsOfFirstRow,
        OneGenerator,
        LogitsOfFirstRow,
        RowNotFreed,
        LastTokenReadTwice,
        WrongModel,
    ],
)
def test_engines_kill(mutant):
    with pytest.raises((AssertionError, ValueError)):
        assert (
            together(
                mutant(MODEL, TOKENIZER, max_batch=4, max_context=64, prefill_chunk=8),
                requests(),
            )
            == EXPECTED
        )


@pytest.mark.parametrize(
    "mutant",
    [
        SharedPositions,
        SharedPlaces,
        MaskOfFirstRow,
        MaskOfLongestRow,
        LengthKeptWhenFreed,
    ],
)
def test_engine_with_a_broken_cache(mutant, monkeypatch):
    monkeypatch.setattr(serve, "RowCache", mutant)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        assert (
            together(
                Engine(MODEL, TOKENIZER, max_batch=4, max_context=64, prefill_chunk=8),
                requests(),
            )
            == EXPECTED
        )


def test_a_long_prompt_does_not_stop_the_others():
    engine = endless(max_batch=2, max_context=1024, prefill_chunk=16)
    ignore = lambda piece: None
    (short,) = engine.add(Request([1, 2, 3], 100), deliver=ignore)
    engine.step()
    (long,) = engine.add(Request([5] * 100, 4), deliver=ignore)
    for i in range(7):
        before = len(short.written)
        step = engine.step()
        assert (
            len(short.written) == before + 1
            and step.read == [(1, 1, 16 if i < 6 else 4)]
            and (0, 0) in step.wrote
        )
        assert bool(long.written) == (i == 6)


def test_the_budget_of_a_step_is_shared():
    engine = endless(max_batch=8, max_context=64, prefill_chunk=10)
    engine.add(*[Request([1] * 4, 5) for _ in range(4)], deliver=lambda piece: None)
    assert engine.step().read == [(0, 0, 4), (1, 1, 4), (2, 2, 2)]
    assert engine.step().read == [(2, 2, 2), (3, 3, 4)]
    assert [row for row, _ in engine.step().wrote] == [0, 1, 2, 3]


def test_the_row_of_a_short_answer_is_used_at_once():
    engine = endless(max_batch=2, max_context=64)
    engine.add(
        Request([1], 3),
        Request([2], 20),
        Request([3], 3),
        Request([4], 3),
        deliver=lambda piece: None,
    )
    rows = {}
    while (step := engine.step()) is not None:
        for row, number in step.wrote:
            rows.setdefault(number, row)
    assert rows == {0: 0, 1: 1, 2: 0, 3: 0}


@pytest.mark.parametrize(
    "stop, expected",
    [
        ((), ("один, два, three", "stop")),
        ((", t",), ("один, два", "stop")),
        (("ва",), ("один, д", "stop")),
        (("nothing", "о"), ("", "stop")),
        (("three!",), ("один, два, three", "stop")),
    ],
)
def test_text(stop, expected):
    engine = Engine(Scripted(spell("один, два, three", 2)), TOKENIZER, max_context=100)
    (pieces,) = answers(engine, Request([1, 2], 90, stop=stop))
    assert text_of(pieces) == expected and not any(
        "\ufffd" in piece.text for piece in pieces
    )


def test_a_blank_at_the_beginning():
    """Some tokenizers drop it from what they decode, unless text stands before it."""

    class Dropping(TiktokenTokenizer):
        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    engine = Engine(
        Scripted(spell(" a b", 2)),
        Dropping({token: rank for rank, token in enumerate(BYTE_ORDER)}),
        max_context=64,
    )
    (pieces,) = answers(engine, Request([1, 2], 20))
    assert text_of(pieces) == (" a b", "stop")


def test_max_tokens_in_the_middle_of_a_character():
    engine = Engine(Scripted(spell("жук")), TOKENIZER, max_context=100)
    for length, text in ((1, "\ufffd"), (2, "ж"), (3, "ж\ufffd"), (6, "жук")):
        (pieces,) = answers(engine, Request([1], length))
        assert text_of(pieces) == (text, "length") and pieces[-1].written == length
    (pieces,) = answers(engine, Request([1], 7))
    assert text_of(pieces) == ("жук", "stop") and pieces[-1].written == 7


@pytest.mark.parametrize("end", [EOS, EOS + 2])
def test_end_tokens(end):
    engine = Engine(
        Scripted([0, *TOKENIZER.encode("ab"), end, *TOKENIZER.encode("cd")]),
        TOKENIZER,
        max_context=100,
    )
    (pieces,) = answers(engine, Request([1], 50))
    assert QWEN_SPECIAL_TOKENS[end - EOS] in (
        "<|endoftext|>",
        "<|im_end|>",
    ) and text_of(pieces) == ("ab", "stop")


def test_rows_of_the_embedding_without_a_token_are_never_written():
    model = Scripted([CONFIG.vocab_size - 1] * 4)
    (pieces,) = answers(
        Engine(model, TOKENIZER, max_context=16),
        Request([1], 5, temperature=0, logprobs=3),
    )
    assert all(
        token < TOKENIZER.vocab_size
        for piece in pieces
        for token, _, _ in piece.logprobs
    )


def test_logprobs():
    request = Request([1, 2, 3], 5, temperature=0, logprobs=3)
    (pieces,) = answers(Engine(MODEL, TOKENIZER, max_context=64), request)
    found = [entry for piece in pieces for entry in piece.logprobs]
    ids = [*request.prompt, *(token for token, _, _ in found)]
    with torch.no_grad():
        expected = MODEL(torch.tensor([ids]))[0, 2:-1].log_softmax(-1)[
            :, : TOKENIZER.vocab_size
        ]
    assert len(found) == 5
    for (token, value, best), row in zip(found, expected):
        assert (
            value == pytest.approx(row[token].item(), abs=1e-4)
            and list(best) == row.topk(3).indices.tolist()
            and best[token] == value
        )
        assert list(best.values()) == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )


def test_not_finite_logits_end_one_request():
    script = spell("abcdefgh")
    script[5] = None
    engine = Engine(Scripted(script), TOKENIZER, max_context=64, max_batch=2)
    good, bad, after = answers(
        engine, Request([1], 3), Request([1], 50), Request([1], 3)
    )
    assert text_of(good) == text_of(after) == ("abc", "length")
    assert (
        bad[-1].finish_reason == "error"
        and "not finite" in bad[-1].text
        and engine.rows == [None, None]
    )


def test_cancelled_jobs_leave_rows_and_queue():
    engine = endless(max_batch=1, max_context=64, max_queue=2)
    pieces = []
    (running,) = engine.add(Request([1], 50), deliver=pieces.append)
    engine.step()
    waiting = engine.add(Request([2], 50), Request([3], 50), deliver=pieces.append)
    with pytest.raises(QueueFull, match="of its 2 places, 2 are taken"):
        engine.add(Request([4], 2), deliver=pieces.append)
    for job in (running, waiting[0]):
        job.cancelled = True
    (last,) = engine.add(Request([4], 2), deliver=pieces.append)
    pieces.clear()
    engine.step()
    assert (
        engine.rows == [waiting[1]]
        and list(engine.waiting) == [last]
        and {piece.index for piece in pieces} <= {1}
    )


def test_all_or_none_enter_the_queue():
    engine = Engine(MODEL, TOKENIZER, max_queue=2, max_context=64)
    with pytest.raises(QueueFull):
        engine.add(*[Request([1], 2)] * 3, deliver=print)
    assert not engine.waiting
    with pytest.raises(ValueError):
        engine.add(Request([1], 2), Request([], 2), deliver=print)
    assert not engine.waiting


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(prompt=[]), "prompt must have at least one token"),
        (dict(prompt=[278]), "prompt must have token ids from 0 to 277"),
        (dict(prompt=[-1]), "prompt must have token ids"),
        (dict(max_tokens=0), "max_tokens must be at least 1"),
        (
            dict(max_tokens=64),
            "1 tokens and max_tokens is 64: together they exceed the context of 64",
        ),
        (dict(temperature=-1), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=1.5), "top_p"),
        (dict(min_p=-0.1), "min_p"),
        (dict(repetition_penalty=0), "penalty"),
    ],
)
def test_requests_that_are_refused(wrong, message):
    engine = Engine(MODEL, TOKENIZER, max_context=64)
    with pytest.raises(ValueError, match=message) as error:
        engine.check(Request(**{"prompt": [1], "max_tokens": 63, **wrong}))
    assert "\n" not in str(error.value)
    engine.check(Request([1], 63))


@pytest.mark.parametrize(
    "name", ["max_batch", "max_context", "max_queue", "prefill_chunk"]
)
def test_engine_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        Engine(MODEL, TOKENIZER, **{name: 0})


def test_the_model_limits_the_context():
    model = QwenForCausalLM(
        QwenConfig(**{**CONFIG.to_dict(), "max_position_embeddings": 32})
    )
    engine = Engine(model, TOKENIZER)
    assert (
        engine.max_context == engine.cache.max_length == 32
        and not engine.model.training
    )


def test_a_failing_step_fails_the_requests_and_not_the_engine():
    async def scenario():
        model = Scripted(spell("abc"))
        engine = Engine(model, TOKENIZER, max_batch=1, max_context=64)
        engine.start()
        forward, model.forward = model.forward, None
        try:
            failed = [
                [piece async for piece in engine.submit(Request([1], 5))][-1]
                for _ in range(2)
            ]
            model.forward = forward
            good = [piece async for piece in engine.submit(Request([1], 5))]
        finally:
            engine.close()
        assert [piece.finish_reason for piece in failed] == [
            "error"
        ] * 2 and "TypeError" in failed[0].text
        assert text_of(good) == ("abc", "stop") and not engine.running

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_an_event_loop_that_has_ended():
    async def scenario(engine):
        return engine.submit(Request([1], 300))

    engine = endless(max_batch=1, max_context=400)
    engine.start()
    answer = asyncio.run(scenario(engine))
    idle(engine)
    assert engine.running and answer._jobs[0].written
    engine.close()


def test_closing_ends_what_runs_and_what_waits():
    async def scenario():
        engine = endless(max_batch=1, max_context=4096)
        engine.start()
        running, waiting = (
            engine.submit(Request([1], 4000)),
            engine.submit(Request([2], 5)),
        )
        await anext(running)
        await asyncio.to_thread(engine.close)
        for answer in (running, waiting):
            assert [piece async for piece in answer][-1] == Piece(
                0, "the server is shutting down", "error", pytest.approx(0, abs=4000)
            )
        with pytest.raises(QueueFull, match="shutting down"):
            engine.submit(Request([1], 5))

    asyncio.run(asyncio.wait_for(scenario(), 60))


# one row, one request, one client cannot harm another
# ---------------------------------------------------------------------------------------


def beside(engine, bad, faulty=None):
    """The pieces of `bad` between two greedy requests; the others' answers must be
    those of the requests alone.
    """
    good = Request([1, 2, 3], 12, temperature=0, logprobs=0)
    first, found, last = answers(engine, good, bad, good)
    for pieces in (first, last):
        assert pieces[-1].finish_reason in ("stop", "length")
        assert [token for piece in pieces for token, _, _ in piece.logprobs] == alone(
            good
        )
    assert engine.rows == [None] * len(engine.rows) and engine.cache.lengths == [
        0
    ] * len(engine.rows)
    return found


EXTREMES = {
    "temperature": [1e-310, 1e-40, 1e-9, 1e9, 1e300],
    "repetition_penalty": [5e-324, 1e-300, 1e-40, 1e40, 1e300],
    "top_k": [1, 10**9],
    "top_p": [5e-324, 1e-12, 1.0],
    "min_p": [0.0, 5e-324, 1.0],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_settings_get_an_answer(name):
    engine = Engine(MODEL, TOKENIZER, max_batch=3, max_context=64)
    for value in EXTREMES[name]:
        found = beside(engine, Request([1, 2, 3], 6, seed=1, **{name: value}))
        assert found[-1].finish_reason in ("stop", "length")


class FaultyDraw(Engine):
    def _draw(self, job, logits):
        if job.request.seed == 13:
            raise RuntimeError("no\nluck")
        return super()._draw(job, logits)


class FaultyText(Engine):
    def add(self, *requests, **options):
        jobs = super().add(*requests, **options)
        for job in jobs:
            if job.request.seed == 13:
                job.text.push = job.text.finish = lambda *_: 1 / 0
        return jobs


class FaultyPass(Engine):
    """The pass fails whenever the faulty request's row takes part, in its prompt or
    afterwards.
    """

    fails_at = 0

    def _forward(self, rows, ids):
        if any(
            job is not None
            and job.request.seed == 13
            and len(job.written) >= self.fails_at
            for job in self.rows[rows]
        ):
            raise MemoryError("out of memory")
        return super()._forward(rows, ids)


class FaultyWriting(FaultyPass):
    fails_at = 2


@pytest.mark.parametrize(
    "faulty, message",
    [
        (FaultyDraw, "RuntimeError: no"),
        (FaultyText, "ZeroDivisionError"),
        (FaultyPass, "MemoryError"),
        (FaultyWriting, "MemoryError"),
    ],
)
def test_an_error_of_one_row_ends_that_row(faulty, message, log):
    found = beside(
        faulty(MODEL, TOKENIZER, max_batch=3, max_context=64),
        Request([1, 2, 3], 6, seed=13),
    )
    assert (
        found[-1].finish_reason == "error"
        and message in found[-1].text
        and "\n" not in found[-1].text
    )
    assert len(log.lines) == 1 and "failed" in log.text and "\n" not in log.text


def test_pieces_that_cannot_be_delivered(log):
    engine, found = endless(max_batch=2, max_context=64), []

    def deliver(piece):
        if piece.index == 0:
            raise RuntimeError("gone")
        found.append(piece)

    engine.add(Request([1], 9), Request([1, 2, 3], 12, temperature=0), deliver=deliver)
    while engine.step():
        pass
    assert found[-1].finish_reason == "length" and engine.rows == [None, None]
    assert "request 0: its pieces cannot be delivered: RuntimeError: gone" in log.text


def test_a_row_is_taken_from_who_holds_the_most():
    """A single request comes while another one's answers hold all rows: it gets a row
    at the next step, and every answer stays what it was.
    """
    wanted = requests()
    many = [
        Request([5, 6, 7], 40, temperature=1.0, seed=i, logprobs=0) for i in range(6)
    ]
    expected = [alone(request) for request in many]
    engine = Engine(MODEL, TOKENIZER, max_batch=4, max_context=64, prefill_chunk=8)
    written, ends = {}, []

    def collect(name):
        def deliver(piece):
            assert piece.finish_reason != "error", piece.text
            written.setdefault((name, piece.index), []).extend(
                token for token, _, _ in piece.logprobs
            )
            if piece.finish_reason:
                ends.append(name)

        return deliver

    engine.add(*many, deliver=collect("many"))
    for _ in range(3):
        engine.step()
    for i in (3, 9, 1):
        (job,) = engine.add(wanted[i], deliver=collect(i))
        engine.step()
        assert job in engine.rows or i in ends
        engine.step()
    while engine.step():
        pass
    assert [written["many", i] for i in range(6)] == expected
    assert [written[i, 0] for i in (3, 9, 1)] == [EXPECTED[i] for i in (3, 9, 1)]
    assert ends.count("many") == 6


def job(number, client="", group=None, together=1, unread=0):
    made = serve.Job(
        Request([1] * unread or [1], 5),
        number,
        0,
        print,
        None,
        None,
        client,
        number if group is None else group,
        together,
    )
    made.read = 0 if unread else 1
    return made


def test_who_gets_a_row():
    a = [job(i, "a", 0) for i in range(4)]
    assert serve.next_for_a_row(a, []) == (a[0], None)
    assert serve.next_for_a_row(a[2:], a[:2]) == (
        a[2],
        None,
    )  # nobody else waits: nothing is taken
    other = job(9, "a", 1)
    assert serve.next_for_a_row([a[3], other], a[:3]) == (
        other,
        a[2],
    )  # the latest of the largest request
    mine = [job(i, "b", i) for i in range(10, 13)]  # another client, request by request
    assert serve.next_for_a_row([*mine, other], a[:2]) == (mine[0], a[1])
    assert serve.next_for_a_row([mine[2]], [*a[:2], *mine[:2]]) == (
        mine[2],
        None,
    )  # it holds as many already
    assert serve.next_for_a_row([other, mine[2]], [a[0], *mine[:2]]) == (other, None)


def test_whose_turn_it_is():
    def writing(number, turn, client="a", group=None):
        made = job(number, client, group)
        made.started, made.turn = True, turn
        return made

    short, long, longest = (
        writing(1, serve.TURN - 1),
        writing(2, serve.TURN),
        writing(3, serve.TURN + 1),
    )
    new, later = job(8, "a"), job(9, "a")
    assert serve.next_turn([later, new], [short, long, longest]) == (new, longest)
    assert (
        serve.next_turn([new], [short]) is None
        and serve.next_turn([longest], [long]) is None
    )
    assert serve.next_turn([new, job(10, "b")], [long, longest])[0].client == "b"
    assert serve.next_turn([new], [short, long, writing(4, 99, "b")]) == (
        new,
        long,
    )  # its client has two rows and b one
    of_two = [writing(4, 99, "a", 7), writing(5, 99, "a", 7)]
    assert (
        serve.next_turn([job(11, "a", 7)], [*of_two, writing(6, 100, "a")])[1] in of_two
    )


def test_a_newcomer_does_not_wait_for_the_ends_of_many_long_answers():
    """All of one client: twenty requests hold or await all rows, and each answer stays
    what it would be alone.
    """
    wanted = [
        Request([i], 100, temperature=1.0, seed=i, logprobs=0) for i in range(1, 21)
    ]
    engine = endless(max_batch=4, max_context=128, max_queue=18)
    written, left = [[] for _ in wanted], [20]

    def collect(index):
        def deliver(piece):
            assert piece.finish_reason != "error", piece.text
            written[index] += [token for token, _, _ in piece.logprobs]
            left[0] -= piece.finish_reason is not None

        return deliver

    for index, request in enumerate(wanted[:18]):
        engine.add(request, deliver=collect(index))
    engine.step()
    for index in (18, 19):
        engine.add(wanted[index], deliver=collect(index))
    for _ in range(serve.TURN * 5):
        engine.step()
    assert all(written)  # in turns of 64, where answers of 100 would make it 400 steps
    most = 0
    while engine.step():
        most = max(most, sum(job.started for job in engine.waiting))
    assert left == [0] and most <= 18
    lone = endless(max_batch=1, max_context=128)
    for index in (0, 7, 19):
        (pieces,) = answers(lone, wanted[index])
        assert written[index] == [
            token for piece in pieces for token, _, _ in piece.logprobs
        ]


def test_a_short_prompt_does_not_wait_for_long_ones():
    share = lambda *left: [
        size
        for _, size in serve.share_budget(
            [job(i, unread=n) for i, n in enumerate(left)], 64
        )
    ]
    assert (
        share(1000) == [64]
        and share(1000, 10) == [54, 10]
        and share(1000, 900, 5) == [32, 27, 5]
        and share(3, 4) == [3, 4]
    )
    assert serve.share_budget([job(0), job(1, unread=100)], 1)[0][1] == 1


def test_whose_places_in_a_full_queue():
    def full(*groups):
        """Waiting jobs of (client, number) for each group."""
        jobs = []
        for group, (client, number) in enumerate(groups):
            jobs += [job(len(jobs) + i, client, group, number) for i in range(number)]
        return jobs

    lose = lambda waiting, number, client: {
        job.group for job in serve.whose_places(waiting, number, client)
    }
    assert lose(full(("a", 1), ("a", 1), ("b", 1)), 1, "c") == {
        1
    }  # the latest of the client with the most
    assert (
        lose(full(("a", 1), ("a", 1), ("b", 1)), 1, "b") == set()
    )  # which would then have as many
    assert lose(full(("a", 8), ("a", 1)), 1, "a") == {
        0
    }  # of one client: much larger requests
    assert lose(full(("a", 2), ("a", 1)), 1, "a") == set()
    assert (
        lose(full(("a", 8))[1:], 1, "b") == set()
    )  # one of its answers is being written


def test_a_full_queue_makes_room_for_who_has_less():
    engine = endless(max_batch=1, max_queue=4, max_context=64)
    pieces = {"greedy": [], "modest": []}
    engine.add(*[Request([1], 5)] * 4, deliver=pieces["greedy"].append, client="a")
    engine.add(Request([2], 5), deliver=pieces["modest"].append, client="b")
    assert [(piece.finish_reason, piece.status) for piece in pieces["greedy"]] == [
        ("error", 429)
    ] * 4
    while engine.step():
        pass
    assert pieces["modest"][-1].finish_reason == "length" and not any(
        "\n" in piece.text for piece in pieces["greedy"]
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(stop=[""]),
        dict(stop=["x"] * 17),
        dict(stop=["x" * 1001]),
        dict(seed=-1),
        dict(seed=2**64),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(repetition_penalty=float("nan")),
        dict(top_p=float("nan")),
        dict(min_p=float("nan")),
        dict(top_k=True),
        dict(temperature="hot"),
    ],
)
def test_wrong_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name) as error:
        Engine(MODEL, TOKENIZER, max_context=64).add(
            Request([1], 5, **wrong), deliver=print
        )
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    Engine(MODEL, TOKENIZER, max_context=64).check(
        Request([1], 5, seed=2**64 - 1, stop=["x" * 1000] * 16)
    )


def test_pieces_that_nobody_fetches(monkeypatch):
    monkeypatch.setattr(serve, "UNREAD", 3)

    async def scenario():
        engine = endless(max_batch=1, max_context=64)
        answer = engine.submit(Request([1], 50))
        while engine.step():
            await asyncio.sleep(0)
        assert (
            answer._jobs[0].cancelled
            and engine.rows == [None]
            and answer._queue.qsize() == 4
        )
        last = [piece async for piece in answer][-1]
        assert last.finish_reason == "error" and "does not read" in last.text

    asyncio.run(scenario())


def test_settings_of_the_model_hold_where_a_request_says_nothing():
    def of(settings, **body):
        model = QwenForCausalLM(CONFIG)
        model.generation_config = settings
        engine = Engine(model, TOKENIZER, max_batch=1, max_context=64)
        body = serve.parse_body(
            json.dumps({"model": NAME, "prompt": [1], **body}).encode(), chat=False
        )
        return serve._requests(engine, body, [[1]])[0].sampling()

    both = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
    }
    assert of({}) == serve.SamplingParams() and of(both) == serve.SamplingParams(
        0.6, 20, 0.8, None, 1.1
    )
    assert (
        of(both, temperature=0, top_k=0, top_p=1)
        == serve.SamplingParams(0, None, 1, None, 1.1)
        and of(both, top_k=-1).top_k is None
    )
    assert (
        of({"do_sample": False, "temperature": 0.6}).temperature == 0
        and of({"do_sample": False}, temperature=1).temperature == 1
    )
    assert of({"top_k": 0}).top_k is None


# the server
# --------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(engine, **options):
    """A uvicorn server in a thread, at a free port of the loopback."""
    limits = {
        name: options.pop(name)
        for name in ("grace_seconds", "request_seconds", "max_connections")
        if name in options
    }
    server = build_server(
        build_app(engine, NAME, **options), engine, **{"grace_seconds": 0, **limits}
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not engine.running


def client(port, kind=openai.OpenAI, **options):
    return kind(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        **{"max_retries": 0, **options},
    )


def post(port, body, path="/v1/completions", **headers):
    """(status, JSON, headers) of a request made by hand."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(
            "POST",
            path,
            body if isinstance(body, bytes) else json.dumps(body),
            {"Content-Type": "application/json", **headers},
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers


@pytest.fixture(scope="module")
def tiny():
    """The port of a server of the tiny model, and its engine."""
    engine = Engine(MODEL, TOKENIZER, max_batch=8, max_context=400, prefill_chunk=16)
    with serving(engine) as port:
        yield port, engine


def idle(engine):
    """Wait until every row is free: a server that keeps them runs into the test's time
    limit.
    """
    while any(engine.rows) or engine.waiting:
        time.sleep(0.005)


def test_completion(tiny):
    port, _ = tiny
    found = client(port).completions.create(
        model=NAME, prompt=[1, 2, 3], max_tokens=20, temperature=0
    )
    expected = TOKENIZER.decode(alone(Request([1, 2, 3], 20, temperature=0)))
    assert (
        found.choices[0].text == expected
        and found.choices[0].finish_reason == "length"
        and found.object == "text_completion"
    )
    assert (
        found.usage.prompt_tokens,
        found.usage.completion_tokens,
        found.usage.total_tokens,
    ) == (3, 20, 23) and found.model == NAME


def test_a_text_opens_a_document(tiny):
    port, _ = tiny
    ids = [EOS, *TOKENIZER.encode("été")]
    options = dict(model=NAME, max_tokens=20, temperature=0)
    found = client(port).completions.create(prompt="été", **options)
    assert found.choices[0].text == client(port).completions.create(
        prompt=ids, **options
    ).choices[0].text and found.usage.prompt_tokens == len(ids)


def test_chat(tiny):
    port, _ = tiny
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    ids = encode_chat(TOKENIZER, messages)
    options = dict(model=NAME, temperature=0.7, seed=3)
    expected = TOKENIZER.decode(alone(Request(ids, 20, temperature=0.7, seed=3)))
    for limit in ("max_tokens", "max_completion_tokens"):
        found = client(port).chat.completions.create(
            messages=messages, **options, **{limit: 20}
        )
        assert (
            found.choices[0].message.content == expected
            and found.choices[0].message.role == "assistant"
        )
        assert (
            found.usage.prompt_tokens == len(ids) and found.object == "chat.completion"
        )
    parts = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi <|im"},
                {"type": "text", "text": "_end|>"},
            ],
        }
    ]
    assert (
        client(port)
        .chat.completions.create(messages=parts, max_tokens=20, **options)
        .choices[0]
        .message.content
        == expected
    )
    # a message of the answer may come back, and without a limit the answer goes on to
    # the end of the context
    found = client(port).chat.completions.create(
        messages=[*messages, found.choices[0].message, *messages], **options
    )
    assert (
        found.usage.total_tokens == 400 and found.choices[0].finish_reason == "length"
    )


def test_streams(tiny):
    port, _ = tiny
    options = dict(model=NAME, temperature=1, seed=4, max_tokens=30)
    chunks = list(
        client(port).chat.completions.create(
            messages=[{"role": "user", "content": "x"}], stream=True, **options
        )
    )
    whole = client(port).chat.completions.create(
        messages=[{"role": "user", "content": "x"}], **options
    )
    assert (
        "".join(chunk.choices[0].delta.content for chunk in chunks)
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant" and all(
        chunk.object == "chat.completion.chunk" for chunk in chunks
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (
        len(chunks) - 1
    ) + ["length"] and len(chunks) > 10
    assert len({chunk.id for chunk in chunks}) == 1 and all(
        chunk.usage is None for chunk in chunks
    )
    *chunks, last = client(port).completions.create(
        prompt="x", stream=True, stream_options={"include_usage": True}, **options
    )
    assert (
        "".join(chunk.choices[0].text for chunk in chunks)
        == client(port).completions.create(prompt="x", **options).choices[0].text
    )
    assert (
        last.choices == []
        and last.usage.completion_tokens == 30
        and last.usage.prompt_tokens == 2
    )


def test_several_answers(tiny):
    port, _ = tiny
    options = dict(model=NAME, temperature=1, max_tokens=12)
    found = client(port).completions.create(prompt=["a", "b"], n=2, seed=7, **options)
    one = lambda prompt, seed: (
        client(port)
        .completions.create(prompt=prompt, seed=seed, **options)
        .choices[0]
        .text
    )
    expected = [one("a", 7), one("a", 8), one("b", 7), one("b", 8)]
    assert [choice.text for choice in found.choices] == expected and [
        choice.index for choice in found.choices
    ] == [0, 1, 2, 3]
    assert found.usage.completion_tokens == 48 and found.usage.prompt_tokens == 4
    streamed = [""] * 4
    for chunk in client(port).completions.create(
        prompt=["a", "b"], n=2, seed=7, stream=True, **options
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    assert len({one("a", None) for _ in range(3)}) == 3


def test_logprobs_over_http(tiny):
    port, _ = tiny
    expected = [
        entry
        for piece in answers(
            Engine(MODEL, TOKENIZER, max_context=64),
            Request([EOS, *TOKENIZER.encode("x")], 6, temperature=0, logprobs=2),
        )[0]
        for entry in piece.logprobs
    ]
    found = (
        client(port)
        .completions.create(
            model=NAME, prompt="x", max_tokens=6, temperature=0, logprobs=2
        )
        .choices[0]
        .logprobs
    )
    assert found.token_logprobs == pytest.approx(
        [value for _, value, _ in expected], abs=1e-4
    )
    assert (
        found.tokens
        == [
            serve._name(serve.token_bytes(TOKENIZER, token)) for token, _, _ in expected
        ]
        and len(found.top_logprobs) == 6
    )
    options = dict(
        model=NAME,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
    )
    content = (
        client(port)
        .chat.completions.create(top_logprobs=3, **options)
        .choices[0]
        .logprobs.content
    )
    assert len(content) == 6 and all(
        len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob
        for entry in content
    )
    streamed = [
        entry
        for chunk in client(port).chat.completions.create(stream=True, **options)
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in content], abs=1e-4
    )


def test_sixteen_clients():
    async def ask(port, request, stream):
        client_ = client(port, openai.AsyncOpenAI)
        extra = {
            name: value
            for name in ("top_k", "min_p", "repetition_penalty")
            if (value := getattr(request, name)) is not None
        }
        options = dict(
            model=NAME,
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            logprobs=0,
            top_p=request.top_p,
            extra_body=extra,
        )
        async with client_:
            if not stream:
                return (await client_.completions.create(**options)).choices[0].text
            return "".join(
                [
                    chunk.choices[0].text
                    async for chunk in await client_.completions.create(
                        stream=True, **options
                    )
                ]
            )

    async def all_of_them(port):
        return await asyncio.gather(
            *(ask(port, request, i % 2) for i, request in enumerate(requests()))
        )

    for rows in (16, 3):
        with serving(
            Engine(MODEL, TOKENIZER, max_batch=rows, max_context=64, prefill_chunk=8)
        ) as port:
            found = asyncio.run(asyncio.wait_for(all_of_them(port), 60))
        assert found == [
            TOKENIZER.decode([token for token in tokens if token not in (EOS, EOS + 2)])
            for tokens in EXPECTED
        ]


def test_stop_and_utf8_over_http():
    with serving(
        Engine(Scripted(spell("щука и рак", 2)), TOKENIZER, max_context=64)
    ) as port:
        options = dict(model=NAME, prompt=[1, 2], max_tokens=50)
        chunks = list(client(port).completions.create(stream=True, **options))
        assert [chunk.choices[0].text for chunk in chunks] == [
            *"щука и рак",
            "",
        ] and chunks[-1].choices[0].finish_reason == "stop"
        for stop, text in (("рак", "щука и "), (["и", "а"], "щук"), ([], "щука и рак")):
            found = client(port).completions.create(stop=stop, **options).choices[0]
            assert (found.text, found.finish_reason) == (text, "stop")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(stream):
    engine = endless(max_batch=1, max_context=4096)
    with serving(engine) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"model": NAME, "prompt": [1], "max_tokens": 4095, "stream": stream}
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        while engine.rows[0] is None or len(engine.rows[0].written) < 5:
            time.sleep(0.002)
        job = engine.rows[0]
        if stream:
            response = connection.getresponse()
            response.readline()
            response.close()
        connection.close()
        idle(engine)
        assert job.cancelled and len(job.written) < 4000
        assert post(port, {"model": NAME, "prompt": [1], "max_tokens": 2})[0] == 200


def test_queue_full():
    engine = endless(max_batch=1, max_queue=1, max_context=4096)
    with serving(engine) as port:
        patient, hasty = client(port, max_retries=20), client(port)
        first = hasty.completions.create(
            model=NAME, prompt=[1], max_tokens=4000, stream=True
        )
        next(first)
        second = hasty.completions.create(
            model=NAME, prompt=[1], max_tokens=2, stream=True
        )
        with pytest.raises(openai.RateLimitError) as error:
            hasty.completions.create(model=NAME, prompt=[1], max_tokens=2)
        assert (
            error.value.status_code == 429
            and error.value.response.headers["Retry-After"] == "1"
            and error.value.code == "queue_full"
        )
        assert "of its 1 places, 1 are taken" in error.value.message
        timer = threading.Timer(0.2, first.close)
        timer.start()
        assert (
            patient.completions.create(
                model=NAME, prompt=[1], max_tokens=2
            ).usage.completion_tokens
            == 2
        )  # the client tries again
        assert len(list(second)) >= 1


def test_models_and_health(tiny):
    port, engine = tiny
    assert [model.id for model in client(port).models.list()] == [NAME] and client(
        port
    ).models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client(port).models.retrieve("other")
    idle(engine)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {
        "status": "ok",
        "rows": 8,
        "active": 0,
        "waiting": 0,
    }


USER = [{"role": "user", "content": "x"}]
BAD = [
    ("completions", b"{", 400, None, "not JSON"),
    ("completions", b"\xff", 400, None, "not JSON"),
    ("completions", b"[" * 100_000, 400, None, "not JSON"),
    ("completions", b"[1]", 400, None, "JSON object, not list"),
    ("completions", {}, 400, "model", "model is missing"),
    ("completions", {"model": NAME}, 400, "prompt", "prompt is missing"),
    ("completions", {"model": NAME, "prompt": None}, 400, "prompt", "missing"),
    (
        "completions",
        {"model": "gpt-\ud800", "prompt": "x"},
        404,
        "model",
        "no model 'gpt-",
    ),
    ("completions", {"model": "gpt", "prompt": "x"}, 404, "model", "no model 'gpt'"),
    (
        "completions",
        {"model": NAME, "prompt": 3},
        400,
        "prompt",
        "prompt must be a text",
    ),
    (
        "completions",
        {"model": NAME, "prompt": []},
        400,
        "prompt",
        "prompt must be a text",
    ),
    ("completions", {"model": NAME, "prompt": [[]]}, 400, None, "at least one token"),
    (
        "completions",
        {"model": NAME, "prompt": [1, "a"]},
        400,
        "prompt",
        "prompt must be a text",
    ),
    (
        "completions",
        {"model": NAME, "prompt": [5000]},
        400,
        None,
        "token ids from 0 to 277",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "temperature": "hot"},
        400,
        "temperature",
        "number from 0 to 2: temperature is 'hot'",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "temperature": 3},
        400,
        "temperature",
        "number from 0 to 2",
    ),
    (
        "completions",
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        400,
        "temperature",
        "number from 0 to 2",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "top_p": 0},
        400,
        "top_p",
        "above 0",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_tokens": True},
        400,
        "max_tokens",
        "whole number of at least 1",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_tokens": 0},
        400,
        "max_tokens",
        "whole number of at least 1",
    ),
    ("completions", {"model": NAME, "prompt": "x", "n": 1.5}, 400, "n", "whole number"),
    ("completions", {"model": NAME, "prompt": "x", "n": 9}, 400, "n", "at most 8"),
    (
        "completions",
        {"model": NAME, "prompt": "x", "seed": -1},
        400,
        "seed",
        "seed must be",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stop": [1]},
        400,
        "stop",
        "stop must be a text",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stream": "yes"},
        400,
        "stream",
        "true or false",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stream_options": {"usage": 1}},
        400,
        "stream_options.usage",
        "not a parameter",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_token": 5},
        400,
        "max_token",
        "not a parameter",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "\ud800" * 1000: 5},
        400,
        "\\ud800" * 6 + "\\ud8",
        "not a parameter",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "echo": True},
        400,
        "echo",
        "echo is not supported",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "logit_bias": {"5": 100}},
        400,
        "logit_bias",
        "not supported",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "frequency_penalty": 0.5},
        400,
        "frequency_penalty",
        "not supported",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x" * 500},
        400,
        "prompt",
        "context has 400 tokens",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_tokens": 399},
        400,
        "prompt",
        "2 of the prompt and 399 of the answer",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x" * 900_000},
        400,
        "prompt",
        "context has 400 tokens: 900,000 characters",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stop": ["a" * 900_000]},
        400,
        "stop",
        "at most 16",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stop": ["a"] * 17},
        400,
        "stop",
        "at most 16",
    ),
    ("completions", {"model": NAME, "prompt": ["x"] * 100_000}, 400, "n", "at most 8"),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": "x" * 900_000}]},
        400,
        "messages",
        "900,000 characters",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": ""}] * 1000},
        400,
        "messages",
        "1000 messages",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": []},
        400,
        "messages",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": "x"},
        400,
        "messages",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [3]},
        400,
        "messages[0]",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user"}]},
        400,
        "messages[0].content",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "robot", "content": "x"}]},
        400,
        "messages[0].role",
        "'robot'",
    ),
    (
        "chat/completions",
        {
            "model": NAME,
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
            ],
        },
        400,
        "messages[0].content",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{**USER[0], "name": "Eve"}]},
        400,
        "messages[0].name",
        "not a parameter",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": "x" * 500}]},
        400,
        "messages",
        "context has 400 tokens",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": USER, "tools": [{"type": "function"}]},
        400,
        "tools",
        "tools is not supported",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": USER, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "not supported",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": USER, "top_logprobs": 21},
        400,
        "top_logprobs",
        "0 to 20",
    ),
    ("nothing", {}, 404, None, "Not Found"),
    ("models", {}, 405, None, "Method Not Allowed"),
]


@pytest.mark.parametrize("path, body, status, param, message", BAD, ids=range(len(BAD)))
def test_refusals(tiny, path, body, status, param, message):
    port, engine = tiny
    found, content, _ = post(port, body, f"/v1/{path}")
    error = content["error"]
    assert (
        found == status
        and set(error) == {"message", "type", "param", "code"}
        and error["type"] == "invalid_request_error"
    )
    assert (
        error["param"] == param
        and message in error["message"]
        and "\n" not in error["message"]
        and len(error["message"]) < 300
    )
    if "context has" in message:
        assert error["code"] == "context_length_exceeded"
    assert not any(engine.rows) and not engine.waiting


def test_harmless_parameters_are_accepted(tiny):
    port, _ = tiny
    harmless = dict(
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        logit_bias={},
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        top_p=None,
        stop=None,
        n=1,
        seed=None,
        parallel_tool_calls=True,
    )
    assert (
        post(
            port,
            {"model": NAME, "messages": USER, "max_tokens": 2, **harmless},
            "/v1/chat/completions",
        )[0]
        == 200
    )
    lone = [{"role": "user", "content": "half a character: \ud800"}]
    assert (
        post(
            port,
            {"model": NAME, "messages": lone, "max_tokens": 2, "stop": "\ud800"},
            "/v1/chat/completions",
        )[0]
        == 200
    )


def test_bodies_that_are_too_large_or_not_json():
    with serving(endless(max_context=64), max_body_bytes=1000) as port:
        small = {"model": NAME, "prompt": [1], "max_tokens": 2}
        status, content, _ = post(port, {**small, "user": "x" * 1_000_000})
        assert status == 413 and "1,000 that it may have" in content["error"]["message"]
        exact = json.dumps({**small, "user": ""}).encode()
        assert (
            post(port, exact[:-2] + b"x" * (1000 - len(exact)) + exact[-2:])[0] == 200
        )
        assert (
            post(port, exact[:-2] + b"x" * (1001 - len(exact)) + exact[-2:])[0] == 413
        )
        status, content, _ = post(port, small, **{"Content-Type": "text/plain"})
        assert (
            status == 415
            and "Content-Type: application/json" in content["error"]["message"]
        )
        assert (
            post(port, small, **{"Content-Type": "Application/JSON; charset=utf-8"})[0]
            == 200
        )


def test_a_model_without_control_tokens():
    class Plain(TiktokenTokenizer):
        def encode(self, text, special=False):
            return super().encode(text)

    with serving(
        Engine(
            MODEL,
            Plain({token: rank for rank, token in enumerate(BYTE_ORDER)}),
            max_context=64,
        )
    ) as port:
        with pytest.raises(openai.BadRequestError, match="no control tokens") as error:
            client(port).chat.completions.create(model=NAME, messages=USER)
        assert (
            error.value.param == "messages"
            and client(port)
            .completions.create(model=NAME, prompt="x", max_tokens=2, temperature=0)
            .usage.completion_tokens
            == 2
        )


def test_a_template_and_end_tokens_of_its_own(tmp_path):
    save_pretrained(MODEL, TOKENIZER, tmp_path / "model")
    model, tokenizer = serve.open_model(str(tmp_path / "model"))
    tokenizer.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    ids = [EOS + 1, *TOKENIZER.encode("Hi")]
    expected = alone(Request(ids, 9, temperature=0))
    with serving(Engine(model, tokenizer, max_context=64)) as port:
        found = client(port).chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=9,
            temperature=0,
        )
    assert found.usage.prompt_tokens == len(ids) and found.choices[
        0
    ].message.content == TOKENIZER.decode(expected)
    model.generation_config = {"eos_token_id": [expected[0]]}
    (pieces,) = answers(
        Engine(model, tokenizer, max_context=64), Request(ids, 9, temperature=0)
    )
    assert text_of(pieces) == ("", "stop")


@pytest.mark.parametrize("stream", [True, False])
def test_errors_of_the_engine(stream):
    script = spell("abcdef")
    script[3] = None
    with serving(Engine(Scripted(script), TOKENIZER, max_context=64)) as port:
        with pytest.raises(openai.APIError, match="not finite") as error:
            list(
                client(port).completions.create(
                    model=NAME, prompt=[1], max_tokens=20, stream=stream
                )
            )
        assert stream or error.value.status_code == 500


def test_a_fault_of_the_server(monkeypatch):
    with serving(Engine(MODEL, TOKENIZER, max_context=64)) as port:
        monkeypatch.setattr(serve, "parse_body", None)
        status, content, _ = post(port, {"model": NAME, "prompt": [1]})
        assert (
            status == 500
            and content["error"]["type"] == "server_error"
            and content["error"]["message"] == "the server failed"
        )


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ValueError, match=r"pip install 'qwen-analog\[serve\]'"):
        build_app(Engine(MODEL, TOKENIZER, max_context=64), NAME)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"pip install 'qwen-analog\[serve\]'"):
        serve.run(argparse.Namespace())


# who may come in
# ---------------------------------------------------------------------------------------------------------------------------


def send(port, data, wait=20):
    """All that comes back for `data` until the connection is closed."""
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=wait) as connection,
        contextlib.suppress(ConnectionResetError),
    ):
        connection.sendall(data)
        while part := connection.recv(65536):
            received += part
    return received


def head(*lines, method="POST /v1/completions", host="localhost"):
    return "\r\n".join(
        [
            f"{method} HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            "Connection: close",
            *lines,
            "",
            "",
        ]
    ).encode()


SMALL = json.dumps({"model": NAME, "prompt": [1], "max_tokens": 2}).encode()


def status_of(response):
    """Status of a response with an error object, which must be whole."""
    first, _, rest = response.partition(b"\r\n")
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert (
        set(error) == {"message", "type", "param", "code"}
        and "\n" not in error["message"]
    )
    return int(first.split()[1])


@pytest.mark.parametrize(
    "host, served",
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("localhost.", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("[0:0:0:0:0:0:0:1]", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False),
        ("192.0.2.1", False),
        ("", False),
        ("localhost@evil.example", False),
        ("[::2]", False),
        ("localhost:80:80", False),
        ("mine.example", True),
    ],
)
def test_hosts(tiny, host, served):
    with serving_once(hosts=("localhost", "127.0.0.1", "::1", "mine.example")) as port:
        response = send(port, head(f"Content-Length: {len(SMALL)}", host=host) + SMALL)
        assert (
            response.startswith(b"HTTP/1.1 200")
            if served
            else status_of(response) == 421
        )


_SERVERS = {}


@contextlib.contextmanager
def serving_once(**options):
    """A server with these options that lives as long as the tests: they do not change
    it.
    """
    key = repr(sorted(options.items()))
    if key not in _SERVERS:
        stack = contextlib.ExitStack()
        _SERVERS[key] = (
            stack,
            stack.enter_context(
                serving(
                    Engine(MODEL, TOKENIZER, max_batch=2, max_context=64), **options
                )
            ),
        )
    yield _SERVERS[key][1]


@pytest.fixture(scope="module", autouse=True)
def end_servers():
    yield
    for stack, _ in _SERVERS.values():
        stack.close()


@pytest.mark.parametrize(
    "origin, served",
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://evil.example", False),
        ("null", False),
        ("http://localhost.evil.example", False),
    ],
)
def test_pages_of_others(tiny, origin, served):
    port, _ = tiny
    response = send(
        port, head(f"Content-Length: {len(SMALL)}", f"Origin: {origin}") + SMALL
    )
    assert (
        response.startswith(b"HTTP/1.1 200") if served else status_of(response) == 403
    )


def test_every_name_and_every_address():
    with serving_once(hosts=("address",)) as port:
        assert send(port, head(method="GET /health", host="192.0.2.1:80")).startswith(
            b"HTTP/1.1 200"
        )
        assert (
            status_of(send(port, head(method="GET /health", host="evil.example")))
            == 421
        )
    with serving_once(hosts=("*",)) as port:
        assert send(port, head(method="GET /health", host="any.example")).startswith(
            b"HTTP/1.1 200"
        )


KEY = "secret-5d1f"


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY} x",
        "Bearer \u00e9",
        f"Bearer x\r\nAuthorization: Bearer {KEY}",
    ],
)
def test_wrong_keys(value):
    with serving_once(api_key=KEY) as port:
        lines = [] if value is None else [f"Authorization: {value}"]
        for path in (
            "POST /v1/completions",
            "POST /v1/chat/completions",
            "GET /v1/models",
            "GET /nowhere",
        ):
            response = send(
                port,
                head(f"Content-Length: {len(SMALL)}", *lines, method=path)
                .decode()
                .encode("latin-1")
                + SMALL,
            )
            assert (
                status_of(response) == 401
                and b"invalid_api_key" in response
                and KEY.encode() not in response
            )
            assert b"www-authenticate: Bearer" in response


def test_the_right_key(log):
    with serving_once(api_key=KEY) as port:
        for word in ("Bearer", "bearer"):
            assert (
                post(port, json.loads(SMALL), Authorization=f"{word} {KEY}")[0] == 200
            )
        assert client(port).with_options(api_key=KEY).models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            client(port).models.list()
        assert send(port, head(method="GET /health")).startswith(b"HTTP/1.1 200")
    assert KEY not in log.text
    for wrong in ("", "two words", "\u00e9", "a\n"):
        with pytest.raises(ValueError, match="API key"):
            build_app(
                Engine(MODEL, TOKENIZER, max_context=64), NAME, api_key=wrong
            ).build_middleware_stack()


CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMALL), SMALL)


@pytest.mark.parametrize(
    "data, status",
    [
        (
            head(f"Content-Length: {len(SMALL)}", "Transfer-Encoding: chunked")
            + CHUNKS,
            400,
        ),
        (head("Transfer-Encoding: gzip, chunked") + CHUNKS, 400),
        (head("Host: localhost", "Content-Length: 0"), 400),
        (head("Content-Length: 5", "Content-Length: 6"), 400),
        (b"\0" * 50 + b"\r\n\r\n", 400),
        (head("Transfer-Encoding: chunked") + b"-5\r\nabc", 400),
        (head("X: " + "a" * 200_000), 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (head(method="GET /%ff%00%ed%a0%80"), 404),
        (head(method="OPTIONS /v1/completions"), 405),
        (b"GET /health HTTP/1.0\r\n\r\n", 421),
        (head(method="GET /v1/models/%0a%ff"), 404),
    ],
)
def test_what_is_not_quite_http(tiny, data, status, log):
    port, engine = tiny
    assert status_of(send(port, data)) == status
    assert "Traceback" not in log.text and not any(engine.rows)


def test_chunked_and_pipelined_requests(tiny):
    port, _ = tiny
    assert send(port, head("Transfer-Encoding: chunked") + CHUNKS).startswith(
        b"HTTP/1.1 200"
    )
    several = (
        head(f"Content-Length: {len(SMALL)}").replace(b"Connection: close\r\n", b"")
        + SMALL
    )
    last = head(f"Content-Length: {len(SMALL)}") + SMALL
    assert send(port, several * 2 + last).count(b"HTTP/1.1 200") == 3
    with serving_once(max_body_bytes=1000) as small:
        chunk = b"%x\r\n%s\r\n" % (600, b" " * 600)
        assert (
            status_of(
                send(
                    small, head("Transfer-Encoding: chunked") + chunk * 9 + b"0\r\n\r\n"
                )
            )
            == 413
        )
    assert send(port, head(method="HEAD /health")).endswith(b"\r\n\r\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_sends_requests_ahead_and_goes(stream):
    engine = endless(max_batch=1, max_context=4096)
    body = json.dumps(
        {"model": NAME, "prompt": [1], "max_tokens": 4000, "stream": stream}
    ).encode()
    one = (
        head(f"Content-Length: {len(body)}").replace(b"Connection: close\r\n", b"")
        + body
    )
    with serving(engine) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(one * 3)
            while engine.rows[0] is None:
                time.sleep(0.005)
            running = engine.rows[0]
        idle(engine)
        assert running.cancelled and len(running.written) < 4000


def test_a_flood_of_requests_is_not_read_ahead(tiny):
    port, _ = tiny
    flood = head(method="GET /health").replace(b"Connection: close\r\n", b"") * 3000
    assert send(port, flood + head(method="GET /health")).count(b"HTTP/1.1 200") == 3001


NASTY = [
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "5e-324",
    "18446744073709551616",
    "1" * 400,
    "1" * 5000,
    '"x"',
    '""',
    r'"\ud800"',
    r'"\u0000"',
    "[]",
    "[[]]",
    "[null]",
    "{}",
    '{"a": 1}',
    '[1, "a"]',
    '["a", ""]',
    "[-1]",
    json.dumps(["a"] * 100),
]


@pytest.mark.parametrize("chat", [True, False])
def test_any_value_of_any_parameter(chat):
    """A request is answered or refused in one line that names what is wrong; never a
    fault of the server.
    """
    engine = Engine(MODEL, TOKENIZER, max_batch=4, max_context=400)
    schema = serve._ChatBody if chat else serve._CompletionBody
    taken = 0
    for name in [*schema.model_fields, *serve.REFUSED, *serve.IGNORED, r"\ud800", ""]:
        for value in NASTY:
            fields = {
                "model": f'"{NAME}"',
                "max_tokens": "2",
                "messages" if chat else "prompt": json.dumps(USER) if chat else '"x"',
                name: value,
            }
            text = (
                "{"
                + ", ".join(f'"{key}": {entry}' for key, entry in fields.items())
                + "}"
            ).encode()
            try:
                body = serve.parse_body(text, chat)
                for request in serve._requests(
                    engine, body, serve._prompts(engine, body)
                ):
                    engine.check(request)
                taken += 1
            except ValueError as error:
                assert (
                    "\n" not in str(error)
                    and len(str(error)) < 500
                    and str(error).isprintable()
                )
    assert taken > 50


def test_a_hundred_thousand_wrong_entries():
    for field, chat in (("prompt", False), ("messages", True), ("stop", False)):
        with pytest.raises(serve.ApiError) as error:
            serve.parse_body(
                (
                    json.dumps(
                        {"model": NAME, "prompt": "x", field: [None] * 100_000}
                    ).encode()
                    if not chat
                    else json.dumps({"model": NAME, field: [None] * 100_000}).encode()
                ),
                chat,
            )
        assert error.value.param.startswith(field) and len(str(error.value)) < 300
    for text in (
        b'{"model": "a", "model": "b"}',
        b'{"model": "a", "prompt": [{"x": 1, "x": 2}]}',
    ):
        with pytest.raises(serve.ApiError, match="occurs twice"):
            serve.parse_body(text, False)


def test_large_bodies_on_their_way(monkeypatch):
    """Few of them are held at a time; small ones always have room."""
    monkeypatch.setattr(serve.Reader, "large", 2)
    large = json.dumps({**json.loads(SMALL), "user": "x" * 100_000}).encode()
    with serving_once() as port, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", port))
            )
            connection.sendall(head(f"Content-Length: {len(large)}") + large[:-1])
        while (found := post(port, large))[0] == 200:
            time.sleep(0.005)
        assert found[0] == 503 and "large bodies" in found[1]["error"]["message"]
        assert post(port, json.loads(SMALL))[0] == 200
        connection.sendall(large[-1:])
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert post(port, large)[0] == 200


def test_late_and_idle_connections(tiny):
    with serving_once(request_seconds=0.3, max_connections=8) as port:
        assert (
            status_of(send(port, b"GET /health HTTP/1.1\r\nHo")) == 408
            and send(port, b"") == b""
        )
        assert status_of(send(port, head("Content-Length: 500") + b"{")) == 408
        # after an answer, too, a request has its time
        kept = head(method="GET /health").replace(b"Connection: close\r\n", b"")
        response = send(port, kept + b"GET /health HT")
        assert (
            response.startswith(b"HTTP/1.1 200")
            and response.count(b"HTTP/1.1 408") == 1
        )


def test_idle_connections_make_room(monkeypatch):
    monkeypatch.setattr(serve.Patience, "patience", 0)
    with serving_once(max_connections=8) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in idle[::2]:
            with contextlib.suppress(OSError):
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        assert post(port, json.loads(SMALL))[0] == 200
        monkeypatch.setattr(
            serve.Patience, "patience", 60
        )  # who has just come may be about to speak
        late = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        assert status_of(send(port, b"")) == 503
        for connection in (*idle, *late):
            connection.close()


def test_busy_connections_do_not_make_room():
    engine = endless(max_batch=2, max_context=4096)
    with serving(engine, max_connections=2) as port:
        running = [
            client(port).completions.create(
                model=NAME, prompt=[1], max_tokens=4000, stream=True
            )
            for _ in range(2)
        ]
        [next(stream) for stream in running]
        assert status_of(send(port, b"")) == 503
        running[0].close()
        while sum(job is not None for job in engine.rows) > 1:
            time.sleep(0.005)
        assert post(port, json.loads(SMALL))[0] == 200
        running[1].close()


def test_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(serve.Patience, "reading_seconds", 0.3)
    engine = endless(max_batch=1, max_context=4096)
    with serving(engine) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        body = json.dumps(
            {
                "model": NAME,
                "prompt": [1],
                "max_tokens": 4000,
                "stream": True,
                "logprobs": 20,
            }
        ).encode()
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        while engine.rows[0] is None:
            time.sleep(0.005)
        job = engine.rows[0]
        idle(engine)
        assert job.cancelled and len(job.written) < 4000


def test_connection_limits(monkeypatch):
    import resource

    def limited(number):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (number, number))
        most, backlog = serve.connection_limits(256)
        assert most + backlog + 16 < number and most >= 1 and backlog >= 1
        return most

    assert limited(4096) == 256 and limited(256) < 256
    with pytest.raises(ValueError, match="ulimit"):
        limited(20)


def test_prompts_that_take_for_ever(monkeypatch, log):
    """A template that never ends holds one of the places for reading prompts; what
    others wait for is bounded, and the server ends.
    """
    hang = threading.Event()
    monkeypatch.setattr(serve, "chat_ids", lambda *_: hang.wait())
    engine = Engine(MODEL, TOKENIZER, max_batch=2, max_context=64)
    app = build_app(engine, NAME, prompt_seconds=0.2)
    server = build_server(app, engine, grace_seconds=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    chat = {"model": NAME, "messages": USER, "max_tokens": 2}
    assert post(port, chat, "/v1/chat/completions")[0] == 400  # one of two threads
    assert post(port, json.loads(SMALL))[0] == 200
    assert post(port, chat, "/v1/chat/completions")[0] == 400
    status, content, headers = post(port, json.loads(SMALL))
    assert status == 503 and headers["Retry-After"] == "1"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and "Traceback" not in log.text
    hang.set()


def test_whatever_a_template_raises(monkeypatch, log):
    def stop(*_):
        raise StopIteration

    with serving(Engine(MODEL, TOKENIZER, max_batch=2, max_context=64)) as port:
        monkeypatch.setattr(serve, "chat_ids", stop)
        status, content, _ = post(
            port,
            {"model": NAME, "messages": USER, "max_tokens": 2},
            "/v1/chat/completions",
        )
        assert status == 500 and content["error"]["message"] == "the server failed"
    assert (
        "Traceback" not in log.text
        and "POST /v1/chat/completions failed: RuntimeError" in log.text
    )


@pytest.mark.parametrize("grace", [0, 30])
def test_the_end_of_a_server(grace, log):
    """Answers that fit into the grace end by themselves, the others with an error of
    the API; the log has no stack trace.
    """
    engine = endless(max_batch=2, max_context=4096, max_queue=8)
    server = build_server(build_app(engine, NAME), engine, grace_seconds=grace)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port, found = server.servers[0].sockets[0].getsockname()[1], []
    silent = socket.create_connection(("127.0.0.1", port))
    # a body on its way may come during the grace
    halves = [
        b"POST /v1/completions HTTP/1.1\r\n",
        *([] if grace else [head("Content-Length: 50") + b"{"]),
    ]
    halves = [
        (socket.create_connection(("127.0.0.1", port), timeout=30), half)
        for half in halves
    ]
    for half, data in halves:
        half.sendall(data)
    length = 50 if grace else 4000

    def ask(stream):
        body = json.dumps(
            {"model": NAME, "prompt": [1], "max_tokens": length, "stream": stream}
        ).encode()
        found.append(send(port, head(f"Content-Length: {len(body)}") + body))

    asking = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(5)]
    [one.start() for one in asking]
    while (
        sum(job is not None for job in engine.rows) + len(engine.waiting) + len(found)
        < 5
    ):
        time.sleep(0.002)
    server.handle_exit(signal.SIGTERM, None)
    for one in [*asking, thread]:
        one.join(30)
        assert not one.is_alive()
    silent.close()
    for half, _ in halves:
        assert status_of(half.recv(65536)) == 503
        half.close()
    for answer in found:
        if b"text/event-stream" in answer:
            last = answer.rstrip().removesuffix(b"0").rstrip().splitlines()[-1]
            assert (
                last == b"data: [DONE]"
                if grace
                else b'"error"' in last and b"shutting down" in last
            )
        else:
            assert (
                answer.startswith(b"HTTP/1.1 200")
                if grace
                else status_of(answer) == 503
            )
    assert len(found) == 5 and "Traceback" not in log.text and not engine.running


def test_a_second_signal_ends_the_grace():
    engine = endless(max_batch=1, max_context=4096)
    with serving(engine, grace_seconds=600) as port:
        stream = client(port).completions.create(
            model=NAME, prompt=[1], max_tokens=4000, stream=True
        )
        next(stream)
        server = next(
            server
            for server in gc.get_objects()
            if isinstance(server, serve.Ending) and server.engine is engine
        )
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


def test_logprobs_tell_bytes_apart():
    """The model is indifferent between the bytes: as many alternatives as were asked
    for, whatever their text, and the drawn one.
    """
    flat = QwenForCausalLM(CONFIG)
    torch.nn.init.zeros_(flat.lm_head.weight)
    engine = Engine(flat, TOKENIZER, max_batch=2, max_context=200)
    engine.stop_ids = set()
    options = dict(model=NAME, max_tokens=40, seed=1, temperature=1)
    with serving(engine) as port:
        choice = (
            client(port)
            .completions.create(prompt="x", logprobs=5, **options)
            .choices[0]
        )
        pieces = [
            chunk.choices[0]
            for chunk in client(port).completions.create(
                prompt="x", logprobs=5, stream=True, **options
            )
        ]
        content = (
            client(port)
            .chat.completions.create(
                messages=USER, logprobs=True, top_logprobs=5, **options
            )
            .choices[0]
        )
    found = choice.logprobs
    assert (
        len(found.tokens) == len(found.text_offset) == len(found.token_logprobs) == 40
    )
    assert any(token.startswith("bytes:\\x") for token in found.tokens)
    for token, value, best in zip(
        found.tokens, found.token_logprobs, found.top_logprobs
    ):
        assert len(best) in (5, 6) and best[token] == value
    assert found.text_offset == sorted(found.text_offset) and found.text_offset[0] == 0
    for token, offset in zip(found.tokens, found.text_offset):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    for name in (
        "tokens",
        "text_offset",
        "token_logprobs",
    ):  # a stream tells the same, bit by bit
        assert [
            value for piece in pieces for value in getattr(piece.logprobs, name)
        ] == getattr(found, name)
    for entry in content.logprobs.content:
        assert len({bytes(other.bytes) for other in entry.top_logprobs}) == 5
    assert (
        b"".join(bytes(entry.bytes) for entry in content.logprobs.content).decode(
            errors="replace"
        )
        == content.message.content
    )


def test_logprobs_are_those_of_the_text():
    """End tokens, and what a stop string cut off, are no part of it; what is below
    -9999 is said to be -9999.
    """
    engine = Engine(Scripted(spell("ab, cd", 2)), TOKENIZER, max_context=64)
    with serving(engine) as port:
        for stop, text in ((None, "ab, cd"), (", c", "ab"), ("b", "a")):
            found = (
                client(port)
                .completions.create(
                    model=NAME, prompt=[1, 2], max_tokens=20, logprobs=0, stop=stop
                )
                .choices[0]
            )
            assert found.text == text == "".join(
                found.logprobs.tokens
            ) and found.logprobs.text_offset == list(range(len(text)))
    writer = serve.LogprobWriter(lambda token: b"x", False, ())
    assert writer.form(Piece(0, "x", None, 1, [(1, float("-inf"), {})]))[
        "token_logprobs"
    ] == [-9999.0]


def test_bytes_of_tokens(tmp_path):
    text = "a \u00e9\u6f22 \U0001f600"
    save_pretrained(MODEL, TOKENIZER, tmp_path / "model")
    for tokenizer in (TOKENIZER, serve.open_model(str(tmp_path / "model"))[1]):
        ids = tokenizer.encode(text)
        assert b"".join(serve.token_bytes(tokenizer, i) for i in ids) == text.encode()
        assert serve.token_bytes(tokenizer, EOS) == b"<|endoftext|>"


# the command
# -------------------------------------------------------------------------------------------------------------------------------

COMMAND = (
    "import argparse, sys; from qwen_analog import serve; parser ="
    " argparse.ArgumentParser(); serve.add_arguments(parser);"
    " serve.run(parser.parse_args())"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "my-model"
    save_checkpoint(directory, MODEL, TOKENIZER)
    return directory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command(checkpoint, number):
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "--model",
        str(checkpoint),
        "--port",
        "0",
        "--max-batch",
        "2",
        "--max-context",
        "512",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert (
            line.startswith("model 'my-model' at http://127.0.0.1:")
            and "2 rows of 512 tokens" in line
        )
        client_ = openai.OpenAI(base_url=line.split()[3], api_key="none", max_retries=3)
        stream = client_.completions.create(
            model="my-model", prompt=[1], max_tokens=300, temperature=0, stream=True
        )
        next(stream)
        process.send_signal(number)
        rest = list(stream)  # what is being written may end
        assert rest[-1].choices[0].finish_reason == "length"
        client_.close()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and output == ""
    assert errors.splitlines() == [
        "WARNING:  stopping: 1 answers have 5 seconds to end; a second signal ends"
        " them now"
    ]


@pytest.mark.parametrize("name", ["my-model", "my-model/checkpoint.pt", "hf-layout"])
def test_sources(checkpoint, name):
    if name == "hf-layout":
        save_pretrained(MODEL, TOKENIZER, checkpoint.parent / name)
    model, tokenizer = serve.open_model(str(checkpoint.parent / name))
    ids = torch.tensor([tokenizer.encode("same")])
    assert torch.equal(model(ids), MODEL(ids)) and tokenizer.encode(
        "same"
    ) == TOKENIZER.encode("same")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.gguf", "owner/no-such-model"])
def test_sources_that_are_not_there(source):
    with pytest.raises((ValueError, OSError)) as error:
        serve.open_model(source)
    assert source in str(error.value) and "\n" not in str(error.value)


def test_other_hosts_are_warned_of_and_taken_ports_refused(
    checkpoint, monkeypatch, capsys
):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = ["--model", str(checkpoint), "--max-context", "32", "--port"]
    with monkeypatch.context() as patch:
        patch.setattr(
            uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets]
        )
        serve.run(parser.parse_args([*options, "0"]))
        assert capsys.readouterr().err == ""
        serve.run(parser.parse_args([*options, "0", "--host", "0.0.0.0"]))
    assert capsys.readouterr().err.startswith(
        "warning: 0.0.0.0 can be reached from other machines"
    )
    with serving(Engine(MODEL, TOKENIZER, max_context=32)) as port:
        for wrong, message in (
            (["0", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
            ([str(port)], f"cannot listen on 127.0.0.1 port {port}"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                serve.run(parser.parse_args([*options, *wrong]))
            assert "\n" not in str(error.value)
    assert parser.parse_args([]).host == "127.0.0.1"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--port", "70000"], "--port must be from 0 to 65535, not 70000"),
        (["--port", "-1"], "--port"),
        (["--max-batch", "0"], "--max-batch"),
        (["--max-context", "-5"], "--max-context"),
        (["--max-queue", "0"], "--max-queue"),
        (["--max-connections", "0"], "--max-connections"),
        (["--max-body-bytes", "0"], "--max-body-bytes"),
        (["--request-seconds", "nan"], "--request-seconds must be .* not nan"),
        (["--grace-seconds", "inf"], "--grace-seconds"),
        (["--grace-seconds", "-1"], "--grace-seconds"),
        (["--host", ""], "--host"),
        (["--host", "no host"], "cannot listen on no host"),
        (["--host", "a" * 300], "cannot listen"),
        (["--allowed-host", "a b"], "--allowed-host"),
        (["--allowed-host", "http://a"], "--allowed-host"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    """In one line, and before a model is opened."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(ValueError, match=message) as error:
        serve.run(parser.parse_args(["--model", "nowhere", "--port", "0", *wrong]))
    assert "\n" not in str(error.value)


def test_the_key_from_the_environment(monkeypatch, checkpoint, capsys):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    apps = []
    monkeypatch.setattr(
        serve,
        "build_server",
        lambda app, engine, **_: (
            apps.append(app) or types.SimpleNamespace(run=lambda sockets: None)
        ),
    )
    options = ["--model", str(checkpoint), "--max-context", "32", "--port", "0"]
    for value, given, expected in (
        (None, [], None),
        ("from-env", [], "from-env"),
        ("from-env", ["--api-key", "given"], "given"),
    ):
        if value is not None:
            monkeypatch.setenv(serve.KEY_VARIABLE, value)
        serve.run(
            parser.parse_args(
                [
                    *options,
                    *given,
                    "--host",
                    "0.0.0.0",
                    "--allowed-host",
                    "Mine.example",
                ]
            )
        )
        gate = apps[-1].user_middleware[0].kwargs
        assert (
            gate["api_key"] == expected
            and {"address", "localhost", "mine.example"} <= gate["hosts"]
        )
        output = capsys.readouterr()
        assert (
            bool(output.err) == (expected is None)
            and "from-env" not in output.out + output.err
        )
    monkeypatch.setenv(serve.KEY_VARIABLE, "")
    with pytest.raises(ValueError, match=serve.KEY_VARIABLE):
        serve.run(parser.parse_args(options))


def test_a_cache_that_does_not_fit(checkpoint, monkeypatch):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    monkeypatch.setattr(
        serve, "open_model", lambda source, check_memory: (MODEL, TOKENIZER)
    )
    with pytest.raises(
        ValueError, match="--max-batch or --max-context, or pass --ignore-memory"
    ) as error:
        serve.run(parser.parse_args(["--model", str(checkpoint), "--port", "0"]))
    assert "\n" not in str(error.value)

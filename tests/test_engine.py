"""The engine: rows of the cache keep apart, and every answer is that of the request
alone.
"""

import asyncio
import dataclasses
import types

import pytest
import torch
from serving_helpers import (
    CONFIG,
    EOS,
    MODEL,
    Scripted,
    TOKENIZER,
    alone,
    answers,
    client,
    endless,
    idle,
    log_fixture,
    new_request,
    requests,
    spell,
    text_of,
    together,
)

from qwen_analog import engine as engine_module
from qwen_analog import scheduler
from qwen_analog.engine import AsyncEngine, Engine, ModelRunner, RowCache
from qwen_analog.scheduler import Delta, QueueFull, Scheduler
from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import QWEN_SPECIAL_TOKENS, TiktokenTokenizer


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
        shared = self.present.positions.amax(0, keepdim=True)
        shared = shared.expand_as(self.present.positions)
        self.present = dataclasses.replace(self.present, positions=shared)
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
        first = slice(0, rows.stop - rows.start)
        self.present = dataclasses.replace(self.present, rows=first)
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


ROWS_MIXED = [
    SharedPositions,
    SharedPlaces,
    MaskOfFirstRow,
    MaskOfLongestRow,
    LengthKeptWhenFreed,
]


@pytest.mark.mutant
@pytest.mark.parametrize(
    "mutant",
    [*ROWS_MIXED, NoCausalMask, FirstRowsAlways, ContentKeptWhenFreed, FreshMemory],
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
    assert (
        engine.scheduler.rows == [None] * rows
        and engine.runner.cache.lengths == [0] * rows
    )


def joined(rows, sizes, cost, room=64, cached=0):
    """In which groups rows that hold `cached` tokens read `sizes`, by row."""
    shares = []
    for row, size in zip(rows, sizes):
        sequence = types.SimpleNamespace(row=row, cached=cached)
        shares.append((sequence, size))
    groups = engine_module.join_reads(shares, cost, room)
    return [[(s.row, size) for s, size in group] for group in groups]


def test_who_reads_in_one_pass():
    assert joined([1, 0, 2], [4, 5, 60], 8) == [[(0, 5), (1, 4)], [(2, 60)]]
    assert joined([0, 2], [5, 5], 8) == [[(0, 5)], [(2, 5)]], "they are no neighbours"
    assert len(joined([0, 1, 2], [5, 5, 60], 109)) == 2
    assert len(joined([0, 1, 2], [5, 5, 60], 110)) == 1
    # the second row has room for 4 tokens more, not for 5
    assert len(joined([0, 1], [5, 4], 8, room=64, cached=60)) == 2
    assert len(joined([0, 1], [5, 4], 8, room=65, cached=60)) == 1
    assert joined([], [], 8) == []


def at_once(cost, chunk=None):
    """What is written for requests that all come before the first step."""
    engine = Engine(MODEL, TOKENIZER, max_batch=16, max_context=64, prefill_chunk=chunk)
    engine.runner.pass_cost = cost  # of 1,000 tokens: all that may are read together
    return [
        [token for delta in deltas for token, _, _ in delta.logprobs]
        for deltas in answers(engine, *requests())
    ]


@pytest.mark.parametrize("cost, chunk", [(-1, 128), (8, 128), (1000, 128), (1000, 20)])
def test_prompts_at_once(cost, chunk):
    assert at_once(cost, chunk) == EXPECTED


def test_prompts_at_once_are_one_pass(monkeypatch):
    engine = endless(max_batch=16, max_context=64)
    wanted = [new_request([i + 1] * (3 + i % 2), 8) for i in range(16)]
    engine.add_request(*wanted, deliver=lambda delta: None)
    passes = count_calls(monkeypatch, ModelRunner, "place")
    step = engine.step()
    assert len(step.read) == len(step.wrote) == 16
    assert len(passes) == 2


def padding_counted(monkeypatch):
    """Padding becomes part of the text."""

    def read(self, sequences, sizes):
        T = max(sizes[s] for s in sequences)
        for s in sequences:
            self.cache.advance(s.row, T - sizes[s])
        return read_right(self, sequences, sizes)

    read_right = ModelRunner.read
    monkeypatch.setattr(ModelRunner, "read", read)


@pytest.mark.mutant
def test_padding_that_counts(monkeypatch):
    padding_counted(monkeypatch)
    assert at_once(-1) == EXPECTED, "there is no padding"
    assert at_once(1000) != EXPECTED


def read_beside_a_full_row(engine):
    """A row that is nearly full reads its last token when its neighbour begins."""
    wanted = new_request([1] * 38, 2, temperature=0), new_request([2] * 21, 4, seed=1)
    written = []
    for request in wanted:
        written += engine.add_request(request, deliver=lambda delta: None)
        engine.step()
    while engine.step():
        pass
    return [s.written for s in written], [alone(request) for request in wanted]


@pytest.mark.parametrize(
    "broken", [False, pytest.param(True, marks=[pytest.mark.mutant])]
)
def test_padding_needs_room(broken, log):
    engine = Engine(MODEL, TOKENIZER, max_batch=2, max_context=40, prefill_chunk=36)
    engine.runner.pass_cost = 1000
    if broken:
        engine.runner.room = 1000
    found, expected = read_beside_a_full_row(engine)
    assert found == expected
    assert any("at once failed" in line for line in log.lines) == broken


def test_arrivals_at_once():
    engine = Engine(MODEL, TOKENIZER, max_batch=16, max_context=64)
    assert together(engine, requests(), every=1) == EXPECTED


def settings_of_first_row(monkeypatch):
    """Every row draws as the first one's request says."""
    draw = engine_module.draw

    def mixed(logits, sequences):
        request = sequences[0].request
        return draw(
            logits, [dataclasses.replace(s, request=request) for s in sequences]
        )

    monkeypatch.setattr(engine_module, "draw", mixed)


def one_generator(monkeypatch):
    draw = engine_module.draw

    def shared(logits, sequences):
        generator = sequences[0].generator
        sequences = [dataclasses.replace(s, generator=generator) for s in sequences]
        return draw(logits, sequences)

    monkeypatch.setattr(engine_module, "draw", shared)


def logits_of_first_row(monkeypatch):
    forward = ModelRunner.forward

    def repeated(self, first_row, ids):
        logits = forward(self, first_row, ids)
        return logits[:1].expand_as(logits)

    monkeypatch.setattr(ModelRunner, "forward", repeated)


def row_not_freed(monkeypatch):
    monkeypatch.setattr(RowCache, "free", lambda self, row: None)


def last_token_read_twice(monkeypatch):
    write = ModelRunner.write

    def twice(self, sequences):
        for sequence in sequences:
            if not sequence.written:
                self.cache.advance(sequence.row, 1)
        return write(self, sequences)

    monkeypatch.setattr(ModelRunner, "write", twice)


def wrong_model(monkeypatch):
    forward = ModelRunner.forward
    scaled = lambda self, first_row, ids: forward(self, first_row, ids) * 1.05
    monkeypatch.setattr(ModelRunner, "forward", scaled)


@pytest.mark.mutant
@pytest.mark.parametrize(
    "mutant",
    [
        settings_of_first_row,
        one_generator,
        logits_of_first_row,
        row_not_freed,
        last_token_read_twice,
        wrong_model,
    ],
)
def test_engines_kill(mutant, monkeypatch):
    mutant(monkeypatch)
    engine = Engine(MODEL, TOKENIZER, max_batch=4, max_context=64, prefill_chunk=8)
    with pytest.raises((AssertionError, ValueError)):
        assert together(engine, requests()) == EXPECTED


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", ROWS_MIXED)
def test_engine_with_a_broken_cache(mutant, monkeypatch):
    monkeypatch.setattr(engine_module, "RowCache", mutant)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        assert (
            together(
                Engine(MODEL, TOKENIZER, max_batch=4, max_context=64, prefill_chunk=8),
                requests(),
            )
            == EXPECTED
        )


def check_penalties():
    """Rows that are penalised, beside one that is not."""
    wanted = [
        new_request(prompt, 20, temperature=0, repetition_penalty=9.0, logprobs=0)
        for prompt in ([*range(0, 240, 6)], [5])
    ]
    wanted.append(new_request([5], 20, temperature=0, logprobs=0))
    engine = Engine(MODEL, TOKENIZER, max_batch=3, max_context=64)
    assert together(engine, wanted) == [alone(request) for request in wanted]


def test_penalties():
    check_penalties()


@pytest.mark.mutant
@pytest.mark.parametrize("kept", [slice(-1, None), slice(40, None), slice(0, 40)])
def test_penalties_kill(kept, monkeypatch):
    """The history has only the last token, or lacks the prompt, or the answer."""
    pad = engine_module.pad_left
    shorter = lambda rows, pad_id: pad(
        [list(row[kept] or row[-1:]) for row in rows], pad_id
    )
    monkeypatch.setattr(engine_module, "pad_left", shorter)
    with pytest.raises(AssertionError):
        check_penalties()


def count_calls(monkeypatch, owner, name):
    """A list that grows with each call of a function."""
    calls, function = [], getattr(owner, name)

    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("logprobs", [None, 2])
def test_one_transfer_a_step(monkeypatch, logprobs):
    """Sixteen rows with parameters and seeds of their own are one pass, one draw and
    one transfer to the host; log-probabilities are brought for those who asked.
    """
    engine = endless(max_batch=16, max_context=64)
    params = [dict(temperature=0), dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1)]
    wanted = [new_request([i + 1], 8, seed=i, **params[i % 4]) for i in range(15)]
    wanted.append(new_request([1], 8, logprobs=logprobs))
    engine.add_request(*wanted, deliver=lambda delta: None)
    engine.step()
    passes = count_calls(monkeypatch, ModelRunner, "forward")
    draws = count_calls(monkeypatch, engine_module, "sample")
    lists = count_calls(monkeypatch, torch.Tensor, "tolist")
    items = count_calls(monkeypatch, torch.Tensor, "item")
    assert len(engine.step().wrote) == 16
    assert len(passes) == len(draws) == 1
    assert (len(lists), len(items)) == ((1, 0) if logprobs is None else (3, 1))


def test_a_long_prompt_does_not_stop_the_others():
    engine = endless(max_batch=2, max_context=1024, prefill_chunk=16)
    ignore = lambda delta: None
    (short,) = engine.add_request(new_request([1, 2, 3], 100), deliver=ignore)
    engine.step()
    (long,) = engine.add_request(new_request([5] * 100, 4), deliver=ignore)
    for i in range(7):
        before = len(short.written)
        step = engine.step()
        assert (
            len(short.written) == before + 1
            and step.read == [(1, 1, 16 if i < 6 else 3)]
            and (0, 0) in step.wrote
        )
        assert bool(long.written) == (i == 6)


def test_the_budget_of_a_step_is_shared():
    engine = endless(max_batch=8, max_context=64, prefill_chunk=10)
    engine.add_request(
        *[new_request([1] * 4, 5) for _ in range(4)], deliver=lambda delta: None
    )
    # the last token of a prompt is read when the first one of the answer is written
    step = engine.step()
    assert step.read == [(0, 0, 3), (1, 1, 3), (2, 2, 3), (3, 3, 3)]
    assert [row for row, _ in step.wrote] == [0, 1, 2, 3]


def test_a_step_reads_more_where_more_read_than_write():
    engine = endless(max_batch=8, max_context=64, prefill_chunk=10)
    engine.add_request(*[new_request([1] * 16, 5)] * 6, deliver=lambda delta: None)
    sizes = lambda step: {row: size for row, _, size in step.read}
    # 6 read and none writes: 40 tokens, half of them for the first to come
    assert sizes(engine.step()) == {0: 15, 1: 15, 2: 10}
    # 4 read and 2 write: 20 tokens
    assert sizes(engine.step()) == {2: 5, 3: 15}
    # 2 read and 4 write: 10
    assert sizes(engine.step()) == {4: 10}


@pytest.mark.parametrize(
    "reading, writing, budget",
    [
        (0, 3, 10),
        (1, 0, 10),
        (3, 0, 30),
        (9, 0, 40),
        (1, 9, 10),
        (5, 4, 20),
        (9, 1, 40),
    ],
)
def test_the_budget_follows_the_ratio(reading, writing, budget):
    running = [types.SimpleNamespace(unread=n) for n in [7] * reading + [0] * writing]
    assert engine_module.read_budget(10, running) == budget


def test_the_row_of_a_short_answer_is_used_at_once():
    engine = endless(max_batch=2, max_context=64)
    engine.add_request(
        new_request([1], 3),
        new_request([2], 20),
        new_request([3], 3),
        new_request([4], 3),
        deliver=lambda delta: None,
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
    (deltas,) = answers(engine, new_request([1, 2], 90, stop=stop))
    assert text_of(deltas) == expected and not any(
        "\ufffd" in delta.text for delta in deltas
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
    (deltas,) = answers(engine, new_request([1, 2], 20))
    assert text_of(deltas) == (" a b", "stop")


def test_max_tokens_in_the_middle_of_a_character():
    engine = Engine(Scripted(spell("жук")), TOKENIZER, max_context=100)
    for length, text in ((1, "\ufffd"), (2, "ж"), (3, "ж\ufffd"), (6, "жук")):
        (deltas,) = answers(engine, new_request([1], length))
        assert text_of(deltas) == (text, "length") and deltas[-1].written == length
    (deltas,) = answers(engine, new_request([1], 7))
    assert text_of(deltas) == ("жук", "stop") and deltas[-1].written == 7


@pytest.mark.parametrize("end", [EOS, EOS + 2])
def test_end_tokens(end):
    engine = Engine(
        Scripted([0, *TOKENIZER.encode("ab"), end, *TOKENIZER.encode("cd")]),
        TOKENIZER,
        max_context=100,
    )
    (deltas,) = answers(engine, new_request([1], 50))
    assert QWEN_SPECIAL_TOKENS[end - EOS] in (
        "<|endoftext|>",
        "<|im_end|>",
    ) and text_of(deltas) == ("ab", "stop")


def test_rows_of_the_embedding_without_a_token_are_never_written():
    model = Scripted([CONFIG.vocab_size - 1] * 4)
    (deltas,) = answers(
        Engine(model, TOKENIZER, max_context=16),
        new_request([1], 5, temperature=0, logprobs=3),
    )
    assert all(
        token < TOKENIZER.vocab_size
        for delta in deltas
        for token, _, _ in delta.logprobs
    )


def test_logprobs():
    request = new_request([1, 2, 3], 5, temperature=0, logprobs=3)
    (deltas,) = answers(Engine(MODEL, TOKENIZER, max_context=64), request)
    found = [entry for delta in deltas for entry in delta.logprobs]
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
        engine, new_request([1], 3), new_request([1], 50), new_request([1], 3)
    )
    assert text_of(good) == text_of(after) == ("abc", "length")
    assert (
        bad[-1].finish_reason == "error"
        and "not finite" in bad[-1].text
        and engine.scheduler.rows == [None, None]
    )


def test_cancelled_jobs_leave_rows_and_queue():
    engine = endless(max_batch=1, max_context=64, max_queue=2)
    deltas = []
    (running,) = engine.add_request(new_request([1], 50), deliver=deltas.append)
    engine.step()
    waiting = engine.add_request(
        new_request([2], 50), new_request([3], 50), deliver=deltas.append
    )
    with pytest.raises(QueueFull, match="of its 2 places, 2 are taken"):
        engine.add_request(new_request([4], 2), deliver=deltas.append)
    for job in (running, waiting[0]):
        job.cancelled = True
    (last,) = engine.add_request(new_request([4], 2), deliver=deltas.append)
    deltas.clear()
    engine.step()
    assert (
        engine.scheduler.rows == [waiting[1]]
        and list(engine.scheduler.waiting) == [last]
        and {delta.index for delta in deltas} <= {1}
    )


def test_all_or_none_enter_the_queue():
    engine = Engine(MODEL, TOKENIZER, max_queue=2, max_context=64)
    with pytest.raises(QueueFull):
        engine.add_request(*[new_request([1], 2)] * 3, deliver=print)
    assert not engine.scheduler.waiting
    with pytest.raises(ValueError):
        engine.add_request(new_request([1], 2), new_request([], 2), deliver=print)
    assert not engine.scheduler.waiting


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(prompt=[]), "prompt must have at least one token"),
        (dict(prompt=[278]), "prompt must have token ids from 0 to 277"),
        (dict(prompt=[-1]), "prompt must have token ids"),
        (dict(max_tokens=0), "max_tokens must be a whole number of at least 1"),
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
        engine.check(new_request(**{"prompt": [1], "max_tokens": 63, **wrong}))
    assert "\n" not in str(error.value)
    engine.check(new_request([1], 63))


@pytest.mark.parametrize(
    "name", ["max_batch", "max_context", "max_queue", "prefill_chunk"]
)
def test_engine_arguments(name):
    with pytest.raises(
        ValueError, match=f"{name} must be a whole number of at least 1, not 0"
    ):
        Engine(MODEL, TOKENIZER, **{name: 0})


def test_the_model_limits_the_context():
    model = QwenForCausalLM(
        QwenConfig(**{**CONFIG.to_dict(), "max_position_embeddings": 32})
    )
    engine = Engine(model, TOKENIZER)
    assert (
        engine.max_context == engine.runner.cache.max_length == 32
        and not engine.runner.model.training
    )


def test_a_failing_step_fails_the_requests_and_not_the_engine():
    async def scenario():
        model = Scripted(spell("abc"))
        engine = AsyncEngine(model, TOKENIZER, max_batch=1, max_context=64)
        engine.start()
        forward, model.forward = model.forward, None
        try:
            failed = [
                [delta async for delta in engine.stream(new_request([1], 5))][-1]
                for _ in range(2)
            ]
            model.forward = forward
            good = [delta async for delta in engine.stream(new_request([1], 5))]
        finally:
            engine.close()
        assert [delta.finish_reason for delta in failed] == [
            "error"
        ] * 2 and "TypeError" in failed[0].text
        assert text_of(good) == ("abc", "stop") and not engine.running

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_an_event_loop_that_has_ended():
    async def scenario(engine):
        return engine.stream(new_request([1], 300))

    engine = endless(max_batch=1, max_context=400)
    engine.start()
    stream = asyncio.run(scenario(engine))
    idle(engine)
    assert engine.running and stream.sequences[0].written
    engine.close()


def test_closing_ends_what_runs_and_what_waits():
    async def scenario():
        engine = endless(max_batch=1, max_context=4096)
        engine.start()
        running, waiting = (
            engine.stream(new_request([1], 4000)),
            engine.stream(new_request([2], 5)),
        )
        await anext(running)
        await asyncio.to_thread(engine.close)
        for answer in (running, waiting):
            assert [delta async for delta in answer][-1] == Delta(
                0, "the server is shutting down", "error", pytest.approx(0, abs=4000)
            )
        with pytest.raises(QueueFull, match="shutting down"):
            engine.stream(new_request([1], 5))

    asyncio.run(asyncio.wait_for(scenario(), 60))


def beside(engine, bad, faulty=None):
    """The deltas of `bad` between two greedy requests; the others' answers must be
    those of the requests alone.
    """
    good = new_request([1, 2, 3], 12, temperature=0, logprobs=0)
    first, found, last = answers(engine, good, bad, good)
    for deltas in (first, last):
        assert deltas[-1].finish_reason in ("stop", "length")
        assert [token for delta in deltas for token, _, _ in delta.logprobs] == alone(
            good
        )
    assert engine.scheduler.rows == [None] * len(
        engine.scheduler.rows
    ) and engine.runner.cache.lengths == [0] * len(engine.scheduler.rows)
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
        found = beside(engine, new_request([1, 2, 3], 6, seed=1, **{name: value}))
        assert found[-1].finish_reason in ("stop", "length")


def faulty_draw(monkeypatch):
    draw = engine_module.draw

    def fails(logits, sequences):
        if any(s.request.params.seed == 13 for s in sequences):
            raise RuntimeError("no\nluck")
        return draw(logits, sequences)

    monkeypatch.setattr(engine_module, "draw", fails)


def faulty_text(monkeypatch):
    prepare = engine_module.new_sequence

    def fails(engine, request, index, group):
        made = prepare(engine, request, index, group)
        if request.params.seed == 13:
            made.text.push = made.text.finish = lambda *_: 1 / 0
        return made

    monkeypatch.setattr(engine_module, "new_sequence", fails)


def faulty_logprobs(monkeypatch):
    """The log-probabilities of one row cannot be computed."""
    token_logprob = engine_module._token_logprob

    def fails(logits, token, number, vocab_size):
        return token_logprob(
            logits, token, 1 / 0 if number == 13 else number, vocab_size
        )

    monkeypatch.setattr(engine_module, "_token_logprob", fails)


def faulty_reading(monkeypatch):
    read = ModelRunner.read

    def fails(self, sequences, sizes):
        if any(s.request.params.seed == 13 for s in sequences):
            raise MemoryError("out of memory")
        return read(self, sequences, sizes)

    monkeypatch.setattr(ModelRunner, "read", fails)


def faulty_writing(monkeypatch):
    """The common pass fails from the faulty request's third token on."""
    write = ModelRunner.write

    def fails(self, sequences):
        if any(s.request.params.seed == 13 and len(s.written) > 1 for s in sequences):
            raise MemoryError("out of memory")
        return write(self, sequences)

    monkeypatch.setattr(ModelRunner, "write", fails)


@pytest.mark.parametrize(
    "faulty, message",
    [
        (faulty_draw, "RuntimeError: no"),
        (faulty_text, "ZeroDivisionError"),
        (faulty_logprobs, "ZeroDivisionError"),
        (faulty_reading, "MemoryError"),
        (faulty_writing, "MemoryError"),
    ],
)
def test_an_error_of_one_row_ends_that_row(faulty, message, log, monkeypatch):
    faulty(monkeypatch)
    bad = new_request([1, 2, 3], 6, seed=13, logprobs=13)
    found = beside(Engine(MODEL, TOKENIZER, max_batch=3, max_context=64), bad)
    assert found[-1].finish_reason == "error"
    assert message in found[-1].text and "\n" not in found[-1].text
    together = [line for line in log.lines if "at once failed" in line]
    assert len(together) == (faulty is not faulty_text)
    assert len(log.lines) == 1 + len(together)
    assert "request" in log.lines[-1] and "failed" in log.lines[-1]
    assert not any("\n" in line for line in log.lines)


def check_retry():
    """A pass for all rows fails after it has drawn: the seeded answers of the others
    are those of the requests alone.
    """
    good = [
        new_request([1, 2, 3 + i], 12, temperature=1.5, seed=i, logprobs=0)
        for i in range(2)
    ]
    bad = new_request([1, 2, 3], 6, temperature=1.5, seed=9, logprobs=13)
    engine = Engine(MODEL, TOKENIZER, max_batch=3, max_context=64)
    first, failed, last = answers(engine, good[0], bad, good[1])
    assert failed[-1].finish_reason == "error"
    for request, deltas in zip(good, (first, last)):
        found = [token for delta in deltas for token, _, _ in delta.logprobs]
        assert found == alone(request)


def test_a_retry_draws_the_same(monkeypatch):
    faulty_logprobs(monkeypatch)
    check_retry()


@pytest.mark.mutant
def test_a_retry_kills(monkeypatch):
    """The generators stay where the failed pass has left them."""
    faulty_logprobs(monkeypatch)
    monkeypatch.setattr(engine_module, "_rewind", lambda sequences, states: None)
    with pytest.raises(AssertionError):
        check_retry()


def test_pieces_that_cannot_be_delivered(log):
    engine, found = endless(max_batch=2, max_context=64), []

    def deliver(delta):
        if delta.index == 0:
            raise RuntimeError("gone")
        found.append(delta)

    engine.add_request(
        new_request([1], 9), new_request([1, 2, 3], 12, temperature=0), deliver=deliver
    )
    while engine.step():
        pass
    assert found[-1].finish_reason == "length" and engine.scheduler.rows == [None, None]
    assert "request 0: its text cannot be delivered: RuntimeError: gone" in log.text


def test_a_row_is_taken_from_who_holds_the_most():
    """A single request comes while another one's answers hold all rows: it gets a row
    at the next step, and every answer stays what it was.
    """
    wanted = requests()
    many = [
        new_request([5, 6, 7], 40, temperature=1.0, seed=i, logprobs=0)
        for i in range(6)
    ]
    expected = [alone(request) for request in many]
    engine = Engine(MODEL, TOKENIZER, max_batch=4, max_context=64, prefill_chunk=8)
    written, ends = {}, []

    def collect(name):
        def deliver(delta):
            assert delta.finish_reason != "error", delta.text
            written.setdefault((name, delta.index), []).extend(
                token for token, _, _ in delta.logprobs
            )
            if delta.finish_reason:
                ends.append(name)

        return deliver

    engine.add_request(*many, deliver=collect("many"))
    for _ in range(3):
        engine.step()
    for i in (3, 9, 1):
        (job,) = engine.add_request(wanted[i], deliver=collect(i))
        engine.step()
        assert job in engine.scheduler.rows or i in ends
        engine.step()
    while engine.step():
        pass
    assert [written["many", i] for i in range(6)] == expected
    assert [written[i, 0] for i in (3, 9, 1)] == [EXPECTED[i] for i in (3, 9, 1)]
    assert ends.count("many") == 6


def test_a_newcomer_does_not_wait_for_the_ends_of_many_long_answers():
    """All of one client: twenty requests hold or await all rows, and each answer stays
    what it would be alone.
    """
    wanted = [
        new_request([i], 100, temperature=1.0, seed=i, logprobs=0) for i in range(1, 21)
    ]
    engine = endless(max_batch=4, max_context=128, max_queue=18)
    written, left = [[] for _ in wanted], [20]

    def collect(index):
        def deliver(delta):
            assert delta.finish_reason != "error", delta.text
            written[index] += [token for token, _, _ in delta.logprobs]
            left[0] -= delta.finish_reason is not None

        return deliver

    for index, request in enumerate(wanted[:18]):
        engine.add_request(request, deliver=collect(index))
    engine.step()
    for index in (18, 19):
        engine.add_request(wanted[index], deliver=collect(index))
    for _ in range(scheduler.TURN * 5):
        engine.step()
    assert all(written)  # in turns of 64, where answers of 100 would make it 400 steps
    most = 0
    while engine.step():
        most = max(most, sum(job.started for job in engine.scheduler.waiting))
    assert left == [0] and most <= 18
    lone = endless(max_batch=1, max_context=128)
    for index in (0, 7, 19):
        (deltas,) = answers(lone, wanted[index])
        assert written[index] == [
            token for delta in deltas for token, _, _ in delta.logprobs
        ]


def test_a_full_queue_makes_room_for_who_has_less():
    engine = endless(max_batch=1, max_queue=4, max_context=64)
    deltas = {"greedy": [], "modest": []}
    engine.add_request(
        *[new_request([1], 5)] * 4, deliver=deltas["greedy"].append, client="a"
    )
    engine.add_request(new_request([2], 5), deliver=deltas["modest"].append, client="b")
    assert [(delta.finish_reason, delta.status) for delta in deltas["greedy"]] == [
        ("error", 429)
    ] * 4
    while engine.step():
        pass
    assert deltas["modest"][-1].finish_reason == "length" and not any(
        "\n" in delta.text for delta in deltas["greedy"]
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
        Engine(MODEL, TOKENIZER, max_context=64).add_request(
            new_request([1], 5, **wrong), deliver=print
        )
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    Engine(MODEL, TOKENIZER, max_context=64).check(
        new_request([1], 5, seed=2**64 - 1, stop=["x" * 1000] * 16)
    )


def test_pieces_that_nobody_fetches(monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_UNREAD", 3)

    async def scenario():
        engine = endless(max_batch=1, max_context=64)
        stream = engine.stream(new_request([1], 50))
        while engine.step():
            await asyncio.sleep(0)
        assert (
            stream.sequences[0].cancelled
            and engine.scheduler.rows == [None]
            and stream._queue.qsize() == 4
        )
        last = [delta async for delta in stream][-1]
        assert last.finish_reason == "error" and "does not read" in last.text

    asyncio.run(scenario())

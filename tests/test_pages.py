"""Pages: whatever comes, waits, leaves and shares, each answer is that of its request
alone, and no page is lost.
"""

import dataclasses
import functools
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_helpers import (
    CONFIG,
    MODEL,
    TOKENIZER,
    alone,
    answers,
    new_request,
    requests,
    text_of,
    together,
)

from qwen_analog import engine as engine_module
from qwen_analog import pages as pages_module
from qwen_analog.engine import Engine
from qwen_analog.pages import (
    PagedCache,
    PageHolders,
    PageMemory,
    PagePass,
    PagePool,
    has_pages,
    new_paged_cache,
    page_digest,
    pages_for,
)

SETTINGS = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)
QUICK = settings(max_examples=40, derandomize=True, **SETTINGS)


def new_engine(rows=4, pages=16, size=4, context=48, chunk=8, **options):
    return Engine(
        MODEL,
        TOKENIZER,
        max_batch=rows,
        max_context=context,
        kv_pages=pages,
        page_size=size,
        prefill_chunk=chunk,
        **options,
    )


def check_pool(cache):
    """Every page is held as often as rows name it, and free where none does; what is
    known of a page is what it holds.
    """
    pool, tables = cache.pool, cache.tables
    named = Counter(page for pages in tables.pages for page in pages)
    assert pool.holders == [named[page] for page in range(pool.num_pages)]
    assert set(pool.free) == set(range(pool.num_pages)) - set(named)
    known = {}
    for before, pages in pool._after.items():
        assert pages
        known |= {page: (before, tokens) for tokens, page in pages.items()}
    assert known == pool.content
    for row, length in enumerate(cache.lengths):
        assert len(tables.tokens[row]) == length <= len(tables.pages[row]) * pool.size
        digest = b""
        for i in range(length // pool.size):
            tokens = tuple(tables.tokens[row][i * pool.size : (i + 1) * pool.size])
            page = tables.pages[row][i]
            assert pool.content.get(page, (digest, tokens)) == (digest, tokens)
            digest = page_digest(digest, tokens)


# --- random schedules


@functools.cache
def expected(prompt, max_tokens, seed):
    return alone(new_request(prompt, max_tokens, seed=seed, temperature=1.2))


BEGINNINGS = tuple(range(30, 60)), tuple(range(30, 38)) + (90,) * 12, (7,) * 20
ASKED = st.tuples(
    st.sampled_from(BEGINNINGS),
    st.integers(1, 20),  # tokens of it
    st.integers(0, 2),  # an end of its own
    st.integers(1, 12),  # tokens to write
    st.integers(0, 3),  # steps until it comes
    st.sampled_from([None, None, None, 1, 4]),  # steps until its client goes
    st.sampled_from("abc"),  # whose it is
)


@dataclasses.dataclass
class Schedule:
    asked: list
    size: int
    spare: int  # pages beyond those that one request needs
    rows: int
    chunk: int
    cost: int = 1000  # tokens that a pass costs: what is padded to be read together


SCHEDULES = st.builds(
    Schedule,
    st.lists(ASKED, min_size=1, max_size=8),
    st.integers(1, 7),
    st.sampled_from([0, 1, 3, 20]),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8, 64]),
    st.sampled_from([-1, 4, 1000]),
)


def run_schedule(schedule):
    """Follow a schedule and check every answer, page and step."""
    context = 40
    pages = pages_for(context, schedule.size) + schedule.spare
    engine = new_engine(schedule.rows, pages, schedule.size, context, schedule.chunk)
    engine.runner.pass_cost = schedule.cost
    cache, written, leaving = engine.runner.cache, {}, []
    todo = list(enumerate(schedule.asked))
    wait = steps = 0
    while True:
        while todo and wait == 0:
            index, (text, length, end, size, wait, leaves, client) = todo.pop(0)
            prompt = (*text[:length], *range(200, 200 + end))
            request = new_request(
                prompt, size, seed=index % 3, temperature=1.2, logprobs=0
            )
            written[index] = request, []

            def deliver(delta, found=written[index][1]):
                assert delta.finish_reason != "error", delta.text
                found += [entry.token for entry in delta.logprobs]

            (sequence,) = engine.add_request(request, deliver=deliver, client=client)
            if leaves is not None:
                leaving.append((steps + leaves, sequence, index))
        for when, sequence, _ in leaving:
            if when == steps:
                sequence.cancelled = True
        if engine.step() is None and not todo:
            break
        check_pool(cache)
        wait, steps = max(wait - 1, 0), steps + 1
        assert steps < 2000, "somebody waits for ever"
    gone = {index for _, _, index in leaving}
    for index, (request, found) in written.items():
        wanted = expected(request.prompt, request.max_tokens, request.params.seed)
        assert found == (wanted[: len(found)] if index in gone else wanted)
    assert cache.lengths == [0] * schedule.rows
    assert len(cache.pool.free) == pages


@QUICK
@given(SCHEDULES)
def test_each_answer_is_that_of_the_request_alone(schedule):
    run_schedule(schedule)


# schedules in which pages are shared, copied, short and used again
HARD = [
    Schedule([(BEGINNINGS[i % 2], n, e, 10, 1, None, "a")], size, spare, 4, 8)
    for size in (3, 4)
    for spare in (0, 2)
    for i, n, e in ((0, 9, 0),)
]
for schedule in HARD:
    schedule.asked = [
        (BEGINNINGS[i % 2], 5 + 3 * i % 14, i % 3, 10, i % 2, None, "ab"[i % 2])
        for i in range(8)
    ]


def run_hard():
    for schedule in HARD:
        run_schedule(schedule)


def test_hard_schedules():
    run_hard()


def wrong_page_order(monkeypatch):
    write = PagePass.write

    def shuffled(self, store, new):
        return write(
            dataclasses.replace(self, table=self.table.sort(-1)[0]), store, new
        )

    monkeypatch.setattr(PagePass, "write", shuffled)


def no_copy_on_write(monkeypatch):
    monkeypatch.setattr(PageMemory, "own", lambda self, page, length, spare: page)


def copy_of_too_little(monkeypatch):
    own = PageMemory.own
    monkeypatch.setattr(
        PageMemory, "own", lambda self, page, n, spare: own(self, page, n - 1, spare)
    )


def freed_although_shared(monkeypatch):
    def give_back(self, page):
        self.holders[page] = 0
        self.free[page] = None

    monkeypatch.setattr(PageHolders, "give_back", give_back)


def found_page_stays_free(monkeypatch):
    def share(self, page):
        self.holders[page] += 1
        if self.holders[page] == 1 and page not in self.content:
            self.free.pop(page, None)

    monkeypatch.setattr(PageHolders, "share", share)


def digest_of_the_page_alone(monkeypatch):
    digest = pages_module.page_digest
    monkeypatch.setattr(pages_module, "page_digest", lambda before, t: digest(b"", t))


def content_remembered_when_taken(monkeypatch):
    monkeypatch.setattr(PagePool, "forget", lambda self, page: None)


def idle_rows_write_to_their_pages(monkeypatch):
    begin = PagedCache.begin

    def all_reserved(self, rows, T):
        before = self.reserved
        self.reserved = [
            (0,) * T if p else r for p, r in zip(self.tables.pages, before)
        ]
        result = begin(self, rows, T)
        self.reserved = before
        return result

    monkeypatch.setattr(PagedCache, "begin", all_reserved)


def padding_in_pages(monkeypatch):
    """Padding is written where a row's next tokens go, in a page that others hold."""
    plan = PagedCache._plan

    def written(self, rows, positions):
        made = plan(self, rows, positions)
        index = positions // self.pool.size
        return dataclasses.replace(made, pages=made.table.gather(1, index))

    monkeypatch.setattr(PagedCache, "_plan", written)


def nobody_gives_way(monkeypatch):
    def never(engine, sequence, size):
        tokens = sequence.next_tokens(size)
        return engine.runner.cache.reserve(sequence.row, tokens) or True

    monkeypatch.setattr(engine_module, "_has_memory", never)


MUTANTS = [
    wrong_page_order,
    no_copy_on_write,
    copy_of_too_little,
    freed_although_shared,
    found_page_stays_free,
    digest_of_the_page_alone,
    content_remembered_when_taken,
    idle_rows_write_to_their_pages,
    padding_in_pages,
    nobody_gives_way,
]


def run_more():
    """Texts that agree in a page and not before it, and a row that reads for long
    between two that write.
    """
    run_hard()
    twins = [(a,) * 4 + (5,) * 12 for a in (1, 2)]
    schedule = Schedule(
        [(text, 16, 0, 8, 2, None, "a") for text in twins * 2], 4, 20, 4, 64
    )
    run_schedule(schedule)
    long = [(BEGINNINGS[0], n, 2, 12, 1, None, "a") for n in (2, 20, 3)]
    run_schedule(Schedule(long, 4, 20, 3, 1))


def test_more_schedules():
    run_more()


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS)
def test_schedules_kill(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(
        (AssertionError, ValueError, RuntimeError, IndexError, KeyError)
    ):
        run_more()


# --- the engine with pages does what it does with rows


@pytest.mark.parametrize("size, pages, rows", [(16, 64, 16), (5, 14, 4), (1, 70, 3)])
def test_requests_of_every_kind(size, pages, rows):
    engine = new_engine(rows, pages, size, 64)
    assert together(engine, requests()) == [alone(request) for request in requests()]
    check_pool(engine.runner.cache)


def test_what_a_page_leaves_behind_reaches_nobody():
    """Not even where it was nan."""
    engine = new_engine(rows=2, pages=12, size=4)
    cache = engine.runner.cache
    for prompt in ([5] * 9, [6] * 9, [7] * 9):
        cache.keys[:, list(cache.pool.free)] = torch.nan
        cache.values[:, list(cache.pool.free)] = torch.nan
        cache.keys[:, -1] = cache.values[:, -1] = torch.nan  # nobody's
        for page in list(cache.pool.free):
            cache.pool.forget(page)
        long, short = [
            new_request(ids, 8, temperature=0, logprobs=0)
            for ids in (prompt, prompt[:6])  # one row ends before the other
        ]
        for request, deltas in zip((long, short), answers(engine, long, short)):
            tokens = [t for delta in deltas for t, _, _ in delta.logprobs]
            assert tokens == alone(request)


@pytest.mark.mutant
def test_what_a_page_leaves_behind_kills(monkeypatch):
    monkeypatch.setattr(PageMemory, "new_page", lambda self: self.pool.take())
    with pytest.raises(AssertionError):
        test_what_a_page_leaves_behind_reaches_nobody()


def read_of(engine, *wanted, client=""):
    """How many tokens of its prompt each request reads, and its answer."""
    found = [[] for _ in wanted]
    deliver = lambda delta: found[delta.index].append(delta)
    sequences = engine.add_request(*wanted, deliver=deliver, client=client)
    read = Counter()
    while step := engine.step():
        for _, number, size in step.read:
            read[number] += size
    return [read[s.number] for s in sequences], [text_of(deltas) for deltas in found]


def test_a_conversation_that_goes_on_is_found():
    engine = new_engine(rows=2, pages=40, size=4, context=100, chunk=64)
    engine.stop_ids = set()
    prompt = list(range(49))
    assert read_of(engine, new_request(prompt, 2))[0] == [48]
    assert read_of(engine, new_request(prompt, 2))[0] == [0]
    # it parts in the middle of a page
    assert read_of(engine, new_request([*prompt[:22], 99, *prompt[23:]], 2))[0] == [26]
    assert read_of(engine, new_request(prompt[:30], 2))[0] == [0]
    assert read_of(engine, new_request([9, *prompt], 2))[0] == [49]
    check_pool(engine.runner.cache)


@torch.inference_mode()
def test_pages_of_three_texts():
    """Two texts share the first full page, and half of the second is copied."""
    cache, count = new_paged_cache(MODEL, num_rows=3, num_pages=16, size=4), []
    for row, letters in enumerate(("abcdefghi", "abcdefghxy", "abcdefxyz")):
        tokens = list(letters.encode())
        count.append(cache.adopt(row, tokens))
        new = tokens[count[-1] :]
        assert cache.reserve(row, new)
        positions, mask = cache.begin(slice(row, row + 1), len(new))
        place = dict(position_ids=positions, mask=mask, cache=cache)
        logits = MODEL(torch.tensor([new]), **place)
        cache.advance(row, len(new))
        expected = MODEL(torch.tensor([tokens]))[:, -len(new) :]
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    assert count == [0, 8, 6]
    assert cache.tables.pages == [[0, 1, 2], [0, 1, 3], [0, 4, 5]]


def test_pages_answer_in_fewer_steps_than_rows():
    sizes = [(2, 70), (25, 6), (9, 20), (40, 6), (2, 6), (25, 70)] * 4
    todo = [
        new_request(range(i, i + n), m, temperature=0) for i, (n, m) in enumerate(sizes)
    ]
    steps, written = [], []
    for memory in (
        dict(max_batch=4),
        dict(max_batch=16, kv_pages=64, page_size=8),
        dict(max_batch=4, kv_pages=64, page_size=8),
    ):
        engine = Engine(MODEL, TOKENIZER, max_context=128, **memory)
        engine.stop_ids = set()
        sequences = engine.add_request(*todo, deliver=lambda delta: None)
        steps.append(0)
        while engine.step():
            steps[-1] += 1
        written.append([sequence.written for sequence in sequences])
    assert written[0] == written[1] == written[2]
    assert steps[1] < 0.5 * steps[0] and abs(steps[2] - steps[0]) < 10


def test_answers_to_one_prompt_share_its_pages():
    engine = new_engine(rows=6, pages=30, size=4, context=60, chunk=64)
    engine.stop_ids = set()
    first = new_request(range(41), 12, seed=1)
    engine.add_request(first, deliver=lambda delta: None)
    engine.step()
    more = [new_request(range(41), 12, seed=i) for i in range(2, 7)]
    engine.add_request(*more, deliver=lambda delta: None)
    engine.step()
    pool = engine.runner.cache.pool
    # ten pages of the prompt, and one more for each: rows of their own take 6 * 11
    assert len(engine.scheduler.running) == 6
    assert pool.num_pages - len(pool.free) == 10 + 6


def test_who_has_many_rows_gives_way():
    """One client's long answers take every page; another's single answer comes later
    and is never interrupted.
    """
    engine = new_engine(rows=4, pages=22, size=4, context=48)
    engine.stop_ids = set()
    engine.add_request(
        *[new_request([i], 40, seed=i) for i in range(4)],
        deliver=lambda delta: None,
        client="many",
    )
    for _ in range(6):
        engine.step()
    (single,) = engine.add_request(
        new_request([9], 40), deliver=lambda delta: None, client="one"
    )
    interrupted = 0
    for step in range(42):
        engine.step()
        interrupted += any(s.written and s.row < 0 for s in engine.scheduler.waiting)
        assert single.row >= 0 or len(single.written) == 40, step
    assert len(single.written) == 40 and interrupted
    while engine.step():
        pass
    assert len(engine.runner.cache.pool.free) == 22


def test_the_first_to_come_is_never_interrupted():
    engine = new_engine(rows=4, pages=12, size=4, context=48)
    engine.stop_ids = set()
    first, *others = engine.add_request(
        *[new_request([i], 40, seed=i) for i in range(4)], deliver=lambda delta: None
    )
    for _ in range(40):
        engine.step()
        assert first.row >= 0 or len(first.written) == 40
    assert len(first.written) == 40 and any(len(s.written) < 40 for s in others)


@pytest.mark.mutant
def test_who_gives_way_kills(monkeypatch):
    first = lambda running: min(running, key=lambda s: s.number)
    monkeypatch.setattr(engine_module, "who_gives_way", first)
    with pytest.raises(AssertionError):
        test_the_first_to_come_is_never_interrupted()


@pytest.mark.mutant
def test_the_last_to_come_kills(monkeypatch):
    """Whose rows they are does not count."""
    last = lambda running: max(running, key=lambda s: s.number)
    monkeypatch.setattr(engine_module, "who_gives_way", last)
    with pytest.raises(AssertionError):
        test_who_has_many_rows_gives_way()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pages=0), "kv_pages must be a whole number of at least 1, not 0"),
        (dict(size=0), "page_size must be a whole number of at least 1, not 0"),
        (
            dict(pages=11, size=4, context=48),
            "kv_pages must be at least 12, not 11: a request of 48 tokens needs as many"
            " pages of 4",
        ),
    ],
)
def test_sizes_that_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        new_engine(**options)
    assert str(error.value) == message


def test_memory_is_what_was_said():
    cache = new_paged_cache(MODEL, 3, 10, 4)
    values = CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim
    assert cache.nbytes == 2 * 4 * values * 4 * 11  # one is nobody's
    assert not has_pages(cache, range(41)) and has_pages(cache, range(40))
    assert cache.reserve(0, range(40)) and not cache.reserve(1, [1])
    assert cache.tables.pages[1] == [] and cache.reserved[1] == ()

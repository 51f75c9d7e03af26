"""The engine that writes with a compiled step: every answer is that of its request
alone, by the plain model, whatever comes, waits, leaves and grows.
"""

import copy
import functools

import pytest
import torch
from serving_helpers import MODEL, TOKENIZER, alone, answers, new_request, requests
from serving_helpers import together
from test_compiled import Replayed, no_compiler, run_in_python

from qwen_analog import compiled, compiled_blocks
from qwen_analog.compiled_rows import CompiledRows, PageRoom, RowRoom, RowSlot
from qwen_analog.engine import Engine, ModelRunner
from qwen_analog.inference import optimize_for_inference

PAGES = {"kv_pages": 16, "page_size": 4}  # of which one request needs up to 14
MEMORIES = pytest.mark.parametrize("memory", [{}, PAGES], ids=["rows", "pages"])


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """The step is the compiled one's, line by line; its rooms are small."""
    run_in_python(monkeypatch)
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    monkeypatch.setattr(compiled, "ROOM", 8)


def new_model():
    return optimize_for_inference(copy.deepcopy(MODEL), compile=True)


def new_engine(memory, rows=4, context=56, chunk=8, model=None):
    sizes = dict(max_batch=rows, max_context=context, prefill_chunk=chunk)
    return Engine(model or new_model(), TOKENIZER, **sizes, **memory)


@functools.cache
def wanted():
    return [alone(request) for request in requests()]


def check_answers(memory, rows=4, **options):
    """Sixteen requests that come one by one, through rooms of up to 56 tokens."""
    engine = new_engine(memory, rows, **options)
    forward = engine.runner.forward
    assert isinstance(forward, CompiledRows)
    fine = not forward.step.cuda
    sizes = [2, 4, 6, 8, 12, 16, 24, 32, 48, 56] if fine else [8, 16, 32, 56]
    assert [*forward.rooms] == sizes
    used = set()
    run = forward.step.run
    forward.step.run = lambda room: (used.add(len(room.places)), run(room))[1]
    assert together(engine, requests()) == wanted()
    assert {16, 32, 48 if fine else 56} <= used <= {*sizes, 56}
    assert engine.scheduler.rows == [None] * rows


@MEMORIES
@pytest.mark.parametrize("rows", [1, 4])
def test_each_answer_is_that_of_the_request_alone(memory, rows):
    check_answers(memory, rows)


def test_interrupted_requests(monkeypatch):
    interrupted = []
    engine = new_engine(PAGES)
    interrupt = engine.scheduler.interrupt
    engine.scheduler.interrupt = lambda s: (interrupted.append(s), interrupt(s))
    assert together(engine, requests(), every=1) == wanted()
    assert interrupted and len(engine.runner.cache.pool.free) == 16


@MEMORIES
def test_a_recorded_step(memory, monkeypatch):
    """The same at the same places, as a CUDA graph does it."""
    monkeypatch.setattr(compiled, "_record", Replayed)
    model = new_model()
    model.compiled_step.cuda = True
    check_answers(memory, model=model)
    engine = new_engine(memory, model=model)
    assert all(room.graph for room in engine.runner.forward.rooms.values())


@MEMORIES
def test_two_engines_of_one_model(memory):
    model = new_model()
    engines = [new_engine(memory, rows, model=model) for rows in (2, 3)]
    for engine in engines:
        assert together(engine, requests()[:4]) == wanted()[:4]


@MEMORIES
def test_an_engine_made_in_inference_mode(memory):
    with torch.inference_mode():
        engine = new_engine(memory)
    assert together(engine, requests()[:4]) == wanted()[:4]


def check_retry(memory):
    """A pass for all rows fails, and each row is tried alone: what the others have
    written by then stays as it is, whatever room the rest needs.
    """
    good = [new_request([1, 2, 3 + i], 12, temperature=0, logprobs=0) for i in range(2)]
    bad = new_request([*range(20)], 9, seed=13, temperature=0, logprobs=0)
    found = answers(new_engine(memory, rows=3), good[0], bad, good[1])
    assert found[1][-1].finish_reason == "error"
    for request, deltas in zip(good, (found[0], found[2])):
        assert [t for delta in deltas for t, _, _ in delta.logprobs] == alone(request)


@pytest.fixture
def failing(monkeypatch):
    write = ModelRunner.write

    def fails(self, sequences):
        found = write(self, sequences)
        if any(s.request.params.seed == 13 and len(s.written) > 2 for s in sequences):
            raise MemoryError("out of memory")
        return found

    monkeypatch.setattr(ModelRunner, "write", fails)


@MEMORIES
def test_rows_that_are_tried_alone(memory, failing):
    check_retry(memory)


@MEMORIES
def test_nan_of_one_row_reaches_no_other(memory):
    """What is hidden is multiplied by 0, and must be finite."""
    model = new_model()
    model.model.embed_tokens.weight[250] = torch.nan
    good = new_request([1, 2, 3], 20, temperature=0, logprobs=0)
    bad = new_request([1, 2, 250], 9, temperature=0)
    engine = new_engine(memory, rows=2, model=model)
    for _ in range(2):
        deltas = answers(engine, bad, good)
        assert deltas[0][-1].finish_reason == "error"
        assert [t for d in deltas[1] for t, _, _ in d.logprobs] == alone(good)


def test_a_compiler_that_fails_is_done_without(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no\nsuch luck")

    monkeypatch.setattr(compiled_blocks, "compile_package", broken)
    check_answers({})
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: the writing of tokens is not compiled: no such luck"]


def test_without_a_compiled_step_nothing_is_replaced():
    engine = Engine(MODEL, TOKENIZER, max_batch=2, max_context=64)
    assert "forward" not in vars(engine.runner)


@pytest.mark.slow
@MEMORIES
@pytest.mark.skipif(bool(no_compiler), reason=str(no_compiler))
def test_translated_to_c_plus_plus(memory, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "ROOM", 64)
    engine = new_engine(memory)
    assert together(engine, requests()) == wanted()
    assert not capsys.readouterr().err


# --- broken versions


def stale_table(monkeypatch):
    """Pages are read by the table of the first step."""
    fill = PageRoom.fill

    def broken(self, positions, plan):
        table = self.plan.table.clone()
        fill(self, positions, plan)
        if hasattr(self, "filled"):
            self.plan.table.copy_(table)
        self.filled = True

    monkeypatch.setattr(PageRoom, "fill", broken)


def stale_place(monkeypatch):
    """Tokens go to the places of the first step."""
    fill = PageRoom.fill

    def broken(self, positions, plan):
        places = self.plan.places.clone()
        fill(self, positions, plan)
        self.plan.places.copy_(places)

    monkeypatch.setattr(PageRoom, "fill", broken)


def mask_of_another_room(monkeypatch):
    """Of the first room, and beyond it everything is seen."""

    def broken(self):
        seen = (self.places <= self.positions) | (self.places >= 8)
        return self.positions, seen[:, None, None]

    monkeypatch.setattr(RowRoom, "where", broken)


def position_not_advanced(monkeypatch):
    monkeypatch.setattr(RowRoom, "fill", lambda self, positions, plan: None)


def one_position_for_all(monkeypatch):
    fill = RowRoom.fill
    broken = lambda self, positions, plan: fill(
        self, positions * 0 + plan.end - 1, plan
    )
    monkeypatch.setattr(RowRoom, "fill", broken)


def first_rows_logits(monkeypatch):
    call = CompiledRows.__call__
    broken = lambda self, first, ids: call(self, 0, ids)
    monkeypatch.setattr(CompiledRows, "__call__", broken)


def written_to_the_first_row(monkeypatch):
    update = RowSlot.update

    def broken(self, layer_idx, keys, values):
        rows, self.rows = self.rows, self.rows * 0
        found = update(self, layer_idx, keys, values)
        self.rows = rows
        return found

    monkeypatch.setattr(RowSlot, "update", broken)


@pytest.mark.mutant
@pytest.mark.parametrize(
    "broken, memory",
    [
        (stale_table, PAGES),
        (stale_place, PAGES),
        (mask_of_another_room, {}),
        (mask_of_another_room, PAGES),
        (position_not_advanced, {}),
        (one_position_for_all, {}),
        (one_position_for_all, PAGES),
        (first_rows_logits, {}),
        (written_to_the_first_row, {}),
    ],
)
def test_broken_parts_are_noticed(broken, memory, monkeypatch):
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_answers(memory)


@pytest.mark.mutant
@MEMORIES
def test_a_retry_notices_rows_that_read_token_0(memory, failing, monkeypatch):
    """An idle row's place is written to, as if its next token were 0."""
    call = CompiledRows.__call__

    def broken(self, first, ids):
        self.token.zero_()
        return call(self, first, ids)

    monkeypatch.setattr(CompiledRows, "__call__", broken)
    with pytest.raises(AssertionError):
        check_retry(memory)


@pytest.mark.mutant
def test_a_table_filled_with_others_pages_is_noticed(monkeypatch):
    """The columns that nobody needs name any page, and nan comes from there."""
    fill = PageRoom.fill

    def broken(self, positions, plan):
        fill(self, positions, plan)
        self.plan.table[:, plan.table.shape[1] :] = 16  # nobody's

    monkeypatch.setattr(PageRoom, "fill", broken)
    with pytest.raises(AssertionError):
        test_nan_of_one_row_reaches_no_other(PAGES)

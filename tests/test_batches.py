"""Batches prepared ahead: in order, exactly resumable, errors where they are due, no
thread left behind.
"""

import json
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from training import folder, same, settings, stops_after, training_state  # noqa: F401

from qwen_analog import batches
from qwen_analog import train as module
from qwen_analog.batches import Batch, next_batch, prefetch, prepare_batch
from qwen_analog.distributed import DistributedContext
from qwen_analog.jsonl import DataError
from qwen_analog.train import Trainer, train
from qwen_analog.train_config import TrainConfig


class Counter:
    """Counts its calls, and returns their numbers."""

    def __init__(self, fails_at=None, error=ValueError):
        self.calls, self.fails_at, self.error = 0, fails_at, error
        self.called = threading.Condition()

    def __call__(self):
        with self.called:
            self.calls += 1
            self.called.notify()
            if self.calls == self.fails_at:
                raise self.error("this one")
            return self.calls

    def wait_for(self, calls):
        with self.called:
            return self.called.wait_for(lambda: self.calls >= calls, timeout=30)


def threads():
    return {t for t in threading.enumerate() if t._target is batches._answer}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_results_come_in_order_and_no_call_is_made_beyond_them(count, depth):
    counter = Counter()
    assert list(prefetch(counter, count, depth)) == list(range(1, count + 1))
    assert counter.calls == count and not threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_exactly_depth_calls_are_ahead_of_the_result_in_use(depth):
    counter = Counter()
    with closing(prefetch(counter, 100, depth)) as results:
        for used in range(1, 8):
            assert next(results) == used
            assert counter.wait_for(used + depth)
    assert counter.calls == used + depth and not threads()


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_error_arrives_where_its_result_is_due(error):
    counter, seen = Counter(fails_at=4, error=error), []
    with pytest.raises(error, match="this one"):
        for result in prefetch(counter, 10):
            assert counter.wait_for(min(4, result + 2))
            seen.append(result)
    assert seen == [1, 2, 3] and counter.calls == 4 and not threads()


def test_a_call_that_never_ends_does_not_hold_the_program(monkeypatch):
    """The thread gets some seconds, and is a daemon: Python does not wait for it."""
    blocked, asked = threading.Event(), []
    counter = Counter()

    def prepare():
        if counter() > 1:
            blocked.wait(30)

    results = prefetch(prepare, 3)
    next(results)
    (thread,) = threads()
    join = thread.join
    monkeypatch.setattr(thread, "join", lambda timeout=None: asked.append(timeout))
    results.close()
    assert asked == [5] and thread.daemon and thread.is_alive()
    blocked.set()
    join()


class Others:
    """A context in which other processes report what they could not do."""

    world_size, rank, device = 3, 0, torch.device("cpu")

    def __init__(self, *failed):
        self.failed = failed

    def all_reduce_sum(self, *values):
        return [v + (rank in self.failed) for rank, v in enumerate(values)]


def test_all_processes_learn_of_data_that_cannot_be_read():
    batch = Batch([], [], {}, {})
    assert next_batch(iter([batch]), Others()) is batch
    with pytest.raises(
        DataError, match="another process, rank 2, cannot read its data"
    ):
        next_batch(iter([batch]), Others(2))

    def broken(error):
        raise error
        yield

    for error in (DataError("mine"), OSError("mine")):
        with pytest.raises(type(error), match="mine"):
            next_batch(broken(error), Others(1))


def metrics(directory):
    lines = Path(directory, "metrics.jsonl").read_text().splitlines()
    entries = map(json.loads, lines)
    return [(e["step"], e["loss"]) for e in entries if "loss" in e]


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_is_the_same_as_without_preparing_ahead(stream, monkeypatch):
    options = dict(stream=stream, max_steps=12, save_every=4)
    train(settings(output_dir="ahead", **options))
    monkeypatch.setattr(
        module, "prefetch", lambda prepare, count: (prepare() for _ in range(count))
    )
    train(settings(output_dir="plain", **options))
    assert metrics("ahead") == metrics("plain") and len(metrics("plain")) == 12
    for name in ("step_4", "step_8", "final"):
        ahead, plain = (training_state(f"{d}/{name}") for d in ("ahead", "plain"))
        assert same(ahead, plain)


@pytest.mark.parametrize("stream, steps", [(False, (3, 1, 5)), (True, (1, 1, 4))])
def test_stopped_and_continued_it_has_the_same_losses(stream, steps, monkeypatch):
    options = dict(stream=stream, max_steps=12, save_every=100, eval_every=100)
    train(settings(output_dir="whole", **options))
    for count in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, "stop_signals", stops_after(count))
            train(settings(**options), resume_from="auto")
        assert not threads()
    train(settings(**options), resume_from="auto")
    assert metrics("checkpoints") == metrics("whole")
    assert same(training_state("checkpoints/final"), training_state("whole/final"))


@pytest.mark.mutant
def test_the_place_of_the_thread_is_not_the_place_of_the_run(monkeypatch):
    options = dict(max_steps=12, save_every=100, eval_every=100)
    train(settings(output_dir="whole", **options))
    right = Trainer.state_dict

    def ahead(trainer):
        return {**right(trainer), "data": trainer.dataset.state_dict()}

    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_signals", stops_after(5))
        patch.setattr(Trainer, "state_dict", ahead)
        train(settings(**options))
    train(settings(**options), resume_from="auto")
    assert metrics("checkpoints")[:5] == metrics("whole")[:5]
    assert metrics("checkpoints")[5:] != metrics("whole")[5:]


def test_the_wait_for_data_is_logged():
    summary = train(settings(save_every=100))
    lines = Path("checkpoints/metrics.jsonl").read_text().splitlines()
    steps = [e for e in map(json.loads, lines) if "loss" in e]
    assert all(0 <= e["data_wait"] <= 128 / e["tokens_per_second"] for e in steps)
    for e in steps:
        share = e["data_wait"] * e["tokens_per_second"] / 128
        assert e["data_wait_share"] == pytest.approx(share)
    waited = sum(e["data_wait"] for e in steps)
    seconds = sum(128 / e["tokens_per_second"] for e in steps)
    assert summary["data_wait_share"] == pytest.approx(waited / seconds)
    assert len(steps) == 6


def test_no_thread_stays_after_a_run_however_it_ends(monkeypatch):
    train(settings(max_steps=2, output_dir="whole"))
    assert not threads()

    def raises(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_step", raises)
    with pytest.raises(KeyboardInterrupt):
        train(settings())
    assert not threads()


def test_a_batch_knows_its_place_and_its_micro_batches():
    class Dataset:
        place = 7

        def take(self, count, rank, world_size):
            self.place += count * world_size
            ids = torch.arange(3)
            return [batches.TokenSequence(ids, ids, ids, []) for _ in range(count)]

        def state_dict(self):
            return {"position": self.place}

    for isolate in (True, False):
        config = TrainConfig(
            micro_batch_size=2, gradient_accumulation_steps=3, isolate_documents=isolate
        )
        prepare = partial(prepare_batch, Dataset(), config, DistributedContext())
        first, second = prefetch(prepare, 2)
        assert (first.before, first.after) == ({"position": 7}, {"position": 13})
        assert (second.before, second.after) == (first.after, {"position": 19})
        assert [b["input_ids"].shape for b in second.micro_batches] == [(2, 3)] * 3
        assert ("document_ids" in second.micro_batches[0]) == isolate


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a GPU")
def test_batches_for_a_gpu_are_pinned():
    ids = torch.arange(3)
    (batch,) = batches._pin([{"input_ids": ids}], torch.device("cuda:0"))
    assert batch["input_ids"].is_pinned() and torch.equal(batch["input_ids"], ids)

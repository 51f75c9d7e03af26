"""Streams: places to resume from, mixing in a buffer, data sets of the hub, and one
reader for all processes of a machine."""

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from text_helpers import (
    END,
    FIELDS,
    LETTERS,
    RANKS,
    TOKENIZER,
    Counting,
    check_sequences,
    lines,
    same,
    texts,
    tokenized,
    write,
    write_random_texts,
)

from qwen_analog import streaming
from qwen_analog.data import PackedDataset, data_difference
from qwen_analog.jsonl import DataError, Document, write_jsonl
from qwen_analog.streaming import (
    HeldOutSide,
    StreamReader,
    StreamingDataset,
    open_stream,
    shuffle_in_buffer,
)
from qwen_analog.tokenizer import TiktokenTokenizer

pytest_plugins = ["text_helpers"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_a_stream_knows_its_files():
    def identified(paths=("d",), fraction=0.1):
        return json.loads(
            json.dumps(
                StreamingDataset(
                    open_stream(paths), TOKENIZER, 8, heldout_fraction=fraction
                ).fingerprint
            )
        )

    write_jsonl(texts([1, 2]), "d/a.jsonl")
    write_jsonl(texts([3]), "d/b.jsonl.gz")
    before = identified()
    assert data_difference(before, identified(["d/a.jsonl", "d/b.jsonl.gz"])) is None
    assert data_difference(
        before, identified(["d/b.jsonl.gz", "d/a.jsonl"])
    ).startswith("files in another order")
    assert (
        data_difference(before, identified(fraction=0.2))
        == "other documents are held out"
    )
    assert "streamed" in data_difference(
        before, PackedDataset(tokenized("d/a.jsonl"), 8).fingerprint
    )
    write_jsonl(texts([1, 3]), "d/a.jsonl")
    assert data_difference(before, identified()).startswith("a.jsonl: ")


def test_a_stream_that_has_changed_is_refused():
    write("a.jsonl", *texts([9, 9, 9]))
    sequences = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 8, buffer_size=0)
    sequences.take(4)
    state = sequences.state_dict()
    assert state["document"] == 1 and state["offset"] > 2
    write("a.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(DataError, match="the stream has changed"):
        StreamingDataset(
            open_stream(["a.jsonl"]), TOKENIZER, 8, buffer_size=0
        ).load_state_dict(state)


def test_resuming_a_stream_encodes_only_what_follows():
    write("a.jsonl", *texts([3] * 50))
    run = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 10, buffer_size=5)
    run.take(25)
    resumed = StreamingDataset(
        open_stream(["a.jsonl"]), Counting(RANKS), 10, buffer_size=5
    )
    Counting.encoded = 0
    resumed.load_state_dict(run.state_dict())
    assert same(resumed.take(2), run.take(2)) and Counting.encoded <= 4


def test_held_out_sequences_of_a_stream():
    write("a.jsonl", *texts([4] * 60))
    stream = open_stream(["a.jsonl"])
    held = StreamingDataset(
        stream, TOKENIZER, 8, seed=3, heldout_fraction=0.4, buffer_size=5
    ).held_out_dataset(3)
    everything = PackedDataset(tokenized("a.jsonl", 0.4), 8, held_out=True)
    assert 3 * 8 < held.tokens_per_epoch < everything.tokens_per_epoch
    assert set(s for b in held.epoch() for s in b.sources) <= set(
        s for b in everything.epoch() for s in b.sources
    )
    more = StreamingDataset(
        stream, TOKENIZER, 8, seed=4, heldout_fraction=0.4
    ).held_out_dataset(10**6)
    assert (
        more.tokens_per_epoch == everything.tokens_per_epoch
        and more.bytes_per_epoch == everything.bytes_per_epoch
    )


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_mixed_as_the_library_mixes(size):
    for name in "abcdefghijkl":
        write_jsonl(({"text": f"{name}{i}"} for i in range(13)), f"d/{name}.jsonl")
    stream = open_stream(["d"])
    reader = StreamReader(stream, TOKENIZER, 3, HeldOutSide(0.0), False, size)
    for epoch in range(2):
        expected = stream.shuffle(
            generator=np.random.default_rng((3, epoch)), buffer_size=size
        )
        assert list(reader.documents(epoch)) == list(expected)


def test_the_shuffle_buffer_is_bounded_by_its_text(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER_CHARACTERS", 1_000)
    taken = []
    documents = [{"text": "a" * n} for n in (100, 200, 50, 900, 3_000, *[5] * 500)]

    def counted():
        for document in documents:
            taken.append(document)
            yield document

    out = []
    for document in shuffle_in_buffer(counted(), np.random.default_rng(0), 10_000):
        out.append(document)
        held = sum(len(d["text"]) for d in taken) - sum(len(d["text"]) for d in out)
        assert held <= 1_000 + 3_000
    assert sorted(map(str, out)) == sorted(map(str, documents))


def test_a_huge_document_in_a_stream_is_encoded_piece_by_piece():
    class Watching(TiktokenTokenizer):
        longest = 0

        def encode(self, text, special=False):
            Watching.longest = max(Watching.longest, len(text))
            return super().encode(text, special)

    text = "some words, " * 100_000
    write("huge.jsonl", {"text": text}, {"text": "b"})
    run = StreamingDataset(
        open_stream(["huge.jsonl"]), Watching(RANKS), 400_000, buffer_size=0
    )
    first = run.take(2)
    assert (
        first[0].input_ids.tolist() == [END, *TOKENIZER.encode(text)][:400_000]
        and not first[1].document_ids.any()
    )
    assert Watching.longest <= 1 << 18
    resumed = StreamingDataset(
        open_stream(["huge.jsonl"]), TOKENIZER, 400_000, buffer_size=0
    )
    resumed.load_state_dict(run.state_dict())
    assert same(resumed.take(3), run.take(3))


def test_several_files_are_one_stream():
    for name, numbers in (("d/a.jsonl", [1, 2]), ("d/b.jsonl.gz", [3])):
        write_jsonl(texts(numbers), name)
    assert [row["source"] for row in open_stream(["d"])] == [
        "d/a.jsonl:1",
        "d/a.jsonl:2",
        "d/b.jsonl.gz:1",
    ]
    sequences = StreamingDataset(open_stream(["d"]), TOKENIZER, 5).take(30)
    assert {s for b in sequences for s in b.sources} == {
        "d/a.jsonl:1",
        "d/a.jsonl:2",
        "d/b.jsonl.gz:1",
    }


def hub(name, records, kind="parquet"):
    Path(name, "data").mkdir(parents=True)
    path = Path(name, "data", f"train-00000-of-00001.{kind}")
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        path.write_bytes(lines(*records))
    return f"hf:{name}"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_directory(kind):
    records = [
        {"title": letter, "text": text, "n": i, "error": "x"}
        for i, (letter, text) in enumerate(LETTERS.items())
    ]
    name = hub("owner/name", records, kind)
    found = [Document(**row) for row in open_stream([name])]
    assert found == [
        Document(text, letter, f"owner/name:{i}")
        for i, (letter, text) in enumerate(LETTERS.items())
    ]
    if kind == "parquet":  # `datasets` sleeps 5 s at the end of each of its epochs
        return
    write("same.jsonl", *records)
    streams = [
        StreamingDataset(open_stream([p]), TOKENIZER, 8, 1, 0.3, buffer_size=4)
        for p in (name, "same.jsonl")
    ]
    a, b = (sequences.take(20) for sequences in streams)
    assert all(
        torch.equal(getattr(x, f), getattr(y, f)) for x, y in zip(a, b) for f in FIELDS
    )
    assert streams[0].held_out_dataset(2)[0].input_ids[0] == END


def test_hub_records_that_are_bad():
    name = hub("bad", [{"text": "a"}, {"text": None}, {"text": " "}])
    with pytest.raises(DataError, match='bad, record 1: "text" is not a string'):
        list(open_stream([name]))
    assert [bool(row["error"]) for row in open_stream([name], skip_bad_lines=True)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(DataError, match='record 0: no field "text"'):
        list(open_stream([hub("body", [{"body": "a"}])]))
    broken = hub("broken", [{"text": "a"}, b"{broken", {"text": "b"}], "jsonl")
    with pytest.raises(DataError, match="the stream cannot be read"):
        StreamingDataset(open_stream([broken]), TOKENIZER, 4).take(1)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"garbage" * 100]
)
def test_hub_files_that_are_damaged(content):
    name = hub("damaged", [{"text": "a"}])
    Path("damaged/data/train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(DataError, match="cannot be") as error:
        StreamingDataset(open_stream([name]), TOKENIZER, 4).take(1)
    assert "\n" not in str(error.value)


def test_hub_names_that_lead_nowhere():
    os.makedirs("empty")
    for paths in (
        ["hf:nobody/nothing"],
        ["hf:empty"],
        ["hf:"],
        ["hf:a", "hf:b"],
        ["hf:a", "b.jsonl"],
        ["b.jsonl", "hf:a"],
    ):
        with pytest.raises(DataError):
            open_stream(paths)
    with pytest.raises(DataError, match="no data"):
        open_stream([])


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    def fetch(*arguments, **options):
        raise AssertionError("the hub is asked again and again")

    monkeypatch.setattr(streaming, "hub_answers", lambda: False)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            DataError,
            match="^the data set owner/name cannot be opened: .*does not answer",
        ),
    ):
        patch.setattr(datasets, "load_dataset", fetch)
        open_stream(["hf:owner/name"])
    assert (
        len(list(open_stream([hub("owner/here", [{"text": "a"}])]))) == 1
    )  # a directory needs no network


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "document": 6, "offset": 0},
        {"epoch": 2, "document": 9, "offset": 3},
        {"epoch": 0, "document": 1, "offset": 99},
        {"epoch": 0, "document": 10**30, "offset": 0},
        {"epoch": math.inf, "document": 0, "offset": 0},
    ],
)
def test_places_that_a_stream_does_not_have(state):
    write("six.jsonl", *({"text": text} for text in LETTERS.values()))
    sequences = StreamingDataset(
        open_stream(["six.jsonl"]), TOKENIZER, 4, buffer_size=2
    )
    with pytest.raises(
        DataError,
        match="the place to resume from is not in it|no position in this data",
    ):
        sequences.load_state_dict(state)


def test_a_stream_that_breaks_off():
    def rows():
        yield {"text": "a", "key": "a", "source": "x:1", "error": ""}
        raise pyarrow.ArrowInvalid("the server is gone")

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match="the server is gone"):
        StreamingDataset(stream, TOKENIZER, 8, buffer_size=0).take(1)


def test_an_abandoned_stream_is_closed_at_once():
    """Left to the garbage collector, the library's reader may be closed inside another
    thread's start, which then waits for itself.
    """
    write("a.jsonl", *({"text": f"text {i}"} for i in range(50)))
    sequences = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 8)
    sequences.take(2)
    alive = weakref.ref(sequences)
    gc.disable()
    try:
        del sequences
        assert alive() is None
    finally:
        gc.enable()


# one reader for all processes of a machine


def found_by(scenario, machines):
    """What each process found in a scenario of `shared_worker.py`."""
    worker = Path(__file__).with_name("shared_worker.py")
    run = subprocess.run(
        [sys.executable, str(worker), scenario, machines],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(streaming.__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def together(ranks):
    """The sequences of all ranks in the order of the stream."""
    steps = zip(*(found["taken"] for found in ranks))
    return [s for step in steps for group in zip(*step) for s in group]


@pytest.fixture
def documents():
    write("a.jsonl", *texts([5, 1, 9, 3, 7, 2, 8, 4, 6] * 12))


@pytest.mark.slow
@pytest.mark.parametrize("machines, readers", [("2", [0]), ("3", [0]), ("2,1", [0, 2])])
def test_processes_share_the_tokenizing_of_one(machines, readers, documents):
    (alone,), ranks = found_by("steps", "1"), found_by("steps", machines)
    assert together(ranks) == together([alone])
    assert all(found["state"] == alone["state"] for found in ranks)
    for rank, found in enumerate(ranks):
        assert found["encoded"] == (alone["encoded"] if rank in readers else 0)
    assert alone["encoded"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("1", "2"), ("2", "1"), ("2", "2,1")])
def test_a_run_goes_on_with_other_processes(before, after, documents):
    state = found_by("steps", before)[0]["state"]
    Path("state.json").write_text(json.dumps(state))
    ranks = found_by("resumed", after)
    assert all(found["began"] == state for found in ranks)
    expected = StreamingDataset(
        open_stream(["a.jsonl"]), TOKENIZER, 16, 3, buffer_size=7
    ).take(48)[24:]
    assert [s[0] for s in together(ranks)] == [s.input_ids.tolist() for s in expected]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["held_out", "few"])
def test_processes_hold_the_same_documents_out(scenario, documents):
    write("few.jsonl", {"text": "one document"}, {"text": "another"})
    (alone,), ranks = found_by(scenario, "1"), found_by(scenario, "2")
    assert together(ranks) == together([alone])
    assert all(found["held out"] == alone["held out"] for found in ranks)


@pytest.mark.slow
def test_sequences_are_shared_in_a_thread_of_their_own(documents):
    (alone,), ranks = found_by("steps", "1"), found_by("in_a_thread", "2")
    assert together(ranks) == together([alone])
    assert [found["sums"] for found in ranks] == [[1.0], [1.0]]


@pytest.mark.slow
def test_an_error_of_the_reader_is_everybodys():
    write("broken.jsonl", *texts([3] * 40), b"{")
    ranks = found_by("broken", "2")
    assert ranks[0] == ranks[1]
    assert ranks[0]["words"].startswith("broken.jsonl, line 41: not JSON")


def test_a_place_that_is_not_there_is_refused_everywhere(documents):
    ranks = found_by("nowhere", "2")
    assert ranks[0] == ranks[1]
    assert "the place to resume from is not in it" in ranks[0]["words"]


class OneProcess:
    rank, local_rank, world_size = 0, 0, 1

    def all_gather_object(self, value):
        return [value]


@pytest.mark.parametrize("shared", [False, True])
def test_what_reading_raised_is_raised_again(shared):
    write("a.jsonl", {"text": "one " * 20}, b"no json\n", {"text": "two"})
    dataset = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 16, buffer_size=0)
    if shared:
        dataset = streaming.SharedDataset(dataset, OneProcess())
    assert len(dataset.take(2)) == 2
    for _ in range(3):
        with pytest.raises(DataError, match="a.jsonl, line 2"):
            dataset.take(20)


@pytest.mark.mutant
def test_a_failure_that_is_forgotten_is_noticed(monkeypatch):
    monkeypatch.setattr(streaming.RunReader, "__next__", lambda self: next(self.runs))
    write("a.jsonl", b"no json\n", {"text": "two"})
    dataset = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 16, buffer_size=0)
    with pytest.raises(DataError):
        dataset.take(1)
    with pytest.raises(StopIteration):
        dataset.take(1)


def test_a_tokenizer_that_fails_is_heard_again(monkeypatch):
    write("a.jsonl", {"text": "one"})
    dataset = StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 16)

    def broken(self, text, special=False):
        raise RuntimeError("no ids today")

    monkeypatch.setattr(type(TOKENIZER), "encode", broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no ids today"):
            dataset.take(1)


# mutants: each a function of the module with one mistake


def make_streamed(path, held_out=False):
    stream = open_stream([path])
    return StreamingDataset(stream, TOKENIZER, 16, 3, 0.3, held_out, buffer_size=20)


def test_streamed_sequences_pass_the_check():
    write_random_texts()
    check_sequences(make_streamed)


plain_drop, plain_runs = streaming.TokenWindow.drop, StreamReader.runs
plain_documents = StreamReader.documents


def the_state_forgets_the_token(self):
    epoch, document, _ = self.window.place
    return {"epoch": epoch, "document": document, "offset": 0}


def documents_counted_from_the_resumption(self, epoch, skip):
    for run in plain_runs(self, epoch, skip):
        yield replace(run, document=run.document - skip * (run.epoch == epoch))


def same_order_each_epoch(self, epoch):
    return plain_documents(self, 0)


def held_out_let_in(self, key):
    return False


def a_token_lost_between_sequences(self, tokens):
    self.read(tokens + 2)  # so that there is one to lose
    plain_drop(self, tokens + 1)


def ranks_take_runs(self, count, rank=0, world_size=1):
    sequences = self.take_pieces(count * world_size)
    return list(map(streaming.pack, sequences[rank * count : (rank + 1) * count]))


MUTANTS = [
    ("StreamingDataset.state_dict", the_state_forgets_the_token),
    ("StreamReader.runs", documents_counted_from_the_resumption),
    ("StreamReader.documents", same_order_each_epoch),
    ("HeldOutSide.__call__", held_out_let_in),
    ("TokenWindow.drop", a_token_lost_between_sequences),
    ("StreamingDataset.take", ranks_take_runs),
]


@pytest.mark.mutant
@pytest.mark.parametrize(
    "place, broken", MUTANTS, ids=lambda m: getattr(m, "__name__", "")
)
def test_a_mistake_is_found(place, broken, monkeypatch):
    write_random_texts()
    monkeypatch.setattr(f"qwen_analog.streaming.{place}", broken)
    with pytest.raises((AssertionError, DataError)):
        check_sequences(make_streamed)

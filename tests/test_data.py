"""The sequences: every token once, resumable at any cut, shared by ranks; and whether
the data are still the same."""

import json
import math
import os
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_helpers import (
    END,
    FIELDS,
    TOKENIZER,
    check_sequences,
    make,
    same,
    texts,
    tokenized,
    write,
    write_random_texts,
)

from qwen_analog import data
from qwen_analog.data import PackedDataset, collate, data_difference
from qwen_analog.jsonl import DataError, write_jsonl
from qwen_analog.loss import IGNORE_INDEX
from qwen_analog.streaming import StreamingDataset, open_stream
from qwen_analog.token_cache import is_held_out, tokenize_files

pytest_plugins = ["text_helpers"]
pytestmark = pytest.mark.usefixtures("quiet")

kinds = pytest.mark.parametrize("kind", ["packed", "streamed", "in order"])
corpora = st.lists(st.integers(1, 9), min_size=1, max_size=7)
property_test = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1.5, "3", None, True])
def test_whole_numbers_that_are_none(value):
    rows, stream = tokenized(write("a.jsonl", {"text": "a"})), open_stream(["a.jsonl"])
    for name, call in {
        "sequence_length": lambda: PackedDataset(rows, value),
        "seed": lambda: PackedDataset(rows, 4, value),
        "buffer_size": lambda: StreamingDataset(
            stream, TOKENIZER, 4, buffer_size=value
        ),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            call()
    for state in (
        {"position": value},
        {},
        None,
        {"epoch": 0, "document": value, "offset": 0},
    ):
        for sequences in (
            PackedDataset(rows, 4),
            StreamingDataset(stream, TOKENIZER, 4),
        ):
            with pytest.raises(DataError, match="no position in this data"):
                sequences.load_state_dict(state)


def identified(path, *arguments):
    return json.loads(
        json.dumps(PackedDataset(tokenized(path, *arguments), 8).fingerprint)
    )


def test_what_differs_is_said():
    write("d.jsonl", *texts([1, 2, 3, 4]))
    before = identified("d.jsonl", 0.3)
    os.mkdir("elsewhere")
    for path, expected in {"d.jsonl": None, "elsewhere/d.jsonl": None}.items():
        write(path, *texts([1, 2, 3, 4]))
        assert data_difference(before, identified(path, 0.3)) is expected
    assert (
        data_difference(
            before, PackedDataset(tokenized("d.jsonl", 0.3), 99, 5, True).fingerprint
        )
        is None
    )
    assert (
        data_difference(before, identified("d.jsonl", 0.9))
        == "other documents are held out"
    )
    for lines_now, phrase in (
        (texts([1, 2, 3, 4, 5]), "d.jsonl: 4 documents then, 5 now"),
        (texts([1, 2, 3, 5]), "d.jsonl: 20 bytes then, 22 now"),
        (
            texts([1, 2, 3, 4])[::-1],
            "d.jsonl: other text, or the same in another order",
        ),
        (
            [*texts([1, 2, 3]), {"text": "4!" * 4}],
            "d.jsonl: other text, or the same in another order",
        ),
    ):
        write("d.jsonl", *lines_now)
        assert data_difference(before, identified("d.jsonl", 0.3)) == phrase
    for name in ("e.jsonl", "f.jsonl"):
        write(name, {"text": "x"})
    two, turned, other = (
        PackedDataset(
            tokenize_files(files, TOKENIZER, cache_dir="cache"), 8
        ).fingerprint
        for files in (
            ["e.jsonl", "f.jsonl"],
            ["f.jsonl", "e.jsonl"],
            ["e.jsonl", "d.jsonl"],
        )
    )
    assert data_difference(two, turned).startswith(
        "files in another order: e.jsonl, f.jsonl then"
    )
    assert data_difference(two, other).startswith(
        "other files: e.jsonl, f.jsonl then, e.jsonl, d.jsonl now"
    )


def test_a_fingerprint_does_not_depend_on_where_the_rows_are():
    rows = tokenized(write("a.jsonl", *texts([1, 2, 3, 4, 5, 6])), 0.3)
    held_in_memory = datasets.Dataset.from_list(list(rows))
    assert (
        data.fingerprint(held_in_memory)
        == data.fingerprint(rows)
        == data.fingerprint(rows.select(range(6)))
    )
    assert data.fingerprint(rows.select([1, 0, 2, 3, 4, 5])) != data.fingerprint(rows)


@pytest.mark.parametrize(
    "before",
    [
        None,
        5,
        {},
        {"files": 3, "held_out": ""},
        {"files": [{}], "held_out": "x"},
        {"files": [{"name": "a", "documents": "x"}], "held_out": 1},
    ],
)
def test_fingerprints_that_cannot_be_read(before):
    now = PackedDataset(tokenized(write("a.jsonl", {"text": "a"})), 8).fingerprint
    assert isinstance(data_difference(before, now), str)


def test_nothing_left_to_train_on_or_held_out():
    write("a.jsonl", {"text": "a"}, {"text": "b"})
    for fraction, held_out, message in (
        (0.0, True, "no document held out"),
        (1.0, False, "no document to train on"),
    ):
        with pytest.raises(DataError, match=message):
            PackedDataset(tokenized("a.jsonl", fraction), 4, held_out=held_out)
        with pytest.raises(DataError, match=message):
            StreamingDataset(
                open_stream(["a.jsonl"]),
                TOKENIZER,
                4,
                heldout_fraction=fraction,
                held_out=held_out,
            ).take(1)
    assert (
        StreamingDataset(open_stream(["a.jsonl"]), TOKENIZER, 4).held_out_dataset(1)
        is None
    )


@kinds
@property_test
@given(numbers=corpora, sequence_length=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_token_once_and_targets_follow(kind, numbers, sequence_length, seed):
    documents = [(END, *TOKENIZER.encode(t["text"])) for t in texts(numbers)]
    epoch = sum(map(len, documents))
    sequences = make(kind, numbers, sequence_length, seed).take(
        3 * epoch // sequence_length + 1
    )
    inputs, targets = (
        torch.cat([getattr(b, name) for b in sequences])
        for name in ("input_ids", "targets")
    )
    assert (
        torch.equal(targets[:-1], inputs[1:])
        and inputs.dtype == targets.dtype == torch.int64
    )
    for e in range(3):
        part = inputs[e * epoch : (e + 1) * epoch]
        starts = (part == END).nonzero().flatten()
        found = [tuple(piece.tolist()) for piece in part.tensor_split(starts)[1:]]
        assert sorted(found) == sorted(documents)
        assert kind != "in order" or found == documents
    for sequence in sequences:
        starts = (sequence.input_ids == END).long()
        starts[0] = 1
        assert (
            torch.equal(sequence.document_ids, starts.cumsum(0) - 1)
            and len(sequence.input_ids) == sequence_length
        )
        for i in sequence.document_ids.unique().tolist():
            whole = documents[int(sequence.sources[i].split(":")[1]) - 1]
            run = tuple(sequence.input_ids[sequence.document_ids == i].tolist())
            assert any(run == whole[j : j + len(run)] for j in range(len(whole)))


@kinds
@property_test
@given(
    numbers=corpora,
    sequence_length=st.integers(1, 30),
    cut=st.integers(0, 25),
    ranks=st.integers(1, 3),
    after=st.integers(1, 3),
)
def test_resume_at_any_cut_with_any_ranks(
    kind, numbers, sequence_length, cut, ranks, after
):
    expected = make(kind, numbers, sequence_length, 1).take(cut + ranks * after * 2)
    run = make(kind, numbers, sequence_length, 1)
    assert same(run.take(cut), expected[:cut])
    for step in range(2):  # resumed from a resumed run, too
        state = json.dumps(run.state_dict())
        parts = []
        for rank in range(ranks):
            run = make(kind, numbers, sequence_length, 1)
            run.load_state_dict(json.loads(state))
            assert run.state_dict() == json.loads(state)
            parts.append(run.take(after, rank, ranks))
        interleaved = [sequence for group in zip(*parts) for sequence in group]
        start = cut + step * ranks * after
        assert same(interleaved, expected[start : start + ranks * after])


@kinds
def test_epochs_and_seeds_differ(kind):
    numbers = [3] * 30
    size = sum(1 + len(TOKENIZER.encode(t["text"])) for t in texts(numbers))
    first, second = (b.input_ids for b in make(kind, numbers, size, 0).take(2))
    other = make(kind, numbers, size, 1).take(1)[0].input_ids
    assert (
        torch.equal(first, second) == torch.equal(first, other) == (kind == "in order")
    )
    assert torch.equal(first, make(kind, numbers, size, 0).take(1)[0].input_ids)
    if kind != "in order":  # epoch 1 of seed 0 is not epoch 0 of seed 1
        assert not torch.equal(second, other)


@kinds
def test_held_out_and_training_documents_do_not_meet(kind):
    numbers = [1, 2, 3, 4, 5] * 8
    sources = [
        {
            s
            for b in make(kind, numbers, 16, 0, 0.3, held_out).take(150)
            for s in b.sources
        }
        for held_out in (False, True)
    ]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == len(numbers)
    held = [i for i, t in enumerate(texts(numbers), 1) if is_held_out(t["text"], 0.3)]
    assert sorted(int(s.split(":")[1]) for s in sources[1]) == held


def test_any_sequence_at_once():
    sequences = make("packed", [5, 1, 9], 7, 2)
    one_by_one = sequences.take(40)
    for k in np.random.default_rng(0).permutation(40):
        assert same([make("packed", [5, 1, 9], 7, 2)[int(k)]], one_by_one[k : k + 1])
    assert len(sequences[10**12].input_ids) == 7


def test_rows_that_were_selected():
    rows = tokenized(write("a.jsonl", *texts([1, 2, 3, 4, 5, 6])))
    some = PackedDataset(rows.select([5, 1, 3]), 200)[0]
    assert set(some.sources) == {"a.jsonl:6", "a.jsonl:2", "a.jsonl:4"}


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(numbers=corpora, sequence_length=st.integers(1, 60))
def test_epoch_counts_every_target_once(numbers, sequence_length):
    sequences = make("packed", numbers, sequence_length, 0)
    ours = list(sequences.epoch())
    targets, inputs = (
        torch.cat([getattr(b, name) for b in ours]) for name in ("targets", "input_ids")
    )
    counted = targets[targets != IGNORE_INDEX]
    assert len(counted) == sequences.tokens_per_epoch - 1 and torch.equal(
        counted, inputs[1 : sequences.tokens_per_epoch]
    )
    assert (inputs >= 0).all()  # marking a target leaves the inputs alone
    assert len(ours) == -(-sequences.tokens_per_epoch // sequence_length)
    assert (
        same(list(sequences.epoch(1)), ours[:1])
        and not list(sequences.epoch(0))
        and same(list(sequences.epoch(10**6)), ours)
    )
    assert (
        sequences.bytes_per_epoch == sum(len(t["text"]) for t in texts(numbers))
        and sequences.position == 0
    )


def test_collate():
    batch = collate(make("packed", [3, 4, 5], 8, 0).take(2))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        name: (2, 8) for name in FIELDS
    }


def test_a_huge_document_is_not_read_whole_for_each_sequence():
    write("huge.jsonl", {"text": "ab" * 1_000_000})
    packed = PackedDataset(tokenized("huge.jsonl"), 64)
    streamed = StreamingDataset(
        open_stream(["huge.jsonl"]), TOKENIZER, 64, buffer_size=0
    )
    total = sum(b.input_ids.sum().item() for b in packed.take(3_000))
    assert total == sum(b.input_ids.sum().item() for b in streamed.take(3_000)) > 0
    assert (
        max(len(ids) for ids in [run.ids for run in streamed.window.runs]) < 2_000_001
        and streamed.window.runs[0].ids.base is not None
    )


# mutants: each a function of the module with one mistake


def make_packed(path, held_out=False):
    rows = tokenize_files([path], TOKENIZER, 0.3, cache_dir=f"cache of {os.getpid()}")
    return PackedDataset(rows, 16, 3, held_out)


def test_packed_sequences_pass_the_check():
    write_random_texts()
    check_sequences(make_packed)


plain_pack, plain_runs = data.pack, data.ShuffledRows.runs


def targets_are_inputs(pieces):
    sequence = plain_pack(pieces)
    return replace(sequence, targets=sequence.input_ids)


def document_ids_of_targets(pieces):
    counts = [len(ids) for ids, _ in pieces]
    numbers = torch.from_numpy(np.repeat(np.arange(len(pieces)), counts))
    return replace(plain_pack(pieces), document_ids=numbers[1:])


def no_end_token(text, tokenizer):
    yield np.array(tokenizer.encode(text), np.int32)


def end_token_closes(text, tokenizer):
    yield np.array([*tokenizer.encode(text), tokenizer.eos_token_id], np.int32)


def remainder_is_dropped(self, k):
    whole = self.tokens_per_epoch // self.sequence_length
    epoch, offset = k // whole, k % whole * self.sequence_length
    runs = self.shuffled.runs(epoch, offset, self.sequence_length + 1)
    rows = ((self.documents[row], place) for row, place in runs)
    pieces = [
        (row["input_ids"][0].values[place].to_numpy(), row["source"][0].as_py())
        for row, place in rows
    ]
    return plain_pack(pieces)


def a_token_too_far_apart(self, epoch, offset, tokens):
    epoch, offset = divmod(
        epoch * self.lengths.sum().item() + offset + offset // 16,
        self.lengths.sum().item(),
    )
    return plain_runs(self, epoch, offset, tokens)


def from_the_start_of_each_document(self, epoch, offset, tokens):
    for row, place in plain_runs(self, epoch, offset, tokens):
        yield row, slice(0, place.stop - place.start)


def same_order_each_epoch(self, epoch):
    order = np.random.default_rng((self.seed, 0)).permutation(len(self.rows))
    return order, np.cumsum(self.lengths[order], dtype=np.int64)


def drawn_with_replacement(self, epoch):
    rng = np.random.default_rng((self.seed, epoch))
    order = rng.integers(len(self.rows), size=len(self.rows))
    return order, np.cumsum(self.lengths[order], dtype=np.int64)


def held_out_by_position(documents, held_out):
    tokens = np.array(documents["num_tokens"][:])
    sizes = np.array(documents["num_bytes"][:])
    chosen = (np.arange(len(tokens)) >= 0.7 * len(tokens)) == held_out
    return np.flatnonzero(chosen), tokens[chosen], sizes[chosen].sum().item()


def ranks_overlap(self, count, rank=0, world_size=1):
    first, self.position = self.position, self.position + count * world_size
    return [self[first + i + rank] for i in range(count)]


def every_rank_takes_the_same(self, count, rank=0, world_size=1):
    first, self.position = self.position, self.position + count * world_size
    return [self[first + i * world_size] for i in range(count)]


def own_sequences_are_counted(self, count, rank=0, world_size=1):
    first, self.position = self.position, self.position + count
    return [self[first + i * world_size + rank] for i in range(count)]


def search_left(ends, offset, side):
    return np.sum(ends < offset)


MUTANTS = [
    ("data.pack", targets_are_inputs),
    ("data.pack", document_ids_of_targets),
    ("token_cache.token_ids", no_end_token),
    ("token_cache.token_ids", end_token_closes),
    ("data.PackedDataset.__getitem__", remainder_is_dropped),
    ("data.ShuffledRows.runs", a_token_too_far_apart),
    ("data.np.searchsorted", search_left),
    ("data.ShuffledRows.runs", from_the_start_of_each_document),
    ("data.ShuffledRows.order", same_order_each_epoch),
    ("data.ShuffledRows.order", drawn_with_replacement),
    ("data.select_documents", held_out_by_position),
    ("data.PackedDataset.take", ranks_overlap),
    ("data.PackedDataset.take", every_rank_takes_the_same),
    ("data.PackedDataset.take", own_sequences_are_counted),
]


@pytest.mark.mutant
@pytest.mark.parametrize(
    "place, broken", MUTANTS, ids=lambda m: getattr(m, "__name__", "")
)
def test_a_mistake_is_found(place, broken, monkeypatch):
    write_random_texts()
    monkeypatch.setattr(f"qwen_analog.{place}", broken)
    with pytest.raises(
        (AssertionError, IndexError, RuntimeError, DataError, ValueError)
    ):
        check_sequences(make_packed)


def check_epoch():
    sequences = make("packed", [3, 4, 5], 8, 0)
    targets = torch.cat([sequence.targets for sequence in sequences.epoch()])
    inputs = torch.cat([sequence.input_ids for sequence in sequences.epoch()])
    counted = targets != IGNORE_INDEX
    assert counted.sum() == sequences.tokens_per_epoch - 1
    assert torch.equal(targets[counted], inputs[1 : sequences.tokens_per_epoch])


plain_epoch = data.first_epoch


def nothing_is_ignored(sequences):
    count = -(-sequences.tokens_per_epoch // sequences.sequence_length)
    yield from (sequences[k] for k in range(count))


def the_last_sequence_is_dropped(sequences):
    yield from list(plain_epoch(sequences))[:-1]


def the_first_target_of_the_next_epoch_counts(sequences):
    for k, sequence in enumerate(plain_epoch(sequences)):
        ignored = (sequence.targets == IGNORE_INDEX).nonzero().flatten()
        for i in ignored[:1]:
            sequence.targets[i] = sequences[k].targets[i]
        yield sequence


@pytest.mark.mutant
@pytest.mark.parametrize(
    "broken",
    [
        nothing_is_ignored,
        the_last_sequence_is_dropped,
        the_first_target_of_the_next_epoch_counts,
    ],
)
def test_a_mistake_of_the_epoch_is_found(broken, monkeypatch):
    check_epoch()
    monkeypatch.setattr(data, "first_epoch", broken)
    with pytest.raises(AssertionError):
        check_epoch()

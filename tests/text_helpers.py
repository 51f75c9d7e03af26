"""What several tests of text and data share: documents, files, references."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pydoc_data.topics import topics
from qwen_analog.bpe import BYTE_ORDER, QWEN_PATTERN
from qwen_analog.data import PackedDataset
from qwen_analog.jsonl import write_jsonl
from qwen_analog.streaming import StreamingDataset, open_stream
from qwen_analog.token_cache import tokenize_files
from qwen_analog.tokenizer import TiktokenTokenizer, load_tokenizer

CORPUS = [topics[key] for key in sorted(topics)][:12] + [
    "naïve café, Привет мир, 你好 世界 🙂 12345\r\n" * 5
]


KINDS = ("ours", "hf", "sentencepiece", "named")
RANKS = {token: rank for rank, token in enumerate(BYTE_ORDER)}
TOKENIZER = TiktokenTokenizer(RANKS)
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

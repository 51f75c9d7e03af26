"""Text out of tokens: nothing shown too early, nothing lost, stop strings wherever the
tokens are cut; batches of texts.
"""

import io
import json
import unicodedata

import pytest
import sentencepiece
import torch
from book import scramble_
from hypothesis import given, settings, strategies as st
from helpers import BYTES
from text_helpers import CORPUS, kinds, qwen
from tokenizers import Tokenizer as Raw, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qwen_analog import QwenConfig, QwenForCausalLM
from qwen_analog.generate import stop_ids
from qwen_analog.text_stream import (
    StopFinder,
    TextStream,
    complete,
    complete_many,
    stream,
)
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.tokenizer import SentencePieceTokenizer

TEXTS = [
    "Привет, мир! Как дела?",
    "你好，世界。今天天气很好",
    "family 👨‍👩‍👧‍👦 flag 🇫🇷 🙂🙂",
    "naïve  café\n\n  indented\ttabs   end ",
    "zwölf Boxkämpfer \ufffd jagen",
]
MULTILINGUAL = st.lists(
    st.sampled_from(TEXTS) | st.text(max_size=8), min_size=1, max_size=4
).map("".join)
ALL = (
    "ours",
    "hf",
    "sentencepiece",
    "named",
    "sentencepiece default",
    "hf byte fallback",
    "qwen",
)


@pytest.fixture(scope="session")
def every(kinds, qwen, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("more_tokenizers")
    model = io.BytesIO()
    lines = "\n".join(CORPUS).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "default.model").write_bytes(model.getvalue())
    raw = Raw(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    raw.train_from_iterator(
        lines[:200],
        trainers.BpeTrainer(
            vocab_size=600, show_progress=False, special_tokens=specials[:2]
        ),
    )
    vocabulary = raw.get_vocab()
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    vocabulary |= {name: len(vocabulary) + i for i, name in enumerate(specials[2:])}
    raw.model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "hf")
    return {
        **kinds,
        "sentencepiece default": SentencePieceTokenizer(folder / "default.model"),
        "hf byte fallback": HFTokenizer(folder / "hf"),
        "qwen": qwen,
    }


def pieces(tokenizer, ids, stop=(), context=()):
    text = TextStream(tokenizer, stop, context)
    return [*(text.push(i) for i in ids), text.finish()], text


@pytest.mark.parametrize("kind", ALL)
def test_pieces_add_up_and_never_show_half_a_character(every, kind):
    tokenizer = every[kind]

    @settings(max_examples=60, deadline=None)
    @given(MULTILINGUAL, MULTILINGUAL)
    def check(before, text):
        ids, start = tokenizer.encode(before + text), tokenizer.encode(before)
        whole = tokenizer.decode(ids)
        shown, _ = pieces(tokenizer, ids)
        assert "".join(shown) == whole and "".join(shown[:-1]).count(
            "\ufffd"
        ) <= whole.count("\ufffd")
        for n in range(1, len(ids)):
            assert whole.startswith("".join(shown[:n]))
        whole = tokenizer.decode(
            start + ids
        )  # a context keeps the blank that a decoder drops at the start
        assert (
            tokenizer.decode(start) + "".join(pieces(tokenizer, ids, context=start)[0])
            == whole
        )

    check()


def test_multibyte_characters_appear_with_their_last_token(qwen):  # noqa: F811
    for text in ("🙂", "👩🏽‍🚀", "Ω≈ç√", "ꙮ", "𓂀𓅓"):
        ids = qwen.encode(text)
        shown, _ = pieces(qwen, ids)
        seen = [qwen.decode(ids[: n + 1]) for n in range(len(ids))]
        for n in range(len(ids)):  # as far as whole characters are here
            assert "".join(shown[: n + 1]) == seen[n].rstrip("\ufffd")
    assert len(qwen.encode("🙂")) > 1 or len(qwen.encode("𓂀")) > 1


@pytest.mark.parametrize("kind", ["ours", "hf", "named", "qwen"])
def test_any_bytes_add_up(every, kind):
    """Random tokens of a byte-level vocabulary are no valid text: the pieces are still
    what decoding gives.
    """
    tokenizer = every[kind]
    broken = [tokenizer.encode(c) for c in "é你🙂"]
    few = sorted(
        {i for ids in broken for i in ids if "\ufffd" in tokenizer.decode([i])}
    ) or [0]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 255) | st.sampled_from(few), max_size=150))
    def check(ids):
        shown, _ = pieces(tokenizer, ids)
        whole = tokenizer.decode(ids)
        assert "".join(shown) == whole
        assert all(whole.startswith("".join(shown[:n])) for n in range(0, len(ids), 7))

    check()


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece default"])
def test_any_pieces_add_up(every, kind):
    """What no text is encoded to, a model can write all the same: blanks after blanks,
    for one.
    """
    tokenizer = every[kind]
    ordinary = [
        i
        for i in range(tokenizer.vocab_size)
        if not (
            tokenizer.model.is_byte(i)
            or tokenizer.model.is_control(i)
            or tokenizer.model.is_unknown(i)
        )
    ]
    blanks = [
        i for i in ordinary if tokenizer.model.id_to_piece(i).startswith("\u2581")
    ]
    blank = [i for i in ordinary if not tokenizer.model.id_to_piece(i).strip("\u2581")]

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.sampled_from(blank)
            | st.sampled_from(blanks)
            | st.sampled_from(ordinary),
            max_size=30,
        ),
        st.integers(0, 5),
    )
    def check(ids, known):
        ids = tokenizer.encode("start") + ids
        shown, _ = pieces(tokenizer, ids[known:], context=ids[:known])
        assert tokenizer.decode(ids[:known]) + "".join(shown) == tokenizer.decode(ids)

    check()


def test_broken_bytes_do_not_wait_for_ever():
    text, shown = TextStream(BYTES), 0
    (byte,) = [i for i, token in enumerate(BYTE_ORDER) if token == b"\xff"]
    for n in range(1, 300):
        shown += len(text.push(byte))
        assert shown >= n - 3


@pytest.mark.parametrize("kind", ALL)
def test_the_window_stays_short(every, kind, monkeypatch):
    tokenizer, lengths = every[kind], []
    ids = tokenizer.encode("Привет 你好 🙂 and so on. " * 40)
    ids += (
        ids[-3:-2] * 400
        + tokenizer.encode(" " * 300)
        + tokenizer.encode("你")[-1:] * 200
    )
    decode = tokenizer.decode
    monkeypatch.setattr(
        type(tokenizer),
        "decode",
        lambda self, ids: lengths.append(len(ids)) or decode(ids),
    )
    text = TextStream(tokenizer)
    for i in ids:
        before = len(lengths)
        text.push(i)
        assert len(lengths) - before <= 4
    assert max(lengths) <= 64 + 66


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", min_size=0, max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_wherever_tokens_are_cut(text, stops):
    """The output does not depend on how the text is cut into tokens, and nothing is
    held back without need.
    """
    ends = [
        (text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text
    ]
    expected = text[: min(ends)[1]] if ends else text
    whole, stream_ = pieces(Characters(len(text) or 1), [text] if text else [], stops)
    single, one = pieces(Characters(1), list(text), stops)
    pairs, two = pieces(
        Characters(2), [text[i : i + 2] for i in range(0, len(text), 2)], stops
    )
    assert "".join(whole) == "".join(single) == "".join(pairs) == expected
    assert stream_.stopped == one.stopped == two.stopped == bool(ends)
    for n in range(len(text) + 1):
        read = text[:n]
        if not any(
            stop in read for stop in stops
        ):  # held back: only what begins a stop string
            shown = "".join(single[:n])
            held = read[len(shown) :]
            assert read.startswith(shown) and (
                not held or any(stop.startswith(held) for stop in stops)
            )
            assert not any(
                read.endswith(stop[:k]) and k > len(held)
                for stop in stops
                for k in range(1, len(stop))
            )


class Characters:
    """A tokenizer whose ids are their own text."""

    def __init__(self, size):
        self.size = size

    def decode(self, ids):
        return "".join(ids)


def test_after_a_stop_nothing_comes():
    text = TextStream(Characters(1), "END")
    assert (
        [text.push(t) for t in ("one E", "N", "D two", " three")]
        == ["one ", "", "", ""]
        and text.stopped
        and text.finish() == ""
    )
    text = TextStream(Characters(1), ["END"])
    assert (
        [text.push(t) for t in ("one E", "N")] == ["one ", ""]
        and not text.stopped
        and text.finish() == "EN"
    )
    assert not text.stopped


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=5),
)
def test_the_finder_knows_what_is_complete_and_what_is_begun(text, strings):
    finder = StopFinder(strings)
    for n, character in enumerate(text, 1):
        ends = {text[i:n] for i in range(n + 1)}
        assert finder.push(character) == max(
            (len(string) for string in strings if string in ends), default=0
        )
        assert finder.begun == max(
            k
            for string in [*strings, ""]
            for k in range(len(string) + 1)
            if string[:k] in ends
        )


@pytest.mark.parametrize(
    "stop",
    [
        ["a" * 900_000],
        ["a" * 900_000 + "b", "ab" * 400_000],
        [f"{i}" for i in range(20_000)],
        ["a" * n + "b" for n in range(3, 2000)],
    ],
    ids=["long", "two long", "many", "nested"],
)
def test_the_work_for_stop_strings_is_linear_in_the_text(stop, monkeypatch):
    """Whatever the stop strings are: for each character of the text at most one new
    state and two looks at the sorted strings.
    """
    made, make = [], StopFinder._make

    def counted(self, *new):
        states = make(self, *new)
        made.append(len(states))
        return states

    monkeypatch.setattr(StopFinder, "_make", counted)
    text = TextStream(Characters(1), stop)
    shown = "".join(
        text.push(character) for character in "a" * 3000 + "c" + "a" * 100 + "c"
    )
    assert shown == "a" * 3000 + "c" + "a" * 100 + "c" and not text.stopped
    assert len(made) <= 2 * 3102 and sum(made) <= 3102


def test_what_waits_for_a_long_stop_string_comes_in_the_end():
    text = TextStream(Characters(1), "a" * 2000)
    assert (
        not any(text.push("a") for _ in range(1999))
        and text.push("b") == "a" * 1999 + "b"
    )
    assert not any(text.push("a") for _ in range(1500)) and text.finish() == "a" * 1500
    stopped = TextStream(Characters(1), "a" * 2000)
    assert (
        "".join(stopped.push(c) for c in "b" + "a" * 2001) == "b"
        and stopped.stopped
        and stopped.finish() == ""
    )


@pytest.mark.parametrize(
    "stop", ["", ["a", ""], [1], 5, b"a", {"a": 1}, ["a", None], float("nan")]
)
def test_stop_strings_that_make_no_sense(stop):
    with pytest.raises(ValueError, match="stop must be") as error:
        TextStream(BYTES, stop)
    assert "\n" not in str(error.value)


def writer(tokenizer=BYTES):
    return scramble_(
        QwenForCausalLM(
            QwenConfig.from_preset(
                "tiny", vocab_size=tokenizer.vocab_size + 5, tie_word_embeddings=False
            )
        )
    ).eval()


def new_text(model, prompt, **options):
    """The continuation by `generate` and one decoding of everything, without its end
    token.
    """
    ids = torch.tensor([[BYTES.eos_token_id, *BYTES.encode(prompt)]])
    new = model.generate(
        ids,
        eos_token_id=BYTES.eos_token_id,
        valid_vocab_size=BYTES.vocab_size,
        **options,
    )[0, ids.shape[1] :].tolist()
    return BYTES.decode(new[:-1] if new and new[-1] == BYTES.eos_token_id else new)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0),
        dict(seed=1),
        dict(seed=2, top_p=0.9, repetition_penalty=1.2),
        dict(max_new_tokens=0),
    ],
    ids=str,
)
def test_stream_and_complete_are_generate(options):
    model = writer()
    options = {"max_new_tokens": 60, **options}
    expected = new_text(model, "Hello", **options)
    assert (
        "".join(model.stream(BYTES, "Hello", **options))
        == "".join(stream(model, BYTES, "Hello", **options))
        == expected
    )
    assert complete(model, BYTES, "Hello", **options) == "Hello" + expected
    ids = [BYTES.eos_token_id, *BYTES.encode("Hello")]
    for given_ids in (ids, torch.tensor(ids), torch.tensor([ids])):
        assert "".join(model.stream(BYTES, given_ids, **options)) == expected
    assert all(model.stream(BYTES, "Hello", **options))  # no empty piece


def test_each_piece_comes_before_the_next_token_is_computed():
    model, calls, log = writer(), [], []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for _ in model.stream(BYTES, "Hello", max_new_tokens=40, seed=1, eos_token_id=None):
        log.append(len(calls))
    assert (
        log == sorted(log) and log[0] <= 5 and len(calls) == 40 and len(set(log)) > 20
    )
    assert torch.is_grad_enabled()


def test_a_stopped_stream_stops_computing():
    model, calls = writer(), []
    options = dict(max_new_tokens=60, seed=1, eos_token_id=None)
    full = "".join(model.stream(BYTES, "Hello", **options))
    stop = full[30:33]
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert (
        "".join(model.stream(BYTES, "Hello", stop=stop, **options))
        == full[: full.index(stop)]
    )
    assert len(calls) < 60
    model.train()
    pieces_ = model.stream(BYTES, "Hello", **options)
    next(pieces_)
    assert model.training  # also while a stream is open
    pieces_.close()


def test_end_tokens_of_the_caller_and_of_the_tokenizer():
    model = writer()
    with torch.no_grad():
        model.lm_head.weight[BYTES.eos_token_id] *= 3
    free = "".join(
        model.stream(BYTES, "Hello", max_new_tokens=60, seed=3, eos_token_id=None)
    )
    ended = "".join(model.stream(BYTES, "Hello", max_new_tokens=60, seed=3))
    assert (
        free.startswith(ended)
        and "<|endoftext|>" in free
        and "<|endoftext|>" not in ended
    )
    assert free[len(ended) :].startswith("<|endoftext|>")
    ids = [BYTES.eos_token_id, *BYTES.encode("Hello")]
    written = model.generate(
        torch.tensor([ids]), 60, seed=3, valid_vocab_size=BYTES.vocab_size
    )[0, len(ids) :].tolist()
    new = next(
        token for i, token in enumerate(written) if i > 1 and token not in written[:i]
    )
    other = next(token for token in range(BYTES.vocab_size) if token not in written)
    early = "".join(
        model.stream(
            BYTES, "Hello", max_new_tokens=60, seed=3, eos_token_id=[other, new]
        )
    )
    assert early == BYTES.decode(written[: written.index(new)])


def test_text_ends_at_the_models_own_end_tokens():
    model, options = writer(), dict(max_new_tokens=60, seed=3)
    ids = [BYTES.eos_token_id, *BYTES.encode("Hello")]
    written = model.generate(
        torch.tensor([ids]), valid_vocab_size=BYTES.vocab_size, **options
    )[0, len(ids) :].tolist()
    new = next(
        token for i, token in enumerate(written) if i > 5 and token not in written[:i]
    )
    expected = BYTES.decode(written[: written.index(new)])
    free = "".join(stream(model, BYTES, "Hello", **options))
    for own in (
        new,
        [new],
        [BYTES.vocab_size + 1, new],
    ):  # the second is a row of padding, which is never chosen
        model.generation_config = {"eos_token_id": own}
        assert stop_ids(model, BYTES) == [new, BYTES.eos_token_id]
        assert "".join(stream(model, BYTES, "Hello", **options)) == expected
        assert (
            "".join(stream(model, BYTES, "Hello", eos_token_id=None, **options))
            == expected
        )
        assert complete(model, BYTES, "Hello", **options) == "Hello" + expected
        assert complete_many(model, BYTES, ["Hello"], **options) == ["Hello" + expected]
        assert (
            "".join(
                stream(
                    model, BYTES, "Hello", eos_token_id=BYTES.eos_token_id, **options
                )
            )
            == free
        )  # the caller's word counts
    model.generation_config = {"eos_token_id": BYTES.eos_token_id}
    assert stop_ids(model, BYTES) == [BYTES.eos_token_id]
    model.generation_config = None
    assert (
        stop_ids(model, BYTES) == [BYTES.eos_token_id]
        and "".join(stream(model, BYTES, "Hello", **options)) == free
    )


def test_no_prompts_and_prompts_that_are_no_texts():
    assert complete_many(writer(), BYTES, []) == []
    for prompts in ("Hello", [[1, 2]], ["a", None]):
        with pytest.raises(ValueError, match="^prompts must be a list of texts"):
            complete_many(writer(), BYTES, prompts)
    with pytest.raises(ValueError, match="^prompt must be a text"):
        complete(writer(), BYTES, [1, 2])


def test_many_prompts_are_each_alone():
    model = writer()
    prompts = ["", "a", "Hello world, " * 6, "Привет", "🙂 and"]
    for options in (
        dict(temperature=0),
        dict(temperature=0, repetition_penalty=1.5),
        dict(temperature=0, stop=["e", "\x00"]),
    ):
        together = complete_many(model, BYTES, prompts, max_new_tokens=25, **options)
        assert together == [
            complete(model, BYTES, prompt, max_new_tokens=25, **options)
            for prompt in prompts
        ], options
        assert len(set(together)) == 5
    assert complete_many(model, BYTES, prompts, max_new_tokens=0) == prompts


def test_texts_in_a_batch_end_at_different_times():
    model = writer()
    with torch.no_grad():
        model.lm_head.weight[BYTES.eos_token_id] *= 3
    together = complete_many(
        model, BYTES, ["one", "two", "three", "four"], max_new_tokens=100, seed=0
    )
    assert len({len(text) for text in together}) > 2 and not any(
        "<|endoftext|>" in text for text in together
    )
    assert unicodedata.normalize("NFC", together[0]).startswith("one")


@pytest.mark.parametrize("kind", ["sentencepiece default", "hf byte fallback"])
def test_the_blank_between_prompt_and_continuation_is_kept(every, kind):
    tokenizer = every[kind]
    model, prompt, blanks = writer(tokenizer), "the class", 0
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(prompt)]])
    for seed in range(12):
        options = dict(max_new_tokens=4, seed=seed, temperature=3.0)
        written = model.generate(ids, valid_vocab_size=tokenizer.vocab_size, **options)[
            0
        ].tolist()
        if "\ufffd" in tokenizer.decode(written) or any(i < 3 for i in written[-4:]):
            continue  # broken bytes and control tokens are another matter
        expected = tokenizer.decode(written)[len(tokenizer.decode(ids[0].tolist())) :]
        assert "".join(model.stream(tokenizer, prompt, **options)) == expected
        blanks += expected.startswith(" ")
    assert blanks


@pytest.mark.parametrize(
    "prompt",
    [
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(3),
        [],
        [1.5],
        torch.zeros(1, 1, 1, dtype=torch.int64),
        None,
        {},
        ["a"],
        [[1], [2, 3]],
    ],
)
def test_prompts_that_are_none(prompt):
    with pytest.raises(ValueError, match="prompt must be") as error:
        writer().stream(BYTES, prompt)  # at once, not at the first piece
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1),
        dict(max_new_tokens=-1),
        dict(eos_token_id=-1),
        dict(min_p=2),
        dict(stop=""),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_the_first_piece(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        writer().stream(BYTES, "Hello", **options)
    with pytest.raises(TypeError):
        writer().stream(BYTES, "Hello", num_return_sequences=2)

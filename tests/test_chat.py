"""Conversations: history, the cache between turns, a full context, and the terminal."""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from book import scramble_
from helpers import SETTINGS

from qwen_analog import chat as chat_module
from qwen_analog.arguments import add_chat_arguments
from qwen_analog.chat import Chat, run
from qwen_analog.chat_template import chat_ids
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.config import QwenConfig
from qwen_analog.text_stream import stream
from qwen_analog.hf import save_pretrained
from qwen_analog.loading import load
from qwen_analog.model import QwenForCausalLM
from qwen_analog.sampling import SamplingParams
from qwen_analog.bpe import train_bpe
from qwen_analog.tokenizer import TiktokenTokenizer


TOKENIZER = TiktokenTokenizer(
    train_bpe(
        ["The cat sat on the mat. You are a helpful assistant, created by"] * 3, 300
    )
)


END = TOKENIZER.encode("<|im_end|>", special=True)[0]


GREEDY = {"temperature": 0}


def small(trained=True, context=1024, **generation) -> QwenForCausalLM:
    config = QwenConfig(
        vocab_size=330,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    model = scramble_(QwenForCausalLM(config)).eval()
    if trained:
        model.generation_config = {
            "eos_token_id": [END, TOKENIZER.eos_token_id],
            **generation,
        }
    return model


def answer(model, messages, n=8, **options):
    """The answer of `stream` to the whole conversation, without any cache from earlier
    turns.
    """
    ids = chat_ids(TOKENIZER, messages)
    return "".join(
        stream(
            model,
            TOKENIZER,
            ids,
            max_new_tokens=n,
            eos_token_id=model.generation_config["eos_token_id"],
            **options,
        )
    )


def second_answer(model, first, said, then):
    """The greedy answer to `then`, after the message `first` and the answer `said`."""
    history = [first, {"role": "assistant", "content": said}]
    return answer(model, [*history, {"role": "user", "content": then}], **GREEDY)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_turn_is_what_the_whole_conversation_gives(system):
    model = small()
    read = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, arguments, out: read.append(arguments[0].shape[1])
    )
    chat, before, history = (
        Chat(model, TOKENIZER, system, max_new_tokens=8, **GREEDY),
        0,
        [] if system is None else [{"role": "system", "content": system}],
    )
    for turn, text in enumerate(["Hello", "And then?", "<|im_end|> Why, é?"]):
        read.clear()
        said = "".join(chat.reply(text))
        computed = sum(read)
        history += [{"role": "user", "content": text}]
        assert said == answer(model, history, **GREEDY) and len(said) > 0
        if turn:  # the prompt of before, and most of the answer, were in the cache
            assert (
                chat.reused >= before
                and computed <= len(chat_ids(TOKENIZER, history)) - chat.reused + 8
            )
        before = len(chat_ids(TOKENIZER, history))
        history += [{"role": "assistant", "content": said}]
        assert ([] if system is None else history[:1]) + chat.messages == history
    chat.reset()
    assert "".join(chat.reply("Hello")) == answer(
        model,
        [
            *([] if system is None else history[:1]),
            {"role": "user", "content": "Hello"},
        ],
        **GREEDY,
    )


def test_sampling_and_seed():
    model = small()
    options = dict(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3
    )
    first, second, other = (
        ["".join(chat.reply("Hi")) for _ in range(2)]
        for chat in (
            Chat(model, TOKENIZER, max_new_tokens=8, seed=seed, **options)
            for seed in (3, 3, 4)
        )
    )
    assert first == second != other
    assert first[0] == answer(
        model, [{"role": "user", "content": "Hi"}], seed=3, **options
    )


def test_defaults_are_the_models_own():
    assert Chat(small(), TOKENIZER).params == SamplingParams(0.2, top_p=0.9)
    sampled = small(temperature=0.7, top_k=20, do_sample=True)
    assert Chat(sampled, TOKENIZER).params == SamplingParams(0.7, top_k=20)
    given = Chat(small(temperature=0.7), TOKENIZER, temperature=0, top_p=0.5)
    assert given.params == SamplingParams(0, top_p=0.5)
    with pytest.raises(ValueError, match="^top_p must be a number above 0"):
        Chat(small(), TOKENIZER, top_p=2)
    with pytest.raises(
        ValueError, match="^this model was not trained for conversations"
    ):
        Chat(small(trained=False), TOKENIZER)


@pytest.mark.parametrize(
    "own, expected",
    [
        ({"do_sample": False, "temperature": 1.5, "top_k": 3}, {"temperature": 0}),
        ({"do_sample": True, "temperature": 1.5, "top_k": 0}, {"temperature": 1.5}),
        (
            {"do_sample": True, "temperature": 1.5, "top_k": None, "top_p": 1.0},
            {"temperature": 1.5},
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"repetition_penalty": 1.1},
            {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1},
        ),
    ],
    ids=str,
)
def test_generation_settings_keep_their_meaning(own, expected):
    model = small(**own)
    assert Chat(model, TOKENIZER).params == SamplingParams(**expected)
    warm = {**expected, "temperature": 0.3}
    assert Chat(model, TOKENIZER, temperature=0.3).params == SamplingParams(**warm)


def test_every_setting_answers_or_is_named():
    model = small()
    for options in (
        dict(temperature=1e-40),
        dict(temperature=5e-324),
        dict(temperature=1e300),
        dict(repetition_penalty=1e-300),
        dict(top_p=1e-300),
        dict(top_k=10**20),
        dict(min_p=1.0, repetition_penalty=1e300),
    ):
        list(Chat(model, TOKENIZER, max_new_tokens=4, seed=0, **options).reply("Hello"))
    for name in SETTINGS:
        for value in (float("nan"), float("inf"), -1, True, "1"):
            with pytest.raises(ValueError, match=f"^{name} must be "):
                Chat(model, TOKENIZER, **{name: value})
    for value in (3, ["S"], b"S"):
        with pytest.raises(ValueError, match="^system must be a text"):
            Chat(model, TOKENIZER, value)
        with pytest.raises(ValueError, match="^text must be a text"):
            Chat(model, TOKENIZER).reply(value)
    assert "".join(
        Chat(model, TOKENIZER, max_new_tokens=4, **GREEDY).reply("\ud800 \x00\x1b[31m")
    ) == "".join(
        Chat(model, TOKENIZER, max_new_tokens=4, **GREEDY).reply("? \x00\x1b[31m")
    )


def test_logits_that_are_not_finite_are_a_line_and_end_nothing():
    model = small()
    chat = Chat(model, TOKENIZER, max_new_tokens=4, seed=0)
    said = "".join(chat.reply("Hello"))
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="^the logits are not finite"):
        list(chat.reply("And?"))
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    assert len(chat.messages) == 2 and chat.messages[1]["content"] == said
    assert list(chat.reply("And?"))


def test_end_token_ends_and_stays_out_of_the_history(monkeypatch):
    model = small()
    ids = TOKENIZER.encode("The cat") + [END] + TOKENIZER.encode("never")
    step = iter(ids)

    def scripted(input_ids, cache, logits_to_keep):
        QwenForCausalLM.forward(
            model, input_ids, cache=cache, logits_to_keep=logits_to_keep
        )
        return (
            torch.nn.functional.one_hot(torch.tensor([[next(step)]]), 330).float() * 99
        )

    monkeypatch.setattr(model, "forward", scripted)
    chat = Chat(model, TOKENIZER, **GREEDY)
    assert "".join(chat.reply("x")) == "The cat" == chat.messages[1]["content"]


def test_broken_off():
    chat = Chat(small(), TOKENIZER, max_new_tokens=8, **GREEDY)
    whole = "".join(chat.reply("Hello"))
    chat.reset()
    pieces = chat.reply("Hello")
    first = next(pieces)
    pieces.close()
    assert whole.startswith(first) and chat.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
    ]
    chat.reset()
    chat.reply("Hello")
    assert chat.messages == []  # never asked for a piece
    assert "".join(chat.reply("Hello")) == whole


def test_a_full_context_forgets_the_oldest_turns():
    model = small(context=200)
    chat = Chat(model, TOKENIZER, "S", max_new_tokens=500, **GREEDY)
    assert chat.max_new_tokens == 50
    for turn in range(12):
        before, forgotten = list(chat.messages), chat.forgotten
        said = "".join(chat.reply(f"Turn {turn}"))
        given = [
            {"role": "system", "content": "S"},
            *before[chat.forgotten :],
            {"role": "user", "content": f"Turn {turn}"},
        ]
        assert len(chat_ids(TOKENIZER, given)) <= 150 and said == answer(
            model, given, 50, **GREEDY
        )
        assert chat.forgotten % 2 == 0
        if chat.forgotten > forgotten:
            assert (
                len(chat_ids(TOKENIZER, given))
                <= 75
                < len(
                    chat_ids(
                        TOKENIZER, [given[0], *before[chat.forgotten - 2 :], given[-1]]
                    )
                )
            )
    assert chat.forgotten > 2 and chat.forgotten % 2 == 0 and len(chat.messages) == 24
    long_questions = Chat(model, TOKENIZER, "S", max_new_tokens=1, **GREEDY)
    for turn in range(6):
        list(long_questions.reply("The cat sat on the mat. " * (turn + 2)))
        assert long_questions.forgotten % 2 == 0
    assert long_questions.forgotten
    with pytest.raises(
        ValueError,
        match=(
            "^the message makes a prompt of .* tokens; there is room for 150: send it"
            " in parts$"
        ),
    ):
        chat.reply("x y " * 200)
    assert len(chat.messages) == 24


def test_a_message_that_is_refused_makes_nothing_forgotten():
    chat = Chat(small(context=300), TOKENIZER, max_new_tokens=8, **GREEDY)
    list(chat.reply("Hello"))
    with pytest.raises(ValueError, match="send it in parts"):
        chat.reply("x y " * 200)
    assert chat.forgotten == 0 and len(chat.messages) == 2


def test_save_and_load(tmp_path):
    chat = Chat(small(), TOKENIZER, "Système", max_new_tokens=4, **GREEDY)
    for text in ("Привет", "B"):
        list(chat.reply(text))
    chat.save(tmp_path / "c.json")
    with pytest.raises(ValueError, match="c.json exists already: choose another name"):
        chat.save(tmp_path / "c.json")
    other = Chat(small(), TOKENIZER, max_new_tokens=4, **GREEDY)
    other.load(tmp_path / "c.json")
    assert (
        other.system == "Système"
        and other.messages == chat.messages
        and "Привет" in (tmp_path / "c.json").read_text(encoding="utf-8")
    )
    assert "".join(other.reply("C")) == "".join(chat.reply("C"))
    kept = list(other.messages)
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for wrong in (
        "{",
        "{}",
        "3",
        "[3]",
        json.dumps([user]),
        json.dumps([said, user]),
        json.dumps([user, {**said, "content": 1}]),
        json.dumps([user, user]),
        json.dumps([{"role": "system"}]),
        json.dumps([{"role": "system", "content": 1}]),
        "[" * 100_000,
        '{"a":' * 100_000,
        json.dumps([[user, said]]),
        json.dumps([{**user, "role": ["user"]}, said]),
        "null",
        "",
        "\xff",
        "1" * 10_000,
        "[NaN]",
    ):
        (tmp_path / "w.json").write_text(wrong)
        with pytest.raises(ValueError, match="w.json holds no conversation"):
            other.load(tmp_path / "w.json")
    (tmp_path / "w.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(ValueError, match="w.json holds no conversation"):
        other.load(tmp_path / "w.json")
    (tmp_path / "big.json").write_text("[" + " " * 2**24 + "]")
    with pytest.raises(ValueError, match="big.json is larger than 16 MiB"):
        other.load(tmp_path / "big.json")
    for place in (tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="is no file"):
            other.load(place)
    assert other.messages == kept and other.system == "Système"
    (tmp_path / "w.json").write_text(
        json.dumps([{**user, "name": {"a": 1}}, {**said, "content": "\ud800!"}])
    )
    other.load(tmp_path / "w.json")  # of a message the role and the text count
    assert other.messages == [user, {**said, "content": "?!"}] and other.system is None


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    chat = Chat(small(), TOKENIZER, max_new_tokens=4, **GREEDY)
    list(chat.reply("Hello"))
    for place in (tmp_path / "no" / "c.json", tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises((OSError, ValueError)) as error:
            chat.save(place)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="No space left"):
        chat_module._write_new(Full(tmp_path / "c.json"), "text")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    chat.save("~/c.json")
    chat.load("~/c.json")
    assert (tmp_path / "c.json").is_file() and len(chat.messages) == 2


class Full(type(Path())):
    """A path on a full disk."""

    def open(self, *arguments, **options):
        file = super().open(*arguments, **options)

        class Writer:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, text):
                file.write(text[:1])
                raise OSError(28, "No space left on device")

        return Writer()


def terminal(monkeypatch, capsys, directory, typed, *options):
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    run(
        parser.parse_args(
            [
                "--model",
                str(directory),
                "--max-new-tokens",
                "8",
                "--temperature",
                "0",
                *options,
            ]
        )
    )
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_pretrained(
        small(), TOKENIZER, tmp_path_factory.mktemp("chat") / "model"
    )


def test_terminal(monkeypatch, capsys, tmp_path, directory):
    file = tmp_path / "talk.json"
    out = terminal(
        monkeypatch,
        capsys,
        directory,
        f"Hello\n\n/save {file}\n/save {file}\n/reset\nHello\n/load {file}\n/system Be"
        " brief.\nHello\n/what\n/save\n/load nowhere.json\n/help\n/exit\nnot read\n",
        "--system",
        "S",
    )
    model = small()
    s = {"role": "system", "content": "S"}
    hello = {"role": "user", "content": "Hello"}
    said = answer(model, [s, hello], **GREEDY)
    assert json.loads(file.read_text()) == [
        s,
        hello,
        {"role": "assistant", "content": said},
    ]
    assert (
        out.count(said + "\n") == 2
        and answer(model, [{"role": "system", "content": "Be brief."}, hello], **GREEDY)
        + "\n"
        in out
    )
    for line in (
        f"(2 messages written to {file})",
        f"({file} exists already: choose another name)",
        "(a new conversation)",
        f"(2 messages read from {file})",
        "(a new conversation with this system prompt)",
        "/what is no command",
        "/save is no command, or its argument is missing",
        "No such file",
    ):
        assert line in out
    assert out.count("/exit         end (also Ctrl-D)") == 3 and "not read" not in out


def test_terminal_interrupts(monkeypatch, capsys, directory):
    """Ctrl-C in an answer keeps what was said; at the prompt it does nothing; the
    program ends with its input.
    """
    calls, real = [], QwenForCausalLM.forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(QwenForCausalLM, "forward", forward)
    lines = iter(["Hello", KeyboardInterrupt, "again", EOFError])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    out = terminal(monkeypatch, capsys, directory, "")
    monkeypatch.undo()
    model = small()
    hello = {"role": "user", "content": "Hello"}
    said = out.split("\n")[1].removesuffix(" (stopped)")
    assert (
        out.split("\n")[1] == said + " (stopped)"
        and 0 < len(said)
        and answer(model, [hello], **GREEDY).startswith(said)
    )
    assert "(/exit or Ctrl-D ends)" in out
    assert second_answer(model, hello, said, "again") + "\n" in out


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{", "unexpected"),
        ("{{ 9 ** (9 ** 9) }}", ""),
    ],
)
def test_what_a_chat_template_refuses_is_said(
    template, reason, tmp_path, monkeypatch, capsys
):
    save_pretrained(small(), TOKENIZER, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    with pytest.raises(ValueError, match=f"^the chat template .*{reason}"):
        Chat(*load(tmp_path / "hf"))
    if reason:
        assert f"{reason}" in terminal(monkeypatch, capsys, tmp_path / "hf", "")


def test_end_ids_may_be_set_as_one_number():
    model = small()
    model.generation_config = {"eos_token_id": END}
    assert "".join(
        Chat(model, TOKENIZER, max_new_tokens=8, **GREEDY).reply("Hello")
    ) == answer(small(), [{"role": "user", "content": "Hello"}], **GREEDY)
    with pytest.raises(ValueError, match="^model.generation_config: eos_token_id 'x'"):
        model.generation_config = {"eos_token_id": "x"}


def test_what_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch, tmp_path):
    chat = Chat(small(context=200), TOKENIZER, max_new_tokens=8, **GREEDY)
    long, encode = "long " * 10_000, TOKENIZER.encode
    monkeypatch.setattr(
        TOKENIZER,
        "encode",
        lambda text, special=False: (
            encode(text, special) if len(text) < len(long) else pytest.fail("tokenized")
        ),
    )
    with pytest.raises(
        ValueError,
        match=(
            "^the message makes a prompt of more than 200 tokens; there is room for"
            " 192: send it in parts$"
        ),
    ):
        chat.reply(long)
    with pytest.raises(
        ValueError,
        match="^a text of 50000 characters does not fit into the model's 200 tokens$",
    ):
        stream(chat.cache.model, TOKENIZER, long)
    options = {"max_new_tokens": 8}
    with pytest.raises(ValueError, match="^a text of 50000 characters"):
        list(chat_module._continue(chat.cache.model, TOKENIZER, options, long))
    # a conversation that is far too long loses its old turns in few steps
    turns = [
        {"role": role, "content": f"{role} {i}"}
        for i in range(3000)
        for role in ("user", "assistant")
    ]
    (tmp_path / "long.json").write_text(json.dumps(turns))
    chat.load(tmp_path / "long.json")
    asked = []
    monkeypatch.setattr(
        chat_module,
        "chat_ids",
        lambda *arguments: asked.append(arguments) or chat_ids(*arguments),
    )
    list(chat.reply("Hello"))
    assert chat.forgotten > 5900 and len(asked) < 20


@pytest.mark.parametrize("where", ["_command", "why_no_chat", "chat_ids"])
def test_ctrl_c_at_other_moments(monkeypatch, capsys, directory, where):
    """In a command and while a prompt is made it stops that; while the model is opened
    it ends the program, as an exception for its caller.
    """

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, where, interrupted)
    if where == "why_no_chat":
        with pytest.raises(KeyboardInterrupt):
            terminal(monkeypatch, capsys, directory, "Hello\n")
    else:
        out = terminal(
            monkeypatch,
            capsys,
            directory,
            "/help\n" if where == "_command" else "Hello\n",
        )
        assert out.endswith(" (stopped)\n\n")


def test_an_output_that_nobody_reads_ends_the_program(monkeypatch, capsys, directory):
    printed = []

    def broken(*texts, **options):
        printed.append(texts)
        if len(printed) > 1:
            raise BrokenPipeError

    monkeypatch.setattr(chat_module, "print", broken, raising=False)
    with pytest.raises(BrokenPipeError):
        terminal(monkeypatch, capsys, directory, "Hello\nHello\n")
    assert len(printed) == 2


def test_input_that_is_no_text(monkeypatch, capsys, directory):
    """Bytes that are no UTF-8, control characters, a closed input."""
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    arguments = parser.parse_args(
        ["--model", str(directory), "--max-new-tokens", "8", "--temperature", "0"]
    )
    monkeypatch.setattr(
        sys,
        "stdin",
        io.TextIOWrapper(
            io.BytesIO(b"\xff\xfe\x00\x1b[31m\nHello\n"), encoding="utf-8"
        ),
    )
    run(arguments)
    model, first = small(), {"role": "user", "content": "\ufffd\ufffd\x00\x1b[31m"}
    said = answer(model, [first], **GREEDY)
    out = capsys.readouterr().out
    assert said + "\n" in out
    assert second_answer(model, first, said, "Hello") + "\n" in out
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input, which is closed"):
        run(arguments)


@pytest.mark.parametrize(
    "flag, value",
    [
        (flag, value)
        for flag in ("--max-new-tokens", "--temperature", "--top-p", "--seed")
        for value in ("nan", "inf", "-1", "x", "1e400")
    ],
)
def test_flags_are_named(capsys, flag, value):
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"{flag}={value}"])
    assert f"argument {flag}: must be a " in capsys.readouterr().err


def test_a_context_shorter_than_the_longest_answer(monkeypatch, capsys, tmp_path):
    """A model that continues text is asked for as many tokens as its context has room
    for.
    """
    save_checkpoint(tmp_path / "final", small(trained=False, context=40), TOKENIZER)
    out = terminal(
        monkeypatch,
        capsys,
        tmp_path / "final",
        "The cat\n" + "x y " * 40 + "\n",
        "--max-new-tokens",
        "512",
    )
    assert (
        re.search(r"\(the text makes a prompt of \d+ tokens; the model reads 40\)", out)
        and "max_position" not in out
    )


def test_an_interrupt_while_a_piece_is_printed(
    monkeypatch, capsys, tmp_path, directory
):
    printed = []

    def interrupted(*texts, **options):
        printed.append(texts)
        if len(printed) == 3:  # the greeting, a piece, a piece
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "print", interrupted, raising=False)
    terminal(monkeypatch, capsys, directory, f"Hello\n/save {tmp_path / 'c.json'}\n")
    assert json.loads((tmp_path / "c.json").read_text())[1]["content"] == printed[1][
        0
    ] + printed[2][0] and printed[3] == (" (stopped)",)


def test_terminal_says_what_it_forgets_and_what_is_too_long(
    monkeypatch, capsys, tmp_path
):
    directory = save_pretrained(small(context=200), TOKENIZER, tmp_path / "short")
    out = terminal(
        monkeypatch,
        capsys,
        directory,
        "".join(f"The number {i}\n" for i in range(8)) + "x y " * 200 + "\n",
        "--system",
        "S",
    )
    assert (
        "(the context is full: the first " in out
        and "(the message makes a prompt of" in out
    )


def test_a_model_without_chat_training_continues_text(monkeypatch, capsys, tmp_path):
    model = small(trained=False)
    save_checkpoint(tmp_path / "final", model, TOKENIZER)
    out = terminal(monkeypatch, capsys, tmp_path / "final", "The cat\n/exit\n")
    assert (
        "was not trained for conversations: it continues what you type" in out
        and "qwen-analog chat --model smollm2" in out
    )
    assert (
        "".join(stream(model, TOKENIZER, "The cat", max_new_tokens=8, **GREEDY)) in out
    )
    # the tokenizer's chat template alone does not make it one
    shutil.rmtree(tmp_path / "final")
    save_pretrained(model, TOKENIZER, tmp_path / "final")
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    Path("final").rename("checkpoints/final")
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    run(parser.parse_args([]))
    assert capsys.readouterr().out.startswith("checkpoints/final was not trained")


def test_pipe(directory):
    code = (
        "import argparse; from qwen_analog.chat import *;"
        " from qwen_analog.arguments import add_chat_arguments; p ="
        " argparse.ArgumentParser(); add_chat_arguments(p);"
        f" run(p.parse_args(['--model', {str(directory)!r},"
        " '--temperature', '0', '--max-new-tokens', '8']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input="Hello\n",
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.split("\n", 1)
    assert (
        lines[0].startswith("A conversation with")
        and lines[1]
        == answer(small(), [{"role": "user", "content": "Hello"}], **GREEDY) + "\n\n"
    )


def check_conversation(kind):
    """In any conversation each answer is the answer to the whole of it, computed from
    nothing.
    """
    model = small()
    chat = kind(model, TOKENIZER, "Be brief.", max_new_tokens=6, **GREEDY)
    for texts in (["Hello", "And <|im_end|> then?", "é"], ["Hullo", "And?"]):
        history = [{"role": "system", "content": "Be brief."}]
        for text in texts:
            history.append({"role": "user", "content": text})
            expected = answer(model, history, 6, **GREEDY)
            said = "".join(chat.reply(text))
            assert said == expected
            assert chat.messages[-1]["content"] == said
            history.append({"role": "assistant", "content": said})
        chat.reset()


class NoHistory(Chat):
    def prompt(self, text):
        turns = [("system", self.system), ("user", text)]
        return chat_ids(TOKENIZER, [{"role": r, "content": c} for r, c in turns])


class TrustsTheCache(Chat):
    """As if every prompt began with the old tokens."""

    def prompt(self, text):
        prompt = super().prompt(text)
        self.cache.ids = prompt[: min(len(self.cache.ids), len(prompt) - 1)]
        return prompt


class ForgetsTheSystem(Chat):
    def reset(self):
        began = hasattr(self, "cache")  # the first reset is that of __init__
        super().reset()
        self.system = None if began and self.cache.ids else self.system


class BelievesTheText(Chat):
    def prompt(self, text):
        turns = [
            {"role": "system", "content": self.system},
            *self.messages,
            {"role": "user", "content": text},
        ]
        form = "".join(
            f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
            for turn in turns
        )
        return self.tokenizer.encode(form + "<|im_start|>assistant\n", special=True)


def test_each_answer_is_the_answer_to_the_whole_conversation():
    check_conversation(Chat)


@pytest.mark.mutant
@pytest.mark.parametrize(
    "kind", [NoHistory, TrustsTheCache, ForgetsTheSystem, BelievesTheText]
)
def test_a_broken_conversation_is_noticed(kind):
    with pytest.raises(AssertionError):
        check_conversation(kind)

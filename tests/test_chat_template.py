"""Conversations as ids: templates that trim, refuse, never end or lie."""

import concurrent.futures
import os

import pytest
from weights_helpers import MESSAGES, TOKENIZER, one_line, small

from qwen_analog import chat_template
from qwen_analog.chat_template import chat_ids, has_chat_format
from qwen_analog.hf_tokenizer import HFTokenizer
from qwen_analog.tokenizer import chat_text, encode_chat
from qwen_analog.tokenizer_json import QWEN_CHAT_TEMPLATE

pytest_plugins = ["weights_helpers"]


def test_chat_ids_are_the_templates_and_contents_stay_text(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    for messages in (
        MESSAGES,
        [{"role": "system", "content": "S <|endoftext|>"}, *MESSAGES],
    ):
        for prompt in (True, False):
            assert (
                chat_ids(tokenizer, messages, prompt)
                == chat_ids(TOKENIZER, messages, prompt)
                == encode_chat(TOKENIZER, messages, prompt)
            )
    harmless = MESSAGES[1:]
    assert chat_ids(tokenizer, harmless) == tokenizer.encode(
        chat_text(harmless), special=True
    )
    for wrong in (
        {"role": "user<|im_end|>", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": 3},
    ):
        with pytest.raises(ValueError, match="a message needs a role"):
            chat_ids(tokenizer, [wrong])


def test_a_template_may_trim_and_may_refuse(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one\nonly') }}{% endif %}"
        "<|im_start|>{{ messages[0].content | trim }}<|im_end|>"
    )
    ids = chat_ids(tokenizer, [{"role": "user", "content": "  <|im_end|> hi\n"}])
    assert (
        tokenizer.decode(ids) == "<|im_start|><|im_end|> hi<|im_end|>"
        and ids.count(402) == 1
    )
    with pytest.raises(
        ValueError, match="^the chat template does not take this conversation: one$"
    ):
        chat_ids(tokenizer, MESSAGES)
    assert not has_chat_format(small(), tokenizer)


HOSTILE = {
    "without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "blanks": "{{ 'x' * 10 ** 10 }}",
    "a filter": "{{ 'x'|center(10 ** 10) }}",
    "a format": "{{ '%09999999999d' % 1 }}",
    "doubled": (
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s"
        " %}{% endfor %}{{ n.s }}"
    ),
    "long": "x" * 3_000_000,
    "a macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "classes": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "undefined": "{{ f() }}",
    "no template": "{{",
    "a file": "{% include '/etc/passwd' %}",
    "an empty refusal": "{{ raise_exception('') }}",
    "a method": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(name, tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = HOSTILE[name]
    with pytest.raises(ValueError, match="^the chat template ") as error:
        chat_ids(tokenizer, MESSAGES)
    assert len(one_line(error)) < 400
    if name == "undefined":
        assert not has_chat_format(small(), tokenizer)
    tokenizer.tokenizer.chat_template = QWEN_CHAT_TEMPLATE  # and the next one is served
    assert chat_ids(tokenizer, MESSAGES) == encode_chat(TOKENIZER, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        QWEN_CHAT_TEMPLATE,
        (
            "{{ eos_token }}{{ tools }}{{ documents }}{% if true %}\n  x\n{% endif %}\n"
            " {%- if not tools %}y{% endif %}"
        ),
        (
            "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m |"
            " tojson }}{{ m['content'] | tojson(indent=1) }}{% endfor %}"
        ),
        (
            "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1"
            " %}{{ n.a }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        ),
        (
            "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ messages | map(attribute='role')"
            " | join(',') }}{{ '<b>' | e }}"
        ),
    ],
)
def test_templates_mean_what_they_mean_to_transformers(template, tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    tokenizer.tokenizer.chat_template = template
    for prompt in (True, False):
        expected = tokenizer.tokenizer.apply_chat_template(
            MESSAGES[1:], tokenize=False, add_generation_prompt=prompt
        )
        assert tokenizer.decode(chat_ids(tokenizer, MESSAGES[1:], prompt)) == expected


def test_templates_from_many_threads_and_from_a_copy_of_the_process(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    expected = chat_ids(tokenizer, MESSAGES)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(
            ids == expected
            for ids in pool.map(lambda _: chat_ids(tokenizer, MESSAGES), range(40))
        )
    first = chat_template._RENDERER.process.pid
    pid = os.fork()
    if pid == 0:  # the copy starts a process of its own
        os._exit(
            0
            if chat_ids(tokenizer, MESSAGES) == expected
            and chat_template._RENDERER.process.pid != first
            else 1
        )
    assert (
        os.waitpid(pid, 0)[1] == 0
        and chat_ids(tokenizer, MESSAGES) == expected
        and chat_template._RENDERER.process.pid == first
    )


def test_odd_conversations_and_templates_that_are_no_text(tokenizer_files):
    tokenizer = HFTokenizer(tokenizer_files)
    for messages in (
        [{"role": "user", "content": "".join(map(chr, range(0xE000, 0xF900)))}],
        [{"role": ["user"], "content": "x"}],
    ):
        with pytest.raises(ValueError):
            chat_ids(tokenizer, messages)
    for template, written in (
        ("{{ messages[0].content }}", "\ue000402\ue000"),
        ("\ue001999\ue001", "\ue001999\ue001"),
    ):
        tokenizer.tokenizer.chat_template = template
        assert chat_ids(
            tokenizer, [{"role": "user", "content": "\ue000402\ue000"}]
        ) == tokenizer.encode(written)
    for template in (5, ["x"], {"tool_use": "x"}):
        tokenizer.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat_template must be a text"):
            chat_ids(tokenizer, MESSAGES)
    tokenizer.tokenizer.chat_template = {
        "default": "{{ messages[0].content }}",
        "tool_use": "x",
    }
    assert tokenizer.decode(chat_ids(tokenizer, MESSAGES)) == MESSAGES[0]["content"]

"""The protocol: OpenAI's bodies, answers and errors, as its own package sees them."""

import json

import pytest
import torch
from serving_helpers import (
    CONFIG,
    EOS,
    MODEL,
    NAME,
    Scripted,
    TOKENIZER,
    USER,
    alone,
    answers,
    client,
    end_servers,
    new_request,
    post,
    serving,
    spell,
    tiny_fixture,
)

from qwen_analog import protocol
from qwen_analog.loading import load
from qwen_analog import QwenForCausalLM
from qwen_analog.engine import AsyncEngine
from qwen_analog.grammar import token_bytes
from qwen_analog.sampling import SamplingParams
from qwen_analog.hf import save_pretrained
from qwen_analog.scheduler import Delta, TokenLogprob
from qwen_analog.tokenizer import encode_chat


def test_settings_of_the_model_hold_where_a_request_says_nothing():
    def of(settings, **body):
        model = QwenForCausalLM(CONFIG)
        model.generation_config = settings
        engine = AsyncEngine(model, TOKENIZER, max_batch=1, max_context=64)
        body = protocol.parse_body(
            json.dumps({"model": NAME, "prompt": [1], **body}).encode(), chat=False
        )
        return protocol.make_requests(engine, body)[0].params

    both = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
    }
    assert of({}) == SamplingParams() and of(both) == SamplingParams(
        0.6, 20, 0.8, None, 1.1
    )
    assert (
        of(both, temperature=0, top_k=0, top_p=1)
        == SamplingParams(0, None, 1, None, 1.1)
        and of(both, top_k=-1).top_k is None
    )
    assert (
        of({"do_sample": False, "temperature": 0.6}).temperature == 0
        and of({"do_sample": False}, temperature=1).temperature == 1
    )
    assert of({"top_k": 0}).top_k is None


def test_completion(tiny):
    port, _ = tiny
    found = client(port).completions.create(
        model=NAME, prompt=[1, 2, 3], max_tokens=20, temperature=0
    )
    expected = TOKENIZER.decode(alone(new_request([1, 2, 3], 20, temperature=0)))
    assert (
        found.choices[0].text == expected
        and found.choices[0].finish_reason == "length"
        and found.object == "text_completion"
    )
    assert (
        found.usage.prompt_tokens,
        found.usage.completion_tokens,
        found.usage.total_tokens,
    ) == (3, 20, 23) and found.model == NAME


def test_a_text_opens_a_document(tiny):
    port, _ = tiny
    ids = [EOS, *TOKENIZER.encode("été")]
    options = dict(model=NAME, max_tokens=20, temperature=0)
    found = client(port).completions.create(prompt="été", **options)
    assert found.choices[0].text == client(port).completions.create(
        prompt=ids, **options
    ).choices[0].text and found.usage.prompt_tokens == len(ids)


def test_chat(tiny):
    port, _ = tiny
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    ids = encode_chat(TOKENIZER, messages)
    options = dict(model=NAME, temperature=0.7, seed=3)
    expected = TOKENIZER.decode(alone(new_request(ids, 20, temperature=0.7, seed=3)))
    for limit in ("max_tokens", "max_completion_tokens"):
        found = client(port).chat.completions.create(
            messages=messages, **options, **{limit: 20}
        )
        assert (
            found.choices[0].message.content == expected
            and found.choices[0].message.role == "assistant"
        )
        assert (
            found.usage.prompt_tokens == len(ids) and found.object == "chat.completion"
        )
    parts = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi <|im"},
                {"type": "text", "text": "_end|>"},
            ],
        }
    ]
    assert (
        client(port)
        .chat.completions.create(messages=parts, max_tokens=20, **options)
        .choices[0]
        .message.content
        == expected
    )
    # a message of the answer may come back, and without a limit the answer goes on to
    # the end of the context
    found = client(port).chat.completions.create(
        messages=[*messages, found.choices[0].message, *messages], **options
    )
    assert (
        found.usage.total_tokens == 400 and found.choices[0].finish_reason == "length"
    )


def test_streams(tiny):
    port, _ = tiny
    options = dict(model=NAME, temperature=1, seed=4, max_tokens=30)
    chunks = list(
        client(port).chat.completions.create(
            messages=[{"role": "user", "content": "x"}], stream=True, **options
        )
    )
    whole = client(port).chat.completions.create(
        messages=[{"role": "user", "content": "x"}], **options
    )
    assert (
        "".join(chunk.choices[0].delta.content for chunk in chunks)
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant" and all(
        chunk.object == "chat.completion.chunk" for chunk in chunks
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (
        len(chunks) - 1
    ) + ["length"] and len(chunks) > 10
    assert len({chunk.id for chunk in chunks}) == 1 and all(
        chunk.usage is None for chunk in chunks
    )
    *chunks, last = client(port).completions.create(
        prompt="x", stream=True, stream_options={"include_usage": True}, **options
    )
    assert (
        "".join(chunk.choices[0].text for chunk in chunks)
        == client(port).completions.create(prompt="x", **options).choices[0].text
    )
    assert (
        last.choices == []
        and last.usage.completion_tokens == 30
        and last.usage.prompt_tokens == 2
    )


def test_several_answers(tiny):
    port, _ = tiny
    options = dict(model=NAME, temperature=1, max_tokens=12)
    found = client(port).completions.create(prompt=["a", "b"], n=2, seed=7, **options)
    one = lambda prompt, seed: (
        client(port)
        .completions.create(prompt=prompt, seed=seed, **options)
        .choices[0]
        .text
    )
    expected = [one("a", 7), one("a", 8), one("b", 7), one("b", 8)]
    assert [choice.text for choice in found.choices] == expected and [
        choice.index for choice in found.choices
    ] == [0, 1, 2, 3]
    assert found.usage.completion_tokens == 48 and found.usage.prompt_tokens == 4
    streamed = [""] * 4
    for chunk in client(port).completions.create(
        prompt=["a", "b"], n=2, seed=7, stream=True, **options
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected
    assert len({one("a", None) for _ in range(3)}) == 3


def test_logprobs_over_http(tiny):
    port, _ = tiny
    expected = [
        entry
        for delta in answers(
            AsyncEngine(MODEL, TOKENIZER, max_context=64),
            new_request([EOS, *TOKENIZER.encode("x")], 6, temperature=0, logprobs=2),
        )[0]
        for entry in delta.logprobs
    ]
    found = (
        client(port)
        .completions.create(
            model=NAME, prompt="x", max_tokens=6, temperature=0, logprobs=2
        )
        .choices[0]
        .logprobs
    )
    assert found.token_logprobs == pytest.approx(
        [value for _, value, _ in expected], abs=1e-4
    )
    assert (
        found.tokens
        == [
            protocol._token_name(token_bytes(TOKENIZER, token))
            for token, _, _ in expected
        ]
        and len(found.top_logprobs) == 6
    )
    options = dict(
        model=NAME,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
    )
    content = (
        client(port)
        .chat.completions.create(top_logprobs=3, **options)
        .choices[0]
        .logprobs.content
    )
    assert len(content) == 6 and all(
        len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob
        for entry in content
    )
    streamed = [
        entry
        for chunk in client(port).chat.completions.create(stream=True, **options)
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in content], abs=1e-4
    )


BAD = [
    ("completions", b"{", 400, None, "not JSON"),
    ("completions", b"\xff", 400, None, "not JSON"),
    ("completions", b"[" * 100_000, 400, None, "not JSON"),
    ("completions", b"[1]", 400, None, "JSON object, not list"),
    ("completions", {}, 400, "model", "model is missing"),
    ("completions", {"model": NAME}, 400, "prompt", "prompt is missing"),
    ("completions", {"model": NAME, "prompt": None}, 400, "prompt", "missing"),
    (
        "completions",
        {"model": "gpt-\ud800", "prompt": "x"},
        404,
        "model",
        "no model 'gpt-",
    ),
    ("completions", {"model": "gpt", "prompt": "x"}, 404, "model", "no model 'gpt'"),
    (
        "completions",
        {"model": NAME, "prompt": 3},
        400,
        "prompt",
        "prompt must be a text",
    ),
    (
        "completions",
        {"model": NAME, "prompt": []},
        400,
        "prompt",
        "prompt must be a text",
    ),
    ("completions", {"model": NAME, "prompt": [[]]}, 400, None, "at least one token"),
    (
        "completions",
        {"model": NAME, "prompt": [1, "a"]},
        400,
        "prompt",
        "prompt must be a text",
    ),
    (
        "completions",
        {"model": NAME, "prompt": [5000]},
        400,
        None,
        "token ids from 0 to 277",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "temperature": "hot"},
        400,
        "temperature",
        "number from 0 to 2: temperature is 'hot'",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "temperature": 3},
        400,
        "temperature",
        "number from 0 to 2",
    ),
    (
        "completions",
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        400,
        "temperature",
        "number from 0 to 2",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "top_p": 0},
        400,
        "top_p",
        "above 0",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_tokens": True},
        400,
        "max_tokens",
        "whole number of at least 1",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_tokens": 0},
        400,
        "max_tokens",
        "whole number of at least 1",
    ),
    ("completions", {"model": NAME, "prompt": "x", "n": 1.5}, 400, "n", "whole number"),
    ("completions", {"model": NAME, "prompt": "x", "n": 9}, 400, "n", "at most 8"),
    (
        "completions",
        {"model": NAME, "prompt": "x", "seed": -1},
        400,
        "seed",
        "seed must be",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stop": [1]},
        400,
        "stop",
        "stop must be a text",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stream": "yes"},
        400,
        "stream",
        "true or false",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stream_options": {"usage": 1}},
        400,
        "stream_options.usage",
        "not a parameter",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_token": 5},
        400,
        "max_token",
        "not a parameter",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "\ud800" * 1000: 5},
        400,
        "\\ud800" * 6 + "\\ud8",
        "not a parameter",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "echo": True},
        400,
        "echo",
        "echo is not supported",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "logit_bias": {"5": 100}},
        400,
        "logit_bias",
        "not supported",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "frequency_penalty": 0.5},
        400,
        "frequency_penalty",
        "not supported",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x" * 500},
        400,
        "prompt",
        "context has 400 tokens",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "max_tokens": 399},
        400,
        "prompt",
        "2 of the prompt and 399 of the answer",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x" * 900_000},
        400,
        "prompt",
        "context has 400 tokens: 900,000 characters",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stop": ["a" * 900_000]},
        400,
        "stop",
        "at most 16",
    ),
    (
        "completions",
        {"model": NAME, "prompt": "x", "stop": ["a"] * 17},
        400,
        "stop",
        "at most 16",
    ),
    ("completions", {"model": NAME, "prompt": ["x"] * 100_000}, 400, "n", "at most 8"),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": "x" * 900_000}]},
        400,
        "messages",
        "900,000 characters",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": ""}] * 1000},
        400,
        "messages",
        "1000 messages",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": []},
        400,
        "messages",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": "x"},
        400,
        "messages",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [3]},
        400,
        "messages[0]",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user"}]},
        400,
        "messages[0].content",
        "a message without a content",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "robot", "content": "x"}]},
        400,
        "messages[0].role",
        "'robot'",
    ),
    (
        "chat/completions",
        {
            "model": NAME,
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
            ],
        },
        400,
        "messages[0].content",
        "messages must be",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{**USER[0], "name": "Eve"}]},
        400,
        "messages[0].name",
        "not a parameter",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": "x" * 500}]},
        400,
        "messages",
        "context has 400 tokens",
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": USER, "tools": [{"type": "function"}]},
        400,
        "tools",
        'tools must be a list of at most 128 {"type": "function"',
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": USER, "response_format": {"type": "xml"}},
        400,
        "response_format.type",
        '{"type": "json_object"} or',
    ),
    (
        "chat/completions",
        {"model": NAME, "messages": USER, "top_logprobs": 21},
        400,
        "top_logprobs",
        "0 to 20",
    ),
    ("nothing", {}, 404, None, "Not Found"),
    ("models", {}, 405, None, "Method Not Allowed"),
]


@pytest.mark.parametrize("path, body, status, param, message", BAD, ids=range(len(BAD)))
def test_refusals(tiny, path, body, status, param, message):
    port, engine = tiny
    found, content, _ = post(port, body, f"/v1/{path}")
    error = content["error"]
    assert (
        found == status
        and set(error) == {"message", "type", "param", "code"}
        and error["type"] == "invalid_request_error"
    )
    assert (
        error["param"] == param
        and message in error["message"]
        and "\n" not in error["message"]
        and len(error["message"]) < 300
    )
    if "context has" in message:
        assert error["code"] == "context_length_exceeded"
    assert not any(engine.scheduler.rows) and not engine.scheduler.waiting


def test_harmless_parameters_are_accepted(tiny):
    port, _ = tiny
    harmless = dict(
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        logit_bias={},
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        top_p=None,
        stop=None,
        n=1,
        seed=None,
        parallel_tool_calls=True,
    )
    assert (
        post(
            port,
            {"model": NAME, "messages": USER, "max_tokens": 2, **harmless},
            "/v1/chat/completions",
        )[0]
        == 200
    )
    lone = [{"role": "user", "content": "half a character: \ud800"}]
    assert (
        post(
            port,
            {"model": NAME, "messages": lone, "max_tokens": 2, "stop": "\ud800"},
            "/v1/chat/completions",
        )[0]
        == 200
    )


NASTY = [
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "5e-324",
    "18446744073709551616",
    "1" * 400,
    "1" * 5000,
    '"x"',
    '""',
    r'"\ud800"',
    r'"\u0000"',
    "[]",
    "[[]]",
    "[null]",
    "{}",
    '{"a": 1}',
    '[1, "a"]',
    '["a", ""]',
    "[-1]",
    json.dumps(["a"] * 100),
]


@pytest.mark.parametrize("chat", [True, False])
def test_any_value_of_any_parameter(chat):
    """A request is answered or refused in one line that names what is wrong; never a
    fault of the server.
    """
    engine = AsyncEngine(MODEL, TOKENIZER, max_batch=4, max_context=400)
    schema = protocol.ChatBody if chat else protocol.CompletionBody
    taken = 0
    for name in [
        *schema.model_fields,
        *protocol.REFUSED,
        *protocol.IGNORED,
        r"\ud800",
        "",
    ]:
        for value in NASTY:
            fields = {
                "model": f'"{NAME}"',
                "max_tokens": "2",
                "messages" if chat else "prompt": json.dumps(USER) if chat else '"x"',
                name: value,
            }
            text = (
                "{"
                + ", ".join(f'"{key}": {entry}' for key, entry in fields.items())
                + "}"
            ).encode()
            try:
                body = protocol.parse_body(text, chat)
                for request in protocol.make_requests(engine, body):
                    engine.check(request)
                taken += 1
            except ValueError as error:
                assert (
                    "\n" not in str(error)
                    and len(str(error)) < 500
                    and str(error).isprintable()
                )
    assert taken > 50


def test_a_hundred_thousand_wrong_entries():
    for field, chat in (("prompt", False), ("messages", True), ("stop", False)):
        with pytest.raises(protocol.ApiError) as error:
            protocol.parse_body(
                (
                    json.dumps(
                        {"model": NAME, "prompt": "x", field: [None] * 100_000}
                    ).encode()
                    if not chat
                    else json.dumps({"model": NAME, field: [None] * 100_000}).encode()
                ),
                chat,
            )
        assert error.value.param.startswith(field) and len(str(error.value)) < 300
    for text in (
        b'{"model": "a", "model": "b"}',
        b'{"model": "a", "prompt": [{"x": 1, "x": 2}]}',
    ):
        with pytest.raises(protocol.ApiError, match="occurs twice"):
            protocol.parse_body(text, False)


def test_logprobs_tell_bytes_apart():
    """The model is indifferent between the bytes: as many alternatives as were asked
    for, whatever their text, and the drawn one.
    """
    flat = QwenForCausalLM(CONFIG)
    torch.nn.init.zeros_(flat.lm_head.weight)
    engine = AsyncEngine(flat, TOKENIZER, max_batch=2, max_context=200)
    engine.stop_ids = set()
    options = dict(model=NAME, max_tokens=40, seed=1, temperature=1)
    with serving(engine) as port:
        choice = (
            client(port)
            .completions.create(prompt="x", logprobs=5, **options)
            .choices[0]
        )
        deltas = [
            chunk.choices[0]
            for chunk in client(port).completions.create(
                prompt="x", logprobs=5, stream=True, **options
            )
        ]
        content = (
            client(port)
            .chat.completions.create(
                messages=USER, logprobs=True, top_logprobs=5, **options
            )
            .choices[0]
        )
    found = choice.logprobs
    assert (
        len(found.tokens) == len(found.text_offset) == len(found.token_logprobs) == 40
    )
    assert any(token.startswith("bytes:\\x") for token in found.tokens)
    for token, value, best in zip(
        found.tokens, found.token_logprobs, found.top_logprobs
    ):
        assert len(best) in (5, 6) and best[token] == value
    assert found.text_offset == sorted(found.text_offset) and found.text_offset[0] == 0
    for token, offset in zip(found.tokens, found.text_offset):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    for name in (
        "tokens",
        "text_offset",
        "token_logprobs",
    ):  # a stream tells the same, bit by bit
        assert [
            value for delta in deltas for value in getattr(delta.logprobs, name)
        ] == getattr(found, name)
    for entry in content.logprobs.content:
        assert len({bytes(other.bytes) for other in entry.top_logprobs}) == 5
    assert (
        b"".join(bytes(entry.bytes) for entry in content.logprobs.content).decode(
            errors="replace"
        )
        == content.message.content
    )


def test_logprobs_are_those_of_the_text():
    """End tokens, and what a stop string cut off, are no part of it; what is below
    -9999 is said to be -9999.
    """
    engine = AsyncEngine(Scripted(spell("ab, cd", 2)), TOKENIZER, max_context=64)
    with serving(engine) as port:
        for stop, text in ((None, "ab, cd"), (", c", "ab"), ("b", "a")):
            found = (
                client(port)
                .completions.create(
                    model=NAME, prompt=[1, 2], max_tokens=20, logprobs=0, stop=stop
                )
                .choices[0]
            )
            assert found.text == text == "".join(
                found.logprobs.tokens
            ) and found.logprobs.text_offset == list(range(len(text)))
    writer = protocol.LogprobWriter(lambda token: b"x", False, ())
    assert writer.form(Delta(0, "x", None, 1, [TokenLogprob(1, float("-inf"), {})]))[
        "token_logprobs"
    ] == [-9999.0]


def test_bytes_of_tokens(tmp_path):
    text = "a \u00e9\u6f22 \U0001f600"
    save_pretrained(MODEL, TOKENIZER, tmp_path / "model")
    for tokenizer in (TOKENIZER, load(str(tmp_path / "model"))[1]):
        ids = tokenizer.encode(text)
        assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()
        assert token_bytes(tokenizer, EOS) == b"<|endoftext|>"

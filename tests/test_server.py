"""The server: clients that leave, send too much, send nothing, or may not come in."""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
import time

import openai
import pytest
import torch
from serving_helpers import (
    EOS,
    MODEL,
    NAME,
    SMALL,
    Scripted,
    TOKENIZER,
    USER,
    alone,
    answers,
    client,
    end_servers,
    endless,
    first_row,
    head,
    idle,
    log_fixture,
    new_request,
    post,
    requests,
    running,
    send,
    serving,
    serving_once,
    spell,
    status_of,
    text_of,
    tiny_fixture,
)

from qwen_analog import protocol, server
from qwen_analog.loading import load
from qwen_analog.engine import AsyncEngine, DeltaStream
from qwen_analog.hf import save_pretrained
from qwen_analog.server import build_app, build_server
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.tokenizer import TiktokenTokenizer


def test_sixteen_clients():
    async def ask(port, request, stream):
        client_ = client(port, openai.AsyncOpenAI)
        extra = {
            name: value
            for name in ("top_k", "min_p", "repetition_penalty")
            if (value := getattr(request.params, name)) is not None
        }
        options = dict(
            model=NAME,
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            temperature=request.params.temperature,
            seed=request.params.seed,
            logprobs=0,
            top_p=request.params.top_p,
            extra_body=extra,
        )
        async with client_:
            if not stream:
                return (await client_.completions.create(**options)).choices[0].text
            return "".join(
                [
                    chunk.choices[0].text
                    async for chunk in await client_.completions.create(
                        stream=True, **options
                    )
                ]
            )

    async def all_of_them(port):
        return await asyncio.gather(
            *(ask(port, request, i % 2) for i, request in enumerate(requests()))
        )

    for rows in (16, 3):
        with serving(
            AsyncEngine(
                MODEL, TOKENIZER, max_batch=rows, max_context=64, prefill_chunk=8
            )
        ) as port:
            found = asyncio.run(asyncio.wait_for(all_of_them(port), 60))
        assert found == [
            TOKENIZER.decode([token for token in tokens if token not in (EOS, EOS + 2)])
            for tokens in map(alone, requests())
        ]


def test_stop_and_utf8_over_http():
    with serving(
        AsyncEngine(Scripted(spell("щука и рак", 2)), TOKENIZER, max_context=64)
    ) as port:
        options = dict(model=NAME, prompt=[1, 2], max_tokens=50)
        chunks = list(client(port).completions.create(stream=True, **options))
        assert [chunk.choices[0].text for chunk in chunks] == [
            *"щука и рак",
            "",
        ] and chunks[-1].choices[0].finish_reason == "stop"
        for stop, text in (("рак", "щука и "), (["и", "а"], "щук"), ([], "щука и рак")):
            found = client(port).completions.create(stop=stop, **options).choices[0]
            assert (found.text, found.finish_reason) == (text, "stop")


def check_a_client_that_goes(stream, size=4095):
    engine = endless(max_batch=1, max_context=4096)
    with serving(engine) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"model": NAME, "prompt": [1], "max_tokens": size, "stream": stream}
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body),
            {"Content-Type": "application/json"},
        )
        job = first_row(engine)
        while len(job.written) < 5:
            time.sleep(0.002)
        if stream:
            response = connection.getresponse()
            response.readline()
            response.close()
        connection.close()
        idle(engine)
        assert job.cancelled and len(job.written) < size - 95
        assert post(port, {"model": NAME, "prompt": [1], "max_tokens": 2})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(stream):
    check_a_client_that_goes(stream)


@pytest.mark.mutant
@pytest.mark.parametrize("stream", [True, False])
def test_writing_on_for_nobody_is_noticed(stream, monkeypatch):
    monkeypatch.setattr(DeltaStream, "abort", lambda self: None)
    with pytest.raises(AssertionError):
        check_a_client_that_goes(stream, size=1000)


def test_queue_full():
    engine = endless(max_batch=1, max_queue=1, max_context=4096)
    with serving(engine) as port:
        patient, hasty = client(port, max_retries=20), client(port)
        first = hasty.completions.create(
            model=NAME, prompt=[1], max_tokens=4000, stream=True
        )
        next(first)
        second = hasty.completions.create(
            model=NAME, prompt=[1], max_tokens=2, stream=True
        )
        with pytest.raises(openai.RateLimitError) as error:
            hasty.completions.create(model=NAME, prompt=[1], max_tokens=2)
        assert (
            error.value.status_code == 429
            and error.value.response.headers["Retry-After"] == "1"
            and error.value.code == "queue_full"
        )
        assert "of its 1 places, 1 are taken" in error.value.message
        timer = threading.Timer(0.2, first.close)
        timer.start()
        assert (
            patient.completions.create(
                model=NAME, prompt=[1], max_tokens=2
            ).usage.completion_tokens
            == 2
        )  # the client tries again
        assert len(list(second)) >= 1


def test_models_and_health(tiny):
    port, engine = tiny
    assert [model.id for model in client(port).models.list()] == [NAME] and client(
        port
    ).models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client(port).models.retrieve("other")
    idle(engine)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {
        "status": "ok",
        "rows": 8,
        "active": 0,
        "waiting": 0,
    }


def test_bodies_that_are_too_large_or_not_json():
    with serving(endless(max_context=64), max_body_bytes=1000) as port:
        small = {"model": NAME, "prompt": [1], "max_tokens": 2}
        status, content, _ = post(port, {**small, "user": "x" * 1_000_000})
        assert status == 413 and "1,000 that it may have" in content["error"]["message"]
        exact = json.dumps({**small, "user": ""}).encode()
        assert (
            post(port, exact[:-2] + b"x" * (1000 - len(exact)) + exact[-2:])[0] == 200
        )
        assert (
            post(port, exact[:-2] + b"x" * (1001 - len(exact)) + exact[-2:])[0] == 413
        )
        status, content, _ = post(port, small, **{"Content-Type": "text/plain"})
        assert (
            status == 415
            and "Content-Type: application/json" in content["error"]["message"]
        )
        assert (
            post(port, small, **{"Content-Type": "Application/JSON; charset=utf-8"})[0]
            == 200
        )


def test_a_model_without_control_tokens():
    class Plain(TiktokenTokenizer):
        def encode(self, text, special=False):
            return super().encode(text)

    with serving(
        AsyncEngine(
            MODEL,
            Plain({token: rank for rank, token in enumerate(BYTE_ORDER)}),
            max_context=64,
        )
    ) as port:
        with pytest.raises(openai.BadRequestError, match="no control tokens") as error:
            client(port).chat.completions.create(model=NAME, messages=USER)
        assert (
            error.value.param == "messages"
            and client(port)
            .completions.create(model=NAME, prompt="x", max_tokens=2, temperature=0)
            .usage.completion_tokens
            == 2
        )


def test_a_template_and_end_tokens_of_its_own(tmp_path):
    save_pretrained(MODEL, TOKENIZER, tmp_path / "model")
    model, tokenizer = load(str(tmp_path / "model"))
    tokenizer.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    ids = [EOS + 1, *TOKENIZER.encode("Hi")]
    expected = alone(new_request(ids, 9, temperature=0))
    with serving(AsyncEngine(model, tokenizer, max_context=64)) as port:
        found = client(port).chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=9,
            temperature=0,
        )
    assert found.usage.prompt_tokens == len(ids) and found.choices[
        0
    ].message.content == TOKENIZER.decode(expected)
    model.generation_config = {"eos_token_id": [expected[0]]}
    (deltas,) = answers(
        AsyncEngine(model, tokenizer, max_context=64),
        new_request(ids, 9, temperature=0),
    )
    assert text_of(deltas) == ("", "stop")


@pytest.mark.parametrize("stream", [True, False])
def test_errors_of_the_engine(stream):
    script = spell("abcdef")
    script[3] = None
    with serving(AsyncEngine(Scripted(script), TOKENIZER, max_context=64)) as port:
        with pytest.raises(openai.APIError, match="not finite") as error:
            list(
                client(port).completions.create(
                    model=NAME, prompt=[1], max_tokens=20, stream=stream
                )
            )
        assert stream or error.value.status_code == 500


def test_a_fault_of_the_server(monkeypatch):
    with serving(AsyncEngine(MODEL, TOKENIZER, max_context=64)) as port:
        monkeypatch.setattr(server, "parse_body", None)
        status, content, _ = post(port, {"model": NAME, "prompt": [1]})
        assert (
            status == 500
            and content["error"]["type"] == "server_error"
            and content["error"]["message"] == "the server failed"
        )


@pytest.mark.parametrize(
    "host, served",
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("localhost.", True),
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("[0:0:0:0:0:0:0:1]", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False),
        ("192.0.2.1", False),
        ("", False),
        ("localhost@evil.example", False),
        ("[::2]", False),
        ("localhost:80:80", False),
        ("mine.example", True),
    ],
)
def test_hosts(tiny, host, served):
    with serving_once(hosts=("localhost", "127.0.0.1", "::1", "mine.example")) as port:
        response = send(port, head(f"Content-Length: {len(SMALL)}", host=host) + SMALL)
        assert (
            response.startswith(b"HTTP/1.1 200")
            if served
            else status_of(response) == 421
        )


@pytest.mark.parametrize(
    "origin, served",
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://evil.example", False),
        ("null", False),
        ("http://localhost.evil.example", False),
    ],
)
def test_pages_of_others(tiny, origin, served):
    port, _ = tiny
    response = send(
        port, head(f"Content-Length: {len(SMALL)}", f"Origin: {origin}") + SMALL
    )
    assert (
        response.startswith(b"HTTP/1.1 200") if served else status_of(response) == 403
    )


def test_every_name_and_every_address():
    with serving_once(hosts=("address",)) as port:
        assert send(port, head(method="GET /health", host="192.0.2.1:80")).startswith(
            b"HTTP/1.1 200"
        )
        assert (
            status_of(send(port, head(method="GET /health", host="evil.example")))
            == 421
        )
    with serving_once(hosts=("*",)) as port:
        assert send(port, head(method="GET /health", host="any.example")).startswith(
            b"HTTP/1.1 200"
        )


KEY = "secret-5d1f"


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY} x",
        "Bearer \u00e9",
        f"Bearer x\r\nAuthorization: Bearer {KEY}",
    ],
)
def test_wrong_keys(value):
    with serving_once(api_key=KEY) as port:
        lines = [] if value is None else [f"Authorization: {value}"]
        for path in (
            "POST /v1/completions",
            "POST /v1/chat/completions",
            "GET /v1/models",
            "GET /nowhere",
        ):
            response = send(
                port,
                head(f"Content-Length: {len(SMALL)}", *lines, method=path)
                .decode()
                .encode("latin-1")
                + SMALL,
            )
            assert (
                status_of(response) == 401
                and b"invalid_api_key" in response
                and KEY.encode() not in response
            )
            assert b"www-authenticate: Bearer" in response


def test_the_right_key(log):
    with serving_once(api_key=KEY) as port:
        for word in ("Bearer", "bearer"):
            assert (
                post(port, json.loads(SMALL), Authorization=f"{word} {KEY}")[0] == 200
            )
        assert client(port).with_options(api_key=KEY).models.list().data[0].id == NAME
        with pytest.raises(openai.AuthenticationError):
            client(port).models.list()
        assert send(port, head(method="GET /health")).startswith(b"HTTP/1.1 200")
    assert KEY not in log.text
    for wrong in ("", "two words", "\u00e9", "a\n"):
        with pytest.raises(ValueError, match="API key"):
            build_app(
                AsyncEngine(MODEL, TOKENIZER, max_context=64), NAME, api_key=wrong
            ).build_middleware_stack()


CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMALL), SMALL)


@pytest.mark.parametrize(
    "data, status",
    [
        (
            head(f"Content-Length: {len(SMALL)}", "Transfer-Encoding: chunked")
            + CHUNKS,
            400,
        ),
        (head("Transfer-Encoding: gzip, chunked") + CHUNKS, 400),
        (head("Host: localhost", "Content-Length: 0"), 400),
        (head("Content-Length: 5", "Content-Length: 6"), 400),
        (b"\0" * 50 + b"\r\n\r\n", 400),
        (head("Transfer-Encoding: chunked") + b"-5\r\nabc", 400),
        (head("X: " + "a" * 200_000), 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (head(method="GET /%ff%00%ed%a0%80"), 404),
        (head(method="OPTIONS /v1/completions"), 405),
        (b"GET /health HTTP/1.0\r\n\r\n", 421),
        (head(method="GET /v1/models/%0a%ff"), 404),
    ],
)
def test_what_is_not_quite_http(tiny, data, status, log):
    port, engine = tiny
    assert status_of(send(port, data)) == status
    assert "Traceback" not in log.text and not any(engine.scheduler.rows)


def test_chunked_and_pipelined_requests(tiny):
    port, _ = tiny
    assert send(port, head("Transfer-Encoding: chunked") + CHUNKS).startswith(
        b"HTTP/1.1 200"
    )
    several = (
        head(f"Content-Length: {len(SMALL)}").replace(b"Connection: close\r\n", b"")
        + SMALL
    )
    last = head(f"Content-Length: {len(SMALL)}") + SMALL
    assert send(port, several * 2 + last).count(b"HTTP/1.1 200") == 3
    with serving_once(max_body_bytes=1000) as small:
        chunk = b"%x\r\n%s\r\n" % (600, b" " * 600)
        assert (
            status_of(
                send(
                    small, head("Transfer-Encoding: chunked") + chunk * 9 + b"0\r\n\r\n"
                )
            )
            == 413
        )
    assert send(port, head(method="HEAD /health")).endswith(b"\r\n\r\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_sends_requests_ahead_and_goes(stream):
    engine = endless(max_batch=1, max_context=4096)
    body = json.dumps(
        {"model": NAME, "prompt": [1], "max_tokens": 4000, "stream": stream}
    ).encode()
    one = (
        head(f"Content-Length: {len(body)}").replace(b"Connection: close\r\n", b"")
        + body
    )
    with serving(engine) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(one * 3)
            running = first_row(engine)
        idle(engine)
        assert running.cancelled and len(running.written) < 4000


def test_a_flood_of_requests_is_not_read_ahead(tiny):
    port, _ = tiny
    flood = head(method="GET /health").replace(b"Connection: close\r\n", b"") * 3000
    assert send(port, flood + head(method="GET /health")).count(b"HTTP/1.1 200") == 3001


def test_large_bodies_on_their_way(monkeypatch):
    """Few of them are held at a time; small ones always have room."""
    monkeypatch.setattr(server.BodyReader, "large_at_a_time", 2)
    large = json.dumps({**json.loads(SMALL), "user": "x" * 100_000}).encode()
    engine = AsyncEngine(MODEL, TOKENIZER, max_batch=2, max_context=64)
    with serving(engine) as port, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", port))
            )
            connection.sendall(head(f"Content-Length: {len(large)}") + large[:-1])
        while (found := post(port, large))[0] == 200:
            time.sleep(0.005)
        assert found[0] == 503 and "large bodies" in found[1]["error"]["message"]
        assert post(port, json.loads(SMALL))[0] == 200
        connection.sendall(large[-1:])
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert post(port, large)[0] == 200


def test_late_and_idle_connections(tiny):
    with serving_once(request_seconds=0.3, max_connections=8) as port:
        assert (
            status_of(send(port, b"GET /health HTTP/1.1\r\nHo")) == 408
            and send(port, b"") == b""
        )
        assert status_of(send(port, head("Content-Length: 500") + b"{")) == 408
        # after an answer, too, a request has its time
        kept = head(method="GET /health").replace(b"Connection: close\r\n", b"")
        response = send(port, kept + b"GET /health HT")
        assert (
            response.startswith(b"HTTP/1.1 200")
            and response.count(b"HTTP/1.1 408") == 1
        )


def test_idle_connections_make_room(monkeypatch):
    monkeypatch.setattr(server.Connection, "patience", 0)
    with serving_once(max_connections=8) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in idle[::2]:
            with contextlib.suppress(OSError):
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        assert post(port, json.loads(SMALL))[0] == 200
        monkeypatch.setattr(
            server.Connection, "patience", 60
        )  # who has just come may be about to speak
        late = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        assert status_of(send(port, b"")) == 503
        for connection in (*idle, *late):
            connection.close()


def test_busy_connections_do_not_make_room():
    engine = endless(max_batch=2, max_context=4096)
    with serving(engine, max_connections=2) as port:
        running = [
            client(port).completions.create(
                model=NAME, prompt=[1], max_tokens=4000, stream=True
            )
            for _ in range(2)
        ]
        [next(stream) for stream in running]
        assert status_of(send(port, b"")) == 503
        running[0].close()
        while sum(job is not None for job in engine.scheduler.rows) > 1:
            time.sleep(0.005)
        assert post(port, json.loads(SMALL))[0] == 200
        running[1].close()


def test_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(server.Connection, "reading_seconds", 0.3)
    engine = endless(max_batch=1, max_context=4096)
    with serving(engine) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        body = json.dumps(
            {
                "model": NAME,
                "prompt": [1],
                "max_tokens": 4000,
                "stream": True,
                "logprobs": 20,
            }
        ).encode()
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        job = first_row(engine)
        idle(engine)
        assert job.cancelled and len(job.written) < 4000


def test_connection_limits(monkeypatch):
    import resource

    def limited(number):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (number, number))
        most, backlog = server.connection_limits(256)
        assert most + backlog + 16 < number and most >= 1 and backlog >= 1
        return most

    assert limited(4096) == 256 and limited(256) < 256
    with pytest.raises(ValueError, match="ulimit"):
        limited(20)


def test_prompts_that_take_for_ever(monkeypatch, log):
    """A template that never ends holds one of the places for reading prompts; what
    others wait for is bounded, and the server ends.
    """
    hang = threading.Event()
    monkeypatch.setattr(protocol, "chat_ids", lambda *_, **__: hang.wait())
    engine = AsyncEngine(MODEL, TOKENIZER, max_batch=2, max_context=64)
    app = build_app(engine, NAME, prompt_seconds=0.2)
    chat = {"model": NAME, "messages": USER, "max_tokens": 2}
    with running(build_server(app, engine, grace_seconds=0)) as port:
        # one of two threads
        assert post(port, chat, "/v1/chat/completions")[0] == 400
        assert post(port, json.loads(SMALL))[0] == 200
        assert post(port, chat, "/v1/chat/completions")[0] == 400
        status, content, headers = post(port, json.loads(SMALL))
        assert status == 503 and headers["Retry-After"] == "1"
    assert "Traceback" not in log.text
    hang.set()


def test_whatever_a_template_raises(monkeypatch, log):
    def stop(*_, **__):
        raise StopIteration

    with serving(AsyncEngine(MODEL, TOKENIZER, max_batch=2, max_context=64)) as port:
        monkeypatch.setattr(protocol, "chat_ids", stop)
        status, content, _ = post(
            port,
            {"model": NAME, "messages": USER, "max_tokens": 2},
            "/v1/chat/completions",
        )
        assert status == 500 and content["error"]["message"] == "the server failed"
    assert (
        "Traceback" not in log.text
        and "POST /v1/chat/completions failed: RuntimeError" in log.text
    )


@pytest.mark.parametrize("grace", [0, 30])
def test_the_end_of_a_server(grace, log):
    """Answers that fit into the grace end by themselves, the others with an error of
    the API; the log has no stack trace.
    """
    engine = endless(max_batch=2, max_context=4096, max_queue=8)
    server = build_server(build_app(engine, NAME), engine, grace_seconds=grace)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port, found = server.servers[0].sockets[0].getsockname()[1], []
    silent = socket.create_connection(("127.0.0.1", port))
    # a body on its way may come during the grace
    halves = [
        b"POST /v1/completions HTTP/1.1\r\n",
        *([] if grace else [head("Content-Length: 50") + b"{"]),
    ]
    halves = [
        (socket.create_connection(("127.0.0.1", port), timeout=30), half)
        for half in halves
    ]
    for half, data in halves:
        half.sendall(data)
    length = 50 if grace else 4000

    def ask(stream):
        body = json.dumps(
            {"model": NAME, "prompt": [1], "max_tokens": length, "stream": stream}
        ).encode()
        found.append(send(port, head(f"Content-Length: {len(body)}") + body))

    asking = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(5)]
    [one.start() for one in asking]
    while (
        sum(job is not None for job in engine.scheduler.rows)
        + len(engine.scheduler.waiting)
        + len(found)
        < 5
    ):
        time.sleep(0.002)
    server.handle_exit(signal.SIGTERM, None)
    for one in [*asking, thread]:
        one.join(30)
        assert not one.is_alive()
    silent.close()
    for half, _ in halves:
        assert status_of(half.recv(65536)) == 503
        half.close()
    for answer in found:
        if b"text/event-stream" in answer:
            last = answer.rstrip().removesuffix(b"0").rstrip().splitlines()[-1]
            assert (
                last == b"data: [DONE]"
                if grace
                else b'"error"' in last and b"shutting down" in last
            )
        else:
            assert (
                answer.startswith(b"HTTP/1.1 200")
                if grace
                else status_of(answer) == 503
            )
    assert len(found) == 5 and "Traceback" not in log.text and not engine.running


def test_a_step_that_takes_long_delays_the_last_event():
    engine = endless(max_batch=1, max_context=4096)
    step = engine.step
    engine.step = lambda: (time.sleep(1.5), step())
    ending = build_server(build_app(engine, NAME), engine, grace_seconds=0)
    with running(ending) as port:
        stream = client(port).completions.create(
            model=NAME, prompt=[1], max_tokens=4000, stream=True
        )
        next(stream)
        ending.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


def test_a_second_signal_ends_the_grace():
    engine = endless(max_batch=1, max_context=4096)
    ending = build_server(build_app(engine, NAME), engine, grace_seconds=600)
    with running(ending) as port:
        stream = client(port).completions.create(
            model=NAME, prompt=[1], max_tokens=4000, stream=True
        )
        next(stream)
        ending.handle_exit(signal.SIGTERM, None)
        ending.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)

"""The command `serve`: its flags, signals, and what it refuses."""

import argparse
import signal
import subprocess
import sys
import types

import openai
import pytest
import torch
import uvicorn
from serving_helpers import MODEL, TOKENIZER, serving

from qwen_analog import hardware, loading, serve, server
from qwen_analog.arguments import report_errors
from qwen_analog.loading import load
from qwen_analog.cli import Parser
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.engine import AsyncEngine, RowCache
from qwen_analog.hf import save_pretrained


def new_parser():
    """A parser whose errors are those of the command line: ValueErrors of one line."""
    parser = Parser("serve")
    serve.add_arguments(parser)
    return parser


@pytest.mark.parametrize("package", ["starlette.applications", "uvicorn"])
def test_missing_packages(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "qwen_analog.server")
    options = new_parser().parse_args(["--port", "0"])
    assert report_errors("serve", lambda: serve.run(options)) == 2
    error = capsys.readouterr().err
    assert "pip install 'qwen-analog[serve]'" in error and error.count("\n") == 1


COMMAND = (
    "import argparse, sys; from qwen_analog import serve; parser ="
    " argparse.ArgumentParser(); serve.add_arguments(parser);"
    " serve.run(parser.parse_args())"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "my-model"
    save_checkpoint(directory, MODEL, TOKENIZER)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command(checkpoint, number):
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "--model",
        str(checkpoint),
        "--port",
        "0",
        "--max-batch",
        "2",
        "--max-context",
        "512",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert (
            line.startswith("model 'my-model' at http://127.0.0.1:")
            and "2 rows of 512 tokens" in line
        )
        client_ = openai.OpenAI(base_url=line.split()[3], api_key="none", max_retries=3)
        stream = client_.completions.create(
            model="my-model", prompt=[1], max_tokens=300, temperature=0, stream=True
        )
        next(stream)
        process.send_signal(number)
        rest = list(stream)  # what is being written may end
        assert rest[-1].choices[0].finish_reason == "length"
        client_.close()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and output == ""
    assert errors.splitlines() == [
        "WARNING:  stopping: 1 answers have 5 seconds to end; a second signal ends"
        " them now"
    ]


@pytest.mark.parametrize("name", ["my-model", "my-model/checkpoint.pt", "hf-layout"])
def test_sources(checkpoint, name):
    if name == "hf-layout":
        save_pretrained(MODEL, TOKENIZER, checkpoint.parent / name)
    model, tokenizer = load(str(checkpoint.parent / name))
    ids = torch.tensor([tokenizer.encode("same")])
    assert torch.equal(model(ids), MODEL(ids)) and tokenizer.encode(
        "same"
    ) == TOKENIZER.encode("same")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.gguf", "owner/no-such-model"])
def test_sources_that_are_not_there(source):
    with pytest.raises((ValueError, OSError)) as error:
        load(source)
    assert source in str(error.value) and "\n" not in str(error.value)


def test_other_hosts_are_warned_of_and_taken_ports_refused(
    checkpoint, monkeypatch, capsys
):
    parser = new_parser()
    options = ["--model", str(checkpoint), "--max-context", "32", "--port"]
    with monkeypatch.context() as patch:
        patch.setattr(
            uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets]
        )
        serve.run(parser.parse_args([*options, "0"]))
        assert capsys.readouterr().err == ""
        serve.run(parser.parse_args([*options, "0", "--host", "0.0.0.0"]))
    assert capsys.readouterr().err.startswith(
        "warning: 0.0.0.0 can be reached from other machines"
    )
    with serving(AsyncEngine(MODEL, TOKENIZER, max_context=32)) as port:
        for wrong, message in (
            (["0", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
            ([str(port)], f"cannot listen on 127.0.0.1 port {port}"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                serve.run(parser.parse_args([*options, *wrong]))
            assert "\n" not in str(error.value)
    assert parser.parse_args([]).host == "127.0.0.1"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            ["--port", "70000"],
            "--port: must be a whole number from 0 to 65535, not '70000'",
        ),
        (["--port", "-1"], "--port"),
        (["--max-batch", "0"], "--max-batch"),
        (["--max-context", "-5"], "--max-context"),
        (["--max-queue", "0"], "--max-queue"),
        (["--kv-pages", "-1"], "--kv-pages"),
        (["--kv-memory", "0"], "--kv-memory"),
        (
            ["--kv-pages", "9", "--kv-memory", "1"],
            "--kv-memory: not allowed with argument --kv-pages",
        ),
        (["--max-connections", "0"], "--max-connections"),
        (["--max-body-bytes", "0"], "--max-body-bytes"),
        (["--request-seconds", "nan"], "--request-seconds: must be .* not 'nan'"),
        (["--grace-seconds", "inf"], "--grace-seconds"),
        (["--grace-seconds", "-1"], "--grace-seconds"),
        (["--host", ""], "--host"),
        (["--host", "no host"], "cannot listen on no host"),
        (["--host", "a" * 300], "cannot listen"),
        (["--allowed-host", "a b"], "--allowed-host"),
        (["--allowed-host", "http://a"], "--allowed-host"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    """In one line, and before a model is opened."""
    parser = new_parser()
    with pytest.raises(ValueError, match=message) as error:
        serve.run(parser.parse_args(["--model", "nowhere", "--port", "0", *wrong]))
    assert "\n" not in str(error.value)


def test_the_key_from_the_environment(monkeypatch, checkpoint, capsys):
    parser = new_parser()
    apps = []
    monkeypatch.setattr(
        server,
        "build_server",
        lambda app, engine, **_: (
            apps.append(app) or types.SimpleNamespace(run=lambda sockets: None)
        ),
    )
    options = ["--model", str(checkpoint), "--max-context", "32", "--port", "0"]
    for value, given, expected in (
        (None, [], None),
        ("from-env", [], "from-env"),
        ("from-env", ["--api-key", "given"], "given"),
    ):
        if value is not None:
            monkeypatch.setenv(serve.KEY_VARIABLE, value)
        serve.run(
            parser.parse_args(
                [
                    *options,
                    *given,
                    "--host",
                    "0.0.0.0",
                    "--allowed-host",
                    "Mine.example",
                ]
            )
        )
        gate = apps[-1].user_middleware[0].kwargs
        assert (
            gate["api_key"] == expected
            and {"address", "localhost", "mine.example"} <= gate["hosts"]
        )
        output = capsys.readouterr()
        assert (
            bool(output.err) == (expected is None)
            and "from-env" not in output.out + output.err
        )
    monkeypatch.setenv(serve.KEY_VARIABLE, "")
    with pytest.raises(ValueError, match=serve.KEY_VARIABLE):
        serve.run(parser.parse_args(options))


def served(checkpoint, monkeypatch, capsys, *flags):
    """The cache that the command makes, and the line that it prints."""
    engines = []
    monkeypatch.setattr(loading, "load", lambda source, **options: (MODEL, TOKENIZER))
    monkeypatch.setattr(
        server,
        "build_server",
        lambda app, engine, **_: (
            engines.append(engine) or types.SimpleNamespace(run=lambda sockets: None)
        ),
    )
    options = ["--model", str(checkpoint), "--port", "0", *flags]
    serve.run(new_parser().parse_args(options))
    cache, line = engines[0].runner.cache, capsys.readouterr().out
    size = cache.nbytes / 2**20
    assert f"({size:,.0f} MiB), a page at http://127.0.0.1:" in line
    return cache, line


@pytest.mark.parametrize(
    "flags, rows, pages",
    [
        ([], 16, 16 * 128),
        (["--max-batch", "3", "--max-context", "100"], 3, 3 * 7),
        (["--kv-pages", "130"], 16, 130),
        (["--kv-memory", "0.001", "--max-batch", "40"], 40, 262),
        (["--kv-pages", "0"], 16, None),
    ],
)
def test_memory_for_keys_and_values(
    checkpoint, monkeypatch, capsys, flags, rows, pages
):
    cache, line = served(checkpoint, monkeypatch, capsys, *flags)
    assert len(cache.lengths) == rows and f"{rows} rows of" in line
    assert "memory is short" not in line
    if pages is None:
        assert isinstance(cache, RowCache) and "pages" not in line
    else:
        assert cache.pool.num_pages == pages and f", {pages:,} pages of 16 (" in line


PAGE_BYTES = (
    16
    * 2
    * 4
    * MODEL.config.num_hidden_layers
    * (MODEL.config.num_key_value_heads * MODEL.config.head_dim)
)


@pytest.mark.parametrize(
    "free, flags, pages",
    [
        (2275 + 2, [], 2048),  # nine tenths of it, without the page of nobody
        (2000, [], 1799),
        (160, [], 143),
        (130, [], 128),  # never fewer than one request needs
        (1, ["--ignore-memory"], 2048),
        (2000, ["--max-batch", "15"], 1799),
        (2000, ["--max-batch", "14"], 14 * 128),
        (2000, ["--kv-pages", "1999"], 1999),
    ],
)
def test_pages_are_as_many_as_memory_allows(
    checkpoint, monkeypatch, capsys, free, flags, pages
):
    left = free * PAGE_BYTES
    monkeypatch.setattr(hardware, "available_memory", lambda device: left)
    cache, line = served(checkpoint, monkeypatch, capsys, *flags)
    assert cache.pool.num_pages == pages and len(cache.lengths) in (14, 15, 16)
    full = 128 * len(cache.lengths)
    said = f", {pages:,} pages of 16, as memory is short (full rows need {full:,}) ("
    assert (said in line) == (pages != full and "--kv-pages" not in flags), line


def test_too_few_pages(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda source, **options: (MODEL, TOKENIZER))
    for flags, found in ((["--kv-pages", "9"], "9"), (["--kv-memory", "1e-5"], "2")):
        options = ["--model", str(checkpoint), "--port", "0", *flags]
        message = (
            f"^{found} pages of 16 tokens do not hold one request of 2,048, which needs"
            " 128: choose a smaller --max-context, or a larger --kv-pages or"
            " --kv-memory$"
        )
        with pytest.raises(ValueError, match=message):
            serve.run(new_parser().parse_args(options))


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "choose a smaller --max-context, or pass --ignore-memory"),
        (["--kv-pages", "0"], "a smaller --max-batch or --max-context, or pass"),
        (["--kv-memory", "0.1"], "a smaller --kv-pages or --kv-memory, or pass"),
        (["--kv-pages", "128"], "a smaller --kv-pages or --kv-memory, or pass"),
    ],
)
def test_a_cache_that_does_not_fit(checkpoint, monkeypatch, flags, said):
    monkeypatch.setattr(hardware, "available_memory", lambda device: 1000)
    monkeypatch.setattr(loading, "load", lambda source, **options: (MODEL, TOKENIZER))
    options = ["--model", str(checkpoint), "--port", "0", *flags]
    with pytest.raises(ValueError, match=said) as error:
        serve.run(new_parser().parse_args(options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_the_model_is_opened_compiled_where_that_is_asked(flags, checkpoint):
    opened = []

    def load(source, **options):
        opened.append(options["compile"])
        raise ValueError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", load)
        options = ["--model", str(checkpoint), "--port", "0", *flags]
        with pytest.raises(ValueError, match="^enough$"):
            serve.run(new_parser().parse_args(options))
    assert opened == [bool(flags)]

"""The wheel in an environment of its own: every command runs; what is missing is
named.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers import BYTES, ROOT, small_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SITE = Path(sysconfig.get_path("purelib"))


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def needed(names, known=None):
    """These distributions and all that they need, without extras."""
    known = {} if known is None else known
    for name in names:
        key = name.lower().replace("_", "-")
        try:
            known.setdefault(key, metadata.distribution(name))
        except metadata.PackageNotFoundError:
            continue  # of another platform
        wanted = [Requirement(text) for text in known[key].requires or []]
        wanted = [
            r.name for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})
        ]
        needed([r for r in wanted if r.lower().replace("_", "-") not in known], known)
    return known


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    clean = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "qwen_analog", source / "qwen_analog", ignore=clean)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", folder, source)
    return next(folder.glob("*.whl"))


def environment(folder, wheel, libraries):
    """A virtual environment with the wheel, which finds `libraries` beside it."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    bin = folder / "bin"
    site = next(folder.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", bin / "python", "install", "-q"]
    run(*install, "--no-deps", "--no-index", wheel)
    # a path in a .pth file is searched, and its own .pth files are not read: the
    # package that is under test here is not found through it
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return bin


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory):
    """An environment in which every extra is installed."""
    return environment(tmp_path_factory.mktemp("full") / "venv", wheel, SITE)


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    """An environment with the core's dependencies only."""
    folder = tmp_path_factory.mktemp("core")
    libraries = folder / "libraries"
    libraries.mkdir()
    texts = metadata.requires("qwen_analog") or []
    names = [Requirement(text).name for text in texts if "extra ==" not in text]
    for distribution in needed(names).values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (libraries / top).exists():
                os.symlink(SITE / top, libraries / top)
    return environment(folder / "venv", wheel, libraries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, settings and a model."""
    from qwen_analog.checkpoint import save_checkpoint
    from qwen_analog.jsonl import write_jsonl

    folder = tmp_path_factory.mktemp("work")
    save_checkpoint(folder / "model", small_model(), BYTES)
    documents = ({"text": f"document {i} is about {i * 7}"} for i in range(300))
    write_jsonl(documents, folder / "d.jsonl")
    # an empty system message keeps Qwen's own out, and all within 64 positions
    turns = {"system": "", "user": "hi", "assistant": "ho"}
    chat = [{"role": role, "content": text} for role, text in turns.items()]
    write_jsonl(
        [{"messages": chat, "title": str(i)} for i in range(9)], folder / "c.jsonl"
    )
    settings = {
        "model": {**json.loads((folder / "model" / "config.json").read_text())},
        "tokenizer": "tiktoken:vocabulary/tokenizer.tiktoken",
        "data": ["d.jsonl"],
        "sequence_length": 32,
        "max_steps": 2,
        "warmup_steps": 1,
        "gradient_accumulation_steps": 1,
    }
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads intermediate_size max_position_embeddings"
    settings["model"] = {name: settings["model"][name] for name in names.split()}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


COMMANDS = """
--version
prepare stdlib --output corpus --vocab-size 300
tokenizer --data d.jsonl --vocab-size 300 --output vocabulary
plan --config settings.json
train --config settings.json
torchrun train --config settings.json --output-dir sharded --parallel fsdp
trace 2
consolidate sharded/final
generate document --model checkpoints/final --max-new-tokens 3
eval --model checkpoints/final --data d.jsonl --heldout-fraction 0.1
export exported --model checkpoints/final
import exported imported
chat --model imported --max-new-tokens 3
prepare style --output style
finetune --init-from model --data c.jsonl --sequence-length 64 --max-steps 2
finetune --resume auto
finetune --init-from model --data c.jsonl --stream --sequence-length 64 --max-steps 2 \
    --lora-rank 2 --output-dir thin
generate hi --model thin/adapter --base model --max-new-tokens 3
bench --model model --work decode --prompt-tokens 8 --new-tokens 4 --only qwen_analog
"""

# one process for several commands: torch is imported once
ONE_BY_ONE = """
import sys
from qwen_analog.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0, line
"""


def environ(folder):
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1"}


def test_every_command_runs(full, folder):
    from qwen_analog.cli import COMMANDS as known

    lines = COMMANDS.strip().splitlines()
    words = {line.split()[0] for line in lines} - {"--version", "torchrun"}
    assert words | {"serve"} == {*known}  # which does not end
    many = [full / "python", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    (cut,) = (i for i, line in enumerate(lines) if line.startswith("torchrun"))
    options = {"cwd": folder, "env": environ(folder), "input": "hello\n"}
    run(full / "qwen-analog", *lines[0].split(), **options)
    run(full / "python", "-c", ONE_BY_ONE, *lines[1:cut], **options)
    run(*many, "-m", "qwen_analog", *lines[cut].split()[1:], **options)
    run(full / "python", "-c", ONE_BY_ONE, *lines[cut + 1 :], **options)
    where = "import qwen_analog; print(qwen_analog.__file__)"
    assert str(full.parent) in run(full / "python", "-c", where, **options)


def test_the_server_answers(full, folder):
    command = [full / "qwen-analog", "serve", "--model", "model", "--port", "0"]
    server = subprocess.Popen(
        command,
        cwd=folder,
        env=environ(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = server.stdout.readline()
        url = "http" + line.partition("http")[2].split()[0]
        with urllib.request.urlopen(f"{url}/models", timeout=20) as answer:
            assert json.load(answer)["data"][0]["id"]
        for name in ("", "chat.css", "chat.js"):
            with urllib.request.urlopen(url.removesuffix("v1") + name) as answer:
                assert answer.read()
    finally:
        server.terminate()
        server.communicate(timeout=30)


def test_the_core_alone_opens_a_model_and_writes(core, folder):
    line = "generate document --model model --max-new-tokens 3"
    assert "document" in run(
        core / "qwen-analog", *line.split(), cwd=folder, env=environ(folder)
    )
    code = """
import qwen_analog, torch
model, tokenizer = qwen_analog.load("model")
ids = torch.tensor([tokenizer.encode("document")])
again = qwen_analog.QwenForCausalLM.from_pretrained("model")
assert torch.equal(model(ids), again(ids))
new = model.generate(ids, 3, valid_vocab_size=tokenizer.vocab_size)
print(tokenizer.decode(new[0].tolist()))
"""
    run(core / "python", "-c", code, cwd=folder, env=environ(folder))


@pytest.mark.parametrize(
    "line, extra",
    [
        ("train --config settings.json", "train"),
        ("eval --model model --data d.jsonl", "train"),
        ("serve --model model", "serve"),
        ("export elsewhere --model model", "hf"),
    ],
)
def test_the_core_alone_names_the_extra_that_is_missing(line, extra, core, folder):
    done = subprocess.run(
        [core / "qwen-analog", *line.split()],
        cwd=folder,
        env=environ(folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"pip install -e '.[{extra}]'" in done.stderr

"""The commands of the README files and of the guide, run as they are printed, on a
small model and little text.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from forks import exit_code, fork
from test_lm_eval_adapter import CHOICES

from qwen_analog import PRESETS, QwenConfig, QwenForCausalLM
from qwen_analog.cli import main
from qwen_analog.config import parameter_counts
from qwen_analog.checkpoint import save_checkpoint
from qwen_analog.corpora import stdlib_documents
from qwen_analog.hf import save_pretrained
from qwen_analog.bpe import BYTE_ORDER
from qwen_analog.jsonl import write_jsonl
from qwen_analog.tokenizer import TiktokenTokenizer

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.ru.md")
# each with the guide that goes on where it ends
PAGES = {"README.md": "docs/guide.md", "README.ru.md": "docs/guide.ru.md"}

# what makes a command small: a flag that comes last is the one that counts
SMALL_RUN = (
    "--sequence-length 32 --micro-batch-size 1 --gradient-accumulation-steps 1"
    " --max-steps 2 --warmup-steps 0 --no-tensorboard --peak-tflops 1 --sample-tokens 2"
    " --no-compile"
).split()


def commands(readme: str) -> list[str]:
    """The lines of its shell blocks and of its guide's, continued ones joined, without
    comments.
    """
    pages = (readme, PAGES[readme])
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        " ".join(line.split())
        for line in (re.sub(r"(^|\s)#.*", "", line) for line in lines)
        if line.strip()
    ]


def program(command: str) -> str:
    words = shlex.split(command)
    return (
        " ".join(words[:2])
        if words[0] in ("qwen-analog", "make", "python", ".")
        else words[0]
    )


RUN = [
    command
    for command in dict.fromkeys(commands("README.md"))
    if program(command).split()[0] not in ("git", "cd", "make", ".")
]


def test_one_line_first_makes_the_commands_known():
    for readme in READMES:
        found = commands(readme)
        programs = [program(command) for command in found]
        first = next(
            i
            for i, name in enumerate(programs)
            if name.split()[0] not in ("git", "cd", "make")
        )
        assert programs[first] == ". .venv/bin/activate", readme
        assert programs.count(". .venv/bin/activate") == 1


def test_the_russian_readme_has_the_same_commands():
    def words(readme):
        return [shlex.split(command) for command in commands(readme)]

    assert words("README.ru.md") == words("README.md")


def test_the_russian_pages_are_the_equals_of_the_english():
    def shape(page):
        text = (ROOT / page).read_text(encoding="utf-8").replace(".ru.md", ".md")
        blocks = re.findall(r"^```(\w+)", text, re.MULTILINE)
        links = re.findall(r"\]\(([^)]+)\)", text)
        rows = len(re.findall(r"^\|", text, re.MULTILINE))
        return blocks, links, rows, len(re.findall(r"^#+ ", text, re.MULTILINE))

    assert shape("README.ru.md") == shape("README.md")
    assert shape("docs/guide.ru.md") == shape("docs/guide.md")


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/guide.ru.md"])
def test_the_guide_names_every_preset_and_counts_parameters(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    named = set()
    for row in re.findall(
        r"^\| (?:presets?|пресеты?) (.*?) \|.*\| (.*?) \|$", text, re.M
    ):
        names = re.findall(r"`(.*?)`", row[0])
        for i, name in enumerate(names):  # a name that begins with - continues one
            if name.startswith("-"):
                names[i] = names[i - 1].rpartition("-")[0] + name
        named |= set(names)
        if row[1][0].isdigit():
            counts = [int(re.sub(r"\D", "", c)) for c in row[1].split(";")]
            configs = [QwenConfig.from_preset(name) for name in names]
            assert counts == [sum(parameter_counts(c).values()) for c in configs]
    assert named == set(PRESETS) - {"analog-3b"}  # the default, `QwenConfig()`


@pytest.mark.parametrize("readme", READMES)
def test_thirty_lines_learn_a_poem(readme, capsys):
    blocks = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / readme).read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    (code,) = (block for block in blocks if "backward" in block)
    exec(code, {"__name__": "__main__"})
    poem = code.partition('"""')[2].partition('"""')[0]
    assert capsys.readouterr().out.strip() == poem.strip()


def test_the_readme_names_every_chapter_by_its_title():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "chapters").glob("[0-9AB]*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = "".join(cells[0]["source"])
        title = re.search(r"^# (.*)$", first, re.MULTILINE)[1]
        number = path.stem.partition("_")[0].lstrip("0") or "0"
        assert f"[{number} {title}](chapters/{path.name})" in text, path.name


def test_make_knows_its_targets():
    for readme in READMES:
        for command in commands(readme):
            if program(command).startswith("make"):
                subprocess.run(
                    [*shlex.split(command), "-n"],
                    cwd=ROOT,
                    check=True,
                    capture_output=True,
                )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as a reader has it after `make train`, with a small model in place of
    the trained one, and a free port.
    """
    path = tmp_path_factory.mktemp("reader")
    for name in (".venv", "qwen_analog"):
        (path / name).symlink_to(Path(sys.prefix) if name == ".venv" else ROOT / name)
    with open(path / "my.jsonl", "w") as file:
        for document in itertools.islice(stdlib_documents(), 40):
            file.write(json.dumps({"text": document["text"][:2000]}) + "\n")
    question = {"title": "a", "answers": ["b", "c"], "right": 0}
    (path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    pairs = ({"prompt": f"{i}?", "chosen": "7", "rejected": "07"} for i in range(9))
    sums = ({"prompt": f"{i} + 1?", "answer": i + 1} for i in range(9))
    write_jsonl(pairs, path / "pairs.jsonl")
    write_jsonl(sums, path / "sums.jsonl")
    # its paths are relative to the folder in which the command runs
    (path / "task.yaml").write_text(CHOICES)
    tokenizer = TiktokenTokenizer(
        {token: rank for rank, token in enumerate(BYTE_ORDER)}
    )
    tokenizer.save(path)
    torch.manual_seed(0)
    model = QwenForCausalLM(QwenConfig.from_preset("tiny")).eval()
    save_checkpoint(path / "checkpoints" / "final", model, tokenizer)
    save_pretrained(model, tokenizer, path / "a_model")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return path, s.getsockname()[1]


def small(command: str, port: int) -> list[str]:
    """`command` with flags at its end that make its work small, and with what a reader
    fills in.
    """
    command = command.replace("/path/to/Qwen2.5-0.5B", "a_model").replace(
        "FIRST_MACHINE:29400", f"127.0.0.1:{port}"
    )
    command = re.sub(
        r"--nnodes=\d+ ",
        "--nnodes=1 ",
        re.sub(r"--nproc_per_node=\d+", "--nproc_per_node=2", command),
    )
    if " chat " not in command:
        command = command.replace("smollm2", "a_model", 1)
    words = shlex.split(command)
    if words[1] == "finetune":
        return [*words, *SMALL_RUN, "--sequence-length", "256", "--skip-bad-lines"]
    if "qwen_analog.train" in words or "train" in words[:2]:
        words += SMALL_RUN
        if "a_model" not in words and "qwen_analog/train_laptop.json" not in words:
            words += ["--model", "tiny", "--tokenizer", "tiktoken:tokenizer.tiktoken"]
        return words
    small_work = {
        "tokenizer": ["--vocab-size", "300"],
        "plan": ["--model", "tiny", "--sequence-length", "64"],
        "generate": ["--max-new-tokens", "2"],
        "eval": ["--data", "my.jsonl", "--heldout-fraction", "0.2"]
        if "--tasks" not in words
        else [],
        "serve": ["--port", str(port)],
    }
    return words + small_work.get(words[1], [])


def run(command: str, path: Path, port: int) -> tuple[int, str]:
    """Exit code and outputs of `command` in a terminal in which the activation line was
    typed.
    """
    if "runs/3b" in command:  # three ways to begin the same run
        shutil.rmtree(path / "runs" / "3b", ignore_errors=True)
    activation = next(
        line for line in commands("README.md") if program(line).startswith(".")
    )
    words = small(command, port)
    line = f"{activation} && exec {shlex.join(words)}"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PATH", "VIRTUAL_ENV")
    }
    environment |= {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    # one command that ends and one that does not show that the program is found
    if words[0] == "qwen-analog" and words[1] not in ("tokenizer", "serve"):
        process = fork(main, words[1:], path, environment, path / "said")
        return exit_code(process), (path / "said").read_text()
    with open(path / "said", "w+") as said:
        process = subprocess.Popen(
            ["sh", "-c", line],
            cwd=path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        if " serve " in command:
            wait_for_server(port, process)
            process.terminate()
        code = process.wait(120)
        said.seek(0)
        return code, said.read()


@pytest.mark.slow
def test_the_commands_run_as_printed(home):
    # one after the other: a reader trains before generating
    for command in RUN:
        code, text = run(command, *home)
        assert code == 0 and "Traceback" not in text, f"{command}\n{text[-3000:]}"


def wait_for_server(port: int, process: subprocess.Popen) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(
                f"http://127.0.0.1:{port}/v1/models", timeout=5
            ).read()
            return
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)

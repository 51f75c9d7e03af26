"""The committed chapters: executed in order, without errors or machine paths; the
package is what they export, byte for byte.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from book import attempt

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9AB]*.ipynb"))


def test_chapters_open_smollm2_where_their_tensors_are():
    """`load` takes a GPU where there is one; what a chapter makes lies on the CPU."""
    for path in CHAPTERS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                asked = re.findall(r'\bload\("smollm2"(.*)', cell.source)
                assert all('"cpu"' in rest for rest in asked), f"{path.name}: {asked}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_committed_executed_in_order(path):
    code = [
        c
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "code" and c.source.strip()
    ]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert any(c.outputs for c in code)
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert not any(
        "execution" in c.metadata for c in code
    )  # times: `make execute` leaves them out
    streams = [[o.get("name") for o in c.outputs] for c in code]
    assert not any(a == b and a for s in streams for a, b in zip(s, s[1:]))
    assert not any(
        str(o).count(word)
        for c in code
        for o in c.outputs
        for word in ("/home/", "/root/", "/tmp/", "site-packages", "it/s]")
    )
    shown = [o.data for c in code for o in c.outputs if "data" in o]
    # a module that is a cell's last value prints itself, over a screen
    assert not any([*d] == ["text/plain"] and "\n" in d["text/plain"] for d in shown)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_an_exercise_is_open_and_may_be_solved(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    names = {
        n
        for c in cells
        for n in re.findall(r"^(?:async )?def (exercise_\d+)", c.source, re.MULTILINE)
    }
    assert names
    printed = "".join(
        o.text for c in cells for o in c.outputs if o.output_type == "stream"
    )
    for name in names:
        assert (
            f"{name}: not yet." in printed
        )  # the check rejects what is there before it is solved
    assert not re.search(r"not yet\. .*None", printed)  # nor speaks of what `...` is
    # `prove` raises for an answer that is accepted: the reader's own must not be among
    # the wrong ones
    assert not [
        c.source for c in cells if re.search(r"prove\([^)]*exercise_\d", c.source)
    ]


def check_three(answer):
    found = answer(2)
    if found - 3:
        raise ValueError(f"{found} is not 3")


def exercise_open(x): ...


def exercise_wrong(x):
    return x


def exercise_right(x):
    return x + 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (exercise_open, "not yet. Write your answer in place of the three dots."),
        (exercise_wrong, "not yet. ValueError: 2 is not 3"),
        (exercise_right, "correct."),
    ],
)
def test_what_an_attempt_says(answer, said, capsys):
    attempt(check_three, answer)
    assert capsys.readouterr().out == f"{answer.__name__}: {said}\n"


def test_an_attempt_shows_an_assert_without_a_message(capsys):
    """In a notebook, as a reader meets it: pytest rewrites the asserts of its own."""
    shell = InteractiveShell.instance()
    shell.run_cell(
        "from book import attempt\n"
        "def check_1(answer):\n"
        "    assert answer(2) == 2\n"
        "    assert answer(3) == 9\n"
        "attempt(check_1, lambda x: x)"
    )
    assert "not yet. This is false: answer(3) == 9\n" in capsys.readouterr().out
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_cell_has_at_most_forty_lines(path):
    for cell in nbformat.read(path, 4).cells:
        length = len(cell.source.rstrip().splitlines())
        assert cell.cell_type != "code" or length <= 40, cell.source


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_markdown_in_a_hint_is_set_apart(path):
    """A renderer reads what stands right after `<summary>` as HTML, not Markdown."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            for hint in re.findall(r"<details.*?</details>", cell.source, re.DOTALL):
                assert re.search(r"</summary>\n\n.*\n\n</details>$", hint, re.DOTALL), (
                    hint
                )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_plot_has_a_caption(path):
    for cell in nbformat.read(path, 4).cells:
        plots = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        assert bool(plots) == ("caption" in cell.metadata), cell.source


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_figures_exist(path):
    for cell in nbformat.read(path, 4).cells:
        for part in cell.source.split("](../figures/")[1:]:
            name = re.split(r"[)\s]", part)[0]  # a title may follow
            assert (ROOT / "figures" / name).is_file() and (
                ROOT / "figures" / name
            ).with_suffix(".py").is_file(), name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_prose_names_chapters_and_links_them(path):
    for cell in nbformat.read(path, 4).cells:
        assert not re.search(r"\bchapters? \d", cell.source, re.IGNORECASE), cell.source
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", cell.source):
                if "://" not in target:
                    assert (path.parent / target).exists(), target


def start_text():
    notebook = nbformat.read(ROOT / "chapters" / "00_start_here.ipynb", 4)
    return "".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def test_the_map_links_every_other_chapter():
    """Those of the workshop are too many for it: README.md names them all."""
    links = set(re.findall(r"\]\((\w+\.ipynb)\)", start_text()))
    names = {path.name for path in CHAPTERS if path.name[0] != "B"}
    assert names - links == {"00_start_here.ipynb"}


def hours(numbers):
    """Hours to read the main text of these chapters."""
    minutes = 0
    for number in numbers:
        (path,) = (ROOT / "chapters").glob(f"{number:02}_*.ipynb")
        for cell in nbformat.read(path, 4).cells:
            if cell.source.startswith("## Exercises"):
                break  # what follows is not the main text
            if cell.cell_type == "code":
                minutes += len(cell.source.splitlines()) / 10
            else:
                minutes += len(cell.source.split()) / 120
    return minutes / 60


@pytest.mark.parametrize(
    ("path", "numbers"),
    [
        ("to understand", range(1, 17)),
        ("to train", [*range(3, 15), *range(31, 39)]),
        ("to use", [2, 6, 7, *range(15, 31)]),
    ],
)
def test_the_paths_through_the_book_take_so_long(path, numbers):
    row = re.search(rf"\| \*\*{path}\*\*.*\| (\d+) \|", start_text())
    assert int(row[1]) == pytest.approx(hours(numbers), rel=0.2)


def test_export_round_trip(tmp_path):
    shutil.copytree(
        ROOT / "chapters",
        tmp_path / "chapters",
        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
    )
    shutil.copytree(
        ROOT / "qwen_analog",
        tmp_path / "qwen_analog",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    modules = {
        line.split()[-1] + ".py"
        for p in CHAPTERS
        for c in nbformat.read(p, 4).cells
        for line in c.source.splitlines()
        if line.startswith("#| default_exp")
    }
    modules.add("_modidx.py")
    for name in modules:
        (tmp_path / "qwen_analog" / name).unlink()
    bin = Path(sys.executable).parent
    subprocess.run(
        ["make", "-o", ".venv/installed", "export", f"BIN={bin}"],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    for name in modules:
        assert (tmp_path / "qwen_analog" / name).read_bytes() == (
            ROOT / "qwen_analog" / name
        ).read_bytes(), f"run `make export`: {name}"


def test_the_network_is_blocked_for_chapters():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "no_network")},
        capture_output=True,
        text=True,
    )
    assert "the book runs without a network" in run.stderr


MODULES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "qwen_analog").glob("[a-z]*.py"))
}
FLOORS = [
    "config norm rope mask kv_cache mlp bpe loss optim hardware files arguments "
    "archive distributed compiled_blocks",
    "attention tokenizer sampling jsonl shards train_config baselines compiled",
    "hf_tokenizer token_cache data corpora model grammar",
    "tools",
    "generate memory pages parallel monitor quantize streaming weights checkpoint "
    "tokenizer_json chat_template lora float8",
    "inference scoring restore text_stream step search run_directory gguf_file hf "
    "compiled_rows",
    "gguf checkpointer finetune resume lm_eval_adapter scheduler",
    "loading engine preferences",
    "rewards",
    "batches simulation",
    "progress preflight chat evaluate plan protocol bench",
    "train server",
    "serve commands prepare",
    "cli",
]


def test_every_exported_name_has_one_definition():
    defined = Counter(
        node.name
        for module, tree in MODULES.items()
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        # a command may be called what it does
        and module not in ("commands", "prepare")
    )
    twice = {name for name, count in defined.items() if count > 1 and name[0] != "_"}
    assert twice == {"main", "add_arguments", "run"}  # what each command brings along


def imported(module):
    """(module of the package, name) for each import at the top of a file."""
    for node in MODULES[module].body:  # inside an `if` stands a guard
        if not isinstance(node, ast.ImportFrom):
            continue
        inside = (node.module or "").partition("qwen_analog")[2].lstrip(".")
        if node.level or (node.module or "").startswith("qwen_analog"):
            where = node.module if node.level else inside
            for alias in node.names:
                yield (where or alias.name, alias.name)


def test_modules_import_only_from_floors_below():
    floors = [set(names.split()) for names in FLOORS]
    assert set().union(*floors) == set(MODULES)
    for floor, names in enumerate(floors):
        below = set().union(*floors[:floor], {"__version__"})
        for name in names:
            above = {module for module, _ in imported(name)} - below
            assert not above, f"{name} imports {sorted(above)}"


def test_modules_import_only_public_names():
    for module in MODULES:
        private = [name for _, name in imported(module) if name.startswith("_")]
        assert not [name for name in private if name != "__version__"], module

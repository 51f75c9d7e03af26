"""Lay the site's source together: `python docs/assemble.py build/book`.

Sphinx wants one directory. It gets the pages of docs/, the chapters with what a page
can do and a notebook cannot (folds, links to the API, buttons), the figures, and a page
for each module. Nothing is executed.
"""

import ast
import json
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Source"].removeprefix("https://github.com/")
# a part begins with the chapter of this name: numbers may change
PARTS = {
    "start_here": "Start",
    "bpe": "I Text",
    "rmsnorm": "II The parts",
    "config": "III The model",
    "loss": "IV Learning",
    "sampling": "V Using",
    "memory": "VI Scale",
    "A": "Appendices",
    "B": "The workshop",
}
# the pages to play with, and the chapters that lead to them
PLAY = {
    "attention": ("Every head of SmolLM2", ["attention", "gqa"]),
    "rope": ("RoPE's dials", ["rope"]),
    "sampling": ("Cut a distribution", ["sampling", "generation"]),
    "memory": ("What fits on a GPU", ["memory", "plan"]),
    "timeline": ("A run, step by step", ["training_step", "pretraining", "symptoms"]),
}
DIRECTIVE = re.compile(r"^#\| *(\w+)(?: +(\S+))? *$", re.MULTILINE)


@dataclass(frozen=True)
class Chapter:
    """A committed notebook of chapters/."""

    path: Path

    @property
    def prefix(self) -> str:
        return self.path.stem.partition("_")[0]

    @property
    def slug(self) -> str:
        """The file's name without its number."""
        return self.path.stem.partition("_")[2]

    @cached_property
    def notebook(self) -> NotebookNode:
        return nbformat.read(self.path, 4)

    @property
    def title(self) -> str:
        return re.search(r"^# (.+)$", self.notebook.cells[0].source, re.MULTILINE)[1]

    @property
    def module(self) -> str | None:
        """The module that it writes, if it owns one."""
        for cell in code_cells(self.notebook):
            for word, name in DIRECTIVE.findall(cell.source):
                if word == "default_exp":
                    return name
        return None

    @property
    def opens(self) -> str | None:
        """The part that begins with it."""
        return PARTS.get(self.slug) if self.prefix.isdigit() else None


def chapters() -> list[Chapter]:
    paths = sorted((ROOT / "chapters").glob("[0-9AB]*.ipynb"))
    return [Chapter(path) for path in paths]


def parts(book: list[Chapter]) -> dict[str, list[Chapter]]:
    """Return the chapters of each part, in order."""
    found, part = {}, None
    for chapter in book:
        part = PARTS.get(chapter.prefix[0]) or chapter.opens or part
        found.setdefault(part, []).append(chapter)
    missing = set(PARTS.values()) - set(found)
    if missing or None in found:
        raise SystemExit(f"docs/assemble.py: no chapter begins {missing or 'the book'}")
    return found


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- what a chapter exports


def defined(source: str) -> list[str]:
    """Return the public names that a cell defines."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def exports(cell: NotebookNode, module: str | None) -> str | None:
    """Return the module that a cell goes into, or None."""
    for word, name in DIRECTIVE.findall(cell.source):
        if word in ("export", "exporti", "exports"):
            return name or module
    return None


def cell_label(module: str, name: str) -> str:
    """Return the anchor of the cell that defines a name, in the form of HTML's ids."""
    return re.sub(r"[^a-z0-9]+", "-", f"code-{module}-{name}".lower()).strip("-")


def written_in(book: list[Chapter]) -> dict[str, tuple[Chapter, str]]:
    """Return the chapter and the label of the cell for each exported name."""
    places = {}
    for chapter in book:
        for cell in code_cells(chapter.notebook):
            module = exports(cell, chapter.module)
            if module and "exporti" not in cell.source.splitlines()[0]:
                for name in defined(cell.source):
                    label = cell_label(module, name)
                    places[f"qwen_analog.{module}.{name}"] = chapter, label
    return places


# --- a chapter's page


def launch_line(chapter: Chapter) -> str:
    """Return the links under a title, as HTML: Markdown has no class for them."""
    file = quote(f"chapters/{chapter.path.name}")
    colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/colab/{file}"
    lab = quote(f"lab/tree/{file}", safe="")
    binder = f"https://mybinder.org/v2/gh/{REPOSITORY}/main?urlpath={lab}"
    github = f"https://github.com/{REPOSITORY}/blob/main/{file}"
    links = {"Open in Colab": colab, "Open in Binder": binder, "Notebook": github}
    anchors = [f'<a href="{url}">{text}</a>' for text, url in links.items()]
    return f'<p class="launch">{" ".join(anchors)}</p>'


def questions(source: str) -> str:
    """Turn the quote `> **Predict, then run.** ...` into a box."""

    def box(match: re.Match) -> str:
        text = re.sub(r"^> ?", "", match[0], flags=re.MULTILINE)
        text = text.removeprefix("**Predict, then run.**").strip()
        title = "Predict, then run"
        return f":::{{admonition}} {title}\n:class: tip predict\n\n{text}\n:::\n"

    pattern = r"^> \*\*Predict, then run\.\*\*.*(?:\n>.*)*\n?"
    return re.sub(pattern, box, source, flags=re.MULTILINE)


IMAGE = re.compile(
    r'^!\[(?P<alt>[^\]]*)\]\((?P<path>[^)\s]+)(?: "(?P<title>[^"]*)")?\)[ \t]*$',
    re.MULTILINE,
)


def numbered_figures(source: str, first: int) -> str:
    """Number the pictures that stand alone; an image's title is its caption, or the
    first sentence of its alternative text."""
    count = first - 1

    def figure(match: re.Match) -> str:
        nonlocal count
        count += 1
        alt = " ".join(match["alt"].split())
        caption = f"**Figure {count}** {match['title'] or alt.partition('. ')[0]}"
        return f"```{{figure}} {match['path']}\n:alt: {alt}\n\n{caption}\n```\n"

    return IMAGE.sub(figure, source)


def captioned(cell: NotebookNode, number: int) -> None:
    """Make a cell's plot a numbered figure; the cell's metadata hold its caption."""
    caption = cell.metadata["caption"]
    cell.metadata["mystnb"] = {
        "figure": {"caption": f"**Figure {number}** {caption}"},
        "image": {"alt": caption},
    }


def linked_papers(source: str) -> str:
    """Link `arXiv 2104.09864`."""
    return re.sub(
        r"(?<![\[/\w])arXiv[ :](\d{4}\.\d{4,5})",
        r"[arXiv \1](https://arxiv.org/abs/\1)",
        source,
    )


def linked_modules(source: str, modules: set[str]) -> str:
    """Link `qwen_analog.rope` to its page, outside of headings and links."""

    def link(match: re.Match) -> str:
        name = match[1]
        return f"{{py:mod}}`qwen_analog.{name}`" if name in modules else match[0]

    # `[^\[`]`: what stands in a link has one already
    return re.sub(r"(?<![\[`}])`qwen_analog\.(\w+)`(?!`)", link, source)


def linked_names(source: str, names: dict[str, str]) -> str:
    """Link every exported name that stands as code in this text."""

    def link(match: re.Match) -> str:
        full = names.get(match[1])
        return f"{{py:obj}}`{match[1]} <{full}>`" if full else match[0]

    return re.sub(r"(?<![\[`}])`(\w+)`(?!`)", link, source)


def tab(module: str, names: list[str]) -> str:
    """Return the line above an exported cell, with a label for each name."""
    labels = [cell_label(module, name) for name in names]
    links = [f"{{py:obj}}`{n} <qwen_analog.{module}.{n}>`" for n in names]
    file = f"{{py:mod}}`qwen_analog/{module}.py <qwen_analog.{module}>`"
    targets = "\n".join(f"({label})=" for label in labels)
    return f"{targets}\n{{.exported}}\n{' · '.join([file, *links])}"


def printable(text: str) -> str:
    """Leave out control characters that XHTML, and so an EPUB, may not hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]", "", text)


def fold(cell: NotebookNode, tag: str, show: str, hide: str) -> None:
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), tag]
    prompts = {"code_prompt_show": show, "code_prompt_hide": hide}
    cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), **prompts}


def play_box(slug: str) -> str:
    """Return a box that leads to the page on which a chapter's idea can be moved."""
    pages = [(page, title) for page, (title, slugs) in PLAY.items() if slug in slugs]
    return "".join(
        f":::{{admonition}} Play with it\n:class: seealso play\n\n"
        f"[{title}](../play/{page}.md): move it, and see what follows.\n:::\n"
        for page, title in pages
    )


class Page:
    """Turns a chapter's notebook into the site's."""

    def __init__(
        self,
        chapter: Chapter,
        places: dict[str, tuple[Chapter, str]],
        epub: bool = False,
    ):
        self.chapter = chapter
        self.play = "" if epub else play_box(chapter.slug)
        self.modules = {name.split(".")[1] for name in places}
        short = [name.rpartition(".")[2] for name in places]
        self.names = {
            name.rpartition(".")[2]: name
            for name in places
            if short.count(name.rpartition(".")[2]) == 1
        }
        self.places = places
        self.figures = 0

    def notebook(self) -> NotebookNode:
        notebook = nbformat.from_dict(self.chapter.notebook)
        cells, asked, played = [], False, not self.play
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                if not played and cell.source.startswith("## "):
                    cells.append(new_markdown_cell(self.play))
                    played = True
                asked = asked or "> **Predict, then run.**" in cell.source
                cell.source = self.markdown(cell.source, first=not cells)
                cells.append(cell)
            elif cell.cell_type == "code":
                cells += self.code(cell, asked)
                asked = False
        # identifiers must not change from build to build
        for number, cell in enumerate(cells):
            cell["id"] = f"cell-{number}"
            cell.source = printable(cell.source)
            for output in cell.get("outputs", []):
                if "text" in output:
                    output.text = printable(output.text)
                # what a page to play with is made of: myst-nb cannot show it
                output.get("data", {}).pop("application/json", None)
        notebook.cells = cells
        return notebook

    def markdown(self, source: str, first: bool = False) -> str:
        source = questions(source)
        changed = numbered_figures(source, self.figures + 1)
        self.figures += len(IMAGE.findall(source))
        lives = re.search(r"^## Where this code lives$", changed, re.MULTILINE)
        if lives:
            head, rest = changed[: lives.end()], changed[lives.end() :]
            changed = head + linked_names(rest, self.names)
        changed = linked_papers(linked_modules(changed, self.modules))
        if first:
            line = launch_line(self.chapter)
            # a function: a title may hold a backslash
            changed = re.sub(
                r"^# .+$",
                lambda m: f"{m[0]}\n\n{line}\n",
                changed,
                count=1,
                flags=re.MULTILINE,
            )
        return changed

    def code(self, cell: NotebookNode, asked: bool) -> list[NotebookNode]:
        module = exports(cell, self.chapter.module)
        cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
        if not cell.source and not cell.get("outputs"):
            return []
        if "caption" in cell.metadata:
            self.figures += 1
            captioned(cell, self.figures)
        if "solution" in cell.metadata.get("tags", []):
            fold(cell, "hide-cell", "Show the solution", "Hide the solution")
        elif cell.metadata.get("jupyter", {}).get("source_hidden"):
            fold(cell, "hide-cell", "Show the code", "Hide the code")
        elif asked and cell.outputs:
            fold(cell, "hide-output", "Show what it gives", "Hide what it gives")
        if not module:
            return [cell]
        names = [n for n in defined(cell.source) if self.is_written_here(module, n)]
        return [new_markdown_cell(tab(module, names)), cell]

    def is_written_here(self, module: str, name: str) -> bool:
        place = self.places.get(f"qwen_analog.{module}.{name}")
        return place is not None and place[0] == self.chapter


# --- the other pages


def linked_chapters(text: str, book: list[Chapter], up: str = "") -> str:
    """Replace `(chapter:rope)` by the path of that chapter; KeyError for none. A page
    that is read in the repository too names files of the repository."""
    paths = {chapter.slug: chapter.path.name for chapter in book}
    text = text.replace("](../chapters/", f"]({up}chapters/")
    text = text.replace("](../", f"](https://github.com/{REPOSITORY}/blob/main/")
    return re.sub(r"\(chapter:(\w+)\)", lambda m: f"({up}chapters/{paths[m[1]]})", text)


def contents(book: list[Chapter], epub: bool) -> str:
    """Return the tables of contents, one a part, and what follows the chapters."""
    blocks = []
    for caption, members in parts(book).items():
        lines = [f"chapters/{chapter.path.stem}" for chapter in members]
        blocks.append((caption, lines))
    play = ["play/index", *(f"play/{page}" for page in PLAY)]
    before = [caption for caption, _ in blocks].index(PARTS["A"])
    if not epub:
        blocks.insert(before, ("Play with it", play))
    reference = ["guide", "guide.ru", "notation", "glossary", "bibliography"]
    blocks.append(("Reference", [*reference, "api/index"]))
    return "\n".join(
        f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n"
        + "\n".join(lines)
        + "\n```"
        for caption, lines in blocks
    )


def overview(book: list[Chapter]) -> str:
    """Return the list of parts and chapters for the first page."""
    lines = []
    for caption, members in parts(book).items():
        links = [f"[{c.title}](chapters/{c.path.name})" for c in members]
        lines.append(f"{caption}\n: " + " · ".join(links) + "\n")
    return "\n".join(lines)


def summary(module: str) -> str:
    tree = ast.parse((ROOT / "qwen_analog" / f"{module}.py").read_text("utf-8"))
    return (ast.get_docstring(tree) or "").split("\n\n")[0]


def api_page(module: str, places: dict[str, tuple[Chapter, str]]) -> str:
    here = {
        c.path: c for name, (c, _) in places.items() if name.split(".")[1] == module
    }
    links = [f"[{c.title}](../chapters/{c.path.name})" for c in here.values()]
    return (
        f"# {module}\n\n{{.written}}\nWritten in {' and '.join(links)}.\n\n"
        f"```{{eval-rst}}\n.. automodule:: qwen_analog.{module}\n"
        "   :members:\n   :undoc-members:\n   :member-order: bysource\n```\n"
    )


def api_index(book: list[Chapter], modules: list[str]) -> str:
    owner = {chapter.module: chapter for chapter in book if chapter.module}
    rows = "\n".join(
        f"| [`{m}`]({m}.md) | {summary(m)} |"
        f" [{owner[m].title}](../chapters/{owner[m].path.name}) |"
        for m in modules
    )
    listed = "\n".join(modules)
    return (
        "# API\n\nThe package `qwen_analog`, by module, in the order in which the book"
        " writes it. What is described here is generated from the docstrings; each name"
        " links the cell that it comes from.\n\n| module | what it holds | chapter |\n"
        f"|---|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )


def notation() -> str:
    """Return the rows of the table of letters, with the default model's sizes."""
    sys.path.insert(0, str(ROOT))
    from qwen_analog.config import QwenConfig

    config = QwenConfig()
    rows = [
        ("B", "sequences in a batch", "", ""),
        ("T", "queries: the tokens of this pass", "", ""),
        ("S", "keys: all tokens that may be seen, cached ones too", "", ""),
        ("D", "the residual stream's width", "hidden_size", ""),
        ("H", "query heads", "num_attention_heads", ""),
        ("K", "key/value heads", "num_key_value_heads", ""),
        ("h", "the width of a head", "head_dim", ""),
        ("F", "the width inside SwiGLU", "intermediate_size", ""),
        ("V", "tokens in the vocabulary", "vocab_size", ""),
        ("L", "blocks", "num_hidden_layers", ""),
    ]
    return "\n".join(
        f"| **{letter}** | {meaning} | {f'`{field}`' if field else ''} |"
        f" {f'{getattr(config, field):,}' if field else ''} |"
        for letter, meaning, field, _ in rows
    )


def papers() -> list[dict[str, str]]:
    """Return the rows of papers.tsv."""
    lines = (DOCS / "papers.tsv").read_text("utf-8").splitlines()
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]


def cited(book: list[Chapter]) -> dict[str, list[Chapter]]:
    """Return the chapters that name each arXiv paper."""
    found: dict[str, list[Chapter]] = {}
    for chapter in book:
        text = "\n".join(cell.source for cell in chapter.notebook.cells)
        # `papers/1910.07467` is an address of the same paper
        numbers = re.findall(r"(?:arXiv[ :]|arxiv\.org/\w+/)(\d{4}\.\d{4,5})", text)
        for number in dict.fromkeys(numbers):
            found.setdefault(number, []).append(chapter)
    return found


def bibliography(book: list[Chapter]) -> str:
    known, where = {row["arxiv"]: row for row in papers()}, cited(book)
    nobody = {"authors": "", "year": "", "title": "arXiv"}
    entries = []
    for number, named in where.items():
        row = known.get(number, nobody)
        links = ", ".join(f"[{c.title}](chapters/{c.path.name})" for c in named)
        authors = f"{row['authors']} {row['year']}. " if row["authors"] else ""
        entry = (
            f"{authors}*{row['title']}*."
            f" [arXiv {number}](https://arxiv.org/abs/{number}). In {links}."
        )
        entries.append((row["authors"] or "~", row["year"], entry))
    return "\n".join(f"- {entry}" for *_, entry in sorted(entries))


def embedded(text: str) -> str:
    """Put the data of a page to play with into the page: it works as a file too."""

    def script(match: re.Match) -> str:
        data = (DOCS / "play" / match[1]).read_text("utf-8").strip()
        return f'<script type="application/json" class="play-data">{data}</script>'

    return re.sub(r"<!-- data: (\S+) -->", script, text)


# --- writing


def write(path: Path, text: str) -> Path:
    """Write a file if it differs: Sphinx reads again what is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text("utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def assemble(target: Path, epub: bool = False) -> None:
    """Write the source of the site, or of the EPUB, where no script runs."""
    book = chapters()
    places = written_in(book)
    modules = [chapter.module for chapter in book if chapter.module]
    made = set()
    replaced = {
        "<!-- contents -->": contents(book, epub),
        "<!-- overview -->": overview(book),
        "<!-- letters -->": notation(),
        "<!-- papers -->": bibliography(book),
        "<!-- play -->": "\n".join(
            f"- [{t}](play/{p}.md)" for p, (t, _) in PLAY.items()
        ),
    }
    for page in sorted(DOCS.rglob("*.md")):
        name = page.relative_to(DOCS)
        if epub and name.parts[0] == "play":
            continue
        text = linked_chapters(
            page.read_text("utf-8"), book, "../" * len(name.parts[1:])
        )
        if epub:
            text = re.sub(r"<!-- site -->.*?<!-- end -->", "", text, flags=re.DOTALL)
        for mark, value in replaced.items():
            text = text.replace(mark, value)
        if name.parts[0] == "play":
            text = text.replace("](play/", "](")
        made.add(write(target / name, embedded(text)))
    for chapter in book:
        notebook = nbformat.writes(Page(chapter, places, epub).notebook())
        made.add(write(target / "chapters" / chapter.path.name, notebook))
    for module in modules:
        made.add(write(target / "api" / f"{module}.md", api_page(module, places)))
    made.add(write(target / "api" / "index.md", api_index(book, modules)))
    labels = {name: [c.title, label] for name, (c, label) in places.items()}
    made.add(write(target / "labels.json", json.dumps(labels, indent=1)))
    for figure in sorted((ROOT / "figures").glob("*.svg")):
        made.add(write(target / "figures" / figure.name, figure.read_text("utf-8")))
    for photo in (ROOT / "figures").glob("*.png"):
        made.add(Path(shutil.copy(photo, target / "figures")))
    for old in set(path for path in target.rglob("*") if path.is_file()) - made:
        old.unlink()


def for_colab(target: Path) -> None:
    """Write the chapters with a first cell that fetches the book and what it needs."""
    setup = (DOCS / "colab_setup.txt").read_text("utf-8").strip()
    setup = setup.replace("REPOSITORY", REPOSITORY)
    shutil.rmtree(target, ignore_errors=True)
    for chapter in chapters():
        notebook = nbformat.from_dict(chapter.notebook)
        cell = nbformat.v4.new_code_cell(setup, id="setup")
        notebook.cells.insert(0, cell)
        write(target / "chapters" / chapter.path.name, nbformat.writes(notebook))


if __name__ == "__main__":
    goal = Path(sys.argv[1]).resolve()
    if "--colab" in sys.argv:
        for_colab(goal)
    else:
        assemble(goal, epub="--epub" in sys.argv)

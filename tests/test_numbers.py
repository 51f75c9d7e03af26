"""Every number in a chapter's prose stands in a cell near it.

A number is bound where a code cell of its section, or of a section next to it, carries
it: in its source or in what it printed, rounded as the prose rounds it. In the text
before the first section a cell anywhere will do. Years and the numbers of papers are
left out; other numbers that no cell can carry are listed, with a reason, in
`tests/data/free_numbers.txt`: `name of the chapter | number | why`.
"""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9AB]*.ipynb"))
LIST = ROOT / "tests" / "data" / "free_numbers.txt"

NUMBER = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)"
)
# what prose may call a carried number by: thousands, a percentage, bytes
SCALES = [1, 1e3, 1e6, 1e9, 1e12, 1e-2, 1e-3, 1e-6, 1e-9, 2**10, 2**20, 2**30]


def prose(source):
    """Markdown without addresses, alternative texts, formulas, code and headings."""
    for pattern in (
        r"```.*?```",
        r"!\[[^\]]*\]",
        r"\]\([^)]*\)",
        r"<[^>]+>",
        r"\$\$.*?\$\$",
        r"\$[^$\n]*\$",
        r"`[^`]*`",
        r"(?m)^#[^\n]*$",
        r"\b\d{4}\.\d{4,5}\b|\b10\.\d{4}/\S+",  # arXiv, doi
        r"\b(19[5-9]\d|20[0-2]\d)\b",  # a year: thousands are written 1,950
        r"(?m)^\s*\d+\. ",
        r"(?i)\b(exercise|solution|step|figure|part)s? \d+( to \d+| and \d+)?",
        r"\b(SHA-|PyTorch |version |section )[\d.]+\b",
    ):
        source = re.sub(pattern, " ", source, flags=re.DOTALL)
    return source


def value(text):
    return float(text.replace(",", ""))


def printed(cell):
    """What a cell shows: its text, not its pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield str(output.get("data", {}).get("text/plain", ""))


def carried(cells):
    """The numbers in the source and in the outputs of code cells."""
    texts = [
        text
        for cell in cells
        if cell.cell_type == "code"
        for text in [cell.source.replace("_", ""), *printed(cell)]
    ]
    # in `bf16` and `v2` no number is meant; in `12x` and `3.5GB` one is
    found = re.findall(
        r"(?<![A-Za-z\d.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?",
        "\n".join(texts),
    )
    return {value(text) for text in found}


def is_carried(text, values):
    digits = len(text.partition(".")[2].partition("e")[0])
    wanted = value(text)
    step = 10.0**-digits if "e" not in text else 10.0**-digits * wanted
    # 1,200 may stand for 1,234: zeros at the end of a long number are rounding
    whole = text.replace(",", "")
    if "." not in whole and len(whole) > 2:
        step = 10.0 ** (len(whole) - max(2, len(whole.rstrip("0"))))
    for scale in SCALES:
        if any(abs(v - wanted * scale) <= 0.5001 * step * scale for v in values):
            return True
    return False


def sections(cells):
    """The cells before the first heading of rank two, then section by section."""
    parts = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and re.match(r"## ", cell.source):
            parts.append([])
        parts[-1].append(cell)
    return parts


def unbound(cells):
    """(number, the words around it) for each number that no cell carries."""
    parts = sections(cells)
    for i, part in enumerate(parts):
        near = cells if i == 0 else sum(parts[i - 1 : i + 2], [])
        values = carried(near)
        for cell in part:
            if cell.cell_type == "markdown":
                text = prose(cell.source)
                for found in NUMBER.finditer(text):
                    if not is_carried(found[0], values):
                        around = text[max(0, found.start() - 30) : found.end() + 20]
                        yield found[0], " ".join(around.split())


def listed(chapter):
    rows = [
        [part.strip() for part in line.split("|")]
        for line in LIST.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    assert all(len(row) == 3 and row[2] for row in rows)
    return {number for name, number, _ in rows if name == chapter.partition("_")[2]}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_number_is_bound_to_a_cell(path):
    free = listed(path.stem)
    found = list(unbound(nbformat.read(path, 4).cells))
    assert not [(n, words) for n, words in found if n not in free]
    assert free == {n for n, _ in found}, "a number on the list is bound, or gone"


def notebook(text, printed_text, source="print(x)"):
    code = nbformat.v4.new_code_cell(source)
    code.outputs = [nbformat.v4.new_output("stream", text=printed_text)]
    return [nbformat.v4.new_markdown_cell(text), code]


@pytest.mark.parametrize(
    ("text", "printed_text"),
    [
        ("It takes 2.05 bits.", "2.0513"),
        ("About 3.2 billion weights.", "3,199,240,192"),
        ("22% of it.", "0.2193"),
        ("1,200 tokens a second.", "1234.5 tokens/s"),
        ("`uint8` and $2^{64}$ are names.", ""),
    ],
)
def test_a_number_that_a_cell_prints_is_bound(text, printed_text):
    assert not list(unbound(notebook(text, printed_text)))


@pytest.mark.parametrize(
    ("text", "printed_text"),
    [
        ("It takes 2.05 bits.", "2.0613"),
        ("About 3.2 billion weights.", "3,099,240,192"),
        ("22% of it.", "0.2793"),
        ("It needs 47 steps.", "48 steps"),
    ],
)
def test_a_number_that_parted_from_its_cell_is_noticed(text, printed_text):
    assert list(unbound(notebook(text, printed_text)))


def test_a_number_of_a_far_section_is_noticed():
    far = notebook("## One\n\nIt is 31.", "") + notebook("## Two", "")
    assert list(unbound(far + notebook("## Three", "31")))

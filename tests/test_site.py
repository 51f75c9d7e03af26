"""The site: built once, then every page opened in headless Chromium."""

import functools
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import assemble
from browser_helpers import LOOK, PHONE, Visitor


# --- what can be wrong with files


class Links(HTMLParser):
    """The ids of a page, where it leads, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.leads, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.leads.append(found["href"])
        # `canonical`, `next`, `author` and so on lead, they load nothing
        loaded = ("stylesheet", "icon", "preload", "shortcut icon", "modulepreload")
        if tag == "link" and found.get("rel") in loaded:
            self.loads.append(found["href"])
        if tag not in ("a", "link"):
            names = ("src", "data", "poster", "srcset")
            self.loads += [found[name] for name in names if found.get(name)]


def file_faults(site: Path) -> list[str]:
    """Return what is wrong with links and resources, without a browser."""
    pages = {path: Links(path) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for link in page.loads:
            if re.match(r"(https?:)?//", link):
                faults.append(f"{name} loads {link}")
        for link in page.leads + [x for x in page.loads if not x.startswith("data:")]:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            where, anchor = urldefrag(link)
            target = path
            if where:
                target = (path.parent / unquote(urlsplit(where).path)).resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                faults.append(f"{name}: {link} is not there")
            elif (
                anchor and target in pages and unquote(anchor) not in pages[target].ids
            ):
                faults.append(f"{name}: {link} has no such anchor")
    for path in sorted(site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"(?:url\(|@import )\s*[\"']?([^\"')]+)", text):
            if re.match(r"(https?:)?//", link):
                faults.append(f"{path.relative_to(site)} loads {link}")
    return faults


# --- fixtures


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def serve():
    """Return a function that serves a directory and gives its address."""
    servers = []

    def start(directory: Path) -> str:
        handler = functools.partial(Quiet, directory=directory)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id) -> Path:
    """The site, as `make book` builds it; processes of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    build = base / "site-build"
    with FileLock(base / "site.lock"):
        if not (build / "site" / "index.html").is_file():
            # --assume-old: the test must not install anything
            command = ["make", "book", "-o", ".venv/installed", f"BUILD={build}"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            run = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert run.returncode == 0, run.stdout + run.stderr
    return build / "site"


@pytest.fixture
def visitor(browser, site, serve):
    visitor = Visitor(browser, serve(site))
    yield visitor
    visitor.page.close()


# --- the site


@pytest.mark.slow
def test_links_and_resources(site):
    assert not file_faults(site)


@pytest.mark.slow
def test_every_chapter_and_module_has_a_page(site):
    book = assemble.chapters()
    for chapter in book:
        html = (site / "chapters" / f"{chapter.path.stem}.html").read_text("utf-8")
        assert "Open in Colab" in html and "Open in Binder" in html
        if chapter.module:
            assert f'href="../api/{chapter.module}.html' in html, chapter.path.name
    for name, (chapter, label) in assemble.written_in(book).items():
        module = name.split(".")[1]
        page = (site / "chapters" / f"{chapter.path.stem}.html").read_text("utf-8")
        assert f'id="{label}"' in page, name
        api = (site / "api" / f"{module}.html").read_text("utf-8")
        if f'id="{name}"' in api:
            assert f"{chapter.path.stem}.html#{label}" in api, name


SHARES = 4


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_page_in_a_browser(visitor, site, share):
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    faults = [fault for name in names[share::SHARES] for fault in visitor.faults(name)]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_page_that_is_opened_on_a_phone(visitor):
    for name in ("index.html", "play/attention.html", "play/memory.html"):
        visitor.open(name, PHONE)
        assert not visitor.noted + visitor.page.evaluate(LOOK)


@pytest.mark.slow
def test_search_finds(visitor):
    found = visitor.finds("softmax")
    assert any("Attention" in title for title in found), found


def page_with(site: Path, text: str) -> str:
    pages = sorted((site / "chapters").glob("*.html"))
    path = next(p for p in pages if text in p.read_text("utf-8"))
    return path.relative_to(site).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mark", "selector"),
    [
        ("Show the solution", "div.cell.tag_solution details"),
        ("Show the code", "div.cell.tag_hide-cell:not(.tag_solution) details"),
        ('class="second-reading"', "details.second-reading"),
    ],
)
def test_what_is_folded_opens(visitor, site, mark, selector):
    visitor.open(page_with(site, mark))
    assert visitor.unfolds(selector)


@pytest.mark.slow
def test_a_link_into_a_fold_opens_it(visitor, site):
    name = page_with(site, 'class="second-reading"')
    html = (site / name).read_text("utf-8").partition('class="second-reading"')[2]
    anchor = re.search(r'id="([^"]+)"', html)[1]
    visitor.open(f"{name}#{anchor}")
    assert (
        visitor.page.locator("details.second-reading").first.get_attribute("open")
        is not None
    )


@pytest.mark.slow
def test_dark_pages_keep_figures_on_white(browser, site, serve):
    page = browser.new_page(color_scheme="dark")
    page.goto(urljoin(serve(site), page_with(site, "<figure")))
    color = "e => getComputedStyle(e).backgroundColor"
    assert page.locator("main img").first.evaluate(color) == "rgb(255, 255, 255)"
    assert page.locator("body").evaluate(color) != "rgb(255, 255, 255)"
    page.close()


# --- the checks can fail

GOOD = """<!doctype html><meta charset="utf-8"><title>t</title><link rel="icon"
href="data:,"><main><p id="here">text</p>%s</main>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
BROKEN = {
    "console:": '<script>console.error("no")</script>',
    "error: no": '<script>throw new Error("no")</script>',
    "404": '<script src="missing.js"></script>',
    "another host": '<img src="http://127.0.0.2:9/x.png" width="9" height="9">',
    "too wide": '<div style="width: 3000px">x</div>',
    "phone: the page is": '<div style="width: 500px">x</div>',
    "is not visible": '<img src="data:image/png;base64,AAAA" width="9" height="9">',
    "is not drawn": '<span class="math">\\(x\\)</span>',
    "is wrong": '<span class="math"><mjx-container style="display: block">'
    "<mjx-merror>x</mjx-merror></mjx-container></span>",
}


@pytest.mark.slow
def test_a_good_page_has_no_faults(browser, serve, tmp_path):
    image = f'<img src="{PIXEL}"><a href="#here">up</a>'
    (tmp_path / "index.html").write_text(GOOD % image)
    assert not file_faults(tmp_path)
    assert not Visitor(browser, serve(tmp_path)).faults("index.html")


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_page_is_noticed(browser, serve, tmp_path, fault):
    (tmp_path / "index.html").write_text(GOOD % BROKEN[fault])
    faults = Visitor(browser, serve(tmp_path)).faults("index.html")
    assert any(fault in found for found in faults), faults


@pytest.mark.slow
def test_a_fold_that_does_not_open_is_noticed(browser, serve, tmp_path):
    fold = "<details><summary>s</summary><p>inside</p></details>"
    stuck = fold.replace("<details>", '<details ontoggle="this.open = false">')
    for name, html, opens in (("good", fold, True), ("stuck", stuck, False)):
        (tmp_path / f"{name}.html").write_text(GOOD % html)
        visitor = Visitor(browser, serve(tmp_path))
        visitor.open(f"{name}.html")
        assert visitor.unfolds("details") == opens


@pytest.mark.slow
def test_a_search_without_results_is_noticed(visitor):
    assert visitor.finds("zzyzxqq") == []


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="missing.html">x</a>', "missing.html is not there"),
        ('<a href="#missing">x</a>', "no such anchor"),
        ('<a href="other.html#missing">x</a>', "no such anchor"),
        ('<img src="missing.png">', "missing.png is not there"),
        ('<script src="https://example.org/x.js"></script>', "loads https://"),
        ('<img src="//example.org/x.png">', "loads //example.org"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "loads https://"),
    ],
)
def test_a_broken_link_is_noticed(tmp_path, html, fault):
    (tmp_path / "index.html").write_text(GOOD % html)
    (tmp_path / "other.html").write_text(GOOD % "")
    assert [found for found in file_faults(tmp_path) if fault in found]


def test_a_remote_font_is_noticed(tmp_path):
    (tmp_path / "x.css").write_text("@font-face { src: url('https://example.org/f') }")
    assert file_faults(tmp_path) == ["x.css loads https://example.org/f"]


# --- how the source is laid together


def test_every_cited_paper_is_in_the_list():
    """docs/papers.tsv: number, authors, year, title, with tabs between."""
    known = {row["arxiv"] for row in assemble.papers()}
    missing = set(assemble.cited(assemble.chapters())) - known
    assert not missing, f"add to docs/papers.tsv: {sorted(missing)}"


def test_every_chapter_is_in_a_part():
    book = assemble.chapters()
    parts = assemble.parts(book)
    assert [c for members in parts.values() for c in members] == book
    with pytest.raises(SystemExit, match="no chapter begins"):
        assemble.parts([c for c in book if c.slug != "rmsnorm"])
    with pytest.raises(KeyError):
        assemble.linked_chapters("[x](chapter:nothing)", book)


def test_a_question_becomes_a_box_and_hides_its_answer():
    question = "> **Predict, then run.** What is\n> 1 + 1?\n\nText."
    boxed = assemble.questions(question)
    assert boxed.startswith(":::{admonition} Predict, then run\n:class: tip predict")
    assert "What is\n1 + 1?\n:::\n" in boxed and boxed.endswith("Text.")
    cell = nbformat.v4.new_code_cell("1 + 1")
    cell.outputs = [nbformat.v4.new_output("stream", text="2")]
    page = assemble.Page(assemble.chapters()[1], {})
    (shown,) = page.code(cell, asked=True)
    assert shown.metadata["tags"] == ["hide-output"]


def test_a_picture_alone_is_a_numbered_figure():
    source = 'Text.\n\n![Two arrows](../figures/rope.svg "One pair")\n\nMore.'
    figure = assemble.numbered_figures(source, 2)
    assert "```{figure} ../figures/rope.svg\n:alt: Two arrows" in figure
    assert "**Figure 2** One pair" in figure
    bare = assemble.numbered_figures("![Two arrows. One is long.](a.svg)", 4)
    assert bare.endswith("\n\n**Figure 4** Two arrows\n```\n")


def test_a_plot_with_a_caption_is_a_numbered_figure():
    cell = nbformat.v4.new_code_cell("plt.show()", metadata={"caption": "A loss"})
    cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": ""})]
    page = assemble.Page(assemble.chapters()[1], {})
    page.figures = 2
    (shown,) = page.code(cell, asked=True)
    assert shown.metadata["mystnb"]["figure"]["caption"] == "**Figure 3** A loss"
    assert shown.metadata["mystnb"]["image"]["alt"] == "A loss"
    assert "code_prompt_show" in shown.metadata["mystnb"]
    assert page.figures == 3


def test_names_and_papers_become_links():
    names = {"apply_rotary": "qwen_analog.rope.apply_rotary"}
    linked = assemble.linked_names("`apply_rotary` and `other`", names)
    assert linked == (
        "{py:obj}`apply_rotary <qwen_analog.rope.apply_rotary>` and `other`"
    )
    linked = assemble.linked_modules(
        "`qwen_analog.rope`, [`qwen_analog.rope`](x)", {"rope"}
    )
    assert linked == "{py:mod}`qwen_analog.rope`, [`qwen_analog.rope`](x)"
    assert "](https://arxiv.org/abs/2104.09864)" in assemble.linked_papers(
        "(arXiv 2104.09864)"
    )


def test_colab_gets_the_chapters_with_what_they_need(tmp_path):
    assemble.for_colab(tmp_path)
    for chapter in assemble.chapters():
        made = nbformat.read(tmp_path / "chapters" / chapter.path.name, 4)
        nbformat.validate(made)
        assert f"github.com/{assemble.REPOSITORY}" in made.cells[0].source
        assert [c.source for c in made.cells[1:]] == [
            c.source for c in chapter.notebook.cells
        ]


# --- the pages to play with compute what the package computes


@pytest.fixture
def compute(browser) -> Callable:
    """Return a function that evaluates JavaScript beside play.js."""
    page = browser.new_page()
    page.add_script_tag(path=ROOT / "docs" / "_static" / "play.js")
    yield page.evaluate
    page.close()


@pytest.mark.slow
def test_the_planner_is_estimate_memory(compute):
    from qwen_analog.config import QwenConfig
    from qwen_analog.memory import estimate_memory

    known = json.loads((ROOT / "docs" / "play" / "memory.json").read_text())
    rng = random.Random(0)
    cases = []
    for _ in range(1000):
        strategy = rng.choice(known["strategy"])
        settings = {
            "precision": rng.choice(known["precision"]),
            "optimizer": rng.choice(known["optimizer"]),
            "activation_checkpointing": rng.choice(known["activation_checkpointing"]),
            "batch_size": rng.choice([1, 2, 5]),
            "sequence_length": rng.choice([7, 128, 4096]),
            "micro_batches": rng.choice([1, 4]),
            "strategy": strategy,
            "shards": 1 if strategy == "ddp" else rng.choice([1, 3, 8]),
            "replicas": rng.choice([1, 2]),
            "document_masks": rng.choice([True, False]),
        }
        cases.append((rng.choice(sorted(known["presets"])), settings))
    sizes = {key: known[key] for key in ("chunk_size", "piece_size")}
    found = compute(
        "cases => cases.map(([c, s]) => play.estimateMemory(c, s))",
        [[known["presets"][name], settings | sizes] for name, settings in cases],
    )
    for (name, settings), ours in zip(cases, found):
        estimate = estimate_memory(QwenConfig.from_preset(name), **settings)
        assert ours["total"] == estimate.total, (name, settings)
        assert ours["moment"] == estimate.moment
        for category, size in estimate.categories().items():
            assert ours.get(category, 0) == size, (category, name, settings)


@pytest.mark.slow
def test_the_cut_is_the_packages_distribution(compute):
    from qwen_analog.sampling import SamplingParams, distribution

    rng = random.Random(0)
    for _ in range(200):
        logits = [rng.gauss(0, 2) for _ in range(9)]
        temperature = rng.choice([0, 0.3, 1.0, 2.0])
        k = rng.choice([None, 1, 3, 9])
        p, m = rng.choice([None, 0.3, 0.9]), rng.choice([None, 0.05, 0.5])
        found = compute(
            "([logits, params]) => play.cut(logits, params)",
            [logits, {"temperature": temperature, "topK": k, "topP": p, "minP": m}],
        )
        params = SamplingParams(temperature, top_k=k, top_p=p, min_p=m)
        row = torch.tensor([logits], dtype=torch.float64)
        wanted = distribution(row, params)[0]
        assert torch.allclose(torch.tensor(found).double(), wanted, atol=1e-12)


@pytest.mark.slow
def test_the_dials_are_rotary_embedding(compute):
    from qwen_analog.rope import RotaryEmbedding, apply_rotary

    rope = RotaryEmbedding(16, 1e4)
    found = compute("() => play.frequencies(16, 1e4)")
    wanted = rope.inverse_frequencies()
    assert torch.allclose(torch.tensor(found).float(), wanted)
    cos, sin = rope(torch.tensor([[12, 9]]))
    query, key = apply_rotary(torch.ones(1, 1, 2, 16), cos, sin)[0, 0]
    shares = compute("w => play.agreement(w, 3)", found)
    assert abs(2 * sum(shares) - (query @ key).item()) < 1e-4


@pytest.mark.slow
def test_the_heads_are_smollm2s(compute):
    import importlib.util

    from qwen_analog import load

    path = ROOT / "docs" / "play" / "attention.py"
    spec = importlib.util.spec_from_file_location("play_attention", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = json.loads(path.with_suffix(".json").read_text("utf-8"))
    model, tokenizer = load("smollm2", "cpu")
    for text, stored in zip(script.SENTENCES, data["sentences"], strict=True):
        ids = tokenizer.encode(text)
        weights = script.attention_weights(model, ids)
        assert [tokenizer.decode([i]) for i in ids] == stored["tokens"]
        found = compute(
            """([text, T]) => {
              const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
              return [[0, 0], [18, 6], [29, 8]].map(
                ([l, h]) => play.head(bytes, T, 9, l, h));
            }""",
            [stored["weights"], len(ids)],
        )
        wanted = torch.stack([weights[0, 0], weights[18, 6], weights[29, 8]])
        assert (torch.tensor(found) - wanted).abs().max() < 0.5 / 255 + 1e-3


@pytest.mark.slow
def test_the_timeline_is_the_chapters_run(compute):
    from qwen_analog.optim import learning_rate_at

    stored = json.loads((ROOT / "docs" / "play" / "timeline.json").read_text("utf-8"))
    (path,) = (ROOT / "chapters").glob("*_pretraining.ipynb")
    displayed = [
        output.data["application/json"]
        for cell in nbformat.read(path, 4).cells
        for output in cell.get("outputs", [])
        if "application/json" in output.get("data", {})
    ]
    assert displayed == [stored], "run docs/play/timeline.py"
    steps = len(stored["loss"])
    moments = compute(
        "run => run.loss.concat(0).map((_, step) => play.moment(run, step))", stored
    )
    assert moments[0]["loss"] is None and moments[0]["text"] == stored["samples"]["0"]
    for step, moment in enumerate(moments[1:], 1):
        rate = learning_rate_at(
            step - 1, learning_rate=1e-2, max_steps=steps, warmup_steps=5
        )
        assert moment["rate"] == pytest.approx(rate, abs=1e-6)
        assert moment["loss"] == stored["loss"][step - 1]
        assert moment["text"] == stored["samples"][str(step // 20 * 20)]


@pytest.mark.slow
def test_the_pages_move_by_keyboard(visitor):
    visitor.open("play/attention.html")
    page = visitor.page
    said = page.locator(".play-said")
    before = said.inner_text()
    page.locator(".play-words button.query").focus()
    page.keyboard.press("ArrowLeft")
    assert said.inner_text() != before
    visitor.open("play/sampling.html")
    cut = page.locator(".play-bars .cut")
    assert cut.count() == 0
    page.get_by_label("Top-k").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert cut.count() == 4
    visitor.open("play/memory.html")
    said = page.locator(".play-said")
    before = said.inner_text()
    page.get_by_label("Precision").select_option("bf16-pure")
    assert said.inner_text() != before
    visitor.open("play/timeline.html")
    written = page.locator(".play-written")
    before = written.inner_text()
    page.get_by_label("Step", exact=True).focus()
    page.keyboard.press("End")
    assert written.inner_text() != before
    page.get_by_role("button", name="Checkpoint before").click()
    assert "Step 140" in page.locator(".play-said").inner_text()
    visitor.open("play/rope.html")
    said = page.locator(".play-said")
    before = said.inner_text()
    page.get_by_role("button", name="1 on", exact=True).click()
    assert said.inner_text() == before  # what the page says: only the distance counts
    page.get_by_label("Key's position").press("ArrowLeft")
    assert said.inner_text() != before
    assert not visitor.noted

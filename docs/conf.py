"""The site's settings; `assemble.py` lays its source together."""

import json
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.fileutil import copy_asset

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import mathml
from assemble import PROJECT, REPOSITORY

project = "qwen_analog"
author = PROJECT["authors"][0]["name"]
project_copyright = f"{author}, Apache-2.0"
html_title = "qwen_analog: a book that runs"
language = "en"
package = (DOCS.parent / "qwen_analog" / "__init__.py").read_text("utf-8")
version = release = re.search(r'__version__ = "(.+)"', package)[1]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
# committed outputs are what the reader sees: a build computes nothing
nb_execution_mode = "off"
nb_code_prompt_show = "Show"
nb_code_prompt_hide = "Hide"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_enable_extensions += ["attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["epub.unknown_project_files", "epub.duplicated_toc_entry"]
show_warning_types = True

smartquotes_action = "q"
add_module_names = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"
default_role = "code"

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": f"https://github.com/{REPOSITORY}",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
    "max_navbar_depth": 1,
    "collapse_navbar": True,
    "show_toc_level": 1,
    "toc_title": "On this page",
    "search_bar_text": "Search the book",
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
}
copybutton_selector = "div.highlight-ipython3 pre, div.highlight-python pre"
copybutton_selector += ", div.cell_input pre, div.highlight-sh pre"

# MathJax comes from a Python package; the menu would fetch parts that are not copied
MATHJAX = "sphinx-mathjax-offline/static/mathjax"
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}

# Sphinx puts `tags` there
html_math_renderer = "mathml" if tags.has("epub") else "mathjax"  # noqa: F821
epub_title = html_title
epub_show_urls = "no"
epub_exclude_files = ["search.html", "labels.json"]
epub_tocscope = "includehidden"
epub_cover = ()


class FoldSecondReadings(SphinxTransform):
    """Everything under a heading "Second reading" goes into `<details>`."""

    default_priority = 400

    def apply(self) -> None:
        for section in list(self.document.findall(nodes.section)):
            title = section[0].astext()
            if title.startswith("Second reading"):
                inner = [s[0].astext() for s in section.findall(nodes.section)][1:]
                what = ": " + " · ".join(inner) if inner else ""
                label = f"Open what may be skipped{what}".replace("<", "&lt;")
                opening = f'<details class="second-reading"><summary>{label}</summary>'
                section.insert(1, nodes.raw("", opening, format="html"))
                section.append(nodes.raw("", "</details>", format="html"))


class NumberEquations(SphinxTransform):
    """Give every displayed equation of a chapter a number."""

    default_priority = 400

    def apply(self) -> None:
        docname = self.env.docname
        if not docname.startswith("chapters/"):
            return
        domain = self.env.domains["math"]
        found = list(self.document.findall(nodes.math_block))
        for count, node in enumerate(found, 1):
            if node.get("label") or node.get("number"):
                continue
            label = f"{docname}-{count}".replace("/", "-").replace("_", "-")
            node["docname"], node["label"] = docname, label
            domain.note_equation(docname, label, location=node)
            node["number"] = domain.get_equation_number_for(label)
            target = nodes.target("", "", ids=[nodes.make_id(f"equation-{label}")])
            node.parent.insert(node.parent.index(node), target)
            self.document.note_explicit_target(target)


def restructured(text: str) -> str:
    """A docstring as reStructuredText: `x` is code, and nothing else is markup."""
    pieces = re.split(r"(`[^`\n]*`)", text)
    for i, piece in enumerate(pieces):
        if i % 2:
            pieces[i] = f"``{piece[1:-1].strip()}``" if piece.strip("` ") else ""
        else:
            pieces[i] = re.sub(r"([\\*|`_])", r"\\\1", piece)
    return "".join(pieces)


def write_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape a docstring and name the chapter that it was written in."""
    text = "\n".join(line.strip() for line in lines)
    lines[:] = restructured(text).splitlines()
    place = app.env.config.written_in.get(name)
    if place and what in ("class", "function", "exception", "data"):
        title, label = place
        title = title.replace("`", "")
        lines += ["", f":ref:`Written in {title} <{label}>`", ""]


def finish_static(app: Sphinx, error: Exception | None) -> None:
    """Copy what the pages load of MathJax, and remove what no page loads."""
    if error or app.builder.format != "html" or app.builder.name == "epub":
        return
    # the theme copies its templates beside its styles
    for template in (Path(app.outdir) / "_static").glob("*.html"):
        template.unlink()
    found = [Path(p) / MATHJAX for p in sys.path if (Path(p) / MATHJAX).is_dir()]
    if not found:
        raise RuntimeError("pip install sphinx-mathjax-offline: MathJax is missing")
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2"):
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        goes = target / part if (found[0] / part).is_dir() else (target / part).parent
        copy_asset(found[0] / part, goes)


def setup(app: Sphinx) -> None:
    labels = json.loads((Path(app.srcdir) / "labels.json").read_text("utf-8"))
    app.add_config_value("written_in", labels, "env")
    app.add_transform(FoldSecondReadings)
    app.add_transform(NumberEquations)
    app.connect("autodoc-process-docstring", write_docstring)
    app.connect("build-finished", finish_static)
    mathml.setup(app)

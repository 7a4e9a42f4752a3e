# Everything a fresh machine needs: `make chat` talks to a small trained model, `make test` runs the tests.
# What they install is locked in requirements/; `make lock` renews those files from pyproject.toml.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: chat test test-versions install lock

chat: $(VENV)/installed
	$(VENV)/bin/mmmamba chat

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests --numprocesses auto --dist worksteal

# The tests that touch Transformers, on its oldest supported and its newest released version.
test-versions: $(VENV)/installed-test
	$(VENV)/bin/python tests/versions.py

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build tool comes from the lock, too, so the package is built without pip's own build environment.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml requirements/chat.txt
	$(PIP) install --constraint requirements/chat.txt setuptools
	$(PIP) install --constraint requirements/chat.txt --no-build-isolation --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements/test.txt
	$(PIP) install --constraint requirements/test.txt --no-build-isolation --editable ".[test]"
	touch $@

LOCK := $(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --custom-compile-command "make lock"

lock: $(VENV)/bin/python
	$(PIP) install uv
	$(LOCK) pyproject.toml requirements/build.in --extra test --output-file requirements/test.txt
	$(LOCK) pyproject.toml requirements/build.in --constraint requirements/test.txt --output-file requirements/chat.txt

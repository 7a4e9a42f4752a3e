# Everything a fresh machine needs: `make chat` talks to a small trained model, `make test` runs the tests.
# What they install is locked in requirements/; `make lock` renews those files from pyproject.toml.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

SERVING := .venv-serving

.PHONY: chat serve test test-versions test-serving install lock

chat: $(VENV)/installed
	$(VENV)/bin/mmmamba chat

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests --ignore tests/serving --numprocesses auto --dist worksteal

# The tests that touch Transformers, on its oldest supported and its newest released version.
test-versions: $(VENV)/installed-test
	$(VENV)/bin/python tests/versions.py

# The server on localhost:8000; docs/serving.md has what to ask it.
serve: $(SERVING)/installed
	$(SERVING)/bin/mmmamba serve examples/shapes/hybrid

# The tests of the vLLM plugin, of servers and of the page, in an environment of their own (Linux, Python 3.11 to 3.13).
test-serving: $(SERVING)/installed
	$(SERVING)/bin/python -m pytest tests/serving

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

# All that is locked, and nothing that its packages ask for beside: see requirements/serving-overrides.in.
$(SERVING)/installed: pyproject.toml requirements/serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --no-deps --requirement requirements/serving.txt
	$(SERVING)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

LOCK := $(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --custom-compile-command "make lock"

lock: $(VENV)/bin/python
	$(PIP) install uv
	$(LOCK) pyproject.toml requirements/build.in --extra test --output-file requirements/test.txt
	$(LOCK) pyproject.toml requirements/build.in --constraint requirements/test.txt --output-file requirements/chat.txt
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --custom-compile-command "make lock" \
		--override requirements/serving-overrides.in pyproject.toml requirements/serving.in --extra app \
		--output-file requirements/serving.txt
	sed --in-place 's/^torch==/torch===/' requirements/serving.txt  # not 2.13.0+cpu, which `==` takes for the same

# Two commands on a fresh machine: `make demo` (models trained, compared, three tables) and `make test`.
# Both set up a local virtual environment with the versions of constraints.txt first.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test lint clean

install: $(VENV)/.installed

# torch alone and first: its pinned version then satisfies what every other package asks for
$(VENV)/.installed: pyproject.toml constraints.txt
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(PIP) torch==2.13.0 && $(PIP) -e '.[demo,dev]' && touch $@ && \
	echo "installed into $(VENV) in $$(( $$(date +%s) - start )) s"

demo: install
	$(BIN)/infini-bench reproduce demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build *.egg-info

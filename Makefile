# make run | run-lm | test | test-slow | lint | generated | bench | bench-peers | clean        needs python3 (3.11 or newer), git and make; everything else goes into .venv
#
# VENV=path puts the environment elsewhere, PYTHON=python3.12 takes another interpreter, ARGS="..." goes to the command or to pytest.

VENV ?= .venv
PEERS ?= .venv-peers
PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find remanence -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: run run-lm test test-slow lint generated bench bench-peers clean

run: $(VENV)/.user
	@$(BIN)/remanence run examples/digits.yaml $(ARGS)

run-lm: $(VENV)/.llm
	@$(BIN)/remanence run examples/authors.yaml $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n 2 -q $(ARGS)

test-slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -n 2 -q -m slow $(ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict remanence tools
	@$(BIN)/lint-imports --no-logo

# What is written from the catalogue and the tests.
generated: $(VENV)/.dev
	@$(BIN)/python tools/stubs.py
	@$(BIN)/python tools/fidelity.py

# Side-by-side benchmarks, on one thread; docs/bench.md is written from their results. The peers get an environment of their own.
bench: $(VENV)/.dev
	@$(BIN)/python -m bench.loop
	@$(BIN)/python -m bench.ledger
	@$(BIN)/python -m bench.vmap
	@$(BIN)/python -m bench.evidence
	@$(BIN)/python -m bench.learn
	@$(BIN)/python -m bench.forget
	@$(BIN)/python -m bench.lm
	@$(BIN)/python -m bench.language
	@$(BIN)/python -m bench.table

bench-peers: $(VENV)/.dev $(PEERS)/.done
	@$(BIN)/python -m bench.peers $(PEERS)/bin/python
	@$(BIN)/python -m bench.table

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Remanence needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12 ...")'
	@echo "Making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The stamps say what is installed. A development install that is current serves `make run`, too.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Remanence for development (about a minute the first time)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.user: pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	@if [ $(VENV)/.dev -nt pyproject.toml ] && [ $(VENV)/.dev -nt constraints.txt ]; then :; else \
		echo "Installing Remanence (about a minute the first time)" && $(PIP) .; \
	fi
	@touch $@

$(VENV)/.llm: pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	@if [ $(VENV)/.dev -nt pyproject.toml ] && [ $(VENV)/.dev -nt constraints.txt ]; then :; else \
		echo "Installing Remanence with its language models (about two minutes the first time)" && $(PIP) '.[llm]'; \
	fi
	@touch $@

$(PEERS)/.done: | $(BIN)/python
	@echo "Making the environment $(PEERS) for the peers (about two minutes, 1.5 GB)"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check avalanche-lib==0.6.0 torch==2.13.0
	@touch $@

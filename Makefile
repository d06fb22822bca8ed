# `make demo` and `make test` need Python 3.11+ and make, nothing else: they create the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXAMPLES ?= 10000
JOBS ?= 2
KILLS ?= 1000
STARTUP_KILLS ?= 60
MINUTES ?= 60
SEED ?= 1
PIP_INSTALL = $(BIN)/python -m pip install --progress-bar on -c constraints.txt

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamlearn wants Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing streamlearn. torch is large: with its CUDA libraries about 3 GB to fetch and 5 GB on disk."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools of the tests, a Java runtime for a real Kafka among them."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

install: $(VENV)/.installed ## a virtual environment with streamlearn in it

demo: $(VENV)/.installed ## watch it learn: digits as a stream, embedded log, learner and servers
	$(BIN)/streamlearn demo $(ARGS)

test: $(VENV)/.installed-dev ## every test, with a real Kafka that it starts by itself; JOBS=2 at once
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(VENV)/.installed-dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

size: ## how large the program is: code lines, settings, metrics, words
	@$(PYTHON) tests/harness/size.py

audit: $(VENV)/.installed-dev ## known vulnerabilities of the pinned dependencies
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

bench: $(VENV)/.installed-bench ## every benchmark; QUICK=--quick for short ones
	@for file in $(filter-out benchmarks/common.py benchmarks/offline.py benchmarks/learning%,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file $(QUICK) || exit 1; done

learning: $(VENV)/.installed-dev ## teacher against label-only twin on 42 streams: hours; goes on where it stopped; docs/learning.md
	$(BIN)/python benchmarks/learning.py $(ARGS)
	$(BIN)/python benchmarks/learning.py --report

soak: $(VENV)/.installed-dev ## long searches for what must never be: EXAMPLES=10000 orders of arrival, KILLS=1000 processes
	STREAMLEARN_SOAK_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/faults/test_ledger_any_order.py $(ARGS)
	STREAMLEARN_LONG_FAULTS=1 $(BIN)/python -m pytest -s tests/faults/test_broker_faults.py tests/faults/test_failing_calls.py $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m harness.soak --kills $(KILLS) --startup-kills $(STARTUP_KILLS) --seed $(SEED) --cold 5 $(SOAK_ARGS)

soak-hour: $(VENV)/.installed-dev ## an hour of steady work: do memory, open files and disk stay flat? MINUTES=60
	PYTHONPATH=tests $(BIN)/python -m harness.hour --minutes $(MINUTES)

up: ## Kafka and streamlearn in containers
	docker compose up --build

down: ## stop them, keep the data
	docker compose down

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-state

.PHONY: help install demo test check size audit bench learning soak soak-hour up down clean

# Needs Python 3.11+ and make; the targets install the rest into .venv.
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
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamlearn needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing streamlearn. torch is large: with its CUDA libraries about 3 GB to download and 5 GB on disk."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests and checks, including a Java runtime for Kafka."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

install: $(VENV)/.installed ## a virtual environment with streamlearn

install-dev: $(VENV)/.installed-dev ## the same with everything for tests and checks

demo: $(VENV)/.installed ## digits as a stream: embedded log, learner and servers
	$(BIN)/streamlearn demo $(ARGS)

test: $(VENV)/.installed-dev ## all tests, with a real Kafka that the suite starts; JOBS=2 processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.installed-dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

size: ## size of the code base: code lines, settings, metrics, words
	@$(PYTHON) tests/harness/size.py

audit: $(VENV)/.installed-dev ## known vulnerabilities of the pinned dependencies
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

bench: $(VENV)/.installed-bench ## all benchmarks, into docs/performance.md; QUICK=--quick for short runs, ARGS=NAME for one
	$(BIN)/python benchmarks/run.py $(QUICK) $(ARGS)

gpu: $(VENV)/.installed-bench ## tests and benchmarks of a GPU, within ten minutes; without one they say so
	$(BIN)/python -m pytest -rs tests/gpu $(ARGS)
	$(BIN)/python benchmarks/gpu.py $(QUICK)

learning: $(VENV)/.installed-dev ## teacher against label-only twin on 42 streams (hours, resumable); writes docs/learning.md
	$(BIN)/python benchmarks/learning.py $(ARGS)
	$(BIN)/python benchmarks/learning.py --report

soak: $(VENV)/.installed-dev ## long fault tests: EXAMPLES=10000 orders of arrival, KILLS=1000 processes
	STREAMLEARN_SOAK_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/faults/test_ledger_any_order.py $(ARGS)
	STREAMLEARN_LONG_FAULTS=1 $(BIN)/python -m pytest -s tests/faults/test_broker_faults.py tests/faults/test_failing_calls.py $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m harness.soak --kills $(KILLS) --startup-kills $(STARTUP_KILLS) --seed $(SEED) --cold 5 $(SOAK_ARGS)

nightly: ## all benchmarks in short form, long fault tests with 200 kills
	$(MAKE) bench QUICK=--quick
	$(MAKE) soak KILLS=200

soak-hour: $(VENV)/.installed-dev ## growth of memory, open files and disk over an hour; MINUTES=60
	PYTHONPATH=tests $(BIN)/python -m harness.hour --minutes $(MINUTES)

up: ## Kafka and streamlearn in containers
	docker compose up --build

down: ## stop the containers, keep the data
	docker compose down

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-state

.PHONY: help install install-dev demo test check size audit bench gpu learning soak nightly soak-hour up down clean

# The one door: what a person runs here and what CI runs are the same words. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types unit test check sweep gpu demo bench

# The first Python from 3.11 on that runs and can make virtual environments; PYTHON=... overrides it.
PYTHON = $(shell for p in python3.11 python3.12 python3; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --doctest-modules
PURE := $(addprefix src/flyball/,core numerics performance planner tuner)
BENCHMARKS ?= engine_throughput sizing

help:  ## list these words
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## create .venv and install Flyball with everything its development needs

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with the venv module was found; install one" \
	  "(Debian: apt-get install python3.11-venv) or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing Flyball and its dependencies into .venv (1.5 GB, torch most of it): some two minutes, once ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 \
	  | tee .venv/setup.log | awk -v tty="$$([ -t 2 ] && echo 1)" \
	    'tty && /^ *(Collecting|Downloading|Building|Installing)/ {printf "\r\033[K  %.76s", $$0 > "/dev/stderr"} \
	     END {if (tty) printf "\r\033[K" > "/dev/stderr"}' || { tail -n 20 .venv/setup.log >&2; exit 1; }
	@touch $@

fmt: $(INSTALLED)  ## format the code and mend what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: $(INSTALLED)  ## format check, lint, import contracts
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy

unit: $(INSTALLED)  ## the fast tests: doctests of the pure packages, unit and property tests
	$(PYTEST) -m 'not slow and not sweep and not gpu' $(PURE) tests/unit $(wildcard tests/property)

test: $(INSTALLED)  ## every test that needs no GPU
	$(PYTEST) -m 'not sweep and not gpu' $(PURE) tests

sweep: $(INSTALLED)  ## the exhaustive proofs that `make test` samples: some ten minutes
	$(PYTEST) -m sweep tests

check: lint types unit  ## what to run before each commit

gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu

demo: $(INSTALLED)  ## the main job end to end on the bundled model: serve, measure, tune, fit, plan
	$(BIN)/flyball demo

bench: $(INSTALLED)  ## the benchmarks, each against its rival (BENCHMARKS="sizing" for some)
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

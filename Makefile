# What there is to do here; `make help` lists it. Every target makes what it needs first, on a bare machine too.
#
#   REQUIRE=all   a test that this machine cannot run is a failure; else it is left out, and named at the end
#   ARGS="..."    more arguments for pytest or for the demo
#   PYTHON=...    the Python to make .venv with
#   PREFIX=...    where `make install` puts the program; UNITS=... where it puts the unit

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
REQUIRE ?=
ARGS ?=
PREFIX ?= /opt/trigpoint
UNITS ?= /etc/systemd/system
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # each program that is started would compile all of its modules again
PYTEST := $(BIN)/pytest $(if $(filter all,$(REQUIRE)),,--leave-out-missing)

BENCHMARKS := $(filter-out record __init__,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/*.py)))

.PHONY: help demo test quick lint campaign bench install wheel clean packages

help: ## list what there is to do
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.demo ## from nothing to a restored, proven commit, in under two minutes
	@$(BIN)/trigpoint demo $(ARGS)

test: packages lint ## everything that must be green, in about 19 minutes on 2 cores
	@$(PYTEST) -n 5 --dist loadfile --no-loadscope-reorder $(ARGS)

quick: lint ## lint, types, unit tests and simulation, in about two minutes on 2 cores
	@$(PYTEST) -n 2 --dist worksteal -m "not slow and not server and not volume" tests/test_*.py tests/trigger tests/connectors tests/simulation $(ARGS)

lint: .venv/.dev ## style and types
	@$(BIN)/ruff format --check --quiet . || { echo "run $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

campaign: packages .venv/.dev ## the full counts, in hours; prints each figure
	@$(PYTEST) -m campaign --timeout 0 -s $(ARGS)

bench: packages .venv/.dev ## the benchmarks; figures into benchmarks/results, by date
	@mkdir -p benchmarks/results
	@for name in $(BENCHMARKS); do \
	    echo "== $$name"; \
	    $(BIN)/python -m benchmarks.$$name --json "benchmarks/results/$$(date -u +%F)-$$name.json" $(ARGS); \
	done

install: ## as root: the program into PREFIX, the unit for systemd beside the others; starts nothing
	@python3 -m venv $(PREFIX)
	@$(PREFIX)/bin/pip install --quiet '.[postgres]'
	@install -d $(UNITS)
	@sed 's|/opt/trigpoint/bin/|$(PREFIX)/bin/|' configs/systemd/trigpoint@.service > $(UNITS)/trigpoint@.service
	@echo "next: $(PREFIX)/bin/trigpoint init; then check; then systemctl enable --now trigpoint@trigpoint"

wheel: .venv/.dev ## build the wheel into dist
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what was made here, .venv too
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

packages:
	@.ci/packages

.venv/.demo: pyproject.toml .ci/venv
	@PYTHON=$(PYTHON) .ci/venv demo
	@touch $@

.venv/.dev: pyproject.toml .ci/venv
	@PYTHON=$(PYTHON) .ci/venv dev
	@touch .venv/.demo $@

# Everything sets itself up: Debian packages (said aloud), the virtual environment .venv, the lab guest.  Nothing is done twice.

SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
UNIT := not real and not guest and not walk and not soak

.PHONY: help demo test quick lint bench soak deb setup format clean

help:             ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup       ## watch a running machine being protected, destroyed and booted back
	@$(BIN)/python -m labs.demo

test: setup       ## style, types, layers and every test, with real QEMU, NBD programs and guests
	@failed=0; \
	$(MAKE) --no-print-directory lint || failed=1; \
	$(PYTEST) -n 2 --dist worksteal -m "not soak" --cov --cov-report=term || failed=1; \
	exit $$failed

quick: venv lint  ## style, types, layers and the unit tests
	$(PYTEST) -n 2 --dist worksteal -m "$(UNIT)"

bench: setup      ## what a backup and a restore cost here
	@labs/setup.sh bench
	@$(BIN)/python -m labs.bench

soak: setup       ## the long tests, the property tests with many more examples, ten minutes of fuzzing
	@failed=0; \
	HYPOTHESIS_PROFILE=soak $(PYTEST) -n 2 --dist worksteal -m "soak or hypothesis" --timeout=7200 || failed=1; \
	$(BIN)/python labs/fuzz.py || failed=1; \
	exit $$failed

deb: venv         ## build the Debian package in dist/
	@$(BIN)/python labs/deb.py

lint: venv        ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv      ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

setup:            ## only the set-up
	@labs/setup.sh packages venv kernel guest

.PHONY: venv
venv:
	@labs/setup.sh venv

clean:            ## remove everything that was made here
	rm -rf .venv .lab .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

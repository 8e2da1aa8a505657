# make demo | test | test-slurm | test-faults | soak | lint | typecheck | clean.
# The environment is .venv, from requirements.lock.
SHELL := /bin/sh
PYTHON ?= python3
LOCK_STAMP := .venv/.installed-lock
CODE_STAMP := .venv/.installed-package
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.PHONY: demo test test-slurm test-faults soak lint typecheck clean install
.DEFAULT_GOAL := demo

demo: install
	@snakemake
	@echo "The frontier: results/figures/pareto.png; as numbers: results/tables/frontier.csv"

test: install
	@python -m pytest --numprocesses 2 -m "not faults" --ignore tests/slurm

# A Slurm on the loopback interface; skipped, with the reason, where that is not possible.
test-slurm: install
	@workflow/scripts/install_slurm.sh
	@SPALF_TEST_SLURM=1 python -m pytest tests/slurm --numprocesses 3

test-faults: install
	@python -m pytest tests/faults

soak: install
	@SPALF_FAULT_KILLS=500 SPALF_FAULT_WORKFLOW_KILLS=50 python -m pytest tests/faults

lint: install
	ruff check .
	ruff format --check .
	lint-imports
	snakefmt --check Snakefile workflow
	snakemake --lint
	snakemake --lint --configfile config/paper.yaml

typecheck: install
	mypy

# The stamps hold what was installed and where, so an environment that is up to date is not
# touched (no network is needed) and one that was moved, which breaks its scripts, is made anew.
install:
	@if ! [ -x .venv/bin/python ] || \
	    { [ -f $(LOCK_STAMP) ] && [ "$$(head -n 1 $(LOCK_STAMP))" != "$(CURDIR)" ]; }; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }; \
	  echo "Creating the environment .venv"; \
	  $(PYTHON) -m venv --clear .venv || { \
	    echo "No venv module: install python3-venv, or take conda (environment.yml)" >&2; exit 2; }; \
	fi
	@{ echo "$(CURDIR)"; cat requirements.lock; } > .venv/.wanted-lock
	@if ! cmp -s .venv/.wanted-lock $(LOCK_STAMP); then \
	  echo "Installing requirements.lock"; \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock && \
	  mv .venv/.wanted-lock $(LOCK_STAMP); \
	else rm -f .venv/.wanted-lock; fi
	@if ! cmp -s pyproject.toml $(CODE_STAMP); then \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e . && cp pyproject.toml $(CODE_STAMP); \
	fi

clean:
	rm -rf results/figures results/tables results/logs build dist *.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@echo "Trained models are in results/, the environment in .venv; remove them by hand."

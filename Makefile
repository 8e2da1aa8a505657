# make demo | paper | frontier | ablations | bench | test | test-slurm | test-browser | test-faults | soak | lint | typecheck | docs | clean.
# The environment is .venv, from requirements.lock.
SHELL := /bin/sh
PYTHON ?= python3
BENCH_LM := results/bench/lm-6l
APART := .venv/apart
LOCK_STAMP := .venv/.installed-lock
CODE_STAMP := .venv/.installed-package
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.PHONY: demo paper frontier ablations bench test test-slurm test-browser test-faults soak lint typecheck docs clean install
.DEFAULT_GOAL := demo

demo: install
	@snakemake
	@echo "The frontier: results/figures/pareto.png; as numbers: results/tables/frontier.csv"

# The demo grid as a manuscript.
paper: install
	@snakemake -- paper
	@echo "The manuscript: results/paper/paper.pdf"

# On a GPU: SPALF beside the baselines, and changed in one thing at a time.
frontier: $(BENCH_LM)/training.json
	@snakemake --configfile config/bench.yaml

# Training steps beside SAELens's: time, memory, ratio.
bench: install
	@python -m spalf.bench --out results/bench/speed

ablations: $(BENCH_LM)/training.json
	@snakemake --configfile config/ablations.yaml

# Their language model: 6 layers, d = 256, on the source of the installed packages. It comes with the
# repository; make --always-make trains it anew.
$(BENCH_LM)/training.json: | install
	@python -m spalf.bundled.prepare --dataset python-packages --out results/bench/tokens
	@python -m spalf.bundled.train_lm --data results/bench/tokens --out $(BENCH_LM) \
	    --layers 6 --d-model 256 --epochs 1

# dictionary-learning, which asks for an older torch, lies where only these tests see it.
$(APART)/.installed: tests/dictionary-learning.txt | install
	@python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(APART) -r $< && cp $< $@

test: install $(APART)/.installed
	@PYTHONPATH="$(CURDIR)/$(APART)" python -m pytest --numprocesses 2 -m "not faults" --ignore tests/slurm --ignore tests/browser

# A Slurm on the loopback interface; skipped, with the reason, where that is not possible.
test-slurm: install
	@workflow/scripts/install_slurm.sh
	@SPALF_TEST_SLURM=1 python -m pytest tests/slurm --numprocesses 3 --dist worksteal

# The page of features in a headless Chromium, which is installed where that is possible.
test-browser: install
	@workflow/scripts/install_browser.sh
	@SPALF_TEST_BROWSER=1 python -m pytest tests/browser --numprocesses 2

test-faults: install
	@python -m pytest tests/faults --numprocesses 2 --dist worksteal

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

# Pages and docstrings as a site in build/site; a link to nothing is an error. What builds it has an
# environment of its own.
docs:
	@if ! cmp -s docs/requirements.txt .venv-docs/.installed; then \
	  $(PYTHON) -m venv --clear .venv-docs && \
	  .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check \
	    -r docs/requirements.txt && \
	  cp docs/requirements.txt .venv-docs/.installed; \
	fi
	@PATH="$(CURDIR)/.venv-docs/bin:$$PATH" NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs \
	  build --strict --config-file docs/site/mkdocs.yml
	@echo "The documentation: build/site/index.html"

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
	@wanted=$$(mktemp .venv/.wanted-lock.XXXXXX) && trap 'rm -f "$$wanted"' EXIT && \
	{ echo "$(CURDIR)"; cat requirements.lock; } > "$$wanted" && \
	if ! cmp -s "$$wanted" $(LOCK_STAMP); then \
	  echo "Installing requirements.lock"; \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock && \
	  cp "$$wanted" $(LOCK_STAMP); \
	fi
	@if ! cmp -s pyproject.toml $(CODE_STAMP); then \
	  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e . && cp pyproject.toml $(CODE_STAMP); \
	fi

clean:
	rm -rf results/figures results/tables results/logs build dist *.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@echo "Trained models are in results/, the environment in .venv; remove them by hand."

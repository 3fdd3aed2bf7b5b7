# Every target sets up what it needs: a virtual environment, the pinned packages, this package in editable form.
#   make demo    make test    make lint    make test-oldest    make bench    make clean
# Another Python: make PYTHON=python3.12 test.  More arguments for pytest: make test ARGS="-k warmup -x"

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_BENCH ?= .venv-bench
JOBS ?= auto
ARGS ?=

# Small tensors are fastest on one thread, and tests run in several processes; nothing is fetched from a model hub.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

READY := $(VENV)/.ready
READY_OLDEST := $(VENV_OLDEST)/.ready
READY_BENCH := $(VENV_BENCH)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint format bench table clean

help:
	@sed -n '1,3s/^# //p' Makefile

demo: $(READY)
	@$(VENV)/bin/python -m examples.demo $(ARGS)

test: $(READY)
	@$(ONE_THREAD) $(VENV)/bin/python -m pytest -q -n $(JOBS) $(ARGS)

test-oldest: $(READY_OLDEST)
	@$(ONE_THREAD) $(VENV_OLDEST)/bin/python -m pytest -q -n $(JOBS) -m "not slow" $(ARGS)

lint: $(READY)
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check --diff .
	@$(VENV)/bin/mypy --no-error-summary

format: $(READY)
	@$(VENV)/bin/ruff check --quiet --fix .
	@$(VENV)/bin/ruff format --quiet .

bench: $(READY_BENCH)
	@$(VENV_BENCH)/bin/python -m benchmarks.overhead
	@$(VENV_BENCH)/bin/python -m benchmarks.host_cost
	@$(VENV_BENCH)/bin/python -m benchmarks.attention
	@$(VENV_BENCH)/bin/python -m benchmarks.profiling
	@$(VENV_BENCH)/bin/python -m benchmarks.cache $(ARGS)
	@$(VENV_BENCH)/bin/python -m benchmarks.table

table: $(READY)
	@$(VENV)/bin/python -m benchmarks.table

clean:
	@rm -rf $(VENV) $(VENV_OLDEST) $(VENV_BENCH) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): constraints.txt setup.cfg
	$(call install,$(VENV),constraints.txt,dev)

$(READY_OLDEST): constraints-oldest.txt setup.cfg
	$(call install,$(VENV_OLDEST),constraints-oldest.txt,test)

$(READY_BENCH): constraints.txt setup.cfg
	$(call install,$(VENV_BENCH),constraints.txt,bench)

# $(call install,folder,constraints,extra). torch is named so that its pinned release is the first thing resolved.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "setting up $(1) (once)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq -c $(2) torch -e ".[$(3)]"
	@touch $(1)/.ready
endef

# Every target sets up what it needs: a virtual environment, the pinned packages, this package in editable form.
#   make demo    make test    make test-all    make lint    make test-oldest    make test-pythons
#   make bench    make bench-times    make notebook    make clean
# Another Python: make PYTHON=python3.12 test.  More arguments for pytest: make test ARGS="-k warmup -x"

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_BENCH ?= .venv-bench
VENV_PYTHON ?= .venv-python
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
.PHONY: help demo notebook test test-all test-oldest test-pythons test-floors lint format mutants bench bench-emoji \
	bench-others bench-times models table clean

help:
	@sed -n '1,4s/^# //p' Makefile

demo: $(READY)
	@$(VENV)/bin/python -m examples.demo $(ARGS)

# Runs examples/quickstart.ipynb in place, in a minute, and keeps what it shows.
notebook: $(READY)
	@$(ONE_THREAD) $(VENV)/bin/python -m examples.notebook

test: $(READY)
	@$(ONE_THREAD) $(VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

# With the long matrix: the same on every family with every cache, which pyproject.toml leaves out of the default run.
test-all: $(READY)
	@$(ONE_THREAD) $(VENV)/bin/python -m pytest -q -n $(JOBS) -m "matrix or not matrix" $(ARGS)

# What touches diffusers: its pipelines, loops, blocks, attention, schedulers and offloading. The rest is the same code on
# plain tensors, and `make test` runs it.
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,\
	zoo exact order branches blocks skipped_blocks wiring wiring_oracle odd_models targets loop context_loop own_loops \
	step_proof given second_denoiser modulated teacache_models teacache_fit apply_plan calibrate magnitude_record \
	response few_steps attention_sites attention_parity attention_patch attention_select attention_unseen \
	compare public))

test-oldest: $(READY_OLDEST)
	@$(ONE_THREAD) $(VENV_OLDEST)/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(OLDEST_TESTS) $(ARGS)

# The Pythons of setup.cfg beside the usual one; the oldest runs the lowest versions that setup.cfg allows.
OLDEST_PYTHON := 3.10
OTHER_PYTHONS := $(OLDEST_PYTHON) 3.12 3.13
constraints_of = $(if $(filter $(OLDEST_PYTHON),$(1)),constraints-floors.txt,constraints.txt)

# What may differ between Pythons: everything is imported, frames and bytecode are read, functions and classes are made
# again, and one small model runs with every patch, eager and compiled.
SMOKE := tests/test_public.py tests/test_code_loops.py tests/test_step_proof.py tests/test_loop.py \
	tests/test_explicit.py tests/test_context_loop.py tests/test_settling.py tests/test_intercept.py \
	tests/test_attention_sites.py tests/test_attention_patch.py tests/test_exact.py tests/test_compile.py \
	tests/test_profile_window.py
SMOKE_OF := (wan or not (test_attention_patch or test_exact or test_compile)) and not (wan22 or wan_ or wrapper or gaps)

test-pythons:
	@for version in $(OTHER_PYTHONS); do $(MAKE) --no-print-directory smoke-$$version || exit 1; done

smoke-%:
	$(call in_python,$*,-k "$(SMOKE_OF)" $(SMOKE))

test-floors:
	$(call in_python,$(OLDEST_PYTHON))

lint: $(READY)
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check --diff .
	@$(VENV)/bin/mypy --no-error-summary

format: $(READY)
	@$(VENV)/bin/ruff check --quiet --fix .
	@$(VENV)/bin/ruff format --quiet .

# Whether the tests find deliberate faults (tests/mutants.json), one after another.
mutants: $(READY)
	@$(ONE_THREAD) $(VENV)/bin/python -m benchmarks.mutants $(ARGS)

# The tables of caches in an hour at most on two cores: two models side by side, within a limit of time. It goes on where
# it was stopped. What is timed by the clock has the machine for itself: bench-times, forty minutes.
bench: $(READY_BENCH)
	@$(MAKE) --no-print-directory -j2 bench-emoji bench-others
	@$(VENV_BENCH)/bin/python -m benchmarks.table

BENCH_CACHE = $(ONE_THREAD) $(VENV_BENCH)/bin/python -m benchmarks.cache

bench-emoji: $(READY_BENCH)
	@$(BENCH_CACHE) --models emoji --captions 2 --minutes 52 $(ARGS)

bench-others: $(READY_BENCH)
	@$(BENCH_CACHE) --models flux qwen wan --steps 20 50 --captions 3 --minutes 52 $(ARGS)

bench-times: $(READY_BENCH)
	@$(VENV_BENCH)/bin/python -m benchmarks.overhead
	@$(VENV_BENCH)/bin/python -m benchmarks.host_cost
	@$(VENV_BENCH)/bin/python -m benchmarks.attention
	@$(VENV_BENCH)/bin/python -m benchmarks.padding
	@$(VENV_BENCH)/bin/python -m benchmarks.constants
	@$(VENV_BENCH)/bin/python -m benchmarks.profiling
	@$(VENV_BENCH)/bin/python -m benchmarks.table

# Every transformer and pipeline class of diffusers with every kind of patch, in about six minutes, and the tables of
# docs/models.md.
models: $(READY)
	@PYTHONPATH=.:tests $(ONE_THREAD) $(VENV)/bin/python -m classes $(ARGS)
	@PYTHONPATH=.:tests $(ONE_THREAD) $(VENV)/bin/python -m pipelines $(ARGS)
	@$(VENV)/bin/python -m benchmarks.table

table: $(READY)
	@$(VENV)/bin/python -m benchmarks.table

clean:
	@rm -rf $(VENV) $(VENV_OLDEST) $(VENV_BENCH) $(VENV_PYTHON)3.* build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
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

# $(call python_at,version): the Python of that version on the path or with pyenv, nothing where there is none.
PYENV_ROOT ?= $(HOME)/.pyenv
python_at = $(firstword $(foreach python,python$(1) $(wildcard $(PYENV_ROOT)/versions/$(1).*/bin/python),\
	$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))

# $(call in_python,version,arguments): runs pytest with that Python.
define in_python
	@$(if $(call python_at,$(1)),$(MAKE) --no-print-directory $(VENV_PYTHON)$(1)/.ready && \
	echo "Python $(1) with $(call constraints_of,$(1))" && \
	$(ONE_THREAD) $(VENV_PYTHON)$(1)/bin/python -m pytest -q -n $(JOBS) $(2) $(ARGS),\
	echo "skipped: no Python $(1) on this machine")
endef

# With uv, since these take PyPI's files of torch, of several gigabytes, which it keeps once for all environments.
$(VENV_PYTHON)%/.ready: constraints.txt constraints-floors.txt setup.cfg $(READY)
	@echo "setting up $(VENV_PYTHON)$* (once)"
	@$(VENV)/bin/uv venv --quiet --allow-existing --python $(call python_at,$*) $(VENV_PYTHON)$*
	@$(VENV)/bin/uv pip install --quiet --python $(VENV_PYTHON)$* -c $(call constraints_of,$*) torch -e ".[test]"
	@touch $@

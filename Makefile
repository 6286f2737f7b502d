# One line a target. `make demo` and `make test` need nothing but make and Python 3.11 or 3.12.
# `make setup` takes the first of these that works; choose another one with `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= python3.11 python3.12 python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch's own index, for the CPU build of torch, where pip's configured index does not have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
KIND := $(if $(GPU),gpu,cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# `make test` fails when its fast tests cover fewer lines than this, in percent.
COVERAGE_FLOOR ?= 85

export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo cappy-minilm test test-all test-fast clients trainers check module-map format docs wheel bench bench-quick lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## make the virtual environment for this machine (CPU or NVIDIA GPU) and check it

$(VENV)/.ready: $(wildcard requirements/*) pyproject.toml
	@test -x $(BIN)/python || { \
	  for python in $(PYTHON) ''; do \
	    test -z "$$python" || $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null && break; \
	  done; \
	  test -n "$$python" || { echo "make setup: none of '$(PYTHON)' is Python 3.11 or 3.12 with venv; install one, or give its path: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  $$python -m venv $(VENV); }
	@echo "setting up $(VENV) for $(if $(GPU),an NVIDIA GPU,CPU only: about 2 minutes and 4.5 GB)"
ifeq ($(KIND),cpu)
	@# Given for every package, an index that cannot be reached would cost 10 s each: only torch needs it.
	@$(PIP) install --no-deps --require-hashes -r requirements/torch-cpu.txt 2>/dev/null || \
	  $(PIP) install --no-deps --require-hashes -r requirements/torch-cpu.txt --extra-index-url $(TORCH_INDEX)
endif
	@# uv installs a lock in a quarter of pip's time. pip is the fallback where only pip knows the package index.
	@lock=requirements/$(KIND)-$$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').lock; \
	  { $(PIP) install --no-deps --require-hashes -r requirements/uv.txt && \
	    VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --require-hashes -r $$lock; } || \
	  $(PIP) install --no-deps --require-hashes -r $$lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@# Neither uv nor a machine with PYTHONDONTWRITEBYTECODE writes bytecode, and every Ray worker would compile anew what it imports.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@$(BIN)/cappy doctor
	@touch $@

doctor: setup  ## check versions, imports, engine, storage and models again
	@$(BIN)/cappy doctor

demo: setup  ## generate, adapt, evaluate and serve on eight BIG-bench tasks (15 minutes on 2 cores)
	@$(BIN)/python -m cappy.demo

cappy-minilm: setup  ## make the pretrained scorer of the package again, from a local copy of T0's rows (hours on 2 cores)
	@$(BIN)/python -m cappy.pretrain $(ARGUMENTS)

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Only the fast tests are measured: on Python 3.11 coverage adds up to two thirds to the CPU time of a test. Python 3.12 has a cheaper way.
COVERAGE_CORE = $$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')
test: setup  ## the tests of every change, with real small models and a real S3 server (20 minutes on 2 cores)
	@status=0; \
	  COVERAGE_CORE=$(COVERAGE_CORE) $(PYTEST) -m 'not slow and not full' --cov --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE_FLOOR) || status=1; \
	  $(PYTEST) -m 'slow and not full' --durations=15 || status=1; \
	  exit $$status

test-all: setup clients trainers  ## all tests, also those marked `full`
	@test -n "$$CAPPY_CLIENTS_PYTHON" || ! test -e $(CLIENTS)/.ready || export CAPPY_CLIENTS_PYTHON=$(CURDIR)/$(CLIENTS)/bin/python; \
	test -n "$$CAPPY_TRAINERS_PYTHON" || ! test -e $(TRAINERS)/.ready || export CAPPY_TRAINERS_PYTHON=$(CURDIR)/$(TRAINERS)/bin/python; $(PYTEST)

# LangChain, LiteLLM and lm-eval need another version of the openai package than this project.
CLIENTS := .venv-clients
CLIENTS_LIST := tests/serving/clients/requirements.txt
clients: setup  ## a separate environment with the client libraries that `make test-all` runs against a server (0.5 GB)
	@test -n "$$CAPPY_CLIENTS_PYTHON" || test $(CLIENTS)/.ready -nt $(CLIENTS_LIST) || \
	  { $(BIN)/python -m venv $(CLIENTS) && \
	    { VIRTUAL_ENV=$(CLIENTS) $(BIN)/uv pip install --quiet -r $(CLIENTS_LIST) || $(CLIENTS)/bin/python -m pip install --quiet -r $(CLIENTS_LIST); } && \
	    touch $(CLIENTS)/.ready; } || \
	  echo "the client libraries cannot be installed; make test-all skips their tests" >&2

# TRL and sentence-transformers are heavy and only for tests. A .pth file adds the packages of $(VENV) to their environment.
TRAINERS := .venv-trainers
TRAINERS_LIST := tests/generation/trainers/requirements.txt
trainers: setup  ## a separate environment with the trainers that `make test-all` runs on exports (0.1 GB)
	@test -n "$$CAPPY_TRAINERS_PYTHON" || test $(TRAINERS)/.ready -nt $(TRAINERS_LIST) || \
	  { $(BIN)/python -m venv $(TRAINERS) && \
	    site='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	    $(BIN)/python -c "$$site" > "$$($(TRAINERS)/bin/python -c "$$site")/base.pth" && \
	    { VIRTUAL_ENV=$(TRAINERS) $(BIN)/uv pip install --quiet --no-deps -r $(TRAINERS_LIST) || \
	      $(TRAINERS)/bin/python -m pip install --quiet --no-deps -r $(TRAINERS_LIST); } && \
	    touch $(TRAINERS)/.ready; } || \
	  echo "the trainers cannot be installed; make test-all skips their tests" >&2

test-fast: setup  ## the tests that take seconds
	@$(BIN)/python -m pytest -m 'not slow and not full'

check: setup  ## lint, types, plain English, and the map of modules in CONTRIBUTING.md
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m tools.prose && $(BIN)/python -m tools.module_map --check

module-map: setup  ## write the map of modules in CONTRIBUTING.md again
	@$(BIN)/python -m tools.module_map

docs: setup  ## build the site of the documentation into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: setup  ## build the wheel and the source archive into dist/
	@$(BIN)/python -m build --no-isolation --outdir dist .

format: setup  ## format the code and apply the fixes of the linter
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup  ## every benchmark, each against its baseline (5 hours on 2 cores; `python -m benchmarks --list` lists the minutes)
	@$(BIN)/python -m benchmarks

bench-quick: setup  ## short runs of the benchmarks that have one, each under two minutes
	@$(BIN)/python -m benchmarks --quick

# Versions stay as they are unless `make lock UPGRADE=--upgrade`; a new version of torch also needs its hashes in torch-cpu.txt.
COMPILE = $(BIN)/uv pip compile $(UPGRADE) --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
CPU_ONLY := --overrides requirements/cpu-overrides.txt --excludes requirements/cpu-excludes.txt --no-emit-package torch
lock: setup  ## write the locks again, with hashes: CPU and GPU, Python 3.11 and 3.12
	@for version in 3.11 3.12; do \
	  tag=py$$(echo $$version | tr -d .); \
	  options="--extra dev --extra docs --python-version $$version --python-platform x86_64-manylinux_2_28 --no-python-downloads"; \
	  $(COMPILE) pyproject.toml --extra cpu $(CPU_ONLY) $$options -o requirements/cpu-$$tag.lock >/dev/null || exit 1; \
	  $(COMPILE) pyproject.toml --extra vllm $$options -o requirements/gpu-$$tag.lock >/dev/null || exit 1; \
	done
	@echo 'uv==0.13.8' | $(COMPILE) - -o requirements/uv.txt >/dev/null

clean:  ## remove the environment and local runs (the cache of models stays)
	rm -rf $(VENV) runs dist build site

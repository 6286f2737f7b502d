# One line a target. `make demo` and `make test` need nothing but python3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Where CPU builds of torch are published for those whose own index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
LOCK := requirements/cpu.lock
# uv installs the lock in a quarter of pip's time; where it cannot (an index only pip is told of), pip does.
TORCH = $(shell grep -E '^torch==' $(LOCK) | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo test test-fast check format bench bench-quick lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## make the virtual environment for this machine (CPU or NVIDIA GPU) and check it

$(VENV)/.ready: $(LOCK) pyproject.toml
	@echo "setting up $(VENV) for $(if $(GPU),an NVIDIA GPU,CPU only); about 1 minute, 4.5 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),yes)
	@$(PIP) install -e '.[vllm,dev]'
else
	@$(PIP) install --no-deps $(TORCH) 2>/dev/null || $(PIP) install --no-deps --extra-index-url $(TORCH_INDEX) $(TORCH)
	@$(PIP) install uv==0.13.8
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps -r $(LOCK) || $(PIP) install --no-deps -r $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation -e .
endif
	@# Neither uv nor a machine with PYTHONDONTWRITEBYTECODE writes bytecode, and every Ray worker would compile anew what it imports.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@$(BIN)/cappy doctor
	@touch $@

doctor: setup  ## check versions, imports, engine, storage and models again
	@$(BIN)/cappy doctor

demo: setup  ## generate, train, evaluate and serve on eight BIG-bench tasks (15 minutes on 2 cores)
	@$(BIN)/python -m serving.demo

test: setup  ## all tests, with real small models and a real S3 server
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup  ## the tests that take seconds
	@$(BIN)/python -m pytest -m 'not slow'

check: setup  ## lint and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup  ## format the code and mend what the linter can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup  ## every benchmark, each against its baseline (5 hours on 2 cores; `python -m benchmarks --list` tells each)
	@$(BIN)/python -m benchmarks

bench-quick: setup  ## short runs of the benchmarks that have one, each under two minutes
	@$(BIN)/python -m benchmarks --quick

lock: setup  ## pin every dependency again into requirements/cpu.lock
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --overrides requirements/overrides.txt --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --torch-backend cpu --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links -o $(LOCK)

clean:  ## remove the environment and local runs (the cache of models stays)
	rm -rf $(VENV) runs

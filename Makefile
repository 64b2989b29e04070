# Everything starts from Python (3.11 or newer) and make; each target sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# `make gpu` takes a PYTHON that is given as it is, with this source tree and no .venv; else .venv
DEVICE ?= cuda
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(BIN)/python
GPU_READY := $(READY)
else
GPU_PYTHON := $(PYTHON)
endif

.PHONY: help setup demo test test-slow test-gpu mutations matrix gpu check format bench bench-micro compile-report clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY) ## create .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ipa_kernels needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "== setting up $(VENV) (once; torch, triton and diffusers are downloaded)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## run a small pipeline with an IP-Adapter, stock and accelerated; writes demo.png
	@echo "== stock against accelerated, on a small pipeline with random weights"
	@$(BIN)/ipa-kernels demo

test: $(READY) ## run the tests (CPU; the kernel runs in Triton's interpreter)
	@echo "== tests on the CPU; a GPU, if there is one, is hidden from them (make test-gpu uses it)"
	@CUDA_VISIBLE_DEVICES=-1 HIP_VISIBLE_DEVICES=-1 $(BIN)/python -m pytest -m 'not slow' --numprocesses=2

test-slow: $(READY) ## run the tests that take minutes each
	@CUDA_VISIBLE_DEVICES=-1 HIP_VISIBLE_DEVICES=-1 $(BIN)/python -m pytest -m slow --numprocesses=2

test-gpu: $(READY) ## run the gpu-marked tests, and the kernel's tests in every dtype
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python -m pytest -m 'not gpu' tests/kernels/test_forward.py

mutations: $(READY) ## break the cache on purpose: each mutation turns a test red
	@$(BIN)/python -m tests.mutations.run

matrix: ## tests with other versions of torch, triton and diffusers; make matrix CORNER=oldest [TESTS=--all] [PYTHON=python3.12]
	@test -n "$(CORNER)" || { echo "which corner? make matrix CORNER=oldest; docs/versions.md has them"; exit 2; }
	@$(PYTHON) .ci/matrix.py "$(CORNER)" $(TESTS)

gpu: $(GPU_READY) ## a day with a GPU: tests, benchmarks, plots; make gpu OUT=folder [DEVICE=cpu] [PYTHON=python3]
	@test -n "$(OUT)" || { echo "where to? make gpu OUT=folder"; exit 2; }
	@$(GPU_PYTHON) -m benchmarks.gpu_day --device $(DEVICE) --out "$(OUT)"

check: $(READY) ## format, lint, types, direction of imports, workflows
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy --python-version 3.12 --platform win32 ipa_kernels
	@$(BIN)/mypy --python-version 3.13 --platform darwin ipa_kernels
	@$(BIN)/lint-imports
	@$(BIN)/actionlint -shellcheck= -pyflakes=
	@$(BIN)/zizmor --offline --quiet .github

format: $(READY) ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY) ## compare the attention core and a generation with stock, after the correctness gate
	@$(BIN)/python -m benchmarks.attention
	@$(BIN)/python -m benchmarks.generation

bench-micro: $(READY) ## the micro-benchmarks that CI can track
	@$(BIN)/python -m pytest tests/benchmarks/test_micro_benchmarks.py --benchmark-only

compile-report: $(READY) ## compile the launch table for every GPU, without one, and count (half an hour on two cores); [OUT=folder] [ENTRIES=--quick]
	@mkdir -p "$(or $(OUT),.)"
	@$(BIN)/python -m benchmarks.compile_report $(ENTRIES) $(if $(OUT),--json "$(OUT)/compile-report.json")
	@$(BIN)/python -m benchmarks.growth $(if $(OUT),--json "$(OUT)/growth.json")

clean: ## remove .venv and caches
	@rm -rf $(VENV) $(VENV)-* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks

# Targets: env (makes .venv), demo, test, equivalence (all layouts against one rank), torture (kills a run 20 times),
# lint, type, format; gpu-first-light, gpu-1, gpu-2, gpu-3 (docs/gpu.md): on a machine with a GPU, with PYTHON=python3 or
# .venv, report in OUT.
#
# torch: on Linux without nvidia-smi the CPU build is demanded by name, so that pip never fetches CUDA libraries.  pip
# must then be able to see it: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, or PIP_FIND_LINKS=<folder with
# the wheel>.  TORCH=torch==2.13.0 takes whatever build the index offers.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
JOBS ?= 2# files of tests at a time; some start up to eight processes
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif

OUT ?= runs/gpu
# a given PYTHON, else .venv where there is one: GPU machines bring their own torch
GPU_PYTHON := $(if $(filter command environment,$(origin PYTHON)),$(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))

.PHONY: env demo demo-long test torture equivalence lint type format gpu-first-light gpu-1 gpu-2 gpu-3

env: $(STAMP)

$(STAMP): setup.py constraints.txt $(wildcard kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH)" -e ".[dev]" \
		|| { echo "make env: pip failed; if it found no $(TORCH), see the top of the Makefile" >&2; exit 1; }
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: env
	$(BIN)/python tools/run_demo.py --force

demo-long: env
	$(BIN)/python tools/run_demo.py --force --out runs/demo_long --config examples/configs/demo_long.yaml --iters 3075 --variety 1

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

torture: env
	$(BIN)/python -m tests.torture.torture --kills 20

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: env
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

equivalence: env
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 8 tools/check_equivalence.py

gpu-first-light gpu-1 gpu-2 gpu-3:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON) tools/gpu_check.py $(@:gpu-%=%) --out "$(OUT)" $(GPU_ARGUMENTS)

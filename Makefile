# What a person would type. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Entry points of Ray and MLflow are looked up on PATH; both phone home unless told not to.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false

.PHONY: help setup quickstart test check test-gpu bench serve stack mlflow k8s tree clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): torch, triton, ray, mlflow, transformers and what they need (about 2 GB with a CPU build of torch; a few minutes)."
	$(PYTHON) -m venv $(VENV)
	@echo "[1/3] torch and triton"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt torch==2.13.0 triton
	@echo "[2/3] ray, mlflow, pyarrow, transformers, test tools"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e '.[platform,server,eval,dev]'
	@echo "[3/3] checking that it fits together"
	@$(BIN)/python -m pip check
	@touch $(READY)

quickstart: $(READY) ## the whole road on this machine: data, pretrain, SFT, evaluate, register, answer
	@$(BIN)/python -m jobs.quickstart

# One thread for each process: those of several would spin for cores that others have.
test: $(READY) ## all tests that need no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY) ## style, types, import contracts, house laws
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_house.py

test-gpu: ## tests that need a CUDA GPU, with the python that is on PATH
	@PYTHONPATH=platform:kernels:.:$$PYTHONPATH $(PYTHON) -m pytest -m gpu -n $${N:-4} -p no:benchmark tests/kernels tests/platform/serve tests/platform/train

bench: ## measure the kernels on this machine's GPU and rewrite kernels/benchmarks/RESULTS.md
	@PYTHONPATH=platform:kernels:.:$$PYTHONPATH $(PYTHON) kernels/benchmarks/bench.py $(ARGS)

serve: $(READY) ## serve the quickstart's champion: OpenAI's API and a chat page, until Ctrl-C
	@$(BIN)/python -m deployments.serve --config deployments/configs/quickstart.yaml --set http_options.port=$${PORT:-8000}

stack: $(READY) ## a whole cluster on this machine: Ray, MLflow on PostgreSQL, S3, until Ctrl-C
	@$(BIN)/python -m jobs.stack

mlflow: $(READY) ## browse the experiments in the local store
	@$(BIN)/python -m jobs.experiments --port $${PORT:-5000}

k8s: $(READY) ## render Serve's configuration and the jobs into k8s/overlays
	@$(BIN)/python -m jobs.kubernetes render

tree: $(READY) ## rewrite README's file tree from the files' captions
	@$(BIN)/python tests/house_tree.py

clean: ## remove .venv and everything that runs wrote
	rm -rf $(VENV) runs

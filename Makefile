# Everything a user types. Only Python 3.11+ and a package index are needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup run test-fast test test-all lint bench faults gpu gpu-dry smollm2 ui clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

setup: $(READY)  ## make .venv and install into it

run: setup  ## the quickstart: data to scores in a few minutes
	$(BIN)/python flows/sft_flow.py run

# The order of files stays: by default the plugin keeps those with few tests, which take longest, for the end.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup  ## the tests that start no process, in two and a half minutes
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m 'not slow and not long'

test: setup  ## all tests but the long ones, in twelve minutes
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m 'not long'

test-all: setup  ## every test, as CI runs them
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

lint: setup  ## ruff, mypy, and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

bench: setup smollm2  ## the benchmarks, each against what one would use instead
	for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

faults: setup  ## kills, flipped bits, full disks, machines in turn, bad input: what becomes of runs, in 25 minutes
	$(BIN)/python -m tests.campaign

gpu: setup  ## what needs a GPU, measured and checked in eight minutes on one (benchmarks/gpu.py)
	$(BIN)/python benchmarks/gpu.py

gpu-dry: setup  ## the same on a CPU with tiny models: whether it runs
	$(BIN)/python benchmarks/gpu.py --device cpu --seconds 180

smollm2: setup  ## weights and data of configs/smollm2-135m.yaml, without a hub
	$(BIN)/python configs/smollm2/get_model.py
	$(BIN)/python configs/smollm2/get_data.py

ui:  ## the Metaflow UI in containers, on http://127.0.0.1:8083 (deploy/metaflow-ui/README.md)
	mkdir -p .metaflow
	SFT_ROOT='$(CURDIR)' docker compose --file deploy/metaflow-ui/compose.yaml up --detach --wait

clean:  ## remove .venv; the store and the runs stay
	rm -rf .venv

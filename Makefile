# Targets make their own .venv with pip. constraints.txt pins torch, so that a CPU machine gets the CPU build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench clean

demo: $(VENV)/installed
	$(BIN)/openunirl train tiny-showo-sft --output-dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/oracle.py --model tiny-showo
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/janus_sampling.py --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/showo_sampling.py --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/answering.py --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/answering.py --family janus --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/answering.py --each 4 --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_step.py --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/common_prefix.py --short
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/profile_rollout.py --short --out $$(mktemp --suffix .png)
	$(BIN)/python benchmarks/processes.py --short
	$(BIN)/python benchmarks/plan_check.py --short

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

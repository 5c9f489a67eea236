PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint bench clean

demo: $(STAMP)
	$(BIN)/lightning-slim fit --config configs/digits_granger_prune.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(STAMP)
	OMP_NUM_THREADS=1 PROPERTY_EXAMPLES=200 $(BIN)/python -m pytest -n 2 -m ""

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_overhead.py
	$(BIN)/python benchmarks/bench_latency.py
	$(BIN)/python benchmarks/bench_compensation.py
	$(BIN)/python benchmarks/bench_scores.py digits-fnn digits-gru --out build/scores
	$(BIN)/python benchmarks/bench_recurrent.py
	$(BIN)/python benchmarks/bench_statistics.py
	$(BIN)/python benchmarks/bench_inputs.py
	$(BIN)/python benchmarks/bench_masks.py
	$(BIN)/python benchmarks/bench_start.py
	$(BIN)/python benchmarks/bench_penalties.py
	$(BIN)/python benchmarks/bench_sensitivity.py
	$(BIN)/python benchmarks/bench_recovery.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/bench_surgery.py

# The constraints are a tested, pinned set: any looser request for torch may pull gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)

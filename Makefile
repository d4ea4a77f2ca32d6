# Two commands need nothing but Python 3.11+, a C++ compiler and a package index:
#   make demo    trains, exports, indexes and searches, and writes a report
#   make test    runs every check and the whole test suite
# DCKT_DATA, where set, names a folder of real corpora that both then use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint types imports pytest bench-transfer bench-synthetic bench-ablations bench-selection bench-training bench-evaluation bench-export bench-search bench-reliability clean

demo: $(VENV)/.export
	$(BIN)/python docs/examples/demo.py

test: check pytest

check: lint types imports

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadscope --max-worker-restart 0

bench-transfer: $(VENV)/.export
	$(BIN)/python benchmarks/transfer.py

bench-synthetic: $(VENV)/.export
	$(BIN)/python benchmarks/synthetic.py

bench-ablations: $(VENV)/.export
	$(BIN)/python benchmarks/ablations.py

bench-selection: $(VENV)/.export
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/selection.py

bench-training: $(VENV)/.export
	$(BIN)/python benchmarks/training.py

bench-evaluation: $(VENV)/.dev
	$(BIN)/python benchmarks/evaluation.py

bench-export: $(VENV)/.dev
	$(BIN)/python benchmarks/export.py

bench-search: $(VENV)/.dev,bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/search.py

bench-reliability: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reliability.py

# A stamp file for each set of extras, so that a second call installs nothing.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

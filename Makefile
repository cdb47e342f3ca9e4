# make demo    installs, makes the demo data, trains the quickstart through Ray and DeepSpeed
# make test    installs, runs the fast tests
# make check   lint, types and import contracts
# make test-long   the tests marked slow or chaos
# make chaos       every fault of docs/reliability.md, made to happen and measured; make chaos-full with all seeds and the long soak
# make peers   the environments of the projects that benchmarks/data_loading.py compares with
# make test-triton36   the kernels' tests under the oldest triton that they work with

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST := not slow and not chaos and not peers and not gpu
LONG := (slow or chaos) and not peers and not gpu
TRITON36 := $(VENV)/triton-3.6

.PHONY: demo test test-long chaos chaos-full test-triton36 peers check format install clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmscale needs Python 3.11 or newer; give one with: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/mmscale data demo demo-data
	$(BIN)/mmscale launch quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -m "$(FAST)"

test-long: $(STAMP)
	$(BIN)/python -m pytest -m "$(LONG)"

chaos: $(STAMP)
	$(BIN)/python benchmarks/reliability.py --scale standard

chaos-full: $(STAMP)
	$(BIN)/python benchmarks/reliability.py --scale full

# Beside the environment, not in it: found first through PYTHONPATH. Its interpreter needs an older numpy, too.
$(TRITON36)/.installed: $(STAMP)
	rm -rf $(TRITON36)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON36) triton==3.6.0 numpy==2.3.5
	@touch $@

# In two processes: attention takes as long as all others.
test-triton36: $(TRITON36)/.installed
	export PYTHONPATH=$(CURDIR)/$(TRITON36); \
	$(BIN)/python -c 'import triton; assert triton.__version__ == "3.6.0", triton.__version__' || exit 1; \
	run() { $(BIN)/python -m pytest -m "$(FAST)" -k "under_the_interpreter or h100" "$$@"; }; \
	run tests/test_triton_attention.py & attention=$$!; \
	run tests/test_compiled.py $(filter-out %_attention.py,$(wildcard tests/test_triton_*.py)); others=$$?; \
	wait $$attention && exit $$others

# One environment for each project that benchmarks/data_loading.py compares with: their dependencies break each other's.
# PEERS="webdataset" makes only that one. What torch needs beside the pinned packages depends on which build it is.
PEERS ?= webdataset energon

peers: $(PEERS:%=.venv-peers/%/.installed)

.venv-peers/%/.installed: benchmarks/peers/%.txt
	@start=$$(date +%s); set -e; rm -rf $(@D); $(PYTHON) -m venv $(@D); \
	$(@D)/bin/python -m pip install --quiet -r $<; touch $@; \
	echo "$*: $$(du -sm $(@D) | cut -f1) MB in $$(($$(date +%s) - start)) s"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

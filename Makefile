# make demo    installs, makes the demo data, trains the quickstart through Ray and DeepSpeed
# make test    installs, runs the fast tests
# make check   lint, types and import contracts
# make test-long   the tests marked slow or chaos

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST := not slow and not chaos and not peers and not gpu
LONG := (slow or chaos) and not peers and not gpu

.PHONY: demo test test-long check format install clean
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

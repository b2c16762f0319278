# `make demo` and `make test` are all that a newcomer needs: both build .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Test workers x threads a worker = cores: more threads than cores slow torch down tenfold.
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell test $(CORES) -lt 4 && echo $(CORES) || echo 4)
THREADS := $(shell expr $(CORES) / $(WORKERS) \| 1)

.PHONY: help demo test bench docs lint format clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP) ## adapt the shipped tiny model to a new subject and draw it before and after
	$(BIN)/python scripts/demo.py $(ARGS)

test: $(STAMP) ## run the tests (WORKERS=1 for one process; ARGS='-k adapters' to choose)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(STAMP) ## measure us and the peers side by side, half an hour (ARGS='--rows unet encode' to choose)
	$(BIN)/python benchmarks/bench.py $(ARGS)

docs: $(STAMP) ## build the manual into site/, pages to open in a browser
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo 'site/index.html'

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tests leave behind; outputs and logs stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	"error: Python 3.10 or newer is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.11 $(MAKECMDGOALS)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	touch $@

# Everything a checkout needs: `make` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-ui screenshots lint chaos bench clean

help: ## lists the targets
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(STAMP) ## installs everything into .venv

demo: $(STAMP) ## trains, kills a training, resumes it, and proves that nothing differs
	$(BIN)/python experiments/demo.py

test: lint ## ruff, mypy and pytest
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 25

test-ui: $(STAMP) ## looks at MLflow's pages in Chromium, and keeps what it sees in build/screenshots
	$(BIN)/python -m pytest -m ui --durations 5 tests/test_ui.py

screenshots: test-ui ## the same, and renews the pictures in docs/images
	$(BIN)/python -m tests.screenshots

lint: $(STAMP) ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(STAMP) ## kills processes at random instants, for minutes
	$(BIN)/python -m pytest -m chaos --timeout 1800

bench: $(STAMP) ## measures what tracking costs a training, for a quarter of an hour, or more if others use the machine
	$(BIN)/python -m benchmarks

clean: ## removes what was installed, built and cached; never your runs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find tracked tests experiments benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# uv installs in half a minute what takes pip several. It reads no pip.conf, so where it
# cannot be had or reaches no registry, pip gets its turn. Like pip it shall compile: where
# PYTHONDONTWRITEBYTECODE is set, every process would compile torch and MLflow anew.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11; try: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment; try: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@uv="$(BIN)/python -m uv pip install --compile-bytecode --python $(BIN)/python"; pip="$(BIN)/python -m pip install"; \
	  set -x; \
	  { $$pip --quiet uv && $$uv --quiet -r requirements.lock; } || $$pip --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

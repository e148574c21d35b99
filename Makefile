# Everything runs in .venv, made on the first call. PYTHON=python3.12 chooses the Python it is made with.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VERSION_OF = -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
VENV_VERSION := $(shell $(BIN)/python $(VERSION_OF))

# The environment is made anew where there is none that works, or where PYTHON names another version.
ifdef PYTHON
ifneq ($(VENV_VERSION),$(shell "$(PYTHON)" $(VERSION_OF)))
REMAKE := remake
endif
endif
ifeq ($(VENV_VERSION),)
REMAKE := remake
endif

export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help install lint format typecheck test examples demo benchmark clean remake

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make .venv and install the package with its tools

# Without a stamp the last installation was cut short, so the environment is made anew.
$(STAMP): pyproject.toml $(REMAKE)
	@if [ -n "$(REMAKE)" ] || [ ! -e $(STAMP) ]; then \
	  python="$(PYTHON)"; \
	  supported() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }; \
	  for candidate in python3 python3.13 python3.12 python3.11; do \
	    if [ -z "$$python" ] && supported "$$candidate" 2>/dev/null; then python="$$candidate"; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make: no Python 3.11 or newer found. Install one, or name one: make PYTHON=/path/to/python3" >&2; exit 1; \
	  elif ! supported "$$python"; then \
	    echo "make: PYTHON=$$python does not run or is older than 3.11. Name another." >&2; exit 1; \
	  elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make: $$python lacks 'venv' or 'ensurepip'. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	  fi; \
	  echo "make: creating $(VENV) with $$python"; \
	  rm -rf $(VENV) && "$$python" -m venv $(VENV) || exit 1; \
	fi
	@rm -f $(STAMP)
	@echo "make: installing the package and its tools (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## format the source and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(STAMP)  ## check the types
	$(BIN)/mypy

test: lint typecheck  ## lint, types, unit tests, doctests, examples, content of the wheel
	$(BIN)/pytest

examples: $(STAMP)  ## run every example in its short form
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && for script in $(wildcard examples/*.py); do \
	  echo "$$script --smoke-test"; \
	  $(BIN)/python "$$script" --smoke-test --out "$$out" || exit 1; \
	done

demo: $(STAMP)  ## train, compare and draw; writes tables and pictures to results/
	$(BIN)/python examples/compare.py --out results

benchmark: $(STAMP)  ## time side by side; each script prints a ratio
	@for script in $(wildcard benchmarks/*.py); do \
	  echo "$$script"; \
	  $(BIN)/python "$$script" || exit 1; \
	done

clean:  ## remove the environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

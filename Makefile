# Two commands: `make demo` and `make test`. Both make the project's own environment in .venv the first time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types clean help

help:
	@echo "make demo   make the environment, train a sparse network on real data, show the result (minutes)"
	@echo "make test   make the environment, run the tests"
	@echo "make lint   style;  make types   types;  make clean   remove the environment"

demo: $(READY)
	@$(BIN)/gossamer train fashion_mnist --fallback digits
	@echo "to go on: source $(BIN)/activate, then gossamer recipes, or gossamer train --help"

test: $(READY)
	@$(BIN)/python -m pytest -q

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make demo PYTHON=/path/to/python3"; exit 1; }
	@case "`$(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null`" in \
	  True) ;; \
	  False) echo "make: '$(PYTHON)' is `$(PYTHON) --version`; gossamer needs 3.11 or newer: make demo PYTHON=/path/to/python3"; exit 1;; \
	  *) echo "make: '$(PYTHON)' is no Python; name one of 3.11 or newer: make demo PYTHON=/path/to/python3"; exit 1;; \
	esac
	@# Begin anew where the making was interrupted or the Python behind it is gone: without pip, or without pyvenv.cfg,
	@# and then pip would install into the Python that the environment was made from.
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1 || { echo "Making the environment in $(VENV) ..."; $(PYTHON) -m venv --clear $(VENV) || { echo "make: Python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }; }
	@echo "Installing gossamer and what it needs (torch is large; a minute or more) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots,vision]' 2>$(VENV)/pip.log \
	  || { cat $(VENV)/pip.log; echo; echo "make: the installation failed (above). Without a network, pip cannot reach the package index: connect, or point pip at a mirror (PIP_INDEX_URL), and run make again."; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV)

# From a fresh clone, with only Python 3.11, pip and make:
#
#     make train    set up .venv, then train the default network on the embedded digits
#     make test     set up .venv with every optional library, then run every check
#
# Set-up is done once and again only when pyproject.toml or constraints.txt change: the stamps .venv/.train and
# .venv/.test remember it.

PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# One BLAS thread per test process: $(JOBS) processes with a pool for all cores each would fight for them.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal

# Python cannot find itself in an environment that has no PATH.
export PATH ?= /usr/local/bin:/usr/bin:/bin

.NOTPARALLEL:
.PHONY: train test test-slow lint format clean help

help:
	@sed -n 's/^#     //p' Makefile

train: $(VENV)/.train
	$(BIN)/convolt train

test: lint
	$(PYTEST)

test-slow: $(VENV)/.test
	$(PYTEST) -m slow --timeout=1800

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing convolt into $(VENV)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing convolt with every optional library into $(VENV) (minutes, once)"
	@$(INSTALL) --editable '.[dev,torch,mpi,export]'
	@touch $(VENV)/.train $@

# Debian's python3 comes without ensurepip unless python3-venv is installed; its pip can then fill the environment.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "convolt needs Python 3.11 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --without-pip $(VENV) \
			&& $(PYTHON) -m pip --disable-pip-version-check --quiet --python $(BIN)/python install pip; } \
		|| { echo "cannot make $(VENV); run: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

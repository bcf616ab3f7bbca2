# make demo: the whole job on real text. make test: lint, types, tests. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Dependencies are installed anew only when what is asked for changed.
READY := $(VENV)/.ready

.PHONY: setup demo test test-gpu lint types unit clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	# torch alone first: asked for by its exact version, a package index may offer a build for this machine.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/moesaic run experiments/quickstart.yaml

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A type checker looks for folders where Python is told of a mapping: one of links shows it the installed layout.
LINKS := build/links/moesaic
FLOORS := kernels search_spaces supernet nas

types: setup
	@mkdir -p $(LINKS)
	@for part in $(FLOORS); do ln -sfn ../../../$$part $(LINKS)/$$part; done
	@for part in __init__.py py.typed; do ln -sfn ../../../moesaic/$$part $(LINKS)/$$part; done
	$(BIN)/pyright

# Two processes, a file each at a time, so that the whole takes two cores less than 15 minutes.
unit: setup
	$(BIN)/pytest -n 2 --dist loadfile

# The same properties on a GPU, where kernels are compiled instead of interpreted.
test-gpu: setup
	$(BIN)/pytest tests/kernels -m "gpu or not gpu"

clean:
	rm -rf $(VENV) build dist *.egg-info

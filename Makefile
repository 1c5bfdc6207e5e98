# VENV may point at an environment that is there already; without it one is made in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.nni_topo-ready
export OMP_NUM_THREADS ?= 1
# the tests in a process per core, in four at most: each takes 1.5 GB; `make test SPREAD=` runs them in one
SPREAD ?= --numprocesses logical --maxprocesses 4 --dist worksteal
# for `make test-lowest`: the oldest Python that the package takes, where it is there
LOWEST := .venv-lowest
PYTHON_LOWEST ?= $(shell python3.10 --version > /dev/null 2>&1 && echo python3.10 || echo $(PYTHON))
# for `make upstream`: NNI is a checkout of NNI's repository, FASHION_MNIST a folder with the four idx files, UPSTREAM any
# further options of benchmarks/upstream/run.py
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
UPSTREAM ?=

.PHONY: demo test test-all test-lowest lint upstream checkout clean

demo: $(READY)
	$(BIN)/nni-topo demo --out demo

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD)

test-all: $(READY)
	$(BIN)/python -m pytest $(SPREAD) -m "slow or not slow"

test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON_LOWEST) -m venv $(LOWEST)
	$(LOWEST)/bin/python tools/lowest.py test > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[test]' --constraint $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest $(SPREAD)

lint: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

upstream: checkout $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[upstream]'
	$(BIN)/python benchmarks/upstream/run.py --nni '$(NNI)' --fashion-mnist '$(FASHION_MNIST)' --out upstream.json $(UPSTREAM)

checkout:
	@test -d '$(NNI)/test/algo/compression' || \
	  { echo "make upstream NNI=DIR: DIR must be a checkout of NNI's repository at v3.0, got '$(NNI)'"; exit 2; }

$(READY): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv $(LOWEST) build dist demo upstream.json *.egg-info

# VENV may point at an environment that is there already; without it one is made in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.nni_topo-ready
export OMP_NUM_THREADS ?= 1
# for `make upstream`: NNI is a checkout of NNI's repository, FASHION_MNIST a folder with the four idx files, UPSTREAM any
# further options of benchmarks/upstream/run.py
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
UPSTREAM ?=
# for `make mutants`: options of benchmarks/mutants/run.py, such as --minutes 30
MUTANTS ?=

.PHONY: demo test test-all lint mutants upstream checkout clean

demo: $(READY)
	$(BIN)/nni-topo demo --out demo

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

mutants: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	nice $(BIN)/python benchmarks/mutants/run.py $(MUTANTS)

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
	rm -rf .venv build dist demo upstream.json *.egg-info

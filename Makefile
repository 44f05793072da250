# Everything one does here: make run, make test, make quick, make lint, make bench, make docs.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
RUNS := $(VENV)/.installed-run
STAMP := $(VENV)/.installed
SITE := $(VENV)/.installed-docs

.PHONY: run test quick lint bench fuzz docs clean

run: $(RUNS)  ## make videos with the embedded model, into out/movd
	$(BIN)/blockstream run movd.yaml --out out/movd --overwrite

# Beside other work, threads that spin while they wait take the cores of those they wait for.
test quick: export OMP_WAIT_POLICY ?= PASSIVE

test: $(STAMP)  ## run the test suite in two processes; WORKERS= in one
	$(BIN)/python -m pytest -q $(if $(WORKERS),-n $(WORKERS))

quick: $(STAMP)  ## the pure core and the engine on fakes, a tenth of the examples: seconds
	BLOCKSTREAM_QUICK=1 $(BIN)/python -m pytest -q -m 'not slow' tests/plan tests/engine

lint: $(STAMP)  ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks that take minutes; the full-size ones are scripts in benchmarks/
	$(BIN)/python -m pytest benchmarks -q --benchmark-only
	$(BIN)/python -m benchmarks.policies

fuzz: $(STAMP)  ## a million damaged files for each parser of checkpoint headers: ten minutes
	$(BIN)/python -m tests.support.mutations

docs: $(SITE)  ## the documentation as a site, build/site/index.html; pages agree with the code, links lead somewhere
	$(BIN)/python -m pytest -q tests/test_hooks.py tests/test_docs.py tests/test_docs_code.py tests/test_docs_claims.py
	$(BIN)/python docs/stage.py build/pages
	$(BIN)/zensical build --strict

# Python 3.11 or later, and nothing else, is needed to get here. A run needs less than the tests do.
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is %d.%d; name one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# setuptools warns of every editable install whose packages lie in several folders
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[movd,report]'
	touch $(RUNS)

# What tests, checks and benchmarks need beside it.
$(STAMP): $(RUNS)
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# What builds the site, for who builds it.
$(SITE): $(STAMP)
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(SITE)

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Every target sets up what it needs; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := .venv-docs

.PHONY: setup demo test test-all check format bench docs dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## 2,000 orders through a tiny trained model under P2->T2, the score, and the page of the run
	mkdir -p out
	$(BIN)/seesaw run --model examples/extract/model --input examples/extract/orders.jsonl \
	  --output out/orders.jsonl --plan 'P2->T2' --ranks 2 --device cpu \
	  --device-memory 12MiB --host-kv 40MiB --chunk 1024 --force
	$(BIN)/python examples/extract/score.py out/orders.jsonl examples/extract/orders.expected.jsonl --minimum 0.98
	$(BIN)/seesaw report out/orders.run

test: setup  ## the suite without what is slow or needs a GPU
	$(BIN)/python -m pytest

test-all: setup  ## everything this machine can run
	$(BIN)/python -m pytest -m 'not gpu'

check: setup  ## format, lint, types, import directions, spelling
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py
	$(BIN)/codespell src tests docs examples README.md CHANGELOG.md CONTRIBUTING.md

format: setup
	$(BIN)/ruff format src tests examples benchmarks
	$(BIN)/ruff check --fix src tests examples benchmarks

bench: setup  ## plans of two ranks on a small model of random weights, in alternating runs, with their floors
	$(BIN)/seesaw bench --shape tiny --workload 'short decode' --scale 0.5 --plans 'P2->T2 T2 P2 D2'

docs: $(DOCS)/.installed  ## the site, in out/site; the reference is read from the sources, so that torch is not needed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo "The site is in out/site/index.html"

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $$($(PYTHON) -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

dist: setup  ## wheel and sdist, in dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) $(DOCS) out dist

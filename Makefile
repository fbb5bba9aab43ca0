# The only tools a fresh machine needs are make and Python >= 3.11.
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: install run test test-all test-slow mutants kills bench lint requirements clean

# The environment alone.
install: $(INSTALLED)

# Environment, embedded data, masked image modelling, semi-supervised training, evaluation, pictures.
run: $(INSTALLED)
	$(PY) -m mira_u_jax.main --config=configs/synthetic.py$(ARGS) --workdir=$(or $(WORKDIR),runs/quickstart)

# The fast tests, all of them, and the slow ones alone; a few files at a time, as compiling keeps one core busy.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(INSTALLED)
	$(PY) $(PYTEST)

test-all: $(INSTALLED)
	$(PY) $(PYTEST) -m "slow or not slow"

test-slow: $(INSTALLED)
	$(PY) $(PYTEST) -m slow $(ARGS)

# Deliberate faults, each of which a test must catch.
mutants: $(INSTALLED)
	$(PY) tests/mutants.py $(ARGS)

# N runs killed at random moments and ten told to leave, all of which must end with the bits of one left alone.
kills: $(INSTALLED)
	$(PY) tests/kills.py --kills=$(or $(N),30) $(ARGS)

# The speed table, beside a PyTorch trainer of the same step, which is installed for it.
bench: $(INSTALLED)
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check torch
	$(PY) -m benchmarks.bench $(if $(JSON),--json=$(JSON)) $(if $(GRID),--grid=$(GRID)) $(ARGS)

# Style, and the type hints.
lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m mypy

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; say make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# After a change of pyproject.toml (needs uv): one file with hashes and without hosts, for every Python from 3.11 on.
requirements:
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --fork-strategy fewest \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.txt

clean:
	rm -rf .venv build *.egg-info

# Everything here makes its own environment first: it needs make, Python 3.11 or newer, and a network the first time.
# PYTHON=...       the Python to use (default: python3.11, else python3)
# VENV_CACHE=...   where environments are kept, shared by clones (default: ~/.cache/fma2d); empty: in the clone

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fma2d
RUN = .venv/bin/python
# Two processes of one thread each: two threads beside another busy process are many times slower than one.
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal --durations=15

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-clients lint types docs clean venv

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12
	@echo; sed -n 's/^# \([A-Z_]*=\)/\1/p' Makefile

demo: venv  ## show what fma2d does
	$(RUN) tools/demo.py

test: lint  ## style, and the tests without the slow ones
	$(TEST) -m "not slow"

test-all: lint  ## style, and all tests
	$(TEST)

# An environment of its own, which sees the packages of .venv (torch above all) and adds those of the clients.
test-clients: venv  ## the libraries that take a backbone (docs/works_with.md), each with this one
	@.venv/bin/python -m venv .venv-clients
	@.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > "$$(.venv-clients/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth"
	.venv-clients/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/clients.txt
	OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)" .venv-clients/bin/python -m pytest -q tests/test_clients.py

lint: venv  ## style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: venv  ## the types of the library, by mypy, which the clone's environment gets the first time
	@$(RUN) -c "import mypy" 2>/dev/null || $(RUN) -m pip install -q mypy
	$(RUN) -m mypy

docs: venv  ## the documentation, into site/; stops at any warning
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:  ## remove what tests and builds leave; the environment stays
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

venv:  ## the environment .venv, nothing else
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" tools/make_venv.py --cache "$(VENV_CACHE)" requirements/dev.txt requirements/no-deps.txt

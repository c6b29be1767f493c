# Every target sets up what it needs by itself: on a bare machine with Python 3.10-3.13, `make demo` is enough.
.DEFAULT_GOAL := help
SHELL  := /bin/sh
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
OUT    ?= runs/demo
# One thread a process, and no windows:
QUIET  := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MPLBACKEND=agg
# The first Python 3.10-3.13 that can make virtual environments; `make PYTHON=/path/to/python demo` overrides it.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.10 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

.PHONY: help setup demo test test-all check docs lab pins clean

help:  ## this list
	@echo "make TARGET    (set-up is automatic; the first call installs PyTorch and takes a few minutes)"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

$(STAMP): setup.py settings.ini constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "mep needs Python 3.10-3.13 with venv (Debian: apt install python3-venv). None was found; name one: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) with `$(PYTHON) --version`: PyTorch is a large download, the first time takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## make .venv with everything in it (constraints.txt pins every version)

demo: $(STAMP)  ## the main job: train, quantize to INT8, export, measure; ends with a table and runs/demo/report.html
	@$(BIN)/mep run --data shapes --out $(OUT)

test: $(STAMP)  ## run every notebook, then every test, one process per core; what is marked slow is left out
	@$(QUIET) $(BIN)/python tools/notebooks.py --jobs $(JOBS)
	@$(QUIET) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow" tests

test-all: $(STAMP)  ## the same with all that is slow
	@$(QUIET) $(BIN)/python tools/notebooks.py --jobs $(JOBS) --flags slow
	@$(QUIET) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile tests

check: $(STAMP)  ## clean -> export changes nothing; outputs are of today's code and fit to publish; README is fresh; ruff
	@$(BIN)/python tools/check.py
	@$(BIN)/ruff check --quiet nbs mep tests benchmarks tools setup.py
	@$(BIN)/ruff format --check --quiet nbs tests benchmarks tools setup.py && echo "ruff: ok"

docs: $(STAMP)  ## build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is not installed. Get it from https://quarto.org/docs/get-started/ and run 'make docs' again; the chapters also render on GitHub and in 'make lab'."; exit 1; }
	@$(BIN)/nbdev_docs && $(BIN)/python tools/readme.py

lab: $(STAMP)  ## read and run the chapters in JupyterLab
	@$(BIN)/jupyter lab nbs

pins: $(STAMP)  ## rewrite constraints.txt with today's versions, for every supported Python (needs uv)
	@command -v uv >/dev/null || { echo "uv is not installed: python3 -m pip install uv"; exit 1; }
	@{ echo "# Exact versions that the tests run with, for every supported Python. Made by 'make pins'; what mep asks for stands in settings.ini."; \
	   uv pip compile --quiet --universal --python-version 3.10 --fork-strategy requires-python --extra dev setup.py --no-header --no-annotate; } > constraints.new \
	 && mv constraints.new constraints.txt

clean:  ## remove what was built (.venv, runs, _proc, _docs)
	rm -rf $(VENV) runs _proc _docs build *.egg-info

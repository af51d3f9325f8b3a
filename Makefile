# Everything a fresh clone needs. `make quickstart` and `make test` work from nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

MINUTES ?= 10

.PHONY: help setup quickstart finetune chaos test test-all lint clean

help:
	@echo "make setup       a virtual environment in $(VENV) with pinned dependencies"
	@echo "make quickstart  train a small language model on 8 simulated devices, with a report"
	@echo "make chaos       kill processes of a run at random for MINUTES ($(MINUTES)), and compare it with one left alone"
	@echo "make finetune    tune that model (trained first where there is none) on docstrings and functions, by LoRA"
	@echo "make test        all tests but the slow ones;  make test-all  all of them"
	@echo "make lint        ruff"

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

setup: $(VENV)/.done

quickstart: setup
	$(BIN)/meshwright train quickstart

chaos: setup
	$(BIN)/meshwright bench chaos --minutes $(MINUTES)

# A base, as a Hugging Face directory; an adapter on it; both as PEFT and transformers load them, compared where these are.
finetune: setup
	test -e runs/quickstart/report.html || $(BIN)/meshwright train quickstart
	test -e runs/base/config.json || $(BIN)/meshwright checkpoint export runs/quickstart runs/base
	$(BIN)/meshwright train finetune/docstrings model.from=runs/base
	rm -rf runs/docstrings/adapter runs/docstrings/merged
	$(BIN)/meshwright adapter export runs/docstrings runs/docstrings/adapter
	$(BIN)/meshwright adapter merge runs/docstrings runs/docstrings/merged
	$(BIN)/meshwright bench interop runs/base runs/docstrings

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv312 build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

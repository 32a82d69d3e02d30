# Every target sets up what it needs: an environment, torch, the compiled extension, the tools.
#
# Environment: the active one (venv or conda) where it has torch 2.11 or newer, else .venv, which is
# made here with the first Python 3.11 or newer; `make PYTHON=python3.12 ...` names another.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all cpp-test cpp-test-sanitize linters lint format bench study \
  clean cmake

# A bare "torch" would fetch gigabytes of CUDA packages.
TORCH := torch==2.13.0
# The same versions as in .pre-commit-config.yaml.
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
NEW_ENOUGH := import sys; from importlib.metadata import version; \
  v = tuple(int(n) for n in version("torch").split("+")[0].split(".")[:2]); \
  sys.exit(sys.version_info < (3, 11) or v < (2, 11))
has_torch = $(1) -c '$(NEW_ENOUGH)' 2>/dev/null

ACTIVE := $(filter-out $(CURDIR)/.venv,$(or $(VIRTUAL_ENV),$(CONDA_PREFIX)))
ENV := $(if $(ACTIVE),$(shell $(call has_torch,$(ACTIVE)/bin/python) && echo $(ACTIVE)))
ENV := $(or $(ENV),.venv)
PY := $(ENV)/bin/python
# In the environment, so that it goes with it; by clone, since several clones may share one.
INSTALLED := $(ENV)/moyu-installed$(if $(filter-out .venv,$(ENV)),$(subst /,-,$(CURDIR)))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/* moyu_ext/*)
CXX_FILES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh moyu_ext/*.h \
  moyu_ext/*.cpp benchmarks/*.h benchmarks/*.cpp benchmarks/*.cu benchmarks/*.cuh tests/cpp/*.h \
  tests/cpp/*.cpp)

help:
	@echo "make demo       calibrate, patch and compare on a small model that ships with the project"
	@echo "make test       the tests, a few minutes"
	@echo "make test-all   also the slow ones, and the C++ tests, plain and with sanitizers"
	@echo "make lint       ruff, mypy, clang-format; make format applies them"
	@echo "make bench      speed of one MLP at the size of LLaMA-2-7B"
	@echo "make study      the numbers of docs/findings.md, about half an hour, into studies/"
	@echo "make clean      remove what was built (.venv stays)"

demo: setup
	@$(PY) -m moyu_ext demo

test: setup
	$(PY) -m pytest

test-all: setup cpp-test cpp-test-sanitize
	$(PY) -m pytest -m "slow or not slow"

bench: setup
	$(PY) -m moyu_ext bench mlp

STUDIES ?= studies
study: setup
	@[[ -z "$$MOYU_DATA" ]] || $(PY) -m pip install --quiet $$($(PY) -c "import importlib.metadata as m; \
	  print(*(r.split(';')[0] for r in m.requires('moyu_ext') if 'eval' in r))")
	@PYTHON=$(abspath $(PY)) tools/study.sh $(STUDIES)

setup: $(INSTALLED)

$(INSTALLED): $(SOURCES) | $(PY)
	@command -v $${CXX:-g++} >/dev/null || { \
	  echo "A C++20 compiler is needed and there is no $${CXX:-g++}. Debian: apt install g++"; exit 1; }
	@[[ -e $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || { \
	  echo "Python.h is needed to build the extension. Debian: apt install python3-dev"; exit 1; }
	@$(call has_torch,$(PY)) || { echo "Installing $(TORCH) into $(ENV)"; \
	  $(PY) -m pip install --quiet $(TORCH); }
	@echo "Building and installing moyu_ext into $(ENV) (minutes, the first time)"
	@$(PY) -m pip install --quiet --editable . pytest
	@touch "$@"

.venv/bin/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "Making .venv with $$($$python --version)"; \
	  $(call has_torch,$$python) && shared=--system-site-packages; \
	  $$python -m venv $$shared .venv && exit; \
	  rm -rf .venv; echo "python -m venv fails. Debian: apt install python3-venv"; exit 1; \
	done; \
	echo "No Python 3.11 or newer was found; name one: make PYTHON=/path/to/python3.11 ..."; exit 1

cpp-test: cmake
	$(CMAKE_PATH) cmake --preset default
	$(CMAKE_PATH) cmake --build --preset default --parallel
	$(CMAKE_PATH) ctest --preset default

cpp-test-sanitize: cmake
	$(CMAKE_PATH) cmake --preset sanitize
	$(CMAKE_PATH) cmake --build --preset sanitize --parallel
	$(CMAKE_PATH) ctest --preset sanitize

# The environment's cmake comes last, where the system has none.
CMAKE_PATH := PATH="$$PATH:$(abspath $(ENV))/bin"
cmake: setup
	@command -v cmake >/dev/null || $(PY) -m pip install --quiet cmake

linters: setup
	@$(PY) -m pip install --quiet $(LINTERS)

lint: linters
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(ENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: linters
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist demo python/*.egg-info .pytest_cache .mypy_cache .ruff_cache "$(INSTALLED)"
	rm -f python/moyu_ext/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# `make test` and `make demo` set everything up; `make help` lists the targets.
#
# PYTHON=python3.12   interpreter that .venv is made from
# TORCH=torch==2.11.0 another torch, 2.10 or newer
# NO_VENV=1           use $(PYTHON) as it is: no .venv, nothing is installed
# PRISM_CUDA_ARCHS, PRISM_CPU_ONLY, CUDA_HOME, CUTLASS_PATH, MAX_JOBS: see docs/building.md

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

ifdef NO_VENV
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# ninja, cmake and clang-format of the versions that pyproject.toml names
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

LIBRARY := prism_cuda/_C.abi3.so
SOURCES := $(shell find csrc third_party -type f -not -path '*/__pycache__/*') setup.py
CXX_FILES := $(shell find csrc tests/cpp examples/cpp -name '*.cu' -o -name '*.cuh' -o -name '*.h' \
  -o -name '*.cpp')
# A change of any of these has to reach the library as well.
SETTINGS = $(PY) $(PRISM_CUDA_ARCHS) cpu:$(PRISM_CPU_ONLY) $(CUDA_HOME) $(CUTLASS_PATH) \
  $(shell git rev-parse HEAD 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help venv build test test-models demo quality lint format cmake clean FORCE

help:
	@echo 'make test    build, then run the tests'
	@echo 'make test-models every architecture of transformers, most of an hour; writes docs/models.md'
	@echo 'make demo    build, then run a model with dense and with sparse attention'
	@echo 'make quality selection quality against density on the testbed, into build/quality'
	@echo 'make build   compile the ops library in place'
	@echo 'make venv    create $(VENV) with everything that is needed'
	@echo 'make cmake   build with CMake as a C++ project would, and run its tests'
	@echo 'make lint    check format, style and types; make format rewrites the files'
	@echo 'make clean   remove build results, keep $(VENV)'

venv: $(READY)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q '$(TORCH)'
	$(PY) tools/requirements.py build hf plot dev > $(VENV)/requirements.txt
	$(PY) -m pip install -q -r $(VENV)/requirements.txt
	@touch $@

build: $(LIBRARY)

$(LIBRARY): $(READY) build/settings $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

build/settings: FORCE
	@mkdir -p build
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

test: build
	$(PY) -m pytest tests -q

test-models: build
	$(PY) tools/model_table.py

demo: build
	$(PY) -m prism_cuda demo

quality: $(READY)
	PYTHONPATH=. $(PY) bench/quality/frontier.py --out build/quality --lengths 4096 --windows 2 --tasks copy \
	  --methods prism peak fine mean_pool xattention vertical_slash oracle_t

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	clang-format -i $(CXX_FILES)

cmake: $(READY)
	cmake -S . -B build/cmake -G Ninja -DPython3_EXECUTABLE="$$(command -v $(PY))"
	cmake --build build/cmake $(if $(MAX_JOBS),-j $(MAX_JOBS))
	ctest --test-dir build/cmake --output-on-failure

clean:
	rm -rf build dist *.egg-info prism_cuda/*.so

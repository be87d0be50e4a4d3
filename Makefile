# Every target works in a clean clone with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

PEERS ?= .venv-peers
PEFT ?= .venv-peft
TPU ?= .venv-tpu

# pytest-xdist: one worker per core; a test file runs in one worker.
PARALLEL = -n logical --maxprocesses 8 --dist loadfile

ifeq ($(CACHE),1)  # keep compiled programs for the next run
export JAX_COMPILATION_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lora_jax/compiled
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1
else ifneq ($(CACHE),)
$(error CACHE=$(CACHE): expected CACHE=1 or no CACHE)
endif

.PHONY: demo test test-all planted bench check peers peft tpu format clean

demo: $(VENV)/.examples  ## fine-tune MiniLM on movie reviews; ARGS="--help" prints its options
	$(BIN)/python examples/finetune_sentiment.py $(ARGS)

test: $(VENV)/.test  ## quick tests, doctests and README code; CACHE=1 makes the second run fast
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: $(VENV)/.test  ## the quick and the long tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not peer" $(ARGS)

planted: $(VENV)/.test  ## check that the tests catch forty planted faults; under an hour
	$(BIN)/python tests/planted/run.py $(ARGS)

bench: ## a training step here and in PyTorch's PEFT, side by side on the CPU; a few minutes
	$(MAKE) $(PEFT)/.test VENV=$(PEFT)
	$(PEFT)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peft.txt
	$(PEFT)/bin/python -m benchmarks.recipes.side_by_side --size small --length 256 --tokens 1024 \
		--dtype float32 --repeats 5 $(ARGS)

check: $(VENV)/.dev  ## lint, formatting, imports, equal lines and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=5 --score=n lora_jax
	$(BIN)/pyright --pythonpath $(BIN)/python

peers: ## tests on models of other projects, in a separate environment
	$(MAKE) $(PEERS)/.test VENV=$(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers.txt
	sed -n 's/^#no-deps //p' tests/peers.txt | xargs \
		$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
	$(PEERS)/bin/python -m pytest -m peer tests/test_zoo.py tests/test_libraries.py $(ARGS)

peft: ## tests against PEFT on the same weights; its PyTorch for the CPU needs Python 3.11
	$(MAKE) $(PEFT)/.test VENV=$(PEFT)
	$(PEFT)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peft.txt
	$(PEFT)/bin/python -m pytest -m peer \
		tests/test_peft.py tests/algebra/test_arithmetic_peft.py \
		tests/io/test_peft_models.py tests/io/test_peft_uniform.py tests/io/test_hf_models.py \
		tests/io/test_hf_ties.py tests/io/test_peft_copies.py tests/io/test_parameters_peft.py \
		tests/io/test_peft_table.py tests/analysis/test_analysis_peft.py \
		tests/io/test_gguf.py tests/recipes/test_models.py tests/examples/test_real_models.py $(ARGS)

tpu: ## tests with the TPU compiler; no TPU needed
	$(MAKE) $(TPU)/.test VENV=$(TPU)
	$(MAKE) $(TPU)/.tpu-aot VENV=$(TPU)
	$(TPU)/bin/python -m pytest tests/test_tpu.py $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp per extra, touched when the extra is installed.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(PEFT) $(TPU) .pytest_cache .ruff_cache .import_linter_cache .hypothesis

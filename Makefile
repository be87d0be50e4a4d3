# Every target works from a clean clone with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check format clean

demo: $(VENV)/.examples  ## fine-tune MiniLM on movie reviews; ARGS="--help" for its options
	$(BIN)/python examples/finetune_sentiment.py $(ARGS)

test: $(VENV)/.test  ## the core suite, doctests and README code
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp an extra: touched when the environment has it.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# make demo    set up, then plan, load and generate with the bundled model
# make test    set up, then run the tests
# make test-long  the tests that take minutes: every combination with compiled steps
# make check   set up, then lint, types, architecture
# make docs    write docs/reference and the outputs shown in pages anew (three minutes: it runs the parity tests)
# make bench   compare with transformers on this machine (long; run it on a quiet machine)
# make kill-test  kill thousands of saves, and some of transformers' (a quarter of an hour; wants strace)
# make tiny    train the bundled model again (half an hour)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-long check bench docs kill-test tiny format clean

demo: $(VENV)/.runtime
	$(BIN)/modelrig plan tiny
	$(BIN)/modelrig run tiny "def add(a, b):" --max-new-tokens 48

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m long

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

kill-test: $(VENV)/.dev
	$(BIN)/python tests/kill_saves.py

docs: $(VENV)/.dev
	$(BIN)/python docs/architectures.py
	$(BIN)/python docs/generate.py
	$(BIN)/python tests/documents.py

tiny: $(VENV)/.dev
	$(BIN)/python examples/train_tiny.py --out plugins/modelrig_plugins/sources/bundled_models/tiny

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# torch goes first: constraints.txt says why.
$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

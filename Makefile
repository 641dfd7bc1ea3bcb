# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= build/demo
# Processes that share the tests, a file at a time, in the order of their names: xdist would leave the longest for the end.
JOBS ?= 2
# Bytecode is compiled once, here: every Ray worker imports torch.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
INSTALLED := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt recipes/demo/packages.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(UV) -c constraints.txt -e '.[demo,test]'
	$(UV) --no-deps -r recipes/demo/packages.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/demo/collect_photos.py $(OUT)/photos
	$(BIN)/x2i build recipes/demo/recipe.yaml --corpus $(OUT)/corpus
	$(BIN)/x2i preview $(OUT)/corpus --out $(OUT)/preview
	$(BIN)/x2i report $(OUT)/corpus
	rm -rf $(OUT)/run
	$(BIN)/x2i train --preset tiny --corpus $(OUT)/corpus --run $(OUT)/run

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -n $(JOBS) schemas filters builders pipelines fine_tune
	$(BIN)/lint-imports

clean:
	rm -rf build

# leanvit: `make` lists what can be done. Every target sets up what it needs and can be run again.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest test-ray coverage lint format bench docs figures dist clean

help:  ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install leanvit with all that demo and tests need (2 to 5 minutes, 6 GB)

$(STAMP): pyproject.toml
	@echo "make: setting up $(VENV) (PyTorch, ONNX Runtime, OpenVINO, test tools): 2 to 5 minutes, 6 GB of disk"
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or run: make PYTHON=python3 $(MAKECMDGOALS)" >&2; exit 4; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: no venv module; on Debian or Ubuntu run: apt-get install python3-venv" >&2; exit 4; }
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[onnx,openvino,dev]"
	@touch $@

demo: $(STAMP)  ## digits in, a proven 8-bit bundle and runs/demo/report.html out (2 to 5 minutes on 2 cores)
	@echo "make: running leanvit demo, 2 to 5 minutes on 2 cores; results in runs/demo"
	$(BIN)/leanvit demo

test: $(STAMP)  ## run the tests (about 30 minutes on 2 cores)
	@echo "make: running the tests, about 30 minutes on 2 cores"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray and not repeat" -n auto --dist loadfile --durations=30 --durations-min=5

test-all: $(STAMP)  ## the same, and what repeats a path on further networks (tests/repeats.txt)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray" -n auto --dist loadfile --durations=30 --durations-min=5

test-oldest: $(STAMP)  ## the core of the tests with the oldest libraries that pyproject.toml allows (5 GB of disk; not part of CI)
	$(BIN)/python benchmarks/versions.py oldest

test-ray: $(VENV)/.ray  ## run the tests on a Ray cluster of this machine (about 6 minutes; 650 MB of disk)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "ray and not repeat" tests/scale --durations=10

$(VENV)/.ray: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[ray,s3]" "moto[server]>=5,<6"
	@touch $@

coverage: $(STAMP)  ## run the tests and measure which lines and branches they reach (about 90 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term:skip-covered
	$(BIN)/coverage report --format=total

lint: $(STAMP)  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the README's table over three seeds, into benchmarks/results (about 12 minutes)
	$(BIN)/python benchmarks/demo.py

docs: $(STAMP)  ## build the site into runs/site; fails at a broken link or a warning (half a minute)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

figures: $(STAMP)  ## draw the figures of docs/models and make all tables again, from the code and benchmarks/results
	$(BIN)/python docs/figures.py
	$(BIN)/python benchmarks/tables.py

dist: $(STAMP)  ## build wheel and sdist into runs/dist, and run the wheel without torch in an environment of its own
	rm -rf runs/dist
	$(BIN)/python -m build --outdir runs/dist
	$(BIN)/leanvit export vit_micro.fmnist --output runs/dist/bundle
	$(PYTHON) -m venv runs/dist/venv
	runs/dist/venv/bin/pip install --quiet --disable-pip-version-check onnxruntime numpy pillow
	runs/dist/venv/bin/pip install --quiet --disable-pip-version-check --no-deps runs/dist/leanvit-*.whl
	cd runs/dist && venv/bin/python -c "import importlib.util as u; assert u.find_spec('torch') is None" \
		&& venv/bin/leanvit verify bundle && venv/bin/leanvit predict bundle ../../docs/compose.jpg

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

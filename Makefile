# Every target sets up all that it needs in .venv; nothing is installed twice.
#   make quickstart   pretrain on real images, and a table of what was learned
#   make test         the tests            make lint   style and types
#   make bench        speed against named rivals

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/.base
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python train.py configs/quickstart.yaml run.dir=runs/quickstart
	$(BIN)/python evaluate.py compare runs/quickstart
	@echo "curves: $(BIN)/tensorboard --logdir runs/quickstart/tensorboard   rows: runs/quickstart/metrics.jsonl"

test: $(VENV)/.dev
	$(if $(wildcard $(VENV)/.without-ffcv),TWINSTREAM_WITHOUT_FFCV=1) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.base
	$(BIN)/pip install -q -e .[bench]
	$(BIN)/python benchmarks/kernels.py

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e .
	touch $@

# FFCV comes as source and is built against OpenCV and libturbojpeg; tools/ffcv_libraries.sh finds or installs them.
$(VENV)/.dev: pyproject.toml tools/ffcv_libraries.sh | $(VENV)/bin/python
	rm -f $(VENV)/.without-ffcv
	if sh tools/ffcv_libraries.sh; then \
	  $(BIN)/pip install -q -e '.[dali,ffcv,dev]'; \
	else \
	  touch $(VENV)/.without-ffcv && $(BIN)/pip install -q -e '.[dali,dev]'; \
	fi
	touch $@ $(VENV)/.base

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup sweep test test-faults check mutants bench ablations methods transfer search-pays \
	fashion-mnist reproduce budget-grid clean

setup: $(VENV)/.installed

# One install for everything; done again only when the dependencies change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies (about 7 GB, some minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		--constraint constraints.txt --editable '.[images,sweep,dev]'
	@touch $@

sweep: setup
	@$(BIN)/python sweep/run.py --config sweep/configs/quickstart.yaml

PARALLEL := -n logical --maxprocesses 4
# Tests of a file share what is expensive.
BY_FILE := $(PARALLEL) --dist loadfile --no-loadscope-reorder

test: setup
	@$(BIN)/python -m pytest $(BY_FILE)

# Kills what a sweep consists of, for real; apart from `make test`.
test-faults: setup
	@$(BIN)/python -m pytest $(BY_FILE) tests/faults

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(MAKE) --no-print-directory test

mutants: setup
	@$(BIN)/python tests/mutants.py

# Rewrites the table in tests/benchmarks/README.md: eight to ten minutes on two cores.
bench: setup
	@$(BIN)/python tests/benchmarks/bench.py --readme

# Minutes for each of about ten rows; rows already in runs/ablations.json are not run again.
SEEDS ?= 0
ablations: setup
	@test -n "$(DATA)" || { echo "usage: make ablations DATA=folder-with-the-four-idx-files SEEDS='0 1'"; exit 2; }
	@$(BIN)/python tests/benchmarks/ablations.py --data "$(DATA)" --seeds $(SEEDS)

# All methods beside each other; each trains for minutes, and what is finished is not run again.
methods: setup
	@test -n "$(DATA)" || { echo "usage: make methods DATA=folder-with-the-four-idx-files [SET='--dataset mnist --epsilon 1']"; exit 2; }
	@$(BIN)/python tests/benchmarks/methods.py --data "$(DATA)" $(SET)

# Experiments on searches, of many hours; the same command goes on where it stopped.
transfer: setup
	@test -n "$(DATA)" || { echo "usage: make transfer DATA=folder-with-the-four-idx-files [SET='--dataset mnist --budget 60']"; exit 2; }
	@$(BIN)/python tests/benchmarks/transfer.py --data "$(DATA)" $(SET)

search-pays: setup
	@test -n "$(DATA)" || { echo "usage: make search-pays DATA=folder-with-the-four-idx-files [SET='--dataset mnist --budget 60']"; exit 2; }
	@$(BIN)/python tests/benchmarks/search_pays.py --data "$(DATA)" $(SET)

fashion-mnist: setup
	@test -n "$(DATA)" || { echo "usage: make fashion-mnist DATA=folder-with-the-four-idx-files"; exit 2; }
	@$(BIN)/python -m core compare --config core/configs/fashion_mnist_small.yaml dataset.path="$(DATA)"

# One published run in time slots: repeat the command until RESULTS.md has its row.
EPSILON ?= 10
BUDGET ?= 1h
reproduce: setup
	@test -n "$(DATASET)" || { echo "usage: make reproduce DATASET=mnist EPSILON=10 BUDGET=20m DATA=folder"; exit 2; }
	@$(BIN)/python -m core reproduce --dataset "$(DATASET)" --epsilon "$(EPSILON)" \
		--budget "$(BUDGET)" $(if $(DATA),dataset.path="$(DATA)") $(SET)

# Published budget grids beside our own: one solved by the privacy plan alone, one trained in small.
GRID := mnist_time_frequency_grid
budget-grid: setup
	@test -n "$(DATA)" || { echo "usage: make budget-grid DATA=folder-with-the-four-idx-files"; exit 2; }
	@$(BIN)/python -m sweep report --config sweep/configs/mnist_budget_grid.yaml
	@$(BIN)/python sweep/run.py --config sweep/configs/$(GRID).yaml dataset.path="$(DATA)" $(SET)
	@$(BIN)/python -m sweep report --name $(GRID)

clean:
	rm -rf $(VENV) runs build *.egg-info

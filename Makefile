# Each target makes .venv where it is missing and installs what it needs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIGITS := build/digits_rbf.npy
WEIGHTS := build/weights
# Of `make fuzz`: how long, and which changes of files.
SECONDS := 120
SEED := 0
FAST := -m "not long and not everywhere"

.PHONY: fuzz fig1 figures report weights test test-all test-everywhere test-peers test-oldest test-newest lint docs package bench bench-peers clean

fig1: $(VENV)/.experiments
	$(BIN)/python experiments/fig1.py

figures: $(VENV)/.data $(DIGITS) $(WEIGHTS)
	$(BIN)/python experiments/fig1.py
	$(BIN)/python experiments/fig1.py --matrix $(DIGITS) --rank 20
	$(BIN)/python experiments/fig4.py
	$(BIN)/python experiments/order.py
	$(BIN)/python experiments/linear_lora.py
	$(BIN)/python experiments/precgd.py
	$(BIN)/python experiments/precgd_problems.py
	$(BIN)/python experiments/table1.py
	$(BIN)/python experiments/fastest.py
	$(BIN)/python experiments/oracle_starts.py
	$(BIN)/python experiments/faces.py
	$(BIN)/python experiments/movielens.py
	$(BIN)/python experiments/real_matrices.py
	$(BIN)/python experiments/fits.py
	$(BIN)/python experiments/weight_spectra.py

report: $(VENV)/.experiments
	$(BIN)/python -m paper_checks --report paper_checks/REPORT.md

weights: $(WEIGHTS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST) --ignore=tests/peers tests nyscaled
	$(BIN)/python -m pytest paper_checks

# What a newcomer need not run: after `test`, all that is marked long.
test-all: test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long --ignore=tests/peers tests nyscaled

test-everywhere: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m everywhere tests/test_same_everywhere.py

test-peers: $(VENV)/.peers $(WEIGHTS)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/peers

# The oldest versions that pyproject.toml allows: of the base dependencies, which the tests in CORE need,
# and of all. `uv` is a resolver that can choose the oldest.
CORE := $(wildcard $(addprefix tests/test_,$(addsuffix .py,completion contracts_problems contracts_steps \
	dynamics initializers linalg loops onebit optimality phase polar problems robust scale sensing \
	solvers spectra status transforms_balance transforms_gram transforms_residual typing x64)))

test-oldest:
	rm -rf build/oldest && $(PYTHON) -m venv build/oldest/core && $(PYTHON) -m venv build/oldest/all
	build/oldest/all/bin/python -m pip install --quiet uv
	build/oldest/all/bin/uv pip install --quiet --resolution lowest-direct \
		--python build/oldest/core/bin/python --editable '.[test-core]'
	build/oldest/all/bin/uv pip install --quiet --resolution lowest-direct \
		--python build/oldest/all/bin/python --editable '.[test]'
	build/oldest/core/bin/python -m pytest -n 2 --dist loadfile $(FAST) $(CORE)
	build/oldest/all/bin/python -m pytest -n 2 --dist loadfile $(FAST) --ignore=tests/peers tests nyscaled

# The newest versions of all, on another Python: make test-newest PYTHON=python3.13
test-newest:
	rm -rf build/newest && $(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	build/newest/bin/python -m pytest -n 2 --dist loadfile $(FAST) --ignore=tests/peers tests nyscaled
	build/newest/bin/python -m pytest paper_checks

fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz $(SECONDS) $(SEED)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The site, into build/site; a warning or a link to nothing is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f docs/mkdocs.yml -d ../build/site

# The wheel, built from the sdist and installed with only the base dependencies, runs README's first snippet.
package: $(VENV)/.dev
	rm -rf build/dist build/wheel
	$(BIN)/python -m build --outdir build/dist
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet build/dist/*.whl
	awk '/^```python/ {inside = 1; next} /^```/ && inside {exit} inside' README.md > build/wheel/snippet.py
	cd build/wheel && bin/python -I snippet.py

bench: $(VENV)/.experiments
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/problems.py
	$(BIN)/python benchmarks/lora.py

bench-peers: $(VENV)/.peers $(WEIGHTS)
	$(BIN)/python benchmarks/lora_init.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/finetune_run.py --model $(WEIGHTS)/all-MiniLM-L6-v2
	$(BIN)/python benchmarks/finetune_overhead.py --model $(WEIGHTS)/all-MiniLM-L6-v2
	$(BIN)/python benchmarks/diffusion.py
	$(BIN)/python benchmarks/lowrank.py
	$(BIN)/python benchmarks/lowrank_growth.py
	$(BIN)/python benchmarks/lowrank_dask.py

$(DIGITS): $(VENV)/.experiments experiments/lib/matrix.py
	$(BIN)/python -m experiments.lib.matrix $@

$(WEIGHTS): tests/fixtures/weights.txt | $(BIN)/python
	$(BIN)/python tests/fixtures/fetch_weights.py $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.experiments: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments]'
	touch $@

$(VENV)/.data: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[data,experiments,models]'
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.peers: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'torch==2.13.0' 'peft==0.21.2' 'transformers==5.23.0'  # as tested
	$(BIN)/python -m pip install --quiet --editable '.[test,peers]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build

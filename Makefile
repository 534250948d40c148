# make demo   train a small Qwen-VL on generated images, score it, ask it a question   (a few minutes, CPU is enough)
# make test   lint, types, tests
# make faults kill, fill up, damage, attack: what docs/reliability.md says   (25 minutes on two cores)
# Each target sets up `.venv` itself, with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/train/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint suite faults format clean

demo: .venv/installed
	rm -rf $(DEMO) outputs/test/demo outputs/predict/demo
	$(BIN)/python -m qwenvl_lit.train hydra.run.dir=$(DEMO)
	$(BIN)/python -m qwenvl_lit.test ckpt=$(DEMO) baseline=true hydra.run.dir=outputs/test/demo
	$(BIN)/python -m qwenvl_lit.predict ckpt=$(DEMO) image=docs/car.png prompt="Where is the car?" hydra.run.dir=outputs/predict/demo

test: lint suite

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

suite: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

faults: .venv/installed-dev
	$(BIN)/python scripts/run_faults.py --record benchmarks/faults.json

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

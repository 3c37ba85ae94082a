# `make demo`, `make test` and `make test-all` make the environment .venv first, `make test-kaggle` makes .venv-kaggle.
PYTHON ?= python3
# The Python of Kaggle's image, and the versions of its packages.
KAGGLE_PYTHON ?= python3.12
KAGGLE_VERSIONS := tests/support/kaggle-constraints.txt
# One known version, because a range would take the newest. A CPU build is enough for the demo and the tests.
TORCH ?= torch==2.13.0
# Where pip gets torch. Empty: pip's default, which for Linux is the CUDA build of several GB. For the CPU build:
# make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: demo test test-all test-kaggle clean

demo: .venv/ready
	$(BIN)/saigakit demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-all: test
	$(BIN)/pytest -n 2 --slow only

test-kaggle: .venv-kaggle/ready
	.venv-kaggle/bin/pytest -n 2

.venv-kaggle/ready: $(KAGGLE_VERSIONS)
.venv-kaggle/ready: override PYTHON = $(KAGGLE_PYTHON)
.venv-kaggle/ready: override TORCH = $(shell grep ^torch== $(KAGGLE_VERSIONS))
.venv-kaggle/ready: VERSIONS = --constraint $(KAGGLE_VERSIONS)

.venv/ready .venv-kaggle/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saigakit needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo "Making $(@D): about 10 minutes the first time, because llama.cpp is compiled; later runs start at once."
	$(PYTHON) -m venv $(@D)
	@# With a heartbeat, for pip is silent while it compiles. This part of saigakit needs no package.
	$(@D)/bin/python -m saigakit.core.launch $(@D)/bin/python -m pip install --disable-pip-version-check --progress-bar off $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@# On some CPUs llama.cpp is compiled in a special way; pip's cache may hold one that was not.
	args=$$($(@D)/bin/python -m saigakit.core.install); \
	if [ -n "$$args" ]; then export CMAKE_ARGS="$$CMAKE_ARGS $$args" PIP_CACHE_DIR="$$($(@D)/bin/python -m pip cache dir)/without-amx"; fi; \
	$(@D)/bin/python -m saigakit.core.launch $(@D)/bin/python -m pip install --disable-pip-version-check --progress-bar off $(VERSIONS) --editable ".[all,dev]"
	touch $@

clean:
	rm -rf .venv .venv-kaggle runs

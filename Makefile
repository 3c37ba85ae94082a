# `make demo`, `make test` and `make test-all`. Each makes its own environment in .venv first.
PYTHON ?= python3
# One known version, because a range would take the newest. A CPU build is enough for the demo and the tests.
TORCH ?= torch==2.13.0
# Where pip gets torch. Empty: pip's default, which for Linux is the CUDA build of several GB. For the CPU build:
# make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: demo test test-all clean

demo: .venv/ready
	$(BIN)/saigakit demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-all: test
	$(BIN)/pytest -n 2 --slow only

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saigakit needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo "Making .venv: about 10 minutes the first time, because llama.cpp is compiled; later runs start at once."
	$(PYTHON) -m venv .venv
	@# With a heartbeat, for pip is silent while it compiles. This part of saigakit needs no package.
	$(BIN)/python -m saigakit.core.launch $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@# On some CPUs llama.cpp is compiled in a special way; pip's cache may hold one that was not.
	args=$$($(BIN)/python -m saigakit.core.install); \
	if [ -n "$$args" ]; then export CMAKE_ARGS="$$CMAKE_ARGS $$args" PIP_CACHE_DIR="$$($(BIN)/python -m pip cache dir)/without-amx"; fi; \
	$(BIN)/python -m saigakit.core.launch $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable ".[all,dev]"
	touch .venv/ready

clean:
	rm -rf .venv runs

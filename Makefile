# make demo, make test: each sets up a virtual environment once, with the CPU build of torch
# where no NVIDIA GPU is seen. `make test TRANSFORMERS=5.17.0` uses an environment of its own, and
# `make test JOBS=8` eight processes.

TORCH        ?= torch==2.13.0
TORCH_INDEX  ?= https://download.pytorch.org/whl/cpu
TRANSFORMERS ?=
TESTS        ?=
JOBS         ?= 2
PYTHON       ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
                  $(shell $(p) -c "import sys, venv; print('$(p)' if sys.version_info >= (3, 11) else '')" 2>/dev/null)))
VENV         := .venv$(TRANSFORMERS:%=-%)
GPU          := $(shell nvidia-smi -L 2>/dev/null | head -n 1)$(wildcard /proc/driver/nvidia/version)

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/stof demo

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .

clean:
	rm -rf .venv .venv-* build dist *.egg-info

# --no-deps: the wheel alone comes from torch's own index (or from a local PIP_FIND_LINKS);
# what it depends on comes from PyPI with the rest.
$(VENV)/torch.stamp:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(if $(GPU),"$(TORCH)",--no-deps --retries 1 --only-binary torch --index-url $(TORCH_INDEX) "$(TORCH)")
	@touch $@

$(VENV)/%.stamp: pyproject.toml $(VENV)/torch.stamp
	$(VENV)/bin/python -m pip install --quiet $(TRANSFORMERS:%="transformers==%") -e ".[$*]"
	@touch $@

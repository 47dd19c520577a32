# `make demo` on a bare machine: sets everything up in .venv, then runs the main job.
# Another interpreter: make demo PYTHON=python3.12. FAISS for GPUs: make setup EXTRAS=gpu,emoji,dev.

PYTHON ?= python3
EXTRAS ?= cpu,emoji,dev
VENV := .venv
RUN := $(VENV)/bin/python
# A copy of the pyproject.toml that was installed last: by content, not by time, so a fresh checkout changes nothing.
STAMP := $(VENV)/.installed-pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-table train test check docs

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'

setup: ## make .venv and install everything, once
	@if cmp -s pyproject.toml $(STAMP) && $(RUN) -c '' 2>/dev/null; then exit 0; fi; \
	if ! $(RUN) -c '' 2>/dev/null; then \
		command -v $(PYTHON) >/dev/null || { \
			echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "wherefrom needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "$(PYTHON) has no venv or ensurepip. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
		$(PYTHON) -m venv $(VENV) || exit 1; \
	fi; \
	$(RUN) -m pip install -e '.[$(EXTRAS)]' && cp pyproject.toml $(STAMP)

demo: setup ## generate, unlearn, rank and show three pictures (minutes)
	$(RUN) evaluate.py attribute -c configs/experiment/demo.yaml

demo-table: setup ## the README's table, rebuilt from nothing (up to an hour, resumable)
	$(RUN) -m experiments.method_table --methods abu caption pixel random \
		--output runs/demo_table --results runs/demo_table/table.json

train: setup ## train the emoji world's autoencoder and diffusion model into weights/emoji (hours)
	$(RUN) train.py fit -c configs/experiment/emoji_autoencoder.yaml --weights weights/emoji/vae
	$(RUN) train.py fit -c configs/experiment/emoji_decoder.yaml --weights weights/emoji/vae
	$(RUN) train.py fit -c configs/experiment/emoji_decoder_noise.yaml --weights weights/emoji/vae
	$(RUN) train.py fit -c configs/experiment/emoji_diffusion.yaml --weights weights/emoji

test: setup ## run the tests; the ten slowest come last
	$(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=10

check: setup ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: setup ## build the site with search and the API reference in build/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "look at it, with search: $(RUN) -m http.server -d build/docs"

# POSIX make and sh only: macOS ships GNU make 3.81, the BSDs their own.

# Tried in this order; `make PYTHON=/path/to/python3.12 ...` names one.
PYTHON = python3 python3.14 python3.13 python3.12 python3.11
ARGS = --prompt "Once upon a time"

RECENT = import sys; sys.exit(sys.version_info < (3, 11))
PIP = from importlib.metadata import files; assert files("pip")
INSTALL = .venv/bin/python -m pip install -qq --disable-pip-version-check -e

# The Linux wheel of MLX brings a slow reference BLAS: OpenBLAS goes before it where there is one.
BLAS = for lib in /usr/lib/$$(uname -m)-linux-gnu/openblas-pthread/libopenblas.so.0 \
	    /usr/lib/$$(uname -m)-linux-gnu/libopenblas.so.0 \
	    /usr/lib64/libopenblasp.so.0 /usr/lib64/libopenblas.so.0; do \
	  if [ -e "$$lib" ]; then LD_PRELOAD=$$lib$${LD_PRELOAD:+:$$LD_PRELOAD}; export LD_PRELOAD; break; fi; \
	done;

help:
	@echo 'make generate  print a story; flags of mlx_mcsd.generate in ARGS="..."'
	@echo 'make test      lint, and run every test'
	@echo 'make lint      check style and formatting'
	@echo 'make setup     make .venv ready for all of these, which they also do by themselves'
	@echo 'make clean     remove build products and caches; rm -r .venv starts afresh'

generate: .venv/.ready
	@$(BLAS) .venv/bin/python -m mlx_mcsd.generate $(ARGS)

test: lint
	@$(BLAS) .venv/bin/python -m pytest -q

lint: setup
	@.venv/bin/python -m ruff check -q .
	@.venv/bin/python -m ruff format -q --check .

setup: .venv/.ready-for-tests

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find mlx_mcsd convert metal examples tests -name __pycache__ -prune -exec rm -rf {} +

# Each stamp is written last, so that a set-up cut short is not taken for done.
.venv/.ready: .venv/.made pyproject.toml
	@echo 'Installing the package in .venv (once, about 2 minutes) ...'
	@$(INSTALL) .
	@touch $@

.venv/.ready-for-tests: .venv/.made pyproject.toml
	@echo 'Installing the package and its test tools in .venv (once, about 4 minutes) ...'
	@$(INSTALL) '.[test,dev,plot]'
	@touch .venv/.ready $@

# A .venv made by hand is kept if it is recent enough and has pip, whole: RECORD is written last.
.venv/.made:
	@recent=; lacking=; \
	if ! .venv/bin/python -c '$(PIP); $(RECENT)' 2>/dev/null; then \
	  for python in $(PYTHON); do \
	    $$python -c '$(RECENT)' >/dev/null 2>&1 || continue; \
	    recent=$$python; \
	    $$python -c 'import ensurepip, venv' 2>/dev/null && break; \
	    lacking=$$python; \
	  done; \
	  if [ -z "$$recent" ]; then \
	    echo 'error: needs Python 3.11 or newer, found none among: $(PYTHON); install one or name it with PYTHON=/path/to/python3.' >&2; \
	    exit 1; \
	  elif [ "$$recent" = "$$lacking" ]; then \
	    echo "error: $$recent lacks venv or ensurepip; install them (Debian and Ubuntu: apt install python3-venv) or name another with PYTHON=." >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$recent ..."; \
	  $$recent -m venv --clear .venv || exit 1; \
	fi; \
	touch $@

.PHONY: help generate test lint setup clean
.NOTPARALLEL:

# pbrd: everything a newcomer, a developer or CI calls. `make` alone lists the targets.
#
# `make demo` and `make test` work on a fresh Debian 12, Ubuntu 22.04 or 24.04: they install what is missing
# (tools/setup), as root or by sudo, and change nothing the second time.

MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-pure check lint types layers format install uninstall deb clean

# PYTHON chooses the interpreter: `make PYTHON=python3.12 test` works in .venv-3.12, beside the usual .venv.
PYTHON ?=
override PYTHON := $(patsubst ~/%,$(HOME)/%,$(PYTHON))
ifneq ($(PYTHON),)
PYTHON_VERSION := $(or $(patsubst python%,%,$(filter python3.%,$(notdir $(PYTHON)))),\
    $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
$(if $(PYTHON_VERSION),,$(error $(PYTHON) does not start: choose another PYTHON))
endif
VENV := .venv$(addprefix -,$(PYTHON_VERSION))
BIN := $(VENV)/bin
ARGS ?=

SUDO := $(shell [ "$$(id -u)" -eq 0 ] || echo sudo)
# Tests run as root: what they leave in the folder of a user who came by sudo is kept to a minimum.
AS_ROOT := $(if $(SUDO),$(SUDO) env PYTHONDONTWRITEBYTECODE=1,)
PYTEST := $(BIN)/python -m pytest $(if $(SUDO),-p no:cacheprovider)

# The modules without I/O; tests/test_layers.py holds them to it. Their tests need no root and no namespaces, but for
# those of policies and units, which send packets.
PURE := errors settings values document uplinks caveats config marks classes classrules eviction schedule prefixes \
    effective health measures objects rules routing ruleset plan paths explain status snapshot events tables topology \
    varlink timestamp layers docs
PURE_TESTS = $(wildcard $(foreach module,$(PURE),tests/test_$(module).py tests/test_$(module)_*.py))

PREFIX ?= /usr/local
DESTDIR ?=

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo
	@echo '  PYTHON=python3.12 chooses the Python; ARGS="-k failover" goes to pytest or to the demo;'
	@echo '  PREFIX=/usr/local and DESTDIR= say where install and uninstall work.'

setup: ## install what is missing: system packages (by apt-get) and the virtual environment
	@tools/setup $(VENV) $(PYTHON)

demo: setup ## two providers in network namespaces: break one, watch the failover
	@$(SUDO) $(BIN)/pbrd demo $(ARGS)

test: setup ## all tests, as root, in network namespaces
	$(AS_ROOT) $(PYTEST) -n auto $(ARGS)

test-pure: setup ## only the tests that need neither root nor namespaces
	$(PYTEST) $(PURE_TESTS) $(ARGS)

check: lint types test ## all that CI checks

lint: setup ## format check, lint, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_layers.py

layers: setup ## only the layers
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_layers.py

types: setup ## mypy --strict
	$(BIN)/mypy --strict

format: setup ## put the code into shape
	$(BIN)/ruff check --fix-only --exit-zero --quiet .
	$(BIN)/ruff format .

# What belongs where stands in packaging/install, by which the Debian package goes, too.
export PREFIX DESTDIR
install: ## install below PREFIX, with the systemd unit; keeps every config that is there
	@set -eu; python=$(or $(PYTHON),/usr/bin/python3); \
	[ -n "$(DESTDIR)" ] || [ "$$(id -u)" -eq 0 ] || { echo 'install: needs root: sudo make install' >&2; exit 1; }; \
	[ -n "$(DESTDIR)" ] || python=$$(tools/setup --system-only $(PYTHON)); \
	PYTHON=$$python packaging/install

uninstall: ## take it away again; configs and state stay
	@packaging/install --remove

deb: ## build the Debian package into dist/; installs what that takes
	@packaging/build-deb

clean: ## remove what make has built in this folder
	@set -e; rubbish=$$(find . -path ./.git -prune -o \( -name '.venv*' -o -name __pycache__ -o -name '*.egg-info' \
	    -o -name .pytest_cache -o -name .mypy_cache -o -name .ruff_cache -o -name .hypothesis \
	    -o -path ./build -o -path ./dist \) -prune -print); \
	[ -z "$$rubbish" ] || rm -rf $$rubbish 2>/dev/null || $(SUDO) rm -rf $$rubbish

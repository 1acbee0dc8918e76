# Every target sets itself up: the first call makes a virtual environment in .venv/, later calls reuse it.

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first Python that fused_resnet supports; another one: make test PYTHON=/path/to/python
find_python = for p in $(1); do \
  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done; true
PYTHON ?= $(shell $(call find_python,python3 python3.13 python3.12 python3.11 python3.10))
OLDEST_PYTHON ?= $(shell $(call find_python,python3.10 $(PYTHON)))

# Test processes, and threads in each: one a core on the two cores that the time limits are stated for.
WORKERS ?= 2
THREADS ?= 1
# make test K=conv runs the tests whose names match (pytest -k); make bench takes it too.
K ?=
# Strictly (and not --quiet, which hides warnings from --strict): a link that leads nowhere or a page that the navigation lacks ends it.
build_site = NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
match = $(if $(K),-k "$(K)")
pytest_tests = OMP_NUM_THREADS=$(THREADS) $(1)/bin/python -m pytest tests -n $(WORKERS) -p no:benchmark $(match)

.PHONY: help demo test test-all compiled bench check site format clean

help:  ## list the targets
	@echo "fused_resnet: each target does its own set-up in .venv/ (the first call downloads PyTorch, a few GB)"
	@awk -F ':.*  ## |:  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-9s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/.with-models,docs  ## swap a torchvision ResNet-50 and compare it with eager PyTorch
	@.venv/bin/fused-resnet demo

test: .venv/.with-test  ## the tests (K=pattern for some of them); no GPU needed
	@$(call pytest_tests,.venv) -m "not slow" --durations=10

# Other people's models and tools too, whose tests are skipped where these are missing. They have no oldest versions here.
test-all: .venv/.with-test,zoo,dropin,train .venv-oldest/.with-test  ## the long sweeps too, then again with the oldest supported versions
	@$(call pytest_tests,.venv) --durations=10
	@echo "Again, with the oldest supported versions:"
	@$(call pytest_tests,.venv-oldest) --durations=10

compiled: .venv/.with-test  ## write anew what the compiler makes of ResNet-18 and 50, which the tests compare with; no GPU needed
	@.venv/bin/python tools/compiled.py

bench: .venv/.with-test  ## time eager, compiled and fused side by side (pytest-benchmark)
	@.venv/bin/python -m pytest bench/ --benchmark-only $(match)

check: .venv/.with-test,dev  ## lint, types, links and code in the docs, the site
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/python tools/check_docs.py
	@$(build_site)

site: .venv/.with-test,dev  ## the documentation as a site, into site/index.html
	@$(build_site)

format: .venv/.with-test,dev  ## let ruff lay out the code and sort the imports
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:  ## remove the environments, caches and build products
	rm -rf .venv .venv-oldest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: an environment, and in it one stamp for each set of extras, renewed when pyproject.toml changes

.venv/.made:
	@$(call make_venv,$(PYTHON),.venv)

.venv-oldest/.made:
	@$(call make_venv,$(OLDEST_PYTHON),.venv-oldest)

.venv/.with-%: .venv/.made pyproject.toml
	@echo "Installing fused_resnet[$*] into .venv/ (the first time: PyTorch, a few minutes)"
	@.venv/bin/python -m pip install --disable-pip-version-check -e ".[$*]"
	@touch $@

.venv-oldest/.with-%: .venv-oldest/.made pyproject.toml tools/oldest.txt
	@echo "Installing fused_resnet[$*] with its oldest dependencies into .venv-oldest/ (a few minutes)"
	@.venv-oldest/bin/python -m pip install --disable-pip-version-check -c tools/oldest.txt -e ".[$*]"
	@touch $@

define make_venv
if [ -z "$(1)" ]; then echo "fused_resnet needs Python 3.10 to 3.13 on the PATH, or PYTHON=/path/to/one" >&2; exit 1; fi; \
echo "Making $(2)/ with $$($(1) --version)"; \
$(1) -m venv $(2) && touch $@
endef

# Makes .venv, then hands each target to `just` (see justfile). Needs only make, git and Python 3.11
# or 3.12. Another Python: `make repro PYTHON=python3.12`.

STAMP := .venv/.installed
TARGETS := demo repro test test-fast cover house lint docs report compare sweep bench smoke locked deps tables lock clean
RUN = PATH="$(CURDIR)/.venv/bin:$$PATH" just

.PHONY: help setup gpu-check $(TARGETS)
.DEFAULT_GOAL := help

help:
	@awk -F ':.*## ' '/^#: / { split(substr($$0, 4), part, " ## "); \
	  printf "  make %-26s %s\n", part[1], part[2] }' $(MAKEFILE_LIST)

#: setup ## make .venv with everything in requirements.lock
#: demo ## hear a piece, and the same piece with a concept switched off or on, in a minute
#: repro ## run every stage whose inputs changed (dvc repro)
#: test ## all tests
#: test-fast ## the tests of up to ten seconds each
#: cover ## lines that no test runs, by file
#: house ## size of the code base against its limits
#: tables ## write the tables of README.md and docs/ from metrics/
#: docs ## the documentation site in site/, warnings as errors
#: lint ## ruff, types, imports between packages, code digests, tables of README and docs
#: report ## print the headline numbers with intervals and controls
#: compare REV=main ## summary of the work tree against a revision or experiment
#: sweep S=train_sae.k=16,32,64 ## queue one experiment a value, run them, show the table
#: bench ## the SAE step and the extraction against other code, as ratios
#: gpu-check PYTHON=python3 ## tests and measurements on a GPU (docs/performance.md), in 7 minutes
#: smoke ## the whole pipeline on a few clips, in a temporary copy
#: locked ## check that dvc.lock, metrics and plots are those of this code
#: deps ## write a digest of each stage's code into code.lock.yaml
#: lock ## remake requirements.lock from pyproject.toml
#: clean ## remove what a rerun makes again (not the models, not DVC's cache)

setup: $(STAMP)

$(TARGETS): $(STAMP)
	@$(RUN) $@ $(if $(filter compare,$@),$(REV)) $(if $(filter sweep,$@),$(S)) $(ARGS)

# Needs no .venv: a GPU machine's own torch is the one to measure.
gpu-check:
	PYTHONPATH=src:. $(or $(PYTHON),python3) -m benchmarks.gpu_check \
	  --out $(or $(OUT),gpu-check) $(ARGS)

# The first Python on PATH that fits; shims and Pythons without ensurepip are passed over.
define FIND_PYTHON
fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; \
python=''; IFS=:; \
for folder in '' $$PATH; do for name in $(or $(PYTHON),python3.11 python3.12 python3); do \
  candidate="$${folder:+$$folder/}$$name"; \
  if [ -z "$$python" ] && [ -n "$$folder$(PYTHON)" ] && "$$candidate" -c "$$fits" >/dev/null 2>&1; \
  then python="$$candidate"; fi; \
done; done; unset IFS; \
if [ -z "$$python" ]; then \
  echo "musicscope needs Python 3.11 or 3.12 with venv and ensurepip (Debian: python3-venv); found:" \
    "$$(python3 --version 2>&1). Install one, or name it: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
  exit 1; \
fi
endef

# pip, not uv: uv took wheels without the bundled libsndfile here, and it reads none of pip's settings.
$(STAMP): requirements.lock requirements-nodeps.txt pyproject.toml
	@if ! test -x .venv/bin/pip; then $(FIND_PYTHON); "$$python" -m venv .venv; fi
	@echo "installing into .venv (a minute or two the first time)"
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

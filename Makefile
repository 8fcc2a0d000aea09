# Makes .venv, then hands each target to `just` (see justfile). Needs only make, git and Python 3.11
# or 3.12. Another Python: `make repro PYTHON=python3.12`. Another torch build: UV_TORCH_BACKEND=cpu.

STAMP := .venv/.installed
TARGETS := repro test lint report compare sweep bench smoke locked deps lock clean
RUN = PATH="$(CURDIR)/.venv/bin:$$PATH" just

.PHONY: help setup $(TARGETS)
.DEFAULT_GOAL := help

help:
	@awk -F ':.*## ' '/^#: / { split(substr($$0, 4), part, " ## "); \
	  printf "  make %-26s %s\n", part[1], part[2] }' $(MAKEFILE_LIST)

#: setup ## make .venv with everything in requirements.lock
#: repro ## run every stage whose inputs changed (dvc repro)
#: test ## all tests
#: lint ## ruff: rules and format
#: report ## print metrics/summary.json as a table
#: compare REV=main ## summary of the work tree against a revision or experiment
#: sweep S=train_sae.k=16,32,64 ## queue one experiment a value, run them, show the table
#: bench ## the SAE step and the extraction against other code, as ratios
#: smoke ## the whole line on a few clips, in a temporary copy
#: locked ## check that dvc.lock, metrics and plots are those of this code
#: deps ## write the code each stage imports into dvc.yaml
#: lock ## remake requirements.lock from pyproject.toml
#: clean ## remove what a rerun makes again (not the models, not DVC's cache)

setup: $(STAMP)

$(TARGETS): $(STAMP)
	@$(RUN) $@ $(if $(filter compare,$@),$(REV)) $(if $(filter sweep,$@),$(S)) $(ARGS)

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

# uv reads none of pip's settings, and without them it takes another torch than pip would.
# (`pip config get` sees one file only, `pip config list` all of them.)
define PIP_SETTINGS_FOR_UV
settings="$$(.venv/bin/pip config list 2>/dev/null || true)"; \
setting() { echo "$$settings" | sed -n "s/^global\.$$1='\(.*\)'$$/\1/p" | sed 's/\\n/ /g'; }; \
links="$${PIP_FIND_LINKS:-$$(setting find-links)}"; \
extra="$${PIP_EXTRA_INDEX_URL:-$$(setting extra-index-url)}"; \
index="$${PIP_INDEX_URL:-$$(setting index-url)}"; \
cert="$${PIP_CERT:-$$(setting cert)}"; \
[ -z "$$links" ] || export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(echo $$links | tr ' ' ',')}"; \
[ -z "$$extra" ] || export UV_EXTRA_INDEX_URL="$${UV_EXTRA_INDEX_URL:-$$(echo $$extra)}"; \
[ -z "$$index" ] || export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; \
[ -z "$$cert" ] || export SSL_CERT_FILE="$${SSL_CERT_FILE:-$$cert}"; \
export UV_INDEX_STRATEGY="$${UV_INDEX_STRATEGY:-unsafe-best-match}" VIRTUAL_ENV="$(CURDIR)/.venv"
endef

$(STAMP): requirements.lock requirements-nodeps.txt pyproject.toml
	@if ! test -x .venv/bin/pip; then $(FIND_PYTHON); "$$python" -m venv .venv; fi
	@.venv/bin/pip install --quiet --disable-pip-version-check -c requirements.lock rust-just uv
	@$(PIP_SETTINGS_FOR_UV); \
	install() { .venv/bin/uv pip install "$$@" || { \
	  echo "uv could not install; trying pip" >&2; .venv/bin/pip install "$$@"; }; }; \
	install -r requirements.lock && \
	install --no-deps -r requirements-nodeps.txt && \
	install --no-deps -e .
	@touch $@

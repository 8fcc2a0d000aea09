# Recipes; `make <recipe>` bootstraps .venv first and then comes here. With .venv on PATH already,
# `just <recipe>` is the same.

set positional-arguments

export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

_default:
    @just --list

# hear a piece, and the same piece with a concept switched off or on
demo *args:
    musicscope demo "$@"

# run every stage whose inputs changed
repro *args:
    #!/usr/bin/env bash
    set -euo pipefail
    python -m experiments.slots
    python -m tools.dvc_repair
    # Frozen stages (training of the embedded models, the long evaluation) have their results in Git.
    dvc repro "$@" 2> >(grep --line-buffered -v "is frozen. Its dependencies are not" >&2)
    echo "next: make report prints the headline numbers; data/report/report.html shows and plays everything"

# all tests, in two processes; for a part: just test tests/config/test_config.py -k name
test *args:
    pytest -q -n 2 --dist worksteal "$@"

# the tests of up to ten seconds each
test-fast *args:
    pytest -q -n 2 --dist worksteal -m "not slow" "$@"

# lines that no test runs, by file
cover *args:
    pytest -q -n 2 --dist worksteal --cov --cov-report=term:skip-covered "$@"

# rules, format, types, imports between packages, code digests, tables of README and docs
lint:
    ruff check .
    ruff format --check .
    ty check
    python -m tools.house --imports
    python -m tools.import_closure
    python -m tools.docs_tables

# headline numbers with intervals and controls; the page is data/report/report.html
report:
    @python -m stages.summarize --show
    @test ! -f data/report/report.html || echo "open data/report/report.html in a browser, or run musicscope view"

# summary of the work tree against a revision or an experiment; or between two revisions
compare rev="HEAD" *other:
    dvc metrics diff "$@" --targets metrics/summary.json --no-path --md

# ++ also sets a key that a section inherits, such as train_crosscoder.k

# one experiment for each value, e.g. just sweep train_sae.k=16,32,64 (give several for a grid)
sweep *sets="train_sae.k=16,32,64":
    dvc exp run --queue $(printf -- '-S ++%s ' "${@:-train_sae.k=16,32,64}")
    dvc exp run --run-all
    just experiments

# slots of params.yaml from a rule: all, top N or names; --single SLOT for stages that read one
slots *rule:
    python -m experiments.slots "$@"

# the pipeline with the keys of experiments/NAME.yaml; --plan estimates it, other words go to dvc exp run
experiment name *args:
    python -m experiments.preset "$@"

# experiments with what they changed and what came out
experiments:
    dvc exp show --md --only-changed --drop 'stages|src|data|assets|plots|metrics/(?!summary)'

# ratios from interleaved runs, known features; sparsify and SAELens where they can be installed
bench:
    pip install --quiet -c requirements.lock -e '.[bench]' || echo "without sparsify or SAELens" >&2
    python -m benchmarks.sae_step
    python -m benchmarks.usae_step
    python -m benchmarks.extraction
    python -m benchmarks.generation
    python -m benchmarks.steering
    python -m benchmarks.synthetic_features

# tests and measurements on a GPU within 400 seconds; --minutes 5 trains the nano models as well
gpu-check *args:
    PYTHONPATH=src:. python -m benchmarks.gpu_check --out gpu-check "$@"

# fail if dvc.lock, metrics or plots are not those of this code and these params
locked:
    @state="$(dvc repro --dry --allow-missing 2>&1)"; case "$state" in \
        *"are up to date"*) ;; \
        *) echo "$state"; echo "run dvc repro and commit dvc.lock, metrics and plots"; exit 1 ;; \
    esac

# the whole line on a few clips, in a temporary copy that is removed
smoke *args:
    python -m tools.smoke "$@"

# size of the code base against its limits; --repro also times a dvc repro
house *args:
    @python -m tools.house "$@"

# write the tables of README and docs from metrics/ and benchmarks/
tables:
    python -m tools.docs_tables --write

# the documentation site in site/, warnings as errors; no network needed
docs *args:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict "$@"

# write a digest of each stage's code into code.lock.yaml
deps:
    python -m tools.import_closure --write

# exact pins from pyproject.toml; existing pins stay unless a range excludes them
lock *args:
    #!/usr/bin/env bash
    set -euo pipefail
    new="$(mktemp)"
    grep '^#' requirements.lock > "$new"
    UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" uv pip compile pyproject.toml --quiet \
        --extra dev --extra docs --no-annotate --no-header --no-emit-index-url -c requirements.lock "$@" \
        | sed 's/+[a-z0-9.]*$//' >> "$new"
    mv "$new" requirements.lock

# remove what a rerun makes again; models and DVC's cache stay
clean:
    rm -rf data/clips data/activations data/sae data/usae data/crosscoder data/features
    rm -rf data/model_code data/maximize_activation data/maximize_shared data/report dvclive .dvc/tmp/partial
    rm -rf data/feature_activity data/feature_pages
    rm -rf .pytest_cache .ruff_cache .hypothesis
    find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

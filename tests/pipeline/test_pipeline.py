"""The DAG as DVC reads it: edges, what a parameter reruns, and the traps that DVC sets."""

from __future__ import annotations

import ast
import itertools

import networkx as nx
import pytest
import yaml
from dvc.repo import Repo

from musicscope.config import Params, load_params
from tools.import_closure import ROOT, stage_script, stages_of

STAGES = stages_of((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
EACH = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# Stages without a section in params.yaml, and why.
NO_SECTION = {
    "summarize": "it copies numbers",
    "figures": "it draws tables",
    "feature_pages": "it renders tables",
    "model_code": "it hashes files",
    "maximize_shared": "it is maximize_activation over all models at once",
}
# Stages that run the script of another one, with an argument.
SCRIPT_OF = {"maximize_shared": "maximize_activation", "steer_full": "steer"}
# What reads data/sae: the universal SAE and the crosscoder for comparison.
BEHIND_SAES = (
    "measure_effects", "train_usae", "match_features", "maximize_activation", "maximize_shared",
    "find_concept", "steer", "feature_activity", "feature_pages", "summarize", "figures", "report",
)  # fmt: skip


@pytest.fixture(scope="module")
def index():
    with Repo(str(ROOT)) as repo:
        yield repo.index


def instances(*names: str) -> set[str]:
    """Matrix instances of the stages `names` under the committed params."""
    params = load_params(ROOT / "params.yaml")
    values = {"model": params.models, "slot": params.slots}
    found = set()
    for name in names:
        if "@" in name:
            found.add(name)
            continue
        if "foreach" in EACH[name]:
            found |= {f"{name}@{key}" for key in params.download_model}
            continue
        matrix = STAGES[name].get("matrix", {})
        axes = [m if isinstance(m, list) else values[axis] for axis, m in matrix.items()]
        found |= {"@".join([name, *filter(None, ["-".join(c)])]) for c in itertools.product(*axes)}
    return found


def expanded(text: str, stage: dict) -> list[str]:
    """`text` for every value of the matrix axes that dvc.yaml itself lists."""
    texts = [text]
    for axis, values in stage.get("matrix", {}).items():
        if isinstance(values, list) and f"${{item.{axis}}}" in text:
            texts = [t.replace(f"${{item.{axis}}}", value) for t in texts for value in values]
    return texts


def declared_params(stage: dict) -> set[str]:
    """Keys of params.yaml that a stage declares."""
    keys = (p.removesuffix(".${key}") for p in stage.get("params", []) if isinstance(p, str))
    return {key for text in keys for key in expanded(text, stage)}


def downstream(index, changed) -> set[str]:
    """Names of the stages that `changed(stage)` holds for and of all that follow and may run."""
    graph = index.graph  # edges go from a stage to what it depends on
    first = {stage for stage in graph if changed(stage)}
    behind = first.union(*(nx.ancestors(graph, stage) for stage in first))
    return {stage.name for stage in behind if not stage.frozen}


def reads_param(key: str):
    def holds(stage) -> bool:
        named = (p for dep in stage.params for p in (dep.params or []))
        return not stage.frozen and any(key == p or key.startswith(f"{p}.") for p in named)

    return holds


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("train_sae.k", ("train_sae", "probe", *BEHIND_SAES)),
        ("probe.bootstrap", ("probe", "summarize", "figures", "report")),
        ("train_judge.epochs", ("train_judge", "steer", "summarize", "figures", "report")),
        (
            "train_crosscoder.k",
            (
                "train_usae@crosscoder",
                "feature_activity",
                "feature_pages",
                "summarize",
                "figures",
                "report",
            ),
        ),
        ("extract_activations.dtype", ("extract_activations", "train_sae", "probe", *BEHIND_SAES)),
    ],
)
def test_a_parameter_reruns_only_what_depends_on_it(index, key, first):
    assert downstream(index, reads_param(key)) == instances(*first)


def test_nothing_depends_on_how_it_is_run(index):
    assert downstream(index, reads_param("compute.threads")) == set()


def test_chosen_layers_reach_their_users_in_one_pass(index):
    for model in load_params(ROOT / "params.yaml").models:
        layers = f"metrics/layers/{model}.yaml"
        (maker,) = (s for s in index.graph if any(str(o) == layers for o in s.outs))
        users = {other.name for other, _ in index.graph.in_edges(maker)}
        assert f"extract_activations@{model}" in users


def test_every_instance_is_in_the_dag_and_runs_unless_its_hours_are_committed(index):
    assert {stage.name for stage in index.graph} == instances(*STAGES)
    assert {s.name for s in index.graph if s.frozen} == instances("pretrain", "steer_full")


def test_results_are_kept_by_git_and_data_by_the_cache(index):
    for stage in index.graph:
        for out in stage.outs:
            by_git = str(out).startswith(
                ("metrics/", "plots/", "data/models/", "data/steering_full/")
            )
            assert out.use_cache != by_git, f"{stage.name}: {out}"
    # `dvc metrics show` and `exp show` print a column per number; the others hold thousands.
    assert [str(out) for stage in index.graph for out in stage.outs if out.metric] == [
        "metrics/summary.json"
    ]


@pytest.mark.parametrize("name", STAGES)
def test_stage_script_section_and_metrics_share_one_name(name):
    stage = STAGES[name]
    script = SCRIPT_OF.get(name, name)
    assert stage_script(stage["cmd"]) == script
    assert (ROOT / "stages" / f"{script}.py").is_file()
    declared = declared_params(stage)
    if name in NO_SECTION:
        assert name not in Params.__dataclass_fields__
    else:
        assert name in declared
    folders = tuple(f"metrics/{n}{end}" for n in {name, *declared} for end in ("/", ".json"))
    outs = [out if isinstance(out, str) else next(iter(out)) for out in stage.get("outs", [])]
    for metric in (out for out in outs if out.startswith("metrics/")):
        for path in expanded(metric, stage):
            assert path.startswith((*folders, "metrics/layers/"))


@pytest.mark.parametrize("name", STAGES)
def test_params_that_a_script_reads_are_declared(name):
    script = SCRIPT_OF.get(name, name)
    tree = ast.parse((ROOT / "stages" / f"{script}.py").read_text(encoding="utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "params"
    } & set(Params.__dataclass_fields__)
    # A key of a section counts for it: match_features reads train_sae.seeds and no more.
    declared = {p.split(".")[0] for p in declared_params(STAGES[name])}
    undeclared = read - declared - {"compute"}
    if not STAGES[name].get("frozen"):
        assert not undeclared, f"add to the params of {name} in dvc.yaml"

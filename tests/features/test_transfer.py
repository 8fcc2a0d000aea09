"""Probes on planted sounds: a feature of one family of sounds does not carry over to another."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from musicscope.data.splits import clip_sets
from musicscope.features import probes, report, transfer
from musicscope.features.logistic import fit_logistic
from tests.features.test_probes import clip_table, probe_section

SECTION = probe_section(k_sparse=(1,), bootstrap=100, null_seeds=2)


@pytest.fixture(scope="module")
def case():
    """SAE codes follow guitar whatever plays it; log-mel has one column per family of sounds."""
    rng = np.random.default_rng(0)
    rows = clip_table(rng, pairs=0)
    mixed = np.where(rng.random(len(rows)) < 0.5, "a", "b")
    family = np.where(rows["font"] == "fluidr3mono", "fluidr3mono", mixed)
    for concept in ("guitar", "reed"):
        rows[f"sound_{concept}"] = np.where(rows[f"has_{concept}"], family, "")
    rows.loc[rows.index[rows["has_reed"] & (rows["split"] == "train")][0], "sound_reed"] = ""
    rows["source"] = np.where(rows["split"] == "test", "new", "old")
    rows.loc[rows["group"] == "test3", "source"] = "old"
    noise = rng.normal(size=(4, len(rows), 6))
    for j, concept in enumerate(("guitar", "reed")):
        has = rows[f"has_{concept}"].to_numpy()
        noise[0, :, j] += 4 * has
        for i, name in enumerate(("a", "b")):
            noise[1, :, 2 * j + i] += 4 * (has & (family == name))
    names = ("sae", "logmel", "dense", "trivial")
    pools = {name: {"mean": x} for name, x in zip(names, noise, strict=True)}
    return rows, pools, probes.run_probes(rows, pools, ("guitar", "reed"), SECTION, 1)


def test_features_of_one_family_do_not_carry_over(case):
    rows, _, result = case
    for concept, entry in result["transfer"]["concepts"].items():
        assert set(entry["families"]) == {"a", "b", "fluidr3mono"}
        # On all families together both representations detect the concept.
        assert result["concepts"][concept]["logmel"]["test"]["auroc"]["value"] > 0.9
        for family, numbers in entry["families"].items():
            assert numbers["sae"]["value"] > 0.95
            assert 0.3 < numbers["logmel"]["value"] < 0.7
            assert numbers["sae_minus_logmel"]["low"] > 0.15
            font = "fluidr3mono" if family == "fluidr3mono" else "mixed"
            played = (rows[f"sound_{concept}"] == family) & (rows["split"] == "test")
            assert numbers["positives"] == (played & (rows["font"] == font)).sum()
        mean, each = entry["mean"]["sae"]["value"], entry["families"].values()
        assert mean == pytest.approx(np.mean([n["sae"]["value"] for n in each]))
        assert "trivial" not in entry["mean"]
    assert result["transfer"]["mean"]["concepts"] == 2
    assert result["transfer"]["mean"]["sae_minus_logmel"]["low"] > 0.2
    held_out = result["concepts"]["guitar"]["sae"]["heldout_font"]["auroc"]["value"]
    fluid = result["transfer"]["concepts"]["guitar"]["families"]["fluidr3mono"]
    assert fluid["sae"]["value"] == pytest.approx(held_out)


def test_a_family_that_trains_is_no_transfer(case):
    """The planted leak: if the left-out family stayed in train, log-mel would detect it."""
    rows, pools, _ = case
    sets = clip_sets(rows)
    labels = rows[["has_guitar"]].to_numpy(bool)
    out = labels & (rows[["sound_guitar"]].to_numpy() == "a")
    at = sets["test"][out[sets["test"], 0] | ~labels[sets["test"], 0]]
    aurocs = []
    for kept in (None, ~out):
        targets = (labels[sets["train"]], labels[sets["validation"]])
        chosen = probes.choose(
            pools["logmel"], *targets, sets["train"], sets["validation"], SECTION.c_grid, kept
        )
        aurocs.append(probes.stats.auroc(chosen.scores[at, 0], labels[at, 0]))
    assert aurocs[0] > 0.9 > 0.7 > aurocs[1]


def test_kept_rows_are_the_ones_that_are_fitted():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 5)) + 0.3
    labels = np.stack([x[:, 0] + rng.normal(size=90) > 0.5, rng.random(90) < 0.3], 1)
    kept = rng.random((90, 2)) < 0.6
    weights, intercepts = fit_logistic(
        x, labels, np.array([0.1, 1.0]), tolerance=1e-8, iterations=20000, kept=kept
    )
    for j, c in enumerate((0.1, 1.0)):
        model = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
        model.fit(x[kept[:, j]], labels[kept[:, j], j])
        found = x @ weights[:, j] + intercepts[j]
        np.testing.assert_allclose(found, model.decision_function(x), atol=2e-4)


def test_the_held_out_source_is_a_set_of_its_own(case):
    rows, _, result = case
    sets = clip_sets(rows)
    at = sets["heldout_source"]
    assert set(at) < set(sets["test"])
    assert set(rows["source"].iloc[at]) == {"new"}
    assert result["clips"]["heldout_source"] == len(at) == 108
    assert result["concepts"]["guitar"]["sae"]["heldout_source"]["auroc"]["n"] == 9
    assert len(clip_sets(rows.drop(columns="source"))["heldout_source"]) == 0
    assert "heldout_source" in set(report.probe_table(result)["set"])


def test_the_mean_over_concepts_is_paired(case):
    *_, result = case
    mean = result["mean"]["test"]
    assert mean["concepts"] == 2
    for name in ("sae", "trivial"):
        each = [entry[name]["test"]["auroc"]["value"] for entry in result["concepts"].values()]
        assert mean[name]["value"] == pytest.approx(np.mean(each))
    gap = mean["sae_minus_trivial"]
    assert gap["value"] == pytest.approx(mean["sae"]["value"] - mean["trivial"]["value"])
    assert gap["low"] > 0.2


def test_the_null_is_chosen_on_permuted_validation_labels(case, monkeypatch):
    rows, pools, _ = case
    seen = []
    real = probes.choose

    def record(pools, train_labels, validation_labels, *rest, **more):
        seen.append(validation_labels)
        return real(pools, train_labels, validation_labels, *rest, **more)

    monkeypatch.setattr(probes, "choose", record)
    both = {name: pools[name] for name in ("sae", "dense")}
    probes.run_probes(rows, both, ("guitar", "reed"), SECTION, 1)
    sae = next(labels for labels in seen if labels.shape[1] == 6)
    for j in range(2):
        for null in (sae[:, 2 + j], sae[:, 4 + j]):
            assert null.sum() == sae[:, j].sum()
            assert (null != sae[:, j]).mean() > 0.1


def test_recordings_without_sounds_have_no_transfer():
    rng = np.random.default_rng(2)
    rows = clip_table(rng, heldout=0, pairs=0)
    assert transfer.sounds_of(rows, ("guitar",)) is None
    pools = {"mean": rng.normal(size=(len(rows), 4))}
    found = probes.run_probes(rows, {"sae": pools, "dense": pools}, ("guitar",), SECTION, 1)
    assert "transfer" not in found

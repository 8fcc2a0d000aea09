"""The section on probes shows controls on every test set, and says which goals are missed."""

from musicscope.report.sections import probes
from tests.support.report import cells, estimate, sources, tables, write_metrics


def metrics(sae=0.9, left_out=0.7, low=0.01):
    """Metrics of one slot; representations differ by .01."""
    names = [key for _, key in probes.REPRESENTATIONS]
    guitar = {
        name: {
            test: {"auroc": estimate(sae - 0.01 * i)} for test in ("test", "heldout_source")
        } | {"pairs_mixed": {"accuracy": estimate(0.6 - 0.01 * i)}}
        for i, name in enumerate(names)
    }  # fmt: skip
    numbers = {key: estimate(left_out) for _, key in probes.LEFT_OUT}
    numbers["sae_minus_logmel"] = estimate(0.05, low, 0.1)
    families = {"timgm6mb": numbers | {"positives": 9}}
    transfer = {"concepts": {"guitar": {"families": families, "mean": numbers}}}
    return {
        "concepts": {"guitar": guitar | {"positives": {"test": 9}}},
        "mean": {"test": {"concepts": 14, "sae": estimate(0.68, 0.65, 0.71)}},
        "transfer": transfer,
    }


def test_goals_have_verdicts():
    found = [(target, verdict) for *_, target, verdict in probes.goals(metrics())]
    assert found == [("≥ 0.85", "met"), ("≥ 0.75", "missed"), ("> 0", "met")]
    missed = probes.goals(metrics(sae=0.6, low=-0.01))
    assert [verdict for *_, verdict in missed] == ["missed", "missed", "missed"]
    unknown = probes.goals({"concepts": metrics()["concepts"]})
    assert [verdict for *_, verdict in unknown] == ["met", "not measured", "not measured"]


def test_controls_stand_beside_the_codes_on_every_set(tmp_path):
    write_metrics(tmp_path, "probe/tiny-top1", metrics())
    found = tables(probes.section(sources(tmp_path)))
    shown = found["tiny top1: test sets"]
    assert shown.columns[1:] == tuple(label for label, _ in probes.TESTS)
    rows = cells(shown)
    assert rows["guitar: SAE"] == ["0.900", "0.900", "–", "0.600", "–"]
    assert rows["guitar: log-mel"][3] == "0.580"
    assert rows["mean over concepts: SAE"][0] == "0.680 [0.650, 0.710]"
    left_out = cells(found["tiny top1: one family of sounds left out"])
    assert left_out["guitar: timgm6mb left out"][0] == "0.700"
    assert left_out["guitar: mean"][4] == "0.050 [0.010, 0.100]"
    assert "met" in {row[2] for row in cells(found["tiny top1: goals"]).values()}

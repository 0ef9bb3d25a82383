"""Products, unions and differences in the plane, in the quick form of the benchmark."""

from pathlib import Path

import pytest


@pytest.fixture
def planar(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import planar

    return planar


@pytest.mark.parametrize("index", range(9))
def test_samples_are_in_place_and_empty_compositions_are_refused(planar, index):
    composition = planar.NINE[index]
    row, samples = planar.run(composition, num_chains=200, seed=7)
    if composition.empty:
        assert row["refused"]
        assert row["log_probability"] < -5
    else:
        assert not row["refused"]
        assert row["in_place"] >= row["true_share"] - 0.03
    assert len(samples) == 200


def test_unions_keep_their_proportions(planar):
    left_or_right = next(p for p in planar.NINE if p.name == "left or right")
    _, samples = planar.run(left_or_right, num_chains=1000, seed=3)
    assert float((samples[:, 0] < 0).float().mean()) == pytest.approx(0.5, abs=0.06)

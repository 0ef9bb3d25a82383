"""Portraits: full variety, labels by construction, one rendering for all."""

import numpy as np
import pytest
import torch

from composable_ebm.data import load_data, portraits

pytest.importorskip("dicebear")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    portraits.load("train", root=folder, num_images=60, processes=1)
    return folder


def test_a_portrait_depends_on_its_split_and_place_alone():
    assert portraits.draw("train", 3) == portraits.draw("train", 3)
    assert portraits.draw("train", 3) != portraits.draw("test", 3)
    options = portraits.draw("train", 3)[1]
    assert np.array_equal(portraits.render(options), portraits.render(options))


def test_pictures_are_rendered_once_and_found_again(root, monkeypatch):
    monkeypatch.setattr(portraits, "render", lambda *_: pytest.fail("rendered"))
    data = load_data("portraits", "train", root, num_images=40)
    assert data.images.shape == (40, 3, 64, 64)
    assert data.labels["smile"].tolist() == [portraits.draw("train", i)[0]["smile"] for i in range(40)]


def test_every_value_of_every_attribute_is_about_equally_likely():
    drawn = [portraits.draw("train", i)[0] for i in range(3000)]
    for attribute, values in portraits.VALUES.items():
        labels = torch.tensor([label[attribute] for label in drawn])
        counts = torch.bincount(labels[labels >= 0], minlength=len(values)).double()
        share = counts / counts.sum()
        assert (share - 1 / len(values)).abs().max() < 0.04, attribute


def test_attributes_are_independent():
    drawn = [portraits.draw("train", i)[0] for i in range(3000)]
    names = ("smile", "glasses", "beard", "curly", "grey_hair")
    table = torch.tensor([[label[name] for name in names] for label in drawn]).double()
    assert (torch.corrcoef(table.T) - torch.eye(5)).abs().max() < 0.07


def test_only_grey_hair_has_no_colour():
    for i in range(200):
        labels, _ = portraits.draw("train", i)
        assert (labels["hair"] == -1) == (labels["grey_hair"] == 1)


def test_a_damaged_cache_is_rendered_again(root, tmp_path):
    cache = tmp_path / "portraits" / "recipe1-64px-train-3.safetensors"
    cache.parent.mkdir()
    cache.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="is damaged and will not be used"):
        data = portraits.load("train", root=tmp_path, num_images=3, processes=1)
    assert torch.equal(data.images, portraits.load("train", root=root, num_images=3).images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"num_images": 0}, "`num_images` must be at least 1"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        portraits.load(**options)

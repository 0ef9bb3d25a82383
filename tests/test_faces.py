"""Faces: labels that are true, independent and reproducible; a cache that cannot lie."""

import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch

from composable_ebm.data import faces, load_data, rendered
from composable_ebm.data.combinations import parse_combination
from composable_ebm.data.root import ENVIRONMENT_VARIABLE

BINARY = ("smile", "glasses", "beard", "curly", "grey_hair")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A cache that holds 24 rendered faces of `train`."""
    pytest.importorskip("dicebear")
    pytest.importorskip("resvg_py")
    folder = tmp_path_factory.mktemp("faces")
    faces.load("train", root=folder, num_images=24, processes=1)
    return folder


@pytest.fixture
def counted(monkeypatch):
    """A stand-in for the renderer that draws grey images and counts them."""
    drawn = []

    def render(options, size=32):
        drawn.append(options)
        return np.full((3, size, size), len(drawn) % 256, dtype=np.uint8)

    monkeypatch.setattr(faces, "render", render)
    monkeypatch.setattr(faces, "_renderer", lambda: None)
    return drawn


# --- what is drawn -------------------------------------------------------------------------------


def test_value_one_of_a_binary_attribute_has_the_attribute():
    assert [a for a, values in faces.VALUES.items() if len(values) == 2] == list(BINARY)
    for attribute in BINARY:
        assert faces.VALUES[attribute][1] == attribute


def test_options_show_what_the_labels_say():
    for index in range(200):
        labels, options = faces.draw("train", index)
        assert (options["mouthVariant"] == ["smile"]) == labels["smile"]
        assert (options["accessoriesProbability"] == 100) == labels["glasses"]
        assert (options["facialHairProbability"] == 100) == labels["beard"]
        assert (options["topVariant"][0] in ("fro", "dreads02")) == labels["curly"]
        assert (options["hairColor"] == ["#e8e1e1"]) == labels["grey_hair"]
        assert options["facialHairColor"] == options["hairColor"]


def test_every_value_is_equally_likely_and_attributes_are_independent():
    n = 4000
    drawn = [faces.draw("train", index)[0] for index in range(n)]
    labels = {name: np.array([label[name] for label in drawn]) for name in faces.VALUES}
    names = list(faces.VALUES)
    for i, first in enumerate(names):
        for second in names[i:]:
            shape = (len(faces.VALUES[first]), len(faces.VALUES[second]))
            counts = np.zeros(shape)
            np.add.at(counts, (labels[first], labels[second]), 1)
            counts = np.diag(counts) if first == second else counts
            expected = n / counts.size
            assert np.abs(counts - expected).max() < 4.5 * expected**0.5, (first, second)


def test_a_face_depends_on_its_split_and_position_alone():
    assert faces.draw("train", 7) == faces.draw("train", 7)
    options = [str(faces.draw(split, index)) for split in faces.SIZES for index in range(300)]
    assert len(set(options)) == len(options)


def test_each_attribute_changes_the_pixels(root):
    _, options = faces.draw("train", 0)
    for attribute, values in faces._OPTIONS.items():
        drawn = []
        for choices in values.values():
            chosen = {name: c[0] if isinstance(c[0], int) else list(c[:1]) for name, c in choices.items()}
            drawn.append(faces.render({**options, **chosen}).astype(int))
        for i, first in enumerate(drawn):
            for second in drawn[i + 1 :]:
                assert (np.abs(first - second).max(axis=0) > 40).sum() >= 8, attribute


def test_render_is_the_mean_over_four_pixels_of_the_larger_picture(root):
    _, options = faces.draw("train", 3)
    small, large = faces.render(options, 16), faces.render(options, 32)
    means = large.reshape(3, 16, 2, 16, 2).mean(axis=(2, 4))
    assert small.shape == (3, 16, 16)
    assert np.abs(small - means).mean() < 4  # the same face, though edges are sampled more finely


def test_rendered_faces_are_those_of_their_options(root):
    data = faces.load("train", root=root, num_images=24)
    assert data.event_shape == (3, 32, 32)
    assert data.name == "faces/train"
    for index in (0, 23):
        labels, options = faces.draw("train", index)
        assert {name: int(label[index]) for name, label in data.labels.items()} == labels
        torch.testing.assert_close(data.images[index], torch.from_numpy(faces.render(options)))


# --- the cache -----------------------------------------------------------------------------------


def test_second_load_renders_nothing_and_fewer_faces_are_the_first(tmp_path, counted):
    first = faces.load("test", root=tmp_path, size=4, num_images=10, processes=1)
    assert len(counted) == 10
    fewer = faces.load("test", root=tmp_path, size=4, num_images=4, processes=1)
    assert len(counted) == 10
    torch.testing.assert_close(fewer.images, first.images[:4])
    assert [len(label) for label in fewer.labels.values()] == [4] * len(faces.VALUES)
    faces.load("test", root=tmp_path, size=4, num_images=11, processes=1)
    assert len(counted) == 21
    assert not list((tmp_path / "faces").glob(".*"))  # nothing half written is left behind


def test_sizes_and_splits_have_caches_of_their_own(tmp_path, counted):
    for split, size in (("train", 4), ("train", 6), ("test", 4)):
        faces.load(split, root=tmp_path, size=size, num_images=2, processes=1)
    assert len(counted) == 6
    assert len(list((tmp_path / "faces").iterdir())) == 3


def test_cache_is_found_in_the_folder_named_in_the_environment(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(faces, "SIZES", {"train": 3})
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    faces.load("train", size=5, processes=1)
    assert len(load_data("faces", root=tmp_path)) == 3  # 32 pixels: rendered anew
    assert len(list((tmp_path / "faces").iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_cache_is_reported_and_rendered_again(tmp_path, counted, damage):
    first = faces.load("train", root=tmp_path, size=4, num_images=3, processes=1)
    (path,) = (tmp_path / "faces").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "flip" else content[:50])
    with pytest.warns(UserWarning, match="is damaged and will not be used"):
        again = faces.load("train", root=tmp_path, size=4, num_images=3, processes=1)
    assert len(counted) == 6
    assert again.labels["smile"].tolist() == first.labels["smile"].tolist()
    faces.load("train", root=tmp_path, size=4, num_images=3, processes=1)
    assert len(counted) == 6


def test_cached_faces_need_no_renderer(root, monkeypatch):
    monkeypatch.setattr(faces, "_renderer", lambda: pytest.fail("rendered"))
    assert len(faces.load("train", root=root, num_images=20)) == 20


@pytest.mark.slow
def test_processes_render_what_one_process_renders(root, tmp_path, monkeypatch):
    monkeypatch.setattr(rendered, "CHUNK", 5)
    several = faces.load("train", root=tmp_path, num_images=12, processes=2)
    one = faces.load("train", root=root, num_images=12)
    torch.testing.assert_close(several.images, one.images)


# --- combinations that are held out --------------------------------------------------------------


def test_excluded_combinations_are_gone_and_all_else_stays(tmp_path, counted):
    everything = faces.load("train", root=tmp_path, size=2, num_images=400, processes=1)
    exclude = ("smile+glasses+beard", "~curly + skin[tan]")
    kept = faces.load("train", root=tmp_path, size=2, num_images=400, exclude=exclude)

    def excluded(data):
        has = {name: label == 1 for name, label in data.labels.items()}
        return has["smile"] & has["glasses"] & has["beard"] | ~has["curly"] & has["skin"]

    assert not excluded(kept).any()
    assert len(kept) == int((~excluded(everything)).sum())
    assert 0.6 * 400 < len(kept) < 0.85 * 400  # (1 - 1/8) (1 - 1/6) = 0.73


def test_combinations_read_like_recipes():
    expected = {"smile": 1, "beard": 0, "skin": 1}
    assert parse_combination("smile+~beard+skin[tan]", faces.VALUES, "faces") == expected
    assert parse_combination("curly[straight]", faces.VALUES, "faces") == {"curly": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smiles", "unknown attribute of the faces 'smiles'; did you mean 'smile'"),
        ("skin[tam]", "unknown value of 'skin' 'tam'; did you mean 'tan'"),
        ("smile+skin", r"'skin' has 3 values: write one of skin\[pale\], skin\[tan\], skin\[brown\]"),
        ("smile+~smile", "'smile' is named twice"),
        ("smile+", "must read `smile`, `~smile` or `skin"),
        ("~skin[tan]", "must read `smile`, `~smile` or `skin"),
        ("smile glasses", "must read `smile`, `~smile` or `skin"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        faces.load("train", exclude=(text,))


# --- errors --------------------------------------------------------------------------------------


def test_single_text_is_not_taken_for_a_list_of_letters():
    with pytest.raises(TypeError, match=r"`exclude` must be a list.*exclude=\('smile\+beard',\)"):
        faces.load("train", exclude="smile+beard")


def test_unknown_split_lists_the_near_ones():
    with pytest.raises(ValueError, match="unknown split of the faces 'valid'; did you mean 'validation'"):
        faces.load("valid")


@pytest.mark.parametrize("name", ["size", "num_images", "processes"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        faces.load("train", **{name: 0})


@pytest.mark.parametrize("missing", ["dicebear", "resvg_py", "dicebear_styles"])
def test_missing_renderer_names_the_extra(tmp_path, monkeypatch, missing):
    for name in ("dicebear", "resvg_py", "dicebear_styles"):
        if name != missing:
            pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, missing, None)  # Python's own way to forbid an import
    faces._renderer.cache_clear()
    with pytest.raises(ImportError, match=rf"'{missing}' is missing: pip install 'composable_ebm\[faces\]'"):
        faces.load("train", root=tmp_path, num_images=1, processes=1)


def test_broken_pool_says_what_a_script_must_do(tmp_path, counted, monkeypatch):
    class Broken:
        def __init__(self, *args, **kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def map(self, *args):
            raise BrokenProcessPool("a child was terminated abruptly")

    monkeypatch.setattr(rendered, "ProcessPoolExecutor", Broken)
    with pytest.raises(BrokenProcessPool) as caught:
        faces.load("train", root=tmp_path, size=2, num_images=300, processes=2)
    assert "processes=1" in caught.value.__notes__[0]
    assert not list(tmp_path.rglob("*.safetensors"))

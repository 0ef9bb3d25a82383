"""Labelled images, and the digits with their measured handwriting."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from composable_ebm.data import LabelledImages, digits
from composable_ebm.data.root import ENVIRONMENT_VARIABLE, search_path

# --- labelled images -----------------------------------------------------------------------------


def shapes(n=6, **changes):
    """A small data set with one attribute; two of six images have no label."""
    fields = {
        "images": torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2),
        "labels": {"colour": torch.tensor([0, 1, -1, 1, 0, -1])},
        "values": {"colour": ("red", "blue")},
        "name": "shapes",
    }
    return LabelledImages(**{**fields, **changes})


def test_batch_maps_bytes_onto_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1)
    batch = LabelledImages(images, {}, {}, "ramp").batch(torch.tensor([1, 0, 2]))
    torch.testing.assert_close(batch.flatten(), torch.tensor([1.0, -1.0, -0.6]))


def test_length_and_event_shape_are_those_of_the_images():
    assert len(shapes()) == 6
    assert shapes().event_shape == (3, 2, 2)


def test_where_keeps_the_labelled_images_with_their_labels():
    labelled = shapes().where("colour")
    assert labelled.images[:, 0, 0, 0].tolist() == [0, 1, 3, 4]
    assert labelled.labels["colour"].tolist() == [0, 1, 1, 0]


def test_select_takes_positions_or_a_mask():
    blue = shapes().select(shapes().labels["colour"] == 1)
    assert blue.images[:, 0, 0, 0].tolist() == [1, 3]
    assert shapes().select(torch.tensor([5, 0])).labels["colour"].tolist() == [-1, 0]
    assert len(shapes().select(torch.zeros(6, dtype=torch.bool))) == 0


def test_to_moves_the_images():
    assert shapes(labels={}, values={}).to("meta").images.device.type == "meta"


@pytest.mark.gpu
def test_data_set_on_a_gpu_gives_batches_there():
    moved = shapes().to("cuda").where("colour")
    assert moved.labels["colour"].device.type == "cuda"
    assert moved.batch(torch.tensor([0, 3], device="cuda")).device.type == "cuda"


def test_unknown_attribute_lists_the_near_ones():
    assert shapes().attribute("colour") == ("red", "blue")
    with pytest.raises(ValueError, match=r"unknown attribute of 'shapes' 'color'; did you mean"):
        shapes().attribute("color")
    with pytest.raises(ValueError, match=r"There are: colour\."):
        shapes().where("size")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(6, 3, 2, 2)}, TypeError, "`images` of 'shapes' must be bytes"),
        (
            {"images": torch.zeros(6, 2, 2, dtype=torch.uint8)},
            ValueError,
            r"must have shape \(n, channels, height, width\), got \(6, 2, 2\)",
        ),
        ({"values": {}}, ValueError, r"must name the same attributes, got \['colour'\] and \[\]"),
        ({"labels": {"colour": torch.zeros(6)}}, TypeError, r"must be int64.*labels\.long\(\)"),
        (
            {"labels": {"colour": torch.zeros(5, dtype=torch.int64)}},
            ValueError,
            r"must have shape \(6,\), one label an image, got \(5,\)",
        ),
        (
            {"labels": {"colour": torch.full((6,), 2)}},
            ValueError,
            r"between -1 \(unlabelled\) and 1 \('blue'\), got 2 to 2",
        ),
        (
            {"labels": {"colour": torch.zeros(6, dtype=torch.int64, device="meta")}},
            ValueError,
            "must be on cpu like the images, got meta",
        ),
        ({"values": {"colour": ("red", "red")}}, ValueError, "repeats a name"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        shapes(**changes)


def test_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"a mask for 'shapes' must have shape \(6,\), got \(5,\)"):
        shapes().select(torch.ones(5, dtype=torch.bool))


# --- measures on strokes whose answers are known -------------------------------------------------


def bar(width, height, degrees=0.0, size=28, fine=16):
    """A centred bar of the given width and height, sheared to lean right, with soft edges."""
    points = (torch.arange(size * fine, dtype=torch.float64) + 0.5) / fine - size / 2
    v, u = torch.meshgrid(points, points, indexing="ij")
    inside = (u + v * math.tan(math.radians(degrees))).abs() < width / 2
    inside &= v.abs() < height / 2
    ink = inside.double().view(size, fine, size, fine).mean(dim=(1, 3))
    return (2 * ink - 1).float()[None, None]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("left", [0, 9])
def test_upright_bar_of_whole_pixels_measures_its_own_width(width, left):
    x = torch.full((1, 1, 28, 28), -1.0)
    x[..., 4:24, left : left + width] = 1
    assert digits.slant(x).item() == pytest.approx(0, abs=1e-3)
    assert digits.width(x).item() == pytest.approx(width, rel=1e-4)
    assert digits.thickness(x).item() == pytest.approx(width * 20 / (width + 20), rel=0.03)


@pytest.mark.parametrize("degrees", [-30, -10, 10, 30])
def test_sheared_bar_measures_its_angle_and_the_width_it_had(degrees):
    x = bar(8, 18, degrees)
    assert digits.slant(x).item() == pytest.approx(degrees, abs=0.3)
    assert digits.width(x).item() == pytest.approx(8, rel=0.03)
    # Across the stroke a sheared bar is thinner, because its sides are longer.
    side = 18 / math.cos(math.radians(degrees))
    assert digits.thickness(x).item() == pytest.approx(8 * 18 / (8 + side), rel=0.03)


def test_thickness_hardly_depends_on_the_direction_of_the_stroke():
    sheared = [bar(3 / math.cos(math.radians(d)), 18, d) for d in range(-45, 46, 15)]
    measured = digits.thickness(torch.cat(sheared))
    assert (measured.max() / measured.min()).item() < 1.06


def test_positive_slant_leans_right_like_italics():
    x = torch.full((1, 1, 5, 5), -1.0)
    for row, column in [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]:  # a slash
        x[0, 0, row, column] = 1
    assert digits.slant(x).item() > 30


def test_grey_strokes_are_as_thick_as_black_ones():
    x = bar(4, 18, 10)
    faint = (x + 1) * 0.3 - 1
    for measure in (digits.thickness, digits.slant, digits.width):
        torch.testing.assert_close(measure(faint), measure(x), rtol=1e-4, atol=1e-4)


def test_stroke_at_the_border_has_an_outline_there():
    x = torch.full((1, 1, 20, 3), 1.0)  # ink everywhere
    assert digits.thickness(x).item() == pytest.approx(3 * 20 / 23, rel=0.03)


def test_mirrored_images_measure_alike_and_lean_the_other_way():
    x = torch.rand(16, 1, 12, 12) * 2 - 1
    for flipped in (x.flip(-1), x.flip(-2)):
        torch.testing.assert_close(digits.thickness(flipped), digits.thickness(x))
        torch.testing.assert_close(digits.width(flipped), digits.width(x))
        torch.testing.assert_close(digits.slant(flipped), -digits.slant(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("measure", [digits.thickness, digits.slant, digits.width])
def test_blank_image_measures_zero_beside_others(measure):
    x = torch.cat([torch.full((1, 1, 28, 28), -1.0), bar(3, 20, 5)])
    blank, drawn = measure(x).tolist()
    assert blank == 0
    assert drawn > 1


@pytest.mark.parametrize("measure", [digits.thickness, digits.slant, digits.width])
@pytest.mark.parametrize(
    "x", [torch.zeros(1, 28, 28), torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).byte()]
)
def test_measures_refuse_what_is_not_a_batch_of_grey_images(measure, x):
    with pytest.raises(ValueError, match=r"`x` must be floats in \[-1, 1\] of shape \(batch, 1, "):
        measure(x)


def test_handwriting_labels_clear_cases_and_leaves_the_rest():
    middle = sum(digits.THICKNESS_CUTS_IN_PIXELS) / 2
    long = middle * 24 / (24 - middle)  # w h/(w + h) = middle
    x = torch.cat([bar(1.5, 24, 20), bar(4, 24, -10), bar(long, 24, 6)])
    labels = digits.handwriting(x)
    assert labels["thick"].tolist() == [0, 1, -1]
    assert labels["slanted"].tolist() == [1, 0, -1]
    assert labels["wide"].tolist() == [0, 0, 0]
    assert all(label.dtype == torch.int64 for label in labels.values())


# --- loading -------------------------------------------------------------------------------------


def test_unknown_split_lists_the_near_ones():
    with pytest.raises(ValueError, match="unknown split of the digits 'valid'; did you mean 'vali"):
        digits.load("valid")


def test_absent_digits_say_where_was_looked_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load\(\.\.\., download=True\)") as caught:
        digits.load(root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert ENVIRONMENT_VARIABLE in str(caught.value)


def test_root_named_in_the_environment_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    assert search_path()[0] == tmp_path


def write_mnist(root, train=5_100, test=40):
    """A tiny data set in MNIST's own layout: images whose first pixel is their position."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", train), ("t10k", test)):
        images = np.zeros((n, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(n) % 251
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


def test_validation_is_the_end_of_the_training_images(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    train, validation, test = map(digits.load, digits.SPLITS)
    assert (len(train), len(validation), len(test)) == (100, 5_000, 40)
    assert train.images[:, 0, 0, 0].tolist() == list(range(100))
    assert validation.images[0, 0, 0, 0].item() == 100
    assert validation.labels["digit"][:3].tolist() == [0, 1, 2]
    assert validation.name == "digits/validation"
    assert train.attribute("digit") == tuple("0123456789")


def test_digits_of_excluded_combinations_are_gone(tmp_path):
    write_mnist(tmp_path)
    kept = digits.load("train", root=tmp_path, exclude=("digit[3]+~thick", "digit[7]+thick"))
    assert (kept.labels["digit"] != 3).all()  # single pixels are thin
    assert len(kept) == 90
    with pytest.raises(ValueError, match="unknown attribute of the digits 'thik'; did you mean 'thick'"):
        digits.load("train", root=tmp_path, exclude=("digit[3]+thik",))


@pytest.fixture(scope="module")
def train(data_root):
    return digits.load("train", root=data_root)


def test_real_digits_are_all_there(data_root, train):
    validation, test = (digits.load(split, root=data_root) for split in ("validation", "test"))
    assert (len(train), len(validation), len(test)) == (55_000, 5_000, 10_000)
    assert train.event_shape == (1, 28, 28)
    ink = torch.cat([train.images, validation.images]).double() / 255
    assert ink.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert test.labels["digit"].bincount().min() > 800


def test_cuts_are_the_thirds_of_the_training_images(train):
    for name, measured in digits.MEASURED.items():
        chunks = torch.arange(len(train)).split(4096)
        values = torch.cat([measured.measure(train.batch(index)) for index in chunks])
        thirds = torch.quantile(values, torch.tensor([1 / 3, 2 / 3]))
        assert measured.cuts == pytest.approx(thirds.tolist(), abs=0.006), name
        shares = (train.labels[name] + 1).bincount() / len(train)
        torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.01, rtol=0)


def skeleton_thickness(image, scale=4):
    """Twice the mean distance to the background along the ridge of the strokes, in pixels."""
    large = scipy.ndimage.zoom(image.astype(float), scale, grid_mode=True, mode="grid-constant")
    distance = scipy.ndimage.distance_transform_edt(large > 127.5)
    ridge = (distance > 0) & (distance == scipy.ndimage.maximum_filter(distance, 3))
    return 2 * distance[ridge].mean() / scale


def test_thickness_agrees_with_the_skeleton_on_real_digits(data_root):
    test = digits.load("test", root=data_root).select(torch.arange(300))
    slow = [skeleton_thickness(image) for image in test.images[:, 0].numpy()]
    fast = digits.thickness(test.batch(torch.arange(300))).numpy()
    assert np.corrcoef(slow, fast)[0, 1] > 0.95

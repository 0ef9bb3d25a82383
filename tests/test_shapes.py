"""Scenes of shapes: every label can be read off the pixels."""

import pytest
import torch

from composable_ebm.data import load_data, shapes


@pytest.fixture(scope="module")
def scenes():
    return shapes.load("train", num_images=2000)


@pytest.fixture(scope="module")
def many_scenes():
    return shapes.load("train", num_images=8000)


def taken(data):
    """The truth about the cells, shape (n, cells)."""
    return torch.stack([data.labels[f"at_{cell}"] for cell in data.values["position"]], dim=1).bool()


def seen(data, grid, size):
    """What the pixels show: mean difference from the background in each cell, shape (n, cells)."""
    background = torch.tensor(shapes.BACKGROUND).view(1, 3, 1, 1)
    ink = (data.images.int() - background).abs().sum(dim=1).float()
    cells = ink.view(-1, grid, size // grid, grid, size // grid).mean(dim=(2, 4))
    return cells.flatten(1)


def test_cells_that_are_taken_are_those_with_ink(scenes):
    ink = seen(scenes, grid=4, size=32)
    assert ink[taken(scenes)].min() > 10 * ink[~taken(scenes)].max()


def test_cells_taken_reads_the_truth_off_the_pixels(scenes):
    x = scenes.batch(torch.arange(len(scenes)))
    assert (shapes.cells_taken(x) == taken(scenes)).all()
    noisy = x + 0.05 * torch.randn(x.shape)
    assert (shapes.cells_taken(noisy) == taken(scenes)).all()
    background = (torch.tensor(shapes.BACKGROUND) / 127.5 - 1).view(1, 3, 1, 1)
    assert not shapes.cells_taken(torch.lerp(background.expand_as(x), x, 0.2)).any()


@pytest.mark.parametrize(("asked", "weight"), [(1, 1.0), (2, 1.0), (2, 2.0), (3, 0.5)])
def test_count_shares_are_those_of_scenes_weighted_by_their_ratios(many_scenes, asked, weight):
    count, cells = many_scenes.labels["count"] + 1, taken(many_scenes)
    # p(position = c | x) = [c is taken]/count, for many different choices of `asked` cells.
    choices = torch.stack([torch.randperm(16)[:asked] for _ in range(150)])
    hits = cells[:, choices].all(dim=2).sum(dim=1)
    weights = hits * count.double() ** (-weight * asked)
    shares = torch.stack([weights[count == n].sum() for n in range(1, 6)]) / weights.sum()
    torch.testing.assert_close(shares, shapes.count_shares(asked, weight), atol=0.03, rtol=0)


def test_labelled_cell_is_one_of_those_taken(scenes):
    assert taken(scenes).gather(1, scenes.labels["position"][:, None]).all()


def test_count_is_the_number_of_cells_taken(scenes):
    torch.testing.assert_close(taken(scenes).sum(dim=1), scenes.labels["count"] + 1)
    assert scenes.values["count"] == ("1", "2", "3", "4", "5")


def test_values_are_equally_likely(many_scenes):
    data = many_scenes
    for name in ("position", "shape", "colour", "count"):
        counts = data.labels[name].bincount().double()
        expected = 8000 / len(data.values[name])
        assert len(counts) == len(data.values[name])
        assert (counts - expected).abs().max() < 4.5 * expected**0.5, name


def test_labelled_object_is_any_of_those_in_the_scene(many_scenes):
    data = many_scenes
    taken_cells, position = taken(data), data.labels["position"]
    several = data.labels["count"] > 0
    first_of_all = position == taken_cells.int().argmax(dim=1)  # in reading order
    share = first_of_all[several].double().mean().item()
    expected = (1 / (data.labels["count"][several] + 1)).mean().item()
    assert share == pytest.approx(expected, abs=4.5 * (0.25 / several.sum().item()) ** 0.5)


def test_labelled_shape_and_colour_are_those_at_the_labelled_cell(scenes):
    size, grid = 32, 4
    cells = scenes.images.view(-1, 3, grid, 8, grid, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    cell = cells[torch.arange(len(scenes)), scenes.labels["position"]].float()  # (n, 3, 8, 8)
    palette = torch.tensor(list(shapes.COLOURS.values())).float()
    distance = (cell[:, None] - palette[None, :, :, None, None]).abs().sum(dim=2)  # (n, colours, 8, 8)
    torch.testing.assert_close(distance.amin(dim=(2, 3)).argmin(dim=1), scenes.labels["colour"])

    background = torch.tensor(shapes.BACKGROUND).view(1, 3, 1, 1)
    full = (palette.view(-1, 3, 1, 1) - background).abs().sum(dim=1)[scenes.labels["colour"]]
    cover = (cell - background).abs().sum(dim=1) / full
    pixels = (grid / size) ** 2
    areas = {
        "circle": torch.pi * shapes.RADIUS**2,
        "square": torch.pi * shapes.RADIUS**2,
        "triangle": 2 * shapes.RADIUS**2,
    }
    for index, name in enumerate(shapes.SHAPES):
        measured = cover[scenes.labels["shape"] == index].sum(dim=(1, 2)).mean().item() * pixels
        assert measured == pytest.approx(areas[name], rel=0.06), name


def test_triangle_is_narrow_at_the_top_and_square_is_not():
    offsets = torch.tensor([[-0.2], [0.2]])  # rows above and below the middle
    across = torch.linspace(-0.5, 0.5, 201)[None]
    widths = [(outline(across, offsets) < 0).sum(dim=1).tolist() for outline in
              (shapes._circle, shapes._square, shapes._triangle)]  # fmt: skip
    assert widths[0][0] == widths[0][1]
    assert widths[1][0] == widths[1][1]
    assert widths[2][1] > 3 * widths[2][0]


def test_scene_depends_on_its_split_and_position_alone():
    few, many = shapes.load("train", num_images=3), shapes.load("train", num_images=1003)
    torch.testing.assert_close(few.images, many.images[:3])
    assert not torch.equal(many.images[1000:], many.images[:3])
    assert not torch.equal(shapes.load("test", num_images=3).images, few.images)


def test_number_of_objects_can_be_chosen():
    one = shapes.load("test", num_images=50, num_objects=(1, 1))
    assert taken(one).sum(dim=1).tolist() == [1] * 50
    three = shapes.load("test", num_images=50, num_objects=(3, 3))
    assert three.labels["count"].tolist() == [2] * 50


def test_grid_and_size_can_be_chosen():
    data = shapes.load("test", size=48, num_images=200, grid=3)
    assert data.event_shape == (3, 48, 48)
    assert len(data.values["position"]) == 9
    ink = seen(data, grid=3, size=48)
    assert ink[taken(data)].min() > 10 * ink[~taken(data)].max()


def test_load_data_knows_the_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "SIZES", {"train": 10, "validation": 7, "test": 5})
    data = load_data("shapes", "validation")
    assert (len(data), data.name) == (7, "shapes/validation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "unknown split of the shapes 'tset'; did you mean 'test'"),
        ({"num_images": 0}, "`num_images` must be at least 1, got 0"),
        ({"size": 8}, "a cell must be 4 pixels or more, got `size` 8 and `grid` 4"),
        ({"grid": 0}, "a cell must be 4 pixels or more"),
        ({"num_objects": (0, 2)}, r"`num_objects` must be two numbers between 1 and 5.*got \(0, 2\)"),
        ({"num_objects": (3, 2)}, "the smaller first"),
        ({"grid": 2, "num_objects": (1, 5)}, "between 1 and 4"),
    ],
)
def test_scenes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shapes.load(**options)

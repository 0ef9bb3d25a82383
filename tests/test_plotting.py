"""The pictures that the package draws: their files, their pixels, and what they say is wrong."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import composable_ebm as ceb
from composable_ebm.plotting import image_grid, plot_training, save_grid


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_image_grid_places_images_row_by_row():
    levels = torch.tensor([-1.0, 0.0, 1.0])
    grid = image_grid(levels.reshape(3, 1, 1, 1).expand(3, 1, 2, 2), columns=2, padding=1, background=7)
    assert grid.shape == (7, 7, 3)
    assert grid.dtype == np.uint8
    assert (grid[1:3, 1:3] == 0).all()
    assert (grid[1:3, 4:6] == 128).all()  # 127.5, rounded to even
    assert (grid[4:6, 1:3] == 255).all()
    assert (grid[4:6, 4:6] == 7).all()  # no fourth image
    assert (grid[0] == 7).all()


def test_image_grid_keeps_colours_and_scales_pixels_to_squares():
    image = torch.full((1, 3, 1, 2), -1.0)
    image[0, 0, 0, 0] = 1.0  # red on the left
    image[0, 2, 0, 1] = 1.0  # blue on the right
    grid = image_grid(image, padding=0, scale=3)
    assert grid.shape == (3, 6, 3)
    assert (grid[:, :3] == [255, 0, 0]).all()
    assert (grid[:, 3:] == [0, 0, 255]).all()


def test_image_grid_clips_and_shows_nan_as_grey():
    values = torch.tensor([-5.0, 5.0, float("nan"), float("inf")])
    grid = image_grid(values.reshape(4, 1, 1, 1), columns=4, padding=0)
    assert grid[0, :, 0].tolist()[:2] == [0, 255]
    assert grid[0, 2, 0] == 128
    assert grid[0, 3, 0] == 255


def test_image_grid_is_about_square_unless_told():
    assert image_grid(torch.zeros(9, 1, 4, 4), padding=0).shape == (12, 12, 3)
    assert image_grid(torch.zeros(2, 1, 4, 4), columns=8, padding=0).shape == (4, 8, 3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 8, 8), (0, 1, 8, 8)])
def test_image_grid_says_what_images_are(shape):
    with pytest.raises(ValueError, match=r"must have shape \(batch, 1 or 3, height, width\)"):
        image_grid(torch.zeros(shape))


def test_save_grid_stores_text_in_the_file(tmp_path):
    path = tmp_path / "deep" / "grid.png"
    metadata = {"recipe": "2*faces/smile - 0.5*faces/beard", "seed": "7", "note": "η = 0.1, 温度"}
    save_grid(torch.zeros(4, 3, 8, 8), path, metadata=metadata)
    with Image.open(path) as image:
        assert image.text == metadata
        assert image.size == (2 * 18 + 2, 2 * 18 + 2)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]  # nothing temporary is left


def test_save_grid_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(torch.ones(1, 1, 4, 4), path)
    before = path.read_bytes()

    def fail(self, target, **options):
        target.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_grid(torch.zeros(1, 1, 4, 4), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("kernel", [ceb.Langevin(0.05), ceb.MALA(0.05)])
def test_plot_trace_draws_acceptance_only_where_there_is_one(tmp_path, kernel):
    out = ceb.sample(ceb.analytic.Gaussian([0.0, 1.0]), num_chains=8, num_steps=20, sampler=kernel)
    out.plot_trace(tmp_path / "trace.png")
    drawn = pixels(tmp_path / "trace.png")
    green = (abs(drawn - [0x3F, 0x92, 0x68]).sum(-1) < 12).any()  # the colour of acceptance
    assert green == (out.acceptance_rate is not None)


def test_plot_trace_refuses_an_empty_trace(tmp_path):
    out = ceb.sample(ceb.analytic.Gaussian([0.0]), num_chains=2, num_steps=0, sampler=ceb.Langevin(0.1))
    with pytest.raises(ValueError, match="took no step"):
        out.plot_trace(tmp_path / "trace.png")


def write_metrics(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_plot_training_draws_what_there_is_and_skips_a_line_being_written(tmp_path):
    metrics = tmp_path / "digits" / "three" / "metrics.jsonl"
    records = [{"step": i, "energy_gap": 0.1, "energy_positive": -1.0, "seconds": i} for i in range(1, 9)]
    write_metrics(metrics, [*records, {"step": 8, "heldout_accuracy": 0.9}])
    whole, partial = tmp_path / "whole.png", tmp_path / "partial.png"
    plot_training(metrics, whole)
    metrics.write_text(metrics.read_text() + '{"step": 9, "ener')
    plot_training(metrics, partial)
    assert (pixels(whole) == pixels(partial)).all()


def test_plot_training_names_a_broken_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, \n{"step": 2, "energy_gap": 0}\n')
    with pytest.raises(json.JSONDecodeError) as caught:
        plot_training(metrics, tmp_path / "curves.png")
    assert "line 1" in caught.value.__notes__[0]


def test_plot_training_says_which_metrics_it_draws(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "seconds": 2.0}])
    with pytest.raises(ValueError, match=r"none of the metrics that are drawn: energy_positive"):
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_figures_leave_the_global_style_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "energy_gap": 2.0}])
    plot_training(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.get_backend()

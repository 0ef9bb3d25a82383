"""Latents: energies of one codec compose, pictures go in and come out, masks follow."""

import copy

import pytest
import torch
from torch import nn

import composable_ebm as ceb
from composable_ebm.energy import analytic

IMAGE, LATENT = (1, 8, 8), (4, 4, 4)


class Blocks(ceb.Codec):
    """2x2 pixels are the four channels of a latent, scaled by a factor."""

    image_shape, event_shape = IMAGE, LATENT

    def __init__(self, factor=2.0, digest=""):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.digest = digest

    def encode(self, images):
        return self.factor * nn.functional.pixel_unshuffle(images, 2)

    def decode(self, latents):
        return nn.functional.pixel_shuffle(latents / self.factor, 2)


def bowl(codec, centre=0.0, name="bowl", shape=LATENT):
    """A Gaussian of standard deviation 0.1 around a constant."""
    energy = ceb.from_callable(
        lambda x: 50 * (x - centre).square().flatten(1).sum(1), name=name, event_shape=shape
    )
    return energy.in_space(codec)


def pictures(num=5, seed=0):
    return torch.rand(num, *IMAGE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pictures_of_samples_are_decoded():
    out = ceb.sample(bowl(Blocks()), num_chains=3, num_steps=5, sampler=ceb.Langevin(1e-3))
    assert out.samples.shape == (3, *LATENT)
    assert out.images.shape == (3, *IMAGE)
    assert torch.equal(out.images, Blocks().pictures(out.samples))


def test_pictures_of_pixel_samples_are_the_samples():
    energy = ceb.from_callable(lambda x: x.square().flatten(1).sum(1), name="pixels", event_shape=IMAGE)
    out = ceb.sample(energy, num_chains=3, num_steps=2, sampler=ceb.Langevin(1e-3))
    torch.testing.assert_close(out.images, out.samples)


def test_saving_writes_decoded_pictures(tmp_path):
    out = ceb.sample(bowl(Blocks()), num_chains=4, num_steps=1, sampler=ceb.Langevin(1e-3))
    out.save(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_pictures_and_latents_start_the_same_chains():
    codec, x = Blocks(), pictures()
    runs = [
        ceb.sample(bowl(codec), init=start, num_steps=3, sampler=ceb.Langevin(1e-3), seed=1).samples
        for start in (x, codec.latents(x))
    ]
    assert torch.equal(*runs)


def test_a_start_of_neither_shape_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(batch, 4, 4, 4\)"):
        ceb.sample(bowl(Blocks()), init=torch.zeros(2, 3, 8, 8), num_steps=1, sampler=ceb.Langevin(1e-3))


def test_a_mask_painted_on_the_picture_holds_the_latents_of_its_cells():
    codec, x = Blocks(), pictures()
    mask = torch.zeros(8, 8)
    mask[:, 5:] = 1  # the cells of columns 4 and 5 may move, though column 4 was not painted
    out = ceb.sample(bowl(codec, 3.0), init=x, mask=mask, num_steps=20, sampler=ceb.Langevin(1e-3))
    before = codec.latents(x)
    assert torch.equal(out.samples[..., :2], before[..., :2])
    assert (out.samples[..., 2:] != before[..., 2:]).all()


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (5, 1, 8, 8)])
def test_masks_keep_their_leading_axes(shape):
    assert Blocks().encode_mask(torch.ones(shape)).shape[:-3] == shape[:-3]


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(..., 8, 8\)"):
        Blocks().encode_mask(torch.ones(6, 6))


def test_a_composition_lives_where_its_terms_live():
    codec = Blocks()
    both = bowl(codec) + 2 * bowl(codec, 1.0, "other")
    assert both.codec is codec
    assert (bowl(codec) | bowl(codec, 1.0, "other")).codec is codec


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: bowl(Blocks(), name="b"), "those of another"),
        (lambda: bowl(None, name="b", shape=IMAGE), r"states of shape \(1, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("join", [lambda a, b: a + b, lambda a, b: a | b, lambda a, b: a - b])
def test_mixing_spaces_is_refused_where_it_is_written(other, what, join):
    with pytest.raises(ValueError, match=rf"only in one image space: a is about the latents.*{what}"):
        join(bowl(Blocks(), name="a"), other())


def test_one_codec_loaded_twice_is_one_space():
    assert (bowl(Blocks(digest="abc")) + bowl(Blocks(digest="abc"), 1.0, "b")).codec.digest == "abc"


def test_a_copy_lives_in_the_same_space():
    energy = bowl(Blocks())
    copied = copy.deepcopy(energy).named("copy")
    assert (energy + copied).codec is not None


def test_energies_of_any_shape_join_latents():
    codec = Blocks()
    anywhere = ceb.from_callable(lambda x: x.flatten(1).sum(1), name="anywhere")
    assert (anywhere + bowl(codec)).codec is codec
    with pytest.raises(ValueError, match="only in one image space"):
        bowl(codec) + analytic.Gaussian(torch.zeros(2), 1.0)


def test_a_codec_is_none_of_the_parameters_of_an_energy():
    assert not list(bowl(Blocks()).parameters())


def test_frames_show_pictures():
    with ceb.Engine() as engine:
        run = engine.submit(bowl(Blocks()), num_chains=2, num_steps=3, sampler=ceb.Langevin(1e-3))
        run.result()
        assert [frame.images.shape for frame in run.frames()][-1] == (2, *IMAGE)


def test_a_run_keeps_its_space():
    with ceb.Engine() as engine:
        run = engine.submit(bowl(Blocks()), num_chains=2, num_steps=None, sampler=ceb.Langevin(1e-3))
        with pytest.raises(ValueError, match="a run keeps its states"):
            run.steer(bowl(Blocks(), name="elsewhere"))
        run.cancel()


def test_codecs_work_in_chunks_and_refuse_other_shapes():
    codec = Blocks()
    x = pictures(300)
    torch.testing.assert_close(codec.reconstruct(x), x)
    with pytest.raises(ValueError, match=r"`images` must have shape \(n, 1, 8, 8\)"):
        codec.latents(torch.zeros(2, 3, 8, 8))

"""Codecs as files beside their experts, and those that others trained."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import card, network
from torch import nn

import composable_ebm as ceb
from composable_ebm.energy.autoencoder import from_autoencoder
from composable_ebm.experts.networks.codec import PictureCodec
from composable_ebm.experts.store import load_codec

IMAGE, LATENT = (3, 16, 16), (4, 4, 4)


def small_codec(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codec = PictureCodec(
            IMAGE, channels=4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), patch=2
        )
    return codec.eval().requires_grad_(False)


def write_codec(folder, seed=0):
    codec = small_codec(seed)
    options = {"type": "PictureCodec", **codec.options}
    described = ceb.Card("toys", "codec", "codec", ("image",), LATENT, None, options)
    return ceb.save_expert(folder, codec, described, half=True).weights["sha256"]


@pytest.fixture
def family(tmp_path):
    """Two experts on the latents of one codec."""
    digest = write_codec(tmp_path / "toys" / "codec")
    for seed, name in enumerate(("one", "two")):
        described = card(name, ("no", "yes"), event_shape=LATENT, data_range=None, codec=digest)
        ceb.save_expert(tmp_path / "toys" / name, network(described, seed), described)
    return tmp_path / "toys"


def test_experts_of_a_family_share_their_codec(family):
    one, two = ceb.load_expert(family / "one"), ceb.load_expert(family / "two")
    assert one.codec is two.codec
    assert (one + two).codec is one.codec
    out = ceb.sample(one + two, num_chains=2, num_steps=2)
    assert out.images.shape == (2, *IMAGE)


def test_values_of_an_expert_keep_its_codec(family):
    one = ceb.load_expert(family / "one")
    assert one["no"].codec is (~one).codec is one["any"].codec is one.codec


def test_a_codec_is_no_expert(family, monkeypatch):
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(family.parent))
    names = ceb.catalogue()
    assert "toys/one" in names
    assert "toys/codec" not in names


def test_another_codec_is_refused(family):
    write_codec(family / "codec", seed=1)
    with pytest.raises(ceb.CheckpointError, match=r"was trained on latents of .* Train the expert again"):
        ceb.load_expert(family / "one")


def test_a_missing_codec_is_named(family):
    (family / "codec" / "config.json").unlink()
    with pytest.raises(ceb.CheckpointError, match=r"neither in .*codec nor in .*codec: copy the codec"):
        ceb.load_expert(family / "one")


def test_a_codec_may_lie_in_the_folder_of_its_expert(family):
    (family / "codec").rename(family / "one" / "codec")
    assert ceb.load_expert(family / "one").codec.event_shape == LATENT


def test_a_damaged_codec_is_refused(family):
    path = family / "codec" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ceb.CheckpointError, match="is truncated"):
        ceb.load_expert(family / "one")


def test_a_loaded_codec_is_the_stored_one(family):
    x = torch.rand(3, *IMAGE) * 2 - 1
    loaded = load_codec(family / "codec")
    torch.testing.assert_close(loaded.latents(x), small_codec().latents(x), atol=5e-3, rtol=5e-3)
    assert json.loads((family / "codec" / "config.json").read_text())["data_range"] is None


def test_encoding_a_batch_gives_unit_scale_and_remembers_it():
    codec = small_codec().train()
    x = torch.rand(64, *IMAGE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for _ in range(1500):
        z = codec.encode_batch(x)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)
    torch.testing.assert_close(codec.encode(x), z, atol=0.1, rtol=0.1)


def test_pictures_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="pictures of 30x30 do not divide into cells of 8 pixels"):
        PictureCodec((3, 30, 30))


class Theirs(nn.Module):
    """What diffusers' autoencoders look like from outside."""

    def __init__(self, distribution):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.distribution = distribution
        self.config = {"scaling_factor": 0.5, "shift_factor": 1.0}

    def encode(self, x):
        z = nn.functional.pixel_unshuffle(x, 2) * self.weight
        if self.distribution:
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))
        return SimpleNamespace(latents=z)

    def decode(self, z):
        return SimpleNamespace(sample=nn.functional.pixel_shuffle(z, 2))


@pytest.mark.parametrize("distribution", [True, False])
def test_a_pretrained_autoencoder_is_a_codec(distribution):
    codec = from_autoencoder(Theirs(distribution), IMAGE)
    x = torch.rand(2, *IMAGE) * 2 - 1
    assert codec.event_shape == (12, 8, 8)
    torch.testing.assert_close(codec.latents(x), (nn.functional.pixel_unshuffle(x, 2) - 1) / 2)
    torch.testing.assert_close(codec.reconstruct(x), x)


def test_what_cannot_decode_is_no_autoencoder():
    with pytest.raises(TypeError, match="Linear has no `encode`"):
        from_autoencoder(nn.Linear(2, 2), IMAGE)

"""Models that others trained, as energies: shown what they expect, and read as what they say."""

import pytest
import torch
from helpers import points
from torch import nn

import composable_ebm as ceb
from composable_ebm.energy.shown import Normalisation

X = points(4, (3, 8, 8)).clamp(-1, 1)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Network(nn.Module):
    """Logits of three labels, noting what it is shown."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen = []

    def forward(self, pictures):
        self.seen.append(pictures)
        return self.linear(pictures.mean((2, 3)))


def normalised(x, size=None):
    pictures = (x + 1) / 2
    if size is not None:
        pictures = nn.functional.interpolate(pictures, size, mode="bicubic", antialias=True)
    return (pictures - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_a_pretrained_classifier_is_shown_pictures_as_it_was_trained_on_them():
    network = Network()
    cat = ceb.from_classifier(network, 2, normalise=(MEAN, STD), data_range=(-1, 1))
    expected = -network(normalised(X)).log_softmax(1)[:, 2]
    torch.testing.assert_close(cat(X), expected)
    score = cat.score(X)
    assert score.shape == X.shape
    assert score.abs().max() > 0


def test_labels_of_a_pretrained_classifier_share_one_pass():
    network = Network()
    cat, dog = (ceb.from_classifier(network, i, normalise=(MEAN, STD), data_range=(-1, 1)) for i in (0, 1))
    bowl = ceb.from_callable(lambda x: x.square().flatten(1).sum(1), event_shape=(3, 8, 8))
    out = ceb.sample(bowl + cat + 2 * dog, num_chains=2, num_steps=1, sampler=ceb.Langevin(0.01))
    assert "read by 2 terms" in out.path


@pytest.mark.parametrize(
    "source",
    [
        type("Transforms", (), {"mean": MEAN, "std": STD, "crop_size": [6]})(),
        type("Timm", (), {"pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": (3, 6, 6)}})(),
        type(
            "Processor", (), {"image_mean": MEAN, "image_std": STD, "crop_size": {"height": 6, "width": 6}}
        )(),
        Normalisation(MEAN, STD, (6, 6)),
    ],
    ids=["torchvision", "timm", "transformers", "itself"],
)
def test_what_comes_with_a_model_tells_its_normalisation_and_size(source):
    network = Network()
    ceb.from_classifier(network, 0, normalise=source, data_range=(-1, 1))(X)
    torch.testing.assert_close(network.seen[0], normalised(X, (6, 6)))


def test_torchvision_transforms_are_understood():
    torchvision = pytest.importorskip("torchvision")
    how = Normalisation.of(torchvision.models.ResNet18_Weights.DEFAULT.transforms())
    assert how == Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224))
    net = torchvision.models.resnet18(weights=None).eval()
    castle = ceb.from_classifier(net, 483, normalise=Normalisation(how.mean, how.std, (32, 32)))
    assert castle.score(X).isfinite().all()


def test_what_tells_no_normalisation_is_refused():
    with pytest.raises(TypeError, match=r"`normalise` must be \(mean, std\), torchvision's .* got Linear"):
        ceb.from_classifier(Network(), 0, normalise=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="positive `std` are given for each channel"):
        ceb.from_classifier(Network(), 0, normalise=((0.5,), (0.0,)))


def test_a_classifier_of_pictures_guides_latents_through_their_codec():
    class Doubled(ceb.Codec):
        image_shape, event_shape = (3, 8, 8), (3, 4, 4)

        def encode(self, images):
            return images[..., ::2, ::2]

        def decode(self, latents):
            return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)

    codec, network = Doubled(), Network()
    cat = ceb.from_classifier(network, 1, normalise=(MEAN, STD), codec=codec)
    z = points(2, (3, 4, 4)).clamp(-1, 1)
    expected = -network(normalised(codec.decode(z))).log_softmax(1)[:, 1]
    torch.testing.assert_close(cat(z), expected)
    latents = ceb.from_callable(lambda z: z.square().flatten(1).sum(1), event_shape=(3, 4, 4)).in_space(codec)
    assert (latents + cat).codec is codec


# -- JEM ----------------------------------------------------------------------------------------------


def test_a_joint_classifier_is_an_expert_of_its_labels():
    network = Network()
    jem = ceb.from_joint_classifier(network, ["cat", "dog", "bird"], (3, 8, 8))
    f = network(X)
    torch.testing.assert_close(jem(X), -f.logsumexp(1))
    torch.testing.assert_close(jem["dog"](X), -f[:, 1])
    likelihood = ceb.given(jem, jem["dog"], weight=2) - jem
    torch.testing.assert_close(likelihood(X), -2 * f.log_softmax(1)[:, 1])
    torch.testing.assert_close((~jem["dog"])(X), -f[:, [0, 2]].logsumexp(1))
    assert str(jem["dog"]) == "classifier/joint[dog]"


# -- CLIP ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_model():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from pipeline_toys import clip_tokenizer

    torch.manual_seed(0)
    text = {"vocab_size": 54, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config).eval(), clip_tokenizer()


def test_similarity_to_a_text_is_what_clip_says(clip_model):
    model, tokenizer = clip_model
    how = Normalisation(MEAN, STD, (8, 8))
    clip = ceb.from_clip(model, tokenizer, normalise=how, event_shape=(3, 8, 8))
    texts = ["a castle", "a moon", "people"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=normalised(X), **tokens).logits_per_image
    torch.testing.assert_close(clip["a castle"](X), -logits[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(clip[texts](X), -logits.log_softmax(1)[:, 0], rtol=1e-3, atol=1e-3)
    assert clip[texts].key == clip["a castle; a moon; people"].key
    assert ceb.parse('2*clip["a castle"]', {"clip": clip}).key == (2 * clip["a castle"]).key


def test_texts_share_one_pass_of_the_pictures(clip_model):
    model, tokenizer = clip_model
    clip = ceb.from_clip(model, tokenizer, normalise=Normalisation(MEAN, STD, (8, 8)), event_shape=(3, 8, 8))
    bowl = ceb.from_callable(lambda x: x.square().flatten(1).sum(1), event_shape=(3, 8, 8))
    mix = bowl + clip["a castle"] - 0.5 * clip["people"]
    out = ceb.sample(mix, num_chains=2, num_steps=2, sampler=ceb.Langevin(1e-3))
    assert "read by 2 terms" in out.path
    assert out.samples.isfinite().all()

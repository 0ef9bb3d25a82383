"""Any module in its fastest form equals autograd; what cannot be read so is named and left to autograd."""

import copy
import gc
import os
import shutil
import weakref
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from helpers import expert, points
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

import composable_ebm as ceb
from composable_ebm.experts.networks import ConvEnergy, NoisyClassifier
from composable_ebm.potential import native
from composable_ebm.potential.forms.traced import TracedForm
from composable_ebm.potential.potential import Potential
from composable_ebm.train.objectives.contrastive import Labelled

COMPILER = any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang")))
CAN = COMPILER and {"avx2", "asimd"} & set(native._features().split())
needs_compiler = pytest.mark.skipif(not CAN, reason="this machine has no C compiler or only short vectors")
STEPS, IN_C = "traced, gradients by hand", "traced, its convolutions in C"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own, so that the tests compile what they test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native.library.cache_clear()
        native._at_hand.cache_clear()
        yield
    native.library.cache_clear()
    native._at_hand.cache_clear()


@pytest.fixture(params=[STEPS, pytest.param(IN_C, marks=needs_compiler)])
def form(request, monkeypatch):
    """Each form of a chain of convolutions in turn."""
    monkeypatch.setenv("COMPOSABLE_EBM_NATIVE", "1" if request.param == IN_C else "0")
    monkeypatch.setattr(native, "PATIENCE", 0.0)
    return request.param


def plain(function, x, cotangent=None):
    """Outputs and the gradient of their sum, by autograd."""
    x = x.clone().requires_grad_()
    outputs = function(x)
    cotangent = torch.ones_like(outputs) if cotangent is None else cotangent
    (gradient,) = torch.autograd.grad(outputs, x, cotangent)
    return outputs.detach(), gradient


def assert_equal(got, expected, tolerance=1e-5):
    """To that part of their size, and the 1e-6 that float32 leaves where terms of order 1 cancel."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert float((mine - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-6


def describe(network, x):
    potential = Potential(ceb.from_callable(network), stack=False)
    assert_equal(potential(x), plain(network, x))
    return potential.describe()


# --- a zoo of modules as people write them -------------------------------------------------------


class Net(nn.Module):
    """Layers by name, and a function of them and the states as `forward`."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


class Block(nn.Module):
    """A residual block as torchvision's, with any normalisation."""

    def __init__(self, inputs, outputs, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        same = inputs == outputs and stride == 1
        self.downsample = (
            None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def conv(inputs, outputs, *args, **options):
    return nn.Conv2d(inputs, outputs, 3, *args, padding=1, **options)


def groups(channels):
    return nn.GroupNorm(2, channels)


def unet(self, x):
    first = F.silu(self.down(x))
    second = F.silu(self.low(F.avg_pool2d(first, 2)))
    up = F.interpolate(second, scale_factor=2, mode="nearest")
    return self.out(torch.cat([first, up], dim=1)).square().mean(dim=(1, 2, 3))


def attention(self, x):
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = self.qkv(tokens).chunk(3, dim=-1)
    weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
    return self.out(weights @ v).sum((1, 2))


def twice(self, x):
    h = F.silu(self.first(x))
    for _ in range(3):
        h = h + F.silu(self.shared(h))
    return h.mean((1, 2, 3))


def branches(self, x):
    h = self.conv(x) if x.shape[-1] > 4 else x
    assert h.ndim == 4, "images"
    h = h.view(h.size(0), -1)
    a, b = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    return (a * b).sum(1) + torch.logsumexp(h, 1) - torch.where(h > 0, h, 0.1 * h).mean(1)


def skipping(self, x):
    h = self.stem(x)
    h = h + self.block(h)
    h = self.norm(h)
    return (
        -self.head(F.adaptive_avg_pool2d(F.gelu(h), 1).flatten(1)).squeeze(-1) + x.square().sum((1, 2, 3)) / 2
    )


def bottleneck(self, x):
    h = self.stem(x)
    return self.head(F.relu(self.out(h) + self.skip(h)).flatten(1))[:, 0]


def mixer(self, x):
    h = self.norm(x.flatten(2))
    h = h + self.tokens(h.mT).mT
    return self.head(h.reshape(len(x), -1))[:, 0].clamp(-50, 50)


CHANNELS = 3
ZOO = {
    "a sequence in a class": Net(
        lambda self, x: self.net(x).squeeze(-1),
        net=nn.Sequential(
            nn.Conv2d(3, 8, 5, 2, 2), nn.SiLU(), conv(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1)
        ),
    ),
    "one value a row": nn.Sequential(
        nn.Flatten(), nn.Linear(192, 20), nn.Softplus(), nn.Linear(20, 1), nn.Flatten(0)
    ),
    "resnet": nn.Sequential(
        conv(3, 8),
        Block(8, 8),
        Block(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 1),
        nn.Flatten(0),
    ).eval(),
    "group norm": nn.Sequential(
        conv(3, 8),
        Block(8, 8, 1, groups),
        Block(8, 12, 2, groups),
        nn.Flatten(),
        nn.Linear(192, 1),
        nn.Flatten(0),
    ),
    "instance norm": nn.Sequential(
        conv(3, 4), nn.InstanceNorm2d(4), nn.ELU(), nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0)
    ),
    "layer norm": nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1), nn.Flatten(0)
    ),
    "unet": Net(unet, down=conv(3, 4), low=conv(4, 6), out=conv(10, 2)),
    "unet, sixteen channels": Net(unet, down=conv(3, 16), low=conv(16, 6), out=conv(22, 2)),
    "transformer": Net(
        lambda self, x: self.layer(x.flatten(2)).mean((1, 2)),
        layer=nn.TransformerEncoderLayer(64, 4, 32, batch_first=True, dropout=0.0),
    ),
    "transformer, evaluated": Net(
        lambda self, x: self.layers(x.flatten(2)).square().sum((1, 2)),
        layers=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 4, 32, batch_first=True, norm_first=True, activation="gelu"),
            2,
            enable_nested_tensor=False,
        ).eval(),
    ),
    "attention by hand": Net(attention, qkv=nn.Linear(3, 12), out=nn.Linear(4, 1)),
    "weights shared": Net(twice, first=conv(3, 4), shared=conv(4, 4)),
    "shapes in python": Net(branches, conv=nn.Conv2d(3, 2, 3)),
    "residual sum": Net(
        skipping,
        stem=conv(3, 8),
        block=nn.Sequential(groups(8), nn.SiLU(), conv(8, 8), groups(8), nn.SiLU(), conv(8, 8)),
        norm=groups(8),
        head=nn.Linear(8, 1),
    ),
    "pools": nn.Sequential(
        conv(3, 20),
        nn.AvgPool2d(3, ceil_mode=True),
        nn.LeakyReLU(0.2),
        conv(20, 5),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.InstanceNorm2d(5, affine=True),
        nn.ELU(),
        nn.GELU("tanh"),
        nn.Flatten(),
        nn.Sigmoid(),
        nn.Linear(45, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 1),
        nn.Flatten(0),
    ).eval(),
    "plain sums": Net(
        lambda self, x: (
            (self.b(F.silu(self.a(x))).square() + 1).log().sum((1, 2, 3))
            - F.relu(self.d(F.relu(self.c(x)))).mean((2, 3)).sum(1)
        ),
        a=conv(3, 4),
        b=conv(4, 4),
        c=nn.Conv2d(3, 20, 5, 4, 1),
        d=nn.Conv2d(20, 33, 2, 1, 1),
    ),
    "bottleneck": Net(
        bottleneck,
        stem=nn.Conv2d(3, 20, 3, 3, 2),
        out=nn.Sequential(
            nn.SiLU(), nn.Conv2d(20, 8, 1), nn.ReLU(), conv(8, 8, 2), nn.ReLU(), nn.Conv2d(8, 20, 1)
        ),
        skip=nn.AvgPool2d(2),
        head=nn.Linear(80, 1),
    ),
    "mixer": Net(mixer, norm=nn.LayerNorm(64), tokens=nn.Linear(3, 3), head=nn.Linear(192, 1)),
    "dilated, grouped, uneven": nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=2, dilation=2),
        nn.Conv2d(6, 6, (3, 1), groups=3),
        nn.Conv2d(6, 2, 3, padding="same"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(96, 1),
        nn.Flatten(0),
    ),
    "max pooling": nn.Sequential(
        conv(3, 4), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)
    ),
    "transposed": Net(
        lambda self, x: self.up(x).sigmoid().sum((1, 2, 3)),
        up=nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1),
    ),
    "weight norm": nn.Sequential(
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(192, 8)),
        nn.SiLU(),
        nn.Linear(8, 1),
        nn.Flatten(0),
    ),
    "spectral norm": nn.Sequential(
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(192, 8)),
        nn.SiLU(),
        nn.Linear(8, 1),
        nn.Flatten(0),
    ).eval(),
    "circular": nn.Sequential(
        nn.Conv2d(3, 2, 2, padding_mode="zeros"), nn.Hardtanh(), nn.Flatten(), nn.Linear(98, 1), nn.Flatten(0)
    ),
    "squared error of its own": Net(
        lambda self, x: (x - self.net(x)).pow(2).flatten(1).sum(1).sqrt(),
        net=nn.Sequential(conv(3, 3), nn.Mish()),
    ),
    "means and deviations": Net(
        lambda self, x: (
            x.std(dim=(2, 3)).mean(1)
            + x.var(dim=1).mean((1, 2))
            + x.flatten(1).norm(dim=1)
            + x.abs().amax((1, 2, 3))
        )
    ),
    "einsum": Net(lambda self, x: torch.einsum("bchw,cd,bdhw->b", x, self.a.weight, x), a=nn.Linear(3, 3)),
    "padding": Net(
        lambda self, x: self.a(F.pad(x, (1, 2, 0, 1))).exp().mean((1, 2, 3)), a=nn.Conv2d(3, 2, 2)
    ),
    "stacked and repeated": Net(
        lambda self, x: (torch.stack([x, x.flip(-1)], 1) * x.repeat(1, 2, 1, 1).view(len(x), 2, 3, 8, 8)).sum(
            (1, 2, 3, 4)
        )
    ),
    "softmax of logits": Net(
        lambda self, x: -F.log_softmax(self.a(x.flatten(1)), dim=1)[:, 2], a=nn.Linear(192, 4)
    ),
}


def gains(self, x):
    h = self.a(x)
    h = F.silu(self.b(F.silu(h * self.gain + self.bias)) * 0.5 + h.mul(self.gain))
    return self.head(h.flatten(1)).square().sum(1)


ZOO["gains and biases"] = Net(
    gains,
    a=conv(3, 20),
    b=conv(20, 20),
    head=nn.Linear(1280, 60),  # large: it stays outside, and an image comes out
    gain=nn.Parameter(torch.randn(20, 1, 1)),
    bias=nn.Parameter(torch.randn(1, 20, 1, 1)),
)


class Tokens(nn.Module):
    """Tokens that are told of each other by a matrix for each group of features, then think."""

    def __init__(self, features, tokens, groups=2):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(groups, tokens, tokens) / tokens)
        self.gain, self.bias = nn.Parameter(torch.randn(2, features).mul(0.3)).unbind()
        self.into, self.out = nn.Linear(features, 48), nn.Linear(48, features)

    def forward(self, h):
        (batch, tokens, _), groups = h.shape, len(self.mix)
        told = F.silu(h * self.gain + self.bias).view(batch, tokens, groups, -1)
        told = torch.bmm(self.mix, told.permute(2, 1, 0, 3).reshape(groups, tokens, -1))
        h = h + told.view(groups, tokens, batch, -1).permute(2, 1, 0, 3).reshape(h.shape)
        return h + self.out(F.relu(self.into(h)))


ZOO["tokens that mix"] = Net(
    lambda self, x: self.tokens(self.start(x.reshape(len(x), 6, 32))).square().sum((1, 2)),
    start=nn.Linear(32, 64),
    tokens=Tokens(64, 6),
)


WITH_CONVOLUTIONS_IN_C = {
    *(
        "a sequence in a class",
        "resnet",
        "group norm",
        "residual sum",
        "pools",
        "plain sums",
        "bottleneck",
        "instance norm",
        "gains and biases",
        "tokens that mix",
    ),
    "weights shared",
    "unet, sixteen channels",
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("batch", [1, 5])
def test_modules_as_people_write_them_are_read(name, batch, form):
    torch.manual_seed(0)
    network, x = ZOO[name], points(batch, (CHANNELS, 8, 8))
    assert (form if name in WITH_CONVOLUTIONS_IN_C else STEPS) in describe(network, x)


@needs_compiler
def test_several_outputs_come_from_c(monkeypatch):
    monkeypatch.setattr(native, "PATIENCE", 0.0)
    network = ConvEnergy((1, 14, 14), 5, widths=(16, 20), hidden=24)
    traced, x, cotangent = TracedForm(network), points(6, (1, 14, 14)), points(6, (5,))
    for batch in (6, 3, 6):
        evaluate = traced.ready(x[:batch], None)
        outputs, pull_back = evaluate(x[:batch], None)
        evaluate(-x[:batch], None)  # what was kept of the first is not overwritten
        got = (outputs, pull_back(cotangent[:batch]))
        assert_equal(got, plain(network, x[:batch], cotangent[:batch]))
        assert traced.path == IN_C


@pytest.mark.parametrize("level", [torch.tensor(0.3), torch.tensor([0.1, 1.0, 3.0])])
def test_gains_of_a_noise_level_go_along(level, form):
    torch.manual_seed(0)
    network = NoisyClassifier((3, 8, 8), num_values=3, width=20, hidden=24)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    traced, x, cotangent = TracedForm(network), points(3, (3, 8, 8)), points(3, (3,))
    for moved in (level, 2 * level, level):
        outputs, pull_back = traced.ready(x, moved)(x, moved)
        assert_equal((outputs, pull_back(cotangent)), plain(lambda s: network(s, moved), x, cotangent))  # noqa: B023
    assert traced.path == (STEPS if level.ndim else form)


@pytest.mark.parametrize("name", ["residual sum", "unet", "layer norm", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_read(name, dtype):
    network, x = ZOO[name].to(dtype), points(3, (CHANNELS, 8, 8)).to(dtype)
    try:
        traced = TracedForm(network)
        outputs, pull_back = traced.ready(x, None)(x, None)
        expected = plain(network, x)
        tolerance = 1e-12 if dtype == torch.float64 else 0.05
        assert_equal((outputs, pull_back(torch.ones_like(outputs))), expected, tolerance)
    finally:
        network.float()


class Written(ceb.Energy):
    """An energy as a class of one's own, with a network inside."""

    noise_conditioned = True

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.SiLU(), nn.Linear(20, 1))
        self.scale = 2.0

    def energy(self, x, noise_level=None):
        level = torch.ones(()) if noise_level is None else noise_level
        return self.scale * self.net(x)[:, 0] / (1 + level.square())


@pytest.mark.parametrize("level", [None, torch.tensor(0.5), torch.tensor([0.1, 1.0, 3.0])])
def test_energies_of_a_class_of_their_own_are_read(level):
    energy, x = Written(), points(3, (CHANNELS, 8, 8))
    composition = 2 * energy + ceb.negate(energy, threshold=1.0)
    potential = Potential(composition, composition.coefficients.float(), stack=False)
    potential = potential.at(noise_level=level)
    for scale in (2.0, 3.0):
        energy.scale = scale
        assert_equal(potential(x), plain(lambda s: composition(s, noise_level=level), x))
        assert "one Written (traced" in potential.describe()


def test_energies_that_hold_what_may_change_unseen_are_called():
    energy = Written()
    energy.settings = {"scale": 1.0}
    potential = Potential(energy, stack=False)
    potential(points(3, (CHANNELS, 8, 8)))
    assert potential.describe() == "1 energy alone"


# --- what is not read ----------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """A gradient of its own making."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.sum((1, 2, 3)) * self.calls


def hooked():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))
    network[1].register_forward_hook(lambda module, inputs, outputs: 3 * outputs)
    return network


def in_numpy(self, x):
    scale = float(x.detach().numpy().sum())
    return x.sum((1, 2, 3)) * scale


REFUSED = {
    "control flow": (Net(lambda self, x: (x if x.sum() > 0 else 2 * x).sum((1, 2, 3))), "is_nonzero"),
    "item": (Net(lambda self, x: x.sum((1, 2, 3)) * x.sum().item()), "item gives float"),
    "several results": (Net(lambda self, x: x.flatten(1).sort(1)[0][:, 5]), "sort has several results"),
    "hooks": (hooked(), "it has hooks"),
    "numpy": (Net(in_numpy), "not that of its operations"),
    "a gradient of its own": (
        Net(lambda self, x: Straight.apply(x).sum((1, 2, 3))),
        "not that of its operations|no gradient",
    ),
    "a change of a buffer": (
        nn.Sequential(conv(3, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 1), nn.Flatten(0)),
        "changes a tensor of the network",
    ),
    "scripted": (torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0))), "compiled"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_goes_by_autograd_and_says_what_stopped_it(name):
    network, reason = REFUSED[name]
    told = describe(network, points(4, (CHANNELS, 8, 8)))
    assert "by autograd: " in told
    assert any(part in told for part in reason.split("|")), told


def test_random_numbers_are_drawn_anew_each_time():
    network = Net(lambda self, x: self.drop(x).sum((1, 2, 3)), drop=nn.Dropout(0.5))
    potential = Potential(ceb.from_callable(network), stack=False)
    x = points(4, (CHANNELS, 8, 8))
    assert not torch.equal(potential(x)[0], potential(x)[0])
    assert "by autograd: dropout" in potential.describe()


def test_a_module_that_counts_its_calls_is_really_called():
    network = Counted()
    potential = Potential(ceb.from_callable(network), stack=False)
    x = points(2, (CHANNELS, 8, 8))
    first, second = potential(x)[0], potential(x)[0]
    assert not torch.equal(first, second)


def test_a_module_that_makes_something_at_its_first_call_is_read():
    def lazily(self, x):
        if self.scale is None:
            self.scale = 2 * torch.ones(3, 8, 8)
        return (self.scale * x).square().sum((1, 2, 3))

    network, x = Net(lazily), points(4, (CHANNELS, 8, 8))
    network.scale = None
    assert STEPS in describe(network, x)


def test_a_module_that_checks_its_states_is_left_to_autograd():
    def of_bits(self, x):
        assert not bool(((x != 0) & (x != 1)).any()) if not torch.is_inference_mode_enabled() else True
        return x.square().sum((1, 2, 3))

    network, x = Net(of_bits), (points(3, (CHANNELS, 8, 8)) > 0).float()
    assert "could not be held against autograd: AssertionError" in describe(network, x)


def test_errors_of_a_module_are_its_own():
    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 1), nn.Flatten(0))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Potential(ceb.from_callable(network), stack=False)(points(2, (CHANNELS, 8, 8)))


# --- what changes between calls ------------------------------------------------------------------


def textbook(activation=nn.SiLU):
    """The textbook network for MNIST."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs, kernel in ((1, 16, 5), (16, 32, 3), (32, 64, 3), (64, 64, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2), activation()]
    head = [nn.Flatten(), nn.Linear(256, 64), activation(), nn.Linear(64, 1), nn.Flatten(0)]
    return nn.Sequential(*layers, *head)


def test_weights_changed_in_place_are_followed(form):
    network, x = textbook(), points(3, (1, 32, 32))
    potential = Potential(ceb.from_callable(network), stack=False)
    before, _ = potential(x)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x).sum().backward()
    optimiser.step()
    assert_equal(potential(x), plain(network, x))
    network[2] = nn.Conv2d(16, 32, 3, stride=2, padding=1)
    assert_equal(potential(x), plain(network, x))
    assert not torch.allclose(potential(x)[0], before)


@pytest.mark.parametrize("name", ["weight norm", "weights shared", "mixer"])
def test_networks_that_learn_are_followed(name):
    network, x = copy.deepcopy(ZOO[name]), points(3, (CHANNELS, 8, 8))
    potential = Potential(ceb.from_callable(network), stack=False)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(3):
        assert_equal(potential(x), plain(network, x))
        assert "traced" in potential.describe()
        network(x).mean().backward()
        optimiser.step()
    for parameter in network.parameters():
        parameter.data = parameter.data * 1.1
    assert_equal(potential(x), plain(network, x))


def test_modes_and_attributes_that_change_are_followed():
    network = Net(lambda self, x: self.factor * self.act(x).sum((1, 2, 3)), act=nn.LeakyReLU(0.1))
    network.factor = 2.0
    potential = Potential(ceb.from_callable(network), stack=False)
    x = points(3, (CHANNELS, 8, 8))
    for change in (
        lambda: setattr(network, "factor", 3.0),
        lambda: setattr(network.act, "negative_slope", 0.5),
        lambda: setattr(network, "act", nn.Tanh()),
    ):
        change()
        assert_equal(potential(x), plain(network, x))
        assert "traced" in potential.describe()


def test_batches_of_other_sizes_are_served():
    network = ZOO["residual sum"]
    potential = Potential(ceb.from_callable(network), stack=False)
    for batch in (1, 4, 2, 4, 7, 3, *range(5, 25), 1):
        x = points(batch, (CHANNELS, 8, 8))
        assert_equal(potential(x), plain(network, x))


def test_a_network_is_read_once_for_all_chains_and_forgotten_with_them():
    calls = []

    def counted(self, x):
        calls.append(1)
        return self.net(x).squeeze(-1)

    network, x = Net(counted, net=nn.Sequential(nn.Flatten(), nn.Linear(192, 1))), points(3, (CHANNELS, 8, 8))
    for _ in range(3):
        Potential(ceb.from_callable(network), stack=False)(x)
    assert len(calls) == 2  # once to read it, once to hold it against autograd
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_training_sees_its_network_unchanged(form):
    network, x = textbook(), points(3, (1, 32, 32))
    Potential(ceb.from_callable(network), stack=False)(x)
    network(x).sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in network.parameters())
    assert network[0].weight.is_contiguous()


def test_a_label_a_row_is_read_from_a_traced_network():
    whole = expert(seed=3)
    labels, x = torch.tensor([2, 0, 1, 1]), points(4, (1, 4, 4))
    potential = Potential(Labelled(whole.network, labels), stack=False)
    assert_equal(potential(x), plain(lambda s: whole.network(s).gather(1, labels[:, None])[:, 0], x))
    assert "traced" in potential.describe()


# --- chains of convolutions ----------------------------------------------------------------------

ACTIVATIONS = (nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softplus, nn.Identity)


@st.composite
def chains(draw, in_c):
    """A random convolutional network with one output, and the shape of its images."""
    activations = st.sampled_from((nn.SiLU, nn.ReLU, nn.Identity) if in_c else ACTIVATIONS)
    often = st.integers(0, 3) if not in_c else st.just(1)
    channels, height, width = (draw(st.integers(*ends)) for ends in ((1, 3), (5, 11), (5, 11)))
    shape, layers = (channels, height, width), []
    if not draw(often) and not height % 2 and not width % 2:
        layers.append(nn.PixelUnshuffle(2))
        channels, height, width = 4 * channels, height // 2, width // 2
    for _ in range(draw(st.integers(1, 3))):
        kernel = draw(st.integers(1, min(5, height, width)))
        stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, kernel - 1))
        features = draw(st.sampled_from((1, 3, 16, 17, 32, 48, 64)))
        bias = draw(st.booleans())
        layers += [nn.Conv2d(channels, features, kernel, stride, padding, bias=bias)]
        layers += [draw(activations)()]
        channels, height, width = (
            features,
            *((side + 2 * padding - kernel) // stride + 1 for side in (height, width)),
        )
        if height > 2 and width > 2 and not draw(often):
            layers.append(nn.AvgPool2d(2, ceil_mode=True))
            height, width = -(-height // 2), -(-width // 2)
    layers.append(nn.Flatten())
    sizes = [channels * height * width, *draw(st.lists(st.integers(1, 20), max_size=2)), 1]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), draw(st.sampled_from(ACTIVATIONS[:2]))()]
    return nn.Sequential(*layers[:-1], nn.Flatten(0)), shape


@given(st.data(), st.integers(1, 5))
@settings(max_examples=30)
@pytest.mark.parametrize("in_c", [False, pytest.param(True, marks=needs_compiler)])
def test_chains_of_convolutions_equal_autograd(in_c, data, batch):
    network, shape = data.draw(chains(in_c))
    x, cotangent = points(batch, shape), torch.linspace(-1, 2, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSABLE_EBM_NATIVE", str(int(in_c)))
        patch.setattr(native, "PATIENCE", 0.0)
        traced = TracedForm(network)
        outputs, pull_back = traced.ready(x, None)(x, None)
        assert traced.path == (IN_C if in_c else STEPS)
    assert_equal((outputs, pull_back(cotangent)), plain(network, x, cotangent))


@needs_compiler
@pytest.mark.parametrize("sides", [(4, 4), (7, 5), (8, 3), (13, 10)])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_convolutions_of_3x3_equal_autograd_whatever_the_sides(sides, padding, monkeypatch):
    """Theirs are products of tiles, which at odd sides go over each other; gradients meet in a sum."""
    monkeypatch.setattr(native, "PATIENCE", 0.0)
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=padding)
    third, head = nn.Conv2d(20, 40, 3, padding=1), nn.Linear(40, 1)

    def energies(self, x):
        h = second(F.silu(first(x)))
        h = F.silu(h) + h
        return head(F.silu(third(h)).mean((2, 3))).squeeze(-1)

    network = Net(energies, first=first, second=second, third=third, head=head)
    assert "C" in describe(network, points(3, (2, *sides)))


class Own(nn.Module):
    """The textbook network as nearly everybody writes it."""

    def __init__(self, activation):
        super().__init__()
        self.net = textbook(activation)[:-1]

    def forward(self, x):
        return -self.net(x).squeeze(-1) + x.square().sum((1, 2, 3)) / 8


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("kind", [textbook, Own])
def test_textbook_network_equals_autograd(form, kind, activation):
    assert form in describe(kind(activation), points(7, (1, 32, 32)))


def test_several_threads_give_what_one_gives(form):
    network, x = textbook(), points(13, (1, 32, 32))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        got = Potential(ceb.from_callable(network), stack=False)(x)
    finally:
        torch.set_num_threads(threads)
    assert_equal(got, plain(network, x))


def test_trajectories_of_fifty_steps_agree(form, monkeypatch):
    energy = ceb.from_callable(textbook(), event_shape=(1, 32, 32), data_range=(-1, 1))
    settings = {"noise_scale": 0.005, "grad_clip": 0.03, "clamp": (-1, 1), "noise_first": True}
    options = {"init": points(4, (1, 32, 32)).clamp(-1, 1), "num_steps": 50, "seed": 1}
    run = {"sampler": ceb.Langevin(10.0, **settings), **options}
    fast = ceb.sample(energy, **run)
    monkeypatch.setattr(TracedForm, "ready", lambda self, x, level: "not today")
    slow = ceb.sample(energy, **run)
    assert form in fast.report()
    assert "by autograd: not today" in slow.report()
    torch.testing.assert_close(fast.samples, slow.samples, rtol=1e-4, atol=1e-4)


# --- the C function ------------------------------------------------------------------------------


def test_a_small_run_does_not_wait_for_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_spent", 0.0)
    monkeypatch.setattr(native, "build", lambda: pytest.fail("compiled"))
    native._at_hand.cache_clear()
    native.library.cache_clear()
    try:
        potential = Potential(ceb.from_callable(textbook()), stack=False)
        for _ in range(3):
            potential(points(16, (1, 32, 32)))
        assert STEPS in potential.describe()
        assert native._spent == pytest.approx(4 * 16 * 3.4e6 / native.RATE, rel=0.05)  # and once to check
    finally:
        native._at_hand.cache_clear()


def test_without_a_compiler_the_steps_are_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "PATIENCE", 0.0)
    native._at_hand.cache_clear()
    native.library.cache_clear()
    try:
        with pytest.raises(native.NativeUnavailable, match="no C compiler was found"):
            native.build()
        assert STEPS in describe(textbook(), points(3, (1, 32, 32)))
    finally:
        native._at_hand.cache_clear()
        native.library.cache_clear()

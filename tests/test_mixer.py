"""The mixer's chains and pictures: streams, live chains, starts, terms, and what is shown of them."""

import ast
import base64
import io
import json
import os
import shlex
import threading
from pathlib import Path

import pytest
import torch
from helpers import binary, card, expert, network, points
from mixer_toys import toy_cards, write_models
from PIL import Image

import composable_ebm as ceb
from composable_ebm import cli
from composable_ebm.experts import catalogue
from composable_ebm.experts.diffused import DiffusedEnergy
from composable_ebm.experts.library import Library
from demos.mixer import look, render, state
from demos.mixer.live import HOLD, START_STEPS, STIR_STEPS, Held, Live, Start
from demos.mixer.shown import HISTORY, History
from demos.mixer.state import Request
from demos.mixer.stream import Frame, stream
from demos.mixer.terms import Term, terms

# -- experts, frames, pictures ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def use_models(models, monkeypatch):
    monkeypatch.setattr(catalogue, "model_folders", lambda: [models])


@pytest.mark.usefixtures("use_models")
def test_library_loads_each_expert_once():
    library = Library()
    assert library["Toys/digit"] is library["Toys/digit"]
    assert library["slanted"].card.full_name == "Toys/slanted"
    assert {"Toys/digit", "Zoo/cat"} <= set(library)
    with pytest.raises(KeyError):
        library["Toys/nothing"]


def test_library_loads_an_expert_again_when_it_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(tmp_path))
    description = toy_cards()["Toys/thick"]
    ceb.save_expert(tmp_path / "Toys/thick", network(description, 0), description)
    library = Library()
    before = library["Toys/thick"]
    ceb.save_expert(tmp_path / "Toys/thick", network(description, 1), description)
    os.utime(tmp_path / "Toys/thick/config.json", ns=(1, 1))
    x = torch.zeros(1, 1, 16, 16)
    assert float(library["Toys/thick"](x)) != float(before(x))


def test_stream_gives_frames_and_then_the_result_of_sample():
    energy = expert(event_shape=(1, 16, 16))
    items = list(stream(energy, Request("", 4, 30, 5), threading.Event()))
    assert all(isinstance(item, Frame) for item in items[:-1])
    assert items[0].states.shape == (4, 1, 16, 16)
    alone = ceb.sample(energy, num_chains=4, num_steps=30, seed=5)
    assert torch.equal(items[-1].samples, alone.samples)


@pytest.mark.usefixtures("use_models")
def test_what_is_copied_makes_the_same_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = Request("0.5*Toys/digit[3] + ~Toys/slanted", 3, 9, 4)
    ceb.sample(ceb.parse(asked.recipe), num_chains=3, num_steps=9, seed=4).save("page.png")
    exec(state.as_python(asked), {})
    python = Path("grid.png").read_bytes()
    program, *arguments = shlex.split(state.as_command(asked))
    assert program == "composable-ebm"
    assert cli.main(arguments) == 0
    assert python == Path("grid.png").read_bytes() == Path("page.png").read_bytes()
    capsys.readouterr()


def test_recipes_are_quoted_where_they_are_copied():
    asked = Request("a'; rm -rf $HOME; \"b\\", 1, 1, 0)
    assert shlex.split(state.as_command(asked))[2] == asked.recipe
    assert ast.literal_eval(state.as_python(asked).split("ceb.parse(")[1].split(")\n")[0]) == asked.recipe


def test_stop_ends_a_stream_early_and_keeps_what_was_reached():
    stop = threading.Event()
    stop.set()
    *_, result = stream(expert(), Request("", 2, 10**6, 0), stop)
    assert result.num_steps == 1


def test_closing_a_stream_ends_its_run():
    stop = threading.Event()
    frames = stream(expert(), Request("", 2, 10**6, 0), stop)
    assert isinstance(next(frames), Frame)
    frames.close()  # returns only when the run has ended
    assert stop.is_set()


def test_errors_of_a_run_come_out_of_its_stream():
    with pytest.raises(ValueError, match="no term with a positive weight"):
        list(stream(-expert(), Request("", 2, 5, 0), threading.Event()))


# -- live chains --------------------------------------------------------------------------------------


def diffused(name, values, seed, **changes):
    """A noise-conditioned expert with random weights."""
    torch.manual_seed(seed)
    net = DiffusedEnergy((1, 4, 4), len(values), hidden=8, components=4, noise_range=(0.02, 10.0))
    torch.nn.init.zeros_(net.quadratic_head.weight)  # which could fall for ever, untrained
    if net.value_head is not None:
        torch.nn.init.normal_(net.value_head.weight)
    anneal = {"noise_level": {"knots": [[0, 10.0], [1, 0.02]], "between": "karras"}}
    anneal |= {"noise_power": 2.0, "predict": True}
    sampler = {"kernel": "Langevin", "step_size": 0.3, "num_steps": 20, "anneal": anneal}
    description = card(name, values, sampler=sampler, noise_conditioned=True, **changes)
    return ceb.Expert.standing(net.eval(), description)


def test_live_chains_of_noise_conditioned_energies_settle_at_one_noise_level():
    base = diffused("base", ("image",), 0)
    live = Live(base, 3, 0)
    assert float(live.noise_level) == 10
    levels = []
    for _ in range(START_STEPS + 5):
        live.step()
        levels.append(float(live.noise_level))
    assert levels == sorted(levels, reverse=True)
    assert levels[START_STEPS - 1 :] == pytest.approx([HOLD] * 6)
    assert live.num_steps == START_STEPS + 5
    x = live.chain.x
    assert torch.allclose(live.picture, x + HOLD**2 * base.score(x, noise_level=live.noise_level), atol=1e-5)


def test_steered_chains_go_on_from_where_they_are():
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    live = Live(base + 4 * (hat - hat["any"]), 64, 0)
    for _ in range(START_STEPS + 20):
        live.step()
    before = live.chain.x
    live.steer(base + 2 * (hat - hat["any"]))
    reweighted = float(live.noise_level)
    live.steer(base + 4 * (~hat - hat["any"]))
    stirred = float(live.noise_level)
    assert HOLD < reweighted < stirred < 10
    noise = (live.chain.x - before).flatten().std()
    assert float(noise) == pytest.approx((stirred**2 - HOLD**2) ** 0.5, rel=0.1)
    for _ in range(STIR_STEPS):
        live.step()
    assert float(live.noise_level) == pytest.approx(HOLD)
    assert not live.chain.divergence().any


def test_a_steered_chain_samples_the_new_recipe():
    hat = diffused("hat", ("bare", "hat"), 1)
    live = Live(hat["any"] + 8 * (hat - hat["any"]), 256, 0)
    shares = []
    for energy in (hat["any"] + 8 * (hat - hat["any"]), hat["any"] + 8 * (~hat - hat["any"])):
        live.steer(energy)
        for _ in range(STIR_STEPS + 30):
            live.step()
        x, level = live.chain.x, live.noise_level
        with torch.no_grad():
            odds = ceb.Sum([hat["any"], hat], [1.0, -1.0])(x, noise_level=level)
        shares.append(float(odds.exp().mean()))
    assert shares[1] < shares[0] - 0.2


def test_a_refused_recipe_leaves_live_chains_as_they_were():
    energy = expert(event_shape=(1, 4, 4))
    live = Live(energy, 2, 0)
    with pytest.raises(ValueError, match="no term with a positive weight"):
        live.steer(-energy)
    assert live.energy is energy
    live.step()


def test_live_chains_of_other_energies_run_with_their_own_kernel():
    energy = expert(event_shape=(1, 4, 4))
    live = Live(2 * energy, 3, 5)
    assert live.noise_level is None
    for _ in range(4):
        live.step()
    x = live.chain.x
    assert torch.equal(live.picture, x)
    assert float(live.chain.dynamics.step_size) == pytest.approx(0.05)
    live.steer(4 * energy)
    assert torch.equal(live.chain.x, x)
    assert float(live.chain.dynamics.step_size) == pytest.approx(0.025)


def test_live_chains_keep_no_trace():
    live = Live(expert(event_shape=(1, 4, 4)), 2, 0)
    for _ in range(5):
        live.step()
    assert len(live.chain.trace().energy) == 0


def test_terms_take_a_value_and_its_marginal_together():
    base, hat = expert("base", ("image",)), expert("hat", ("bare", "hat"))
    x = points(5, (1, 4, 4))
    found = terms(base + 4 * (hat - hat["any"]) + 0.5 * ~expert("cat", ("dog", "cat")), x)
    assert [(term.name, term.weight) for term in found] == [
        ("toys/base", 1.0),
        ("toys/hat", 4.0),
        ("~toys/cat", 0.5),
    ]
    assert found[0].energy == pytest.approx(float(base(x).mean()))
    assert found[0].probability is found[2].probability is None
    chance = torch.stack([-(~hat)(x), -hat(x)]).softmax(0)[1]
    assert found[1].probability == pytest.approx(float(chance.mean()))
    assert found[1].energy == pytest.approx(float(-chance.log().mean()), rel=1e-4)


def test_terms_of_a_choice_among_many_values_are_a_ratio_too():
    hue = expert("hue", ("red", "green", "blue"))
    x = points(5, (1, 4, 4))
    found = terms(expert("base", ("image",)) + 2 * (~hue["red"] - hue["any"]), x)
    chance = 1 - torch.stack([-hue[v](x) for v in ("red", "green", "blue")]).softmax(0)[0]
    assert found[1].probability == pytest.approx(float(chance.mean()))


def test_montage_maps_the_data_range_to_black_and_white():
    states = torch.tensor([0.0, 10.0, 5.0]).reshape(3, 1, 1, 1).expand(3, 1, 6, 6)
    picture = render.montage(states, (0.0, 10.0)).convert("L")
    values = {picture.getpixel((x, y)) for x in range(picture.width) for y in range(picture.height)}
    assert {0, 255, 128} == values


def test_data_uri_is_a_png_that_carries_text():
    picture = render.montage(torch.zeros(2, 3, 4, 4), (-1.0, 1.0))
    decoded = _decode(render.data_uri(picture, {"recipe": "2*smile + glässes"}))
    assert decoded.size == picture.size
    assert decoded.text["recipe"] == "2*smile + glässes"


def test_what_visitors_write_is_escaped():
    assert "<script>" not in render.note("<script>\n<script>")
    picture = render.montage(torch.zeros(1, 1, 4, 4), (-1.0, 1.0))
    assert "<script>" not in render.figure(picture, "data:", "", '"><script>')
    assert "<script>" not in render.report("<script>")


def _decode(uri):
    head, content = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


# -- starts -------------------------------------------------------------------------------------------


def test_live_chains_start_from_a_picture_with_some_noise():
    base = diffused("base", ("image",), 0)
    picture = points(1, (1, 4, 4))[0].clamp(-1, 1)
    live = Live(base, 64, 0, start=Start(picture, None, 1.5))
    assert float(live.noise_level) == 1.5
    assert float((live.chain.x - picture).std()) == pytest.approx(1.5, rel=0.1)
    for _ in range(START_STEPS):
        live.step()
    assert float(live.noise_level) == pytest.approx(HOLD)


def test_what_is_not_painted_stays_as_it_was_to_the_last_bit():
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    picture = points(1, (1, 4, 4))[0].clamp(-1, 1)
    mask = torch.zeros(1, 4, 4)
    mask[:, 1:3] = 1
    live = Live(base, 3, 0, start=Start(picture, mask))
    for energy in (base, base + 4 * (hat - hat["any"])):
        live.steer(energy)
        for _ in range(STIR_STEPS + 4):
            live.step()
        held = (1 - mask).bool().expand(3, -1, -1, -1)
        assert torch.equal(live.picture[held], picture.expand(3, -1, -1, -1)[held])
        assert float((live.picture - picture)[~held].abs().max()) > 0.1
        assert not live.chain.divergence().any


def test_the_free_part_is_drawn_from_the_conditional():
    """Two correlated Gaussians: given the second at 1.5, the first has mean ρ 1.5 and variance 1 - ρ²."""
    correlation = 0.8
    energy = ceb.analytic.Gaussian([0.0, 0.0], [[1.0, correlation], [correlation, 1.0]])
    picture, mask = torch.tensor([0.0, 1.5]), torch.tensor([1.0, 0.0])
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    held = Held(energy, picture, mask, noise)
    out = ceb.sample(held, init=torch.zeros(4000, 2), num_steps=200, sampler=ceb.Langevin(0.02), seed=0)
    x = held.states(out.samples)
    assert torch.all(x[:, 1] == 1.5)
    assert float(x[:, 0].mean()) == pytest.approx(correlation * 1.5, abs=0.05)
    assert float(x[:, 0].var()) == pytest.approx(1 - correlation**2, rel=0.1)


def test_held_states_carry_the_noise_of_their_level():
    picture, mask = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    noise = points(3, (1, 2, 2))
    held = Held(expert(event_shape=(1, 4, 4)), picture, mask, noise)
    assert torch.allclose(held.states(torch.ones(3, 1, 2, 2), torch.tensor(0.5)), 0.5 * noise)
    levels = torch.tensor([0.0, 1.0, 2.0])
    assert torch.allclose(held.states(torch.ones(3, 1, 2, 2), levels), levels.reshape(3, 1, 1, 1) * noise)


def _uri(size=(4, 4), color=0, mode="L"):
    return render.data_uri(Image.new(mode, size, color))


def test_the_page_says_what_to_start_from():
    energy = expert(event_shape=(1, 4, 4))
    assert look.started("", 2, energy) is None
    sent = json.dumps({"picture": _uri(color=255), "mask": ""})
    start = look.started(sent, 3, energy)
    assert torch.equal(start.picture, torch.ones(1, 4, 4))
    assert (start.mask, start.level) == (None, 3.0)
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    mask.paste((255, 0, 0, 255), (0, 0, 4, 8))
    start = look.started(json.dumps({"picture": _uri(), "mask": render.data_uri(mask)}), 1e9, energy)
    assert torch.equal(start.mask[0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert start.level == look.MAX_LEVEL


@pytest.mark.parametrize(
    "sent",
    [
        "x",
        "[]",
        "{}",
        '{"picture": 3}',
        '{"picture": "data:image/png;base64,!!!"}',
        '{"picture": "data:image/png;base64,AAAA"}',
        '{"picture": "file:///etc/passwd"}',
        "[" * 100_000,
        None,
    ],
)
def test_starts_that_are_no_pictures_are_refused(sent):
    energy = expert(event_shape=(1, 4, 4))
    if sent is None:
        sent = json.dumps({"picture": _uri(), "mask": _uri()})  # nothing is painted
    with pytest.raises(ValueError, match=r"cannot be read|no picture|Nothing is painted"):
        look.started(sent, 2, energy)


def test_heat_maps_name_the_sample_and_share_the_push():
    energy = expert("base", ("image",)) + 2 * expert("hat", ("bare", "hat"))
    page = look.heat_map(json.dumps({"chain": 4, "picture": _uri(color=90)}), energy)
    assert "sample 5" in page
    assert 'alt="Where hat pushes"' in page
    shares = [int(text.split(" %")[0].split(">")[-1]) for text in page.split("<br>")[1:]]
    assert sum(shares) == pytest.approx(100, abs=1)


# -- terms along a run --------------------------------------------------------------------------------


def test_terms_of_an_or_are_told_one_by_one():
    base, hat, tie = expert("base", ("image",)), binary("hat", 1), binary("tie", 2)
    x = points(5, (1, 4, 4))
    either = 3 * (hat - hat["any"]) | 2 * (tie - tie["any"])
    found = terms(base + either, x)
    assert [(term.name, term.weight) for term in found] == [
        ("toys/base", 1.0),
        ("or toys/hat", 3.0),
        ("or toys/tie", 2.0),
    ]
    alone = terms(base + 3 * (hat - hat["any"]), x)
    assert found[1].probability == pytest.approx(alone[1].probability)


def test_an_or_of_ratios_is_the_probability_of_either():
    """E = -log(p(a|x) + p(b|x)): no normalising constant is missing."""
    hat, tie = binary("hat", 1), binary("tie", 2)
    x = points(5, (1, 4, 4))
    energy = (hat - hat["any"]) | (tie - tie["any"])
    chances = [torch.stack([-(~each)(x), -each(x)]).softmax(0)[1] for each in (hat, tie)]
    assert torch.allclose(energy(x), -torch.log(chances[0] + chances[1]), atol=1e-5)


def test_history_keeps_the_last_energies_of_the_terms_that_are_there():
    history = History()
    for i in range(HISTORY + 10):
        history.add([Term("a", 1, float(i), None)] + ([Term("b", 1, 0.0, None)] if i < 5 else []))
    assert history.of("a") == [float(i) for i in range(10, HISTORY + 10)]
    assert history.of("b") == []


def test_sparklines_span_their_energies_and_survive_infinities():
    assert render.sparkline([1.0]) == ""
    drawn = render.sparkline([5.0, float("inf"), 1.0, 3.0], 100, 24)
    assert 'points="0.0,2.0 50.0,22.0 100.0,12.0"' in drawn
    assert "from 5 to 3 nats" in drawn
    assert "points=" in render.sparkline([2.0, 2.0])

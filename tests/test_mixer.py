"""The mixer's chains and pictures: streams, live chains, starts, terms, and what is shown of them."""

import ast
import base64
import io
import os
import shlex
import time
from pathlib import Path

import pytest
import torch
from helpers import binary, expert, network, points
from mixer_toys import diffused, toy_cards, write_models
from PIL import Image

import composable_ebm as ceb
from composable_ebm import cli
from composable_ebm.experts import catalogue
from composable_ebm.experts.library import Library
from demos.mixer import pictures, runs, starts, state
from demos.mixer.live import HOLD, NUDGE, START_STEPS, STIR, STIR_STEPS, Live, Start
from demos.mixer.state import Request
from demos.mixer.stream import stream
from demos.mixer.terms import terms

# -- experts, frames, pictures ------------------------------------------------------------------------


@pytest.fixture
def engine():
    with ceb.Engine() as engine:
        yield engine


def soon(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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


def test_stream_gives_frames_and_then_the_result_of_sample_to_the_last_bit(engine):
    energy = expert(event_shape=(1, 16, 16))
    engine.submit(energy, 3, None, seed=1)  # somebody else, with the same kernel
    items = list(stream(energy, Request("", 4, 30, 5), engine.submit))
    assert all(isinstance(item, ceb.Frame) for item in items[:-1])
    assert items[0].states.shape == (4, 1, 16, 16)
    alone = ceb.sample(energy, num_chains=4, num_steps=30, seed=5)
    assert torch.equal(items[-1].samples, alone.samples)
    assert torch.equal(items[-1].energies, alone.energies)


def test_sampling_a_mix_of_noise_conditioned_experts_is_sample_to_the_last_bit(engine):
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    mix = base + 4 * (hat - hat["any"])
    *_, result = stream(mix, Request("", 3, 20, 2), engine.submit)
    assert torch.equal(result.samples, ceb.sample(mix, num_chains=3, num_steps=20, seed=2).samples)


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


def test_stop_ends_a_stream_early_and_keeps_what_was_reached(engine):
    frames = stream(expert(), Request("", 2, 10**6, 0), engine.submit)
    items = [next(frames)]
    engine.runs[0].cancel()
    *_, last, result = items + list(frames)
    assert last.step == result.num_steps < 10**6
    assert torch.equal(last.states, result.samples)


def test_closing_a_stream_ends_its_run(engine):
    frames = stream(expert(), Request("", 2, 10**6, 0), engine.submit)
    assert isinstance(next(frames), ceb.Frame)
    frames.close()
    soon(lambda: engine.runs == ())


def test_errors_of_a_run_come_out_of_its_stream(engine):
    with pytest.raises(ValueError, match="no term with a positive weight"):
        list(stream(-expert(), Request("", 2, 5, 0), engine.submit))


# -- live chains --------------------------------------------------------------------------------------


def watched(live):
    """Its frames from now on, in a list that grows, and its run."""
    frames = []
    live.run.watch(frames.append)
    return frames, live.run


def settled(live, steps):
    """A frame after so many steps more."""
    frames = live.run.frames()
    first = next(frames).step
    return next(frame for frame in frames if frame.step >= first + steps)


def test_live_chains_of_noise_conditioned_energies_settle_at_one_noise_level(engine):
    base = diffused("base", ("image",), 0)
    frames, run = watched(Live(engine.submit, base, 3, 0, num_steps=START_STEPS + 5))
    assert run.block.sigmas[0] == pytest.approx(10)
    run.result()
    levels = {frame.step: float(frame.noise_level) for frame in frames}
    assert list(levels.values()) == sorted(levels.values(), reverse=True)
    assert all(level == pytest.approx(HOLD) for step, level in levels.items() if step >= START_STEPS)
    assert all(level > HOLD + 1e-6 for step, level in levels.items() if step < START_STEPS)
    last = frames[-1]
    assert last.step == START_STEPS + 5
    expected = last.states + HOLD**2 * base.score(last.states, noise_level=last.noise_level)
    assert torch.allclose(last.denoised, expected, atol=1e-5)


PICTURE = Start(torch.zeros(1, 4, 4), level=3.0)


def test_chains_are_tended_so_that_they_land_unless_they_begin_at_a_picture(engine):
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    live = Live(engine.submit, base + (hat - hat["any"]), 16, 0)
    assert live.tended
    assert not Live(engine.submit, base, 2, 0, start=PICTURE).tended
    wanted = base + (~hat - hat["any"])
    live.steer(wanted)
    frame = next(
        f for f in live.run.frames() if f.composition is wanted and f.met is not None and f.met.all()
    )
    assert frame.alive.all()
    assert not live.fits(expert(event_shape=(1, 4, 4)))  # whose chains know no noise to go up to


def test_steered_chains_go_on_from_where_they_are(engine):
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    mix = base + 4 * (hat - hat["any"])
    live = Live(engine.submit, mix, 64, 0, start=PICTURE, steps_per_second=200)
    settled(live, START_STEPS + 20)
    for energy, stir in ((base + 2 * (hat - hat["any"]), NUDGE), (base + 4 * (~hat - hat["any"]), STIR)):
        settled(live, STIR_STEPS)
        frames = live.run.frames()
        before = next(frames)
        live.steer(energy)
        first = next(frame for frame in frames if frame.composition is energy)
        assert before.composition is not energy
        assert HOLD < float(first.noise_level) < stir
        rose = (first.states - before.states).flatten().std()
        assert float(rose) > 0.5 * float(first.noise_level)
    last = settled(live, STIR_STEPS)
    assert float(last.noise_level) == pytest.approx(HOLD)
    assert last.alive.all()


def test_steering_stirs_by_as_much_as_chains_carry_at_least(engine):
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    asked = []

    class Told:
        """A run that notes what it is told, at a frame of our choice."""

        frame = None

        def steer(self, energy, sampler, schedule_steps):
            asked.append(
                (sampler.schedule.noise_level(0.0), sampler.schedule.noise_level(1.0), schedule_steps)
            )

    run = Told()
    live = Live(lambda *_, **__: run, base + hat, 2, 0, start=PICTURE)

    def at(level, energy):
        run.frame = ceb.Frame(1, None, None, None, torch.tensor(level), None, energy)

    live.steer(base + 2 * hat)  # before its first step: the noise that it begins with
    at(5.0, live.energy)
    live.steer(base + 3 * hat)  # on the way down
    at(HOLD, live.energy)
    live.steer(base + 4 * hat)
    live.steer(base + ~hat)
    live.steer(base + 5 * ~hat)  # has not begun with ~hat yet, so that stir is still to come
    levels = [start for start, _, _ in asked]
    assert levels == pytest.approx([3.0, 5.0, NUDGE, STIR, STIR])
    assert all(stop == pytest.approx(HOLD) and steps == STIR_STEPS + 1 for _, stop, steps in asked)


def test_a_steered_chain_samples_the_new_recipe(engine):
    hat = diffused("hat", ("bare", "hat"), 1)
    live = Live(engine.submit, hat["any"] + 8 * (hat - hat["any"]), 256, 0)
    shares = []
    for energy in (hat["any"] + 8 * (hat - hat["any"]), hat["any"] + 8 * (~hat - hat["any"])):
        live.steer(energy)
        frame = settled(live, STIR_STEPS + 30)
        with torch.no_grad():
            odds = ceb.Sum([hat["any"], hat], [1.0, -1.0])(frame.states, noise_level=frame.noise_level)
        shares.append(float(odds.exp().mean()))
    assert shares[1] < shares[0] / 2


def test_a_refused_recipe_leaves_live_chains_as_they_were(engine):
    energy = expert(event_shape=(1, 4, 4))
    live = Live(engine.submit, energy, 2, 0)
    with pytest.raises(ValueError, match="no term with a positive weight"):
        live.steer(-energy)
    assert live.energy is energy
    assert settled(live, 3).composition is energy


def test_live_chains_of_other_energies_run_with_their_own_kernel(engine):
    energy = expert(event_shape=(1, 4, 4))
    live = Live(engine.submit, 2 * energy, 3, 5)
    frame = settled(live, 4)
    assert frame.noise_level is None
    assert frame.denoised is frame.states
    assert float(live.run.block.dynamics.step_size) == pytest.approx(0.05)
    live.steer(more := 4 * energy)
    soon(lambda: live.run.block.energy is more and live.run.frame.composition is more)
    assert float(live.run.block.dynamics.step_size) == pytest.approx(0.025)


def test_live_chains_keep_no_trace(engine):
    live = Live(engine.submit, expert(event_shape=(1, 4, 4)), 2, 0)
    settled(live, 5)
    live.run.cancel()
    assert len(live.run.result().trace.energy) == 0


def test_live_chains_share_a_batch_and_every_network_pass_with_others_of_the_same_experts(engine):
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    lives = [
        Live(engine.submit, base + w * (hat - hat["any"]), 2, w, steps_per_second=500) for w in (1, 2, 3)
    ]
    for live in lives:
        soon(lambda live=live: live.run.num_steps > START_STEPS)
    assert all(live.run.shared for live in lives)
    assert engine.potentials_made == 1  # of the mix; its carrier knows where to begin, and is not asked
    lives[0].run.cancel()  # somebody leaves
    assert settled(lives[1], 3).alive.all()
    assert "in a batch with other requests" in lives[0].run.result().path


def test_terms_take_a_value_and_its_marginal_together():
    base, hat = expert("base", ("image",)), expert("hat", ("bare", "hat"))
    x = points(5, (1, 4, 4))
    found, _ = terms(base + 4 * (hat - hat["any"]) + 0.5 * ~expert("cat", ("dog", "cat")), x)
    assert [(term.name, term.weight) for term in found] == [
        ("toys/base", 1.0),
        ("toys/hat", 4.0),
        ("~toys/cat", 0.5),
    ]
    assert found[0].energy == pytest.approx(float(base(x).mean()))
    assert found[0].probability is None
    cat = torch.stack([-(~expert("cat", ("dog", "cat")))(x), -expert("cat", ("dog", "cat"))(x)]).softmax(0)[0]
    assert found[2].probability == pytest.approx(float(cat.mean()), rel=1e-4)  # of its own two values
    chance = torch.stack([-(~hat)(x), -hat(x)]).softmax(0)[1]
    assert found[1].probability == pytest.approx(float(chance.mean()))
    assert found[1].energy == pytest.approx(float(-chance.log().mean()), rel=1e-4)


def test_terms_of_a_choice_among_many_values_are_a_ratio_too():
    hue = expert("hue", ("red", "green", "blue"))
    x = points(5, (1, 4, 4))
    found, _ = terms(expert("base", ("image",)) + 2 * (~hue["red"] - hue["any"]), x)
    chance = 1 - torch.stack([-hue[v](x) for v in ("red", "green", "blue")]).softmax(0)[0]
    assert found[1].probability == pytest.approx(float(chance.mean()))


def test_montage_maps_pictures_to_black_and_white():
    images = torch.tensor([-1.0, 1.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 6, 6)
    picture = pictures.montage(images).convert("L")
    values = {picture.getpixel((x, y)) for x in range(picture.width) for y in range(picture.height)}
    assert {0, 255, 128} == values


def test_data_uri_is_a_png_that_carries_text():
    picture = pictures.montage(torch.zeros(2, 3, 4, 4))
    decoded = _decode(pictures.data_uri(pictures.png(picture, {"recipe": "2*smile + glässes"})))
    assert decoded.size == picture.size
    assert decoded.text["recipe"] == "2*smile + glässes"


def _decode(uri):
    head, content = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


# -- starts -------------------------------------------------------------------------------------------


def test_live_chains_start_from_a_picture_with_some_noise(engine):
    base = diffused("base", ("image",), 0)
    picture = points(1, (1, 4, 4))[0].clamp(-1, 1)
    asked = {}

    def submit(*arguments, **options):
        asked.update(options)
        return engine.submit(*arguments, **options)

    live = Live(submit, base, 64, 0, start=Start(picture, None, 1.5))
    assert asked["sampler"].schedule.noise_level(0.0) == pytest.approx(1.5)
    noise = asked["init"] - picture
    assert float(noise.std()) == pytest.approx(1.5, rel=0.1)
    own = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(live.run.request.seed))
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), own.flatten()]))[0, 1])) < 0.1
    assert float(settled(live, START_STEPS).noise_level) == pytest.approx(HOLD)


def test_what_is_not_painted_stays_as_it_was_to_the_last_bit(engine):
    base, hat = diffused("base", ("image",), 0), diffused("hat", ("bare", "hat"), 1)
    picture = points(1, (1, 4, 4))[0].clamp(-1, 1)
    mask = torch.zeros(1, 4, 4)
    mask[:, 1:3] = 1
    live = Live(engine.submit, base, 3, 0, start=Start(picture, mask))
    held = (1 - mask).bool().expand(3, -1, -1, -1)
    for energy in (base, base + 4 * (hat - hat["any"])):
        live.steer(energy)
        frame = settled(live, STIR_STEPS + 4)
        assert torch.equal(frame.denoised[held], picture.expand(3, -1, -1, -1)[held])
        assert float((frame.denoised - picture)[~held].abs().max()) > 0.1
        noise = (frame.states - picture)[held]  # the noise of the level is on what is held, too
        assert float(noise.std()) == pytest.approx(HOLD, rel=0.5)
        assert frame.alive.all()


def _uri(size=(4, 4), color=0, mode="L"):
    return pictures.data_uri(Image.new(mode, size, color))


def test_the_page_says_what_to_start_from():
    energy = expert(event_shape=(1, 4, 4))
    assert starts.started(None, energy, 4) is None
    start = starts.started({"pictures": [_uri(color=255)], "mask": "", "level": 3}, energy, 4)
    assert torch.equal(start.picture, torch.ones(1, 4, 4))
    assert (start.mask, start.level) == (None, 3.0)
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    mask.paste((255, 0, 0, 255), (0, 0, 4, 8))
    sent = {"pictures": [_uri()], "mask": pictures.data_uri(mask), "level": 1e9}
    start = starts.started(sent, energy, 4)
    assert torch.equal(start.mask[0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert start.level == starts.MAX_LEVEL


def test_chains_may_start_from_a_picture_each_and_some_may_stay(engine):
    energy = expert(event_shape=(1, 4, 4))
    sent = {"pictures": [_uri(color=shade) for shade in (0, 255)], "keep": [1, 99]}
    start = starts.started(sent, energy, 2)
    assert start.picture.flatten(1).mean(1).tolist() == [-1.0, 1.0]
    run = Live(engine.submit, energy, 2, 0, start=start, num_steps=5).run
    samples = run.result().samples
    assert torch.equal(samples[1], torch.ones(1, 4, 4))
    assert not torch.equal(samples[0], start.picture[0])


@pytest.mark.parametrize(
    "sent",
    [
        "x",
        [1],
        {"mask": ""},
        {"pictures": 3},
        {"pictures": [3]},
        {"pictures": ["data:image/png;base64,!!!"]},
        {"pictures": ["data:image/png;base64,AAAA"]},
        {"pictures": ["file:///etc/passwd"]},
        {"pictures": [_uri()], "mask": _uri()},  # nothing is painted
    ],
)
def test_starts_that_are_no_pictures_are_refused(sent):
    energy = expert(event_shape=(1, 4, 4))
    with pytest.raises(ValueError, match=r"cannot be read|no picture|Nothing is painted"):
        starts.started(sent, energy, 4)


# -- terms along a run --------------------------------------------------------------------------------


def test_terms_of_an_or_are_told_one_by_one():
    base, hat, tie = expert("base", ("image",)), binary("hat", 1), binary("tie", 2)
    x = points(5, (1, 4, 4))
    either = 3 * (hat - hat["any"]) | 2 * (tie - tie["any"])
    found, _ = terms(base + either, x)
    assert [(term.name, term.weight) for term in found] == [
        ("toys/base", 1.0),
        ("toys/hat", 3.0),
        ("toys/tie", 2.0),
    ]
    alone, _ = terms(base + 3 * (hat - hat["any"]), x)
    assert found[1].probability == pytest.approx(alone[1].probability)


def test_an_or_of_ratios_is_the_probability_of_either():
    """E = -log(p(a|x) + p(b|x)): no normalising constant is missing."""
    hat, tie = binary("hat", 1), binary("tie", 2)
    x = points(5, (1, 4, 4))
    energy = (hat - hat["any"]) | (tie - tie["any"])
    chances = [torch.stack([-(~each)(x), -each(x)]).softmax(0)[1] for each in (hat, tie)]
    assert torch.allclose(energy(x), -torch.log(chances[0] + chances[1]), atol=1e-5)


def test_pictures_meet_a_mix_where_all_is_likely_and_of_each_or_one():
    base, hat, tie, cap = (
        expert("base", ("image",)),
        *(binary(name, i) for i, name in enumerate(("hat", "tie", "cap"))),
    )
    x = points(64, (1, 4, 4))
    assert terms(base, x)[1] is None
    likely = [torch.stack([-(~each)(x), -each(x)]).softmax(0)[1] > 0.5 for each in (hat, tie, cap)]
    ratios = [each - each["any"] for each in (hat, tie, cap)]
    _, met = terms(base + 2 * ratios[0] + (3 * ratios[1] | ratios[2]), x)
    assert met.tolist() == (likely[0] & (likely[1] | likely[2])).tolist()
    assert 0 < met.sum() < 64


def test_several_values_of_one_expert_are_each_told():
    hue = expert("hue", ("red", "green", "blue"))
    x = points(5, (1, 4, 4))
    found, _ = terms(expert("base", ("image",)) + 2 * hue["red"] + hue["blue"] - 3 * hue["any"], x)
    assert [(term.name, term.weight) for term in found[1:]] == [
        ("toys/hue[red]", 2.0),
        ("toys/hue[blue]", 1.0),
    ]
    assert 0 < found[1].probability < 1


def test_energies_are_never_numbers_of_forty_digits():
    assert runs.nats(-4.3e38) == "-4.3e+38"
    assert runs.nats(-15234.4) == "-15,234"
    assert runs.nats(0.000389) == "0.000389"

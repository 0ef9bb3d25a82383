"""The mixer: its state, its pictures, its API over HTTP, and the page in a browser."""

import ast
import base64
import io
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import card, expert, network, points
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import composable_ebm as ceb
from composable_ebm import cli
from composable_ebm.experts import catalogue
from composable_ebm.experts.diffused import DiffusedEnergy
from composable_ebm.experts.library import Library
from demos.mixer import render, state
from demos.mixer.live import HOLD, START_STEPS, STIR_STEPS, Live
from demos.mixer.state import AND, NOT, Choice, Limits, Request, Row
from demos.mixer.stream import Frame, stream
from demos.mixer.terms import terms

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LIMITS = Limits(max_chains=64, max_steps=2000)
DIGIT = Row("Toys/digit", "Toys", "digit", "", ("any", *"0123456789"))
THICK = Row("Toys/thick", "Toys", "thick", "NOT: thin", ())
SHORT = {"kernel": "Langevin", "step_size": 0.1, "num_steps": 7}
BODY = Row("Yard/body", "Yard", "body", "", (), base=True)
HAT = Row("Yard/hat", "Yard", "hat", "NOT: bare", (), against="Yard/hat[any]", weight=4.0)
HUE = Row("Yard/hue", "Yard", "hue", "", ("any", "red", "green", "blue"), against="Yard/hue[any]")
TREE = Row("Yard/tree", "Yard", "tree", "", (), against="Yard/body")
CAT = Row("Zoo/cat", "Zoo", "cat", "", ())


def toy_cards():
    shape = (1, 16, 16)
    made = [
        card("digit", tuple("0123456789"), "Toys", shape),
        card("slanted", ("upright", "slanted"), "Toys", shape),
        card("thick", ("thin", "thick"), "Toys", shape),
        card("body", ("image",), "Yard", shape, attribute="image", sampler=SHORT),
        card("hat", ("bare", "hat"), "Yard", shape, weight=4.0, sampler=SHORT),
        card("hue", ("red", "green", "blue"), "Yard", shape, sampler=SHORT),
        card("cat", ("cat",), "Zoo", shape),
    ]
    return {each.full_name: each for each in made}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, each) in enumerate(toy_cards().items()):
        ceb.save_expert(folder / name, network(each, seed), each)
    return folder


@pytest.fixture
def use_models(models, monkeypatch):
    monkeypatch.setattr(catalogue, "model_folders", lambda: [models])


# -- state ------------------------------------------------------------------------------------------


def test_every_expert_is_a_row_and_those_with_many_values_come_first():
    rows = state.rows(toy_cards())
    names = ["Toys/digit", "Toys/slanted", "Toys/thick", "Yard/body", "Yard/hue", "Yard/hat", "Zoo/cat"]
    assert [row.name for row in rows] == names
    assert rows[0].values == ("any", *"0123456789")
    assert rows[2] == THICK
    assert rows[3].base
    assert rows[4:6] == [HUE, HAT]
    assert rows[6] == CAT


def test_defaults_turn_on_one_expert_of_each_kind_in_each_family():
    rows = state.rows(toy_cards())
    assert state.compose(rows, state.defaults(rows), "Toys") == "Toys/digit[3] + Toys/slanted"
    assert state.compose(rows, state.defaults(rows), "Zoo") == "Zoo/cat"


def test_a_start_value_exists_where_there_is_no_three():
    rows = state.rows({"Toys/hue": card("hue", ("red", "green", "blue"), "Toys")})
    assert state.compose(rows, state.defaults(rows), "Toys") == "Toys/hue[red]"


@pytest.mark.parametrize(
    ("digit", "thick", "text"),
    [
        (Choice(True, "3", AND, 1), Choice(True, "any", AND, 1), "Toys/digit[3] + Toys/thick"),
        (Choice(True, "any", AND, 2), Choice(True, "any", NOT, 0.5), "2*Toys/digit + 0.5*~Toys/thick"),
        (Choice(True, "7", NOT, 1.25), Choice(False, "any", AND, 1), "1.25*~Toys/digit[7]"),
        (Choice(True, "3", AND, 0), Choice(True, "any", AND, 1), "Toys/thick"),
        (Choice(True, "3", AND, math.nan), Choice(True, "any", AND, 99), "Toys/digit[3] + 12*Toys/thick"),
        (Choice(True, "11", AND, 1), Choice(True, "any", "MAYBE", 1), "Toys/digit + Toys/thick"),
        (Choice(False, "3", AND, 1), Choice(False, "any", AND, 1), ""),
    ],
)
def test_controls_compose_a_recipe(digit, thick, text):
    choices = [digit, thick, Choice(True, "any", AND, 1)]
    assert state.compose([DIGIT, THICK, CAT], choices, "Toys") == text
    if text:
        names = {
            DIGIT.name: expert("digit", tuple("0123456789"), family="Toys"),
            THICK.name: expert("thick", ("thin", "thick"), family="Toys"),
        }
        ceb.parse(text, names)


YARD = [BODY, HUE, HAT, TREE]


@pytest.mark.parametrize(
    ("body", "hue", "hat", "tree", "text"),
    [
        (True, None, (AND, 4), None, "Yard/body + 4*ratio(Yard/hat, Yard/hat[any])"),
        (True, None, (NOT, 1), None, "Yard/body + ratio(~Yard/hat, Yard/hat[any])"),
        (True, ("red", AND, 2), None, None, "Yard/body + 2*ratio(Yard/hue[red], Yard/hue[any])"),
        (True, ("red", NOT, 1), None, None, "Yard/body + ratio(~Yard/hue[red], Yard/hue[any])"),
        (True, ("any", AND, 2), None, None, "Yard/body"),
        (True, None, None, (AND, 3), "Yard/body + 3*ratio(Yard/tree, Yard/body)"),
        (True, None, (AND, 0), None, "Yard/body"),
        (False, ("red", AND, 1), (NOT, 4), None, "Yard/hue[red] + 4*~Yard/hat"),
        (False, ("any", AND, 1), None, None, "Yard/hue"),
        (False, None, None, None, ""),
    ],
)
def test_beside_a_base_experts_are_ratios(body, hue, hat, tree, text):
    choices = [
        Choice(body, "any", NOT, 0.5),  # of a base, only on and off count
        Choice(hue is not None, *(hue or ("any", AND, 1))),
        Choice(hat is not None, "any", *(hat or (AND, 1))),
        Choice(tree is not None, "any", *(tree or (AND, 1))),
    ]
    assert state.compose(YARD, choices, "Yard") == text
    if text:
        names = {
            BODY.name: expert("body", ("image",), family="Yard"),
            HUE.name: expert("hue", ("red", "green", "blue"), family="Yard"),
            HAT.name: expert("hat", ("bare", "hat"), family="Yard"),
            TREE.name: expert("tree", ("tree",), family="Yard"),
        }
        ceb.parse(text, names)


def test_bases_are_on_at_the_start_and_weights_come_from_cards():
    rows = state.rows(toy_cards())
    text = "Yard/body + ratio(Yard/hue[red], Yard/hue[any]) + 4*ratio(Yard/hat, Yard/hat[any])"
    assert state.compose(rows, state.defaults(rows), "Yard") == text


def test_faces_come_first_and_start_as_named():
    shape = (3, 4, 4)
    cards = [
        card("thick", ("thin", "thick"), "digits", shape),
        card("base", ("image",), "faces", shape, attribute="image"),
        card("beard", ("no_beard", "beard"), "faces", shape, weight=4.0),
        card("curly", ("straight", "curly"), "faces", shape),
        card("glasses", ("no_glasses", "glasses"), "faces", shape),
        card("smile", ("serious", "smile"), "faces", shape),
    ]
    rows = state.rows({each.full_name: each for each in cards})
    assert [row.label for row in rows] == ["base", "smile", "glasses", "beard", "curly", "thick"]
    assert state.compose(rows, state.defaults(rows), rows[0].family) == (
        "faces/base + ratio(faces/smile, faces/smile[any]) + ratio(faces/glasses, faces/glasses[any])"
        " + 4*ratio(~faces/beard, faces/beard[any])"
    )


def test_each_family_starts_with_the_steps_it_was_calibrated_with():
    cards = {**toy_cards(), "Blank/x": card("x", ("x",), "Blank", sampler={})}
    assert state.steps(cards) == {"Toys": 12, "Yard": 7, "Zoo": 12, "Blank": state.DEFAULT_STEPS}


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        ("Toys/digit[3] + Toys/slanted", "Toys"),
        ("1.25*~Toys/digit[7] + 0.5*Toys/thick", "Toys"),
        ("Toys/digit", "Toys"),
        ("Yard/body + 2*ratio(Yard/hue[red], Yard/hue[any]) + 4*ratio(~Yard/hat, Yard/hat[any])", "Yard"),
        ("Yard/hue + 12*~Yard/hat", "Yard"),
        ("Toys/thick + Toys/digit[3]", None),  # not in the order of the rows
        ("99*Toys/thick", None),
        ("Toys/digit[3] | Toys/digit[4]", None),
        ("Toys/digit[3] + Zoo/cat", None),
        ("Toys/digit[11]", None),
        ("ratio(Toys/thick, Toys/thick[any])", None),
        ("1.1.1*Toys/thick", None),
        ("__import__('os')", None),
        ("", None),
        (" + " * 4000, None),
    ],
)
def test_controls_follow_recipes_that_they_can_show(recipe, family):
    rows = state.rows(toy_cards())
    found = state.decompose(rows, recipe)
    assert (found and found[0]) == family
    if found:
        assert state.compose(rows, found[1], family) == recipe


def test_a_picture_that_was_saved_is_restored():
    texts = {"recipe": "a + b", "num_chains": "4", "num_steps": "30", "seed": "7", "sampler": "{}"}
    assert state.restored(json.dumps(texts), LIMITS) == Request("a + b", 4, 30, 7)
    assert state.restored('{"recipe": "a"}', LIMITS) == Request("a", 16, state.DEFAULT_STEPS, 0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("{}", "carries no recipe"),
        ("[]", "carries no recipe"),
        ("no JSON", "carries no recipe"),
        ("[" * 100_000, "carries no recipe"),
        (None, "carries no recipe"),
        ('{"recipe": ["a"]}', "carries no recipe"),
        (json.dumps({"recipe": "a" * 10**6}), "carries no recipe"),
        (
            '{"recipe": "a", "num_chains": "1000000"}',
            "picture's `num_chains` must be a whole number from 1 to 64",
        ),
        ('{"recipe": "a", "num_steps": "-1"}', "`num_steps` must be"),
        ('{"recipe": "a", "seed": "1e3"}', "`seed` must be"),
        ('{"recipe": "a", "seed": {"a": 1}}', "`seed` must be"),
    ],
)
def test_pictures_with_hostile_texts_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        state.restored(texts, LIMITS)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        (-5, 1),
        (10**6, 64),
        ("12", 12),
        (math.nan, 16),
        (math.inf, 16),
        (None, 16),
        ("x", 16),
        ([], 16),
    ],
)
def test_numbers_of_the_page_are_moved_within_limits(value, expected):
    assert state.clamped("a", value, 10, 0, LIMITS).num_chains == expected


def test_integers_too_large_for_a_float_are_no_error():
    assert state.clamped("a", 10**400, 10**400, -(10**400), LIMITS) == Request("a", 16, 200, 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("a", 10**6, 10, 0), "`num_chains` must be a whole number from 1 to 64, got 1000000"),
        (("a", 0, 10, 0), "`num_chains` must be"),
        (("a", 2.5, 10, 0), "`num_chains` must be"),
        (("a", True, 10, 0), "`num_chains` must be"),
        (("a", math.nan, 10, 0), "`num_chains` must be"),
        (("a", 4, -1, 0), "`num_steps` must be a whole number from 0 to 2000, got -1"),
        (("a", 4, math.inf, 0), "`num_steps` must be"),
        (("a", 4, 1, -1), "`seed` must be a whole number from 0"),
        (("a", 4, 1, "x"), "`seed` must be"),
        ((None, 4, 1, 0), "`recipe` must be text, got NoneType"),
    ],
)
def test_numbers_of_programs_are_refused_outside_limits(request_, message):
    with pytest.raises(ValueError, match=message):
        state.checked(*request_, LIMITS)


def test_whole_numbers_may_arrive_as_floats():
    assert state.checked("a", 4.0, 10.0, 3.0, LIMITS) == Request("a", 4, 10, 3)


# -- experts, frames, pictures ------------------------------------------------------------------------


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


# -- the API ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """The page, served by the command line in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command line, but with no experts beside the toys, whatever the checkout holds.
    script = (
        "import pathlib, sys; from composable_ebm import cli; from composable_ebm.experts import catalogue; "
        "catalogue.model_folders = lambda: [pathlib.Path(sys.argv[1])]; sys.exit(cli.main(sys.argv[2:]))"
    )
    arguments = ["mixer", "--port", str(port), "--num-threads", "1"]
    command = [sys.executable, "-c", script, str(models), *arguments]
    folder = tmp_path_factory.mktemp("server")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 180
            while not _answers(url):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "the page did not come up in three minutes"
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def client(server):
    return pytest.importorskip("gradio_client").Client(server, verbose=False)


def test_api_has_three_endpoints(client):
    named = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert named == {"/sample", "/experts", "/running"}


def test_api_lists_experts(client):
    experts = {each["name"]: each for each in client.predict(api_name="/experts")}
    assert experts["Toys/thick"]["values"] == ["thin", "thick"]
    assert experts["Toys/digit"]["event_shape"] == [1, 16, 16]


@pytest.mark.usefixtures("use_models")
def test_api_samples_what_sample_samples(client):
    recipe = "Toys/digit[3] + 2*Toys/thick"
    answer = client.predict(recipe, 5, 20, 7, api_name="/sample")
    alone = ceb.sample(ceb.parse(recipe), num_chains=5, num_steps=20, seed=7)
    assert answer["recipe"] == recipe
    assert answer["energies"] == pytest.approx(alone.energies.tolist(), rel=1e-4, abs=1e-4)
    assert "5 chains, 20 steps" in answer["report"]
    picture = _decode(answer["png"])
    assert picture.text["recipe"] == recipe
    assert picture.text["seed"] == "7"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("Toys/digti[3]", 4, 5, 0), "unknown expert 'Toys/digti'; did you mean Toys/digit"),
        (("Toys/digit[12]", 4, 5, 0), "has no value '12'"),
        (("", 4, 5, 0), "an empty recipe"),
        (("nan*Toys/digit[3]", 4, 5, 0), "unknown expert 'nan'"),
        (("1e999*Toys/digit[3]", 4, 5, 0), "must be finite"),
        (("-Toys/digit[3]", 4, 5, 0), "no term with a positive weight"),
        (("(" * 5000 + "Toys/digit", 4, 5, 0), "nests at most"),
        (("Toys/digit", 10**6, 5, 0), "`num_chains` must be a whole number from 1 to 64, got 1000000"),
        (("Toys/digit", 4, -5, 0), "`num_steps` must be a whole number from 0 to 2000, got -5"),
        (("Toys/digit", 4, 5, -1), "`seed` must be"),
        (("Toys/digit", "many", 5, 0), "`num_chains` must be"),
        ((17, 4, 5, 0), "`recipe` must be text, got int"),
    ],
)
def test_bad_requests_are_explained_and_the_server_stays_alive(client, request_, message):
    with pytest.raises(Exception, match=message):  # gradio_client has a class of its own for each version
        client.predict(*request_, api_name="/sample")
    assert len(client.predict("Toys/digit[1]", 2, 1, 0, api_name="/sample")["energies"]) == 2


# -- the page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if not os.path.exists(CHROMIUM):
        pytest.skip("there is no chromium; apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The open page; afterwards, no error may be in its console, and no request left the machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    errors, hosts = [], set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.goto(server)
    _button(page, "Sample").wait_for()
    yield page
    page.close()
    assert errors == []
    assert hosts == {server.split("/")[2]}


def _button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def _recipe(page):
    return page.get_by_role("textbox", name="Recipe")


def _choose_family(page, name):
    page.get_by_label("Family").click()
    page.get_by_role("option", name=name).click()


def _set(page, name, value):
    page.get_by_role("spinbutton", name=f"number input for {name}").fill(str(value))
    page.keyboard.press("Tab")


@pytest.mark.browser
def test_page_samples_and_saves_a_picture_with_its_recipe(page, tmp_path):
    assert _recipe(page).input_value() == "Toys/digit[3] + Toys/slanted"
    _button(page, "Sample").click()
    link = page.get_by_role("link", name="Save picture")
    link.wait_for()
    assert "step 12 of 12" in page.locator("#picture figcaption").inner_text()
    image = page.get_by_role("img", name="16 samples of Toys/digit[3] + Toys/slanted")
    assert image.evaluate("image => image.naturalWidth") == 4 * 17 - 1
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "saved.png")
    assert Image.open(tmp_path / "saved.png").text["recipe"] == "Toys/digit[3] + Toys/slanted"
    page.get_by_role("button", name="Report").click()
    page.get_by_text("16 chains, 12 steps").wait_for()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.browser
def test_recipe_follows_the_controls_and_can_be_written_by_hand(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.get_by_role("checkbox", name="thick").check()
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + Toys/thick")
    page.get_by_label("NOT").nth(2).check(force=True)
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + ~Toys/thick")
    _set(page, "thick weight", 1.15)
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + 1.15*~Toys/thick")
    # The browser composes; the server, asked again, must not take its text for an edited one.
    _recipe(page).fill("Toys/digit[3] + Toys/thik")
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("radio", name="5").check(force=True)
    expect(_recipe(page)).to_have_value("Toys/digit[5] + Toys/slanted + 1.15*~Toys/thick")
    expect(page.locator(".note")).to_have_count(0)
    _recipe(page).fill("Toys/digit[3] + Toys/thik")
    expect(page.get_by_role("alert")).to_contain_text("did you mean Toys/thick")
    _button(page, "Sample").click()
    expect(_button(page, "Sample")).to_be_enabled()
    expect(page.locator("#picture img")).to_have_count(0)
    _recipe(page).fill("Toys/digit[4]")
    expect(page.get_by_role("alert")).to_have_count(0)
    _recipe(page).press("Enter")
    page.get_by_role("img", name="16 samples of Toys/digit[4]", exact=True).wait_for()
    # Enter has the controls follow what was written.
    expect(page.get_by_role("radio", name="4")).to_be_checked()
    expect(page.get_by_role("checkbox", name="slanted")).not_to_be_checked()
    expect(page.locator(".note")).to_have_count(0)
    page.get_by_role("checkbox", name="slanted").check()
    expect(_recipe(page)).to_have_value("Toys/digit[4] + Toys/slanted")


@pytest.mark.browser
def test_sample_takes_the_controls_as_they_are_when_it_is_pressed(page):
    page.get_by_label("NOT").nth(1).check(force=True)
    _button(page, "Sample").click()
    page.get_by_role("img", name="16 samples of Toys/digit[3] + ~Toys/slanted", exact=True).wait_for()


@pytest.mark.browser
def test_page_asks_for_an_expert_where_none_is_on(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    for name in ("digit", "slanted"):
        page.get_by_role("checkbox", name=name).uncheck()
    expect(page.locator(".note")).to_have_text("Turn on at least one expert.")


@pytest.mark.browser
def test_stop_keeps_the_partial_picture(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    _set(page, "Samples", 64)
    _set(page, "Steps", 2000)
    _button(page, "Sample").click()
    page.locator("#picture img").wait_for()
    _button(page, "Stop").click()
    expect(page.locator("#picture figcaption")).to_contain_text("stopped at step")
    expect(page.get_by_role("link", name="Save picture")).to_be_visible()
    expect(_button(page, "Sample")).to_be_enabled()
    expect(_button(page, "Stop")).to_be_disabled()


def _soon(check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.browser
def test_play_follows_the_controls_until_stop(page, client):
    expect = pytest.importorskip("playwright.sync_api").expect
    _button(page, "Play").click()
    page.get_by_role("img", name="16 running chains of Toys/digit[3] + Toys/slanted").wait_for()
    expect(_button(page, "Sample")).to_be_disabled()
    assert client.predict(api_name="/running") == 1
    page.get_by_label("NOT").nth(1).check(force=True)
    page.get_by_role("img", name="16 running chains of Toys/digit[3] + ~Toys/slanted").wait_for()
    expect(page.get_by_role("row", name="~Toys/slanted")).to_be_visible()
    _recipe(page).fill("Toys/digit[3] + Toys/thik")  # a slip of the pen does not stop the chains
    expect(page.get_by_role("alert")).to_contain_text("did you mean Toys/thick")
    step = page.locator("#picture figcaption span").first
    before = step.inner_text()
    expect(step).not_to_have_text(before)
    _choose_family(page, "Zoo")
    page.get_by_role("img", name="16 running chains of Zoo/cat").wait_for()
    _button(page, "Stop").click()
    expect(page.locator("#picture figcaption")).to_contain_text("stopped at step")
    expect(page.get_by_role("link", name="Save picture")).to_be_visible()
    expect(_button(page, "Play")).to_be_enabled()
    expect(_button(page, "Stop")).to_be_disabled()
    _soon(lambda: client.predict(api_name="/running") == 0)


@pytest.mark.browser
def test_visitors_play_different_mixes_and_a_closed_tab_frees_its_chains(page, client, browser, server):
    other, third = browser.new_page(), browser.new_page()
    for each in (other, third):
        each.goto(server)
    other.get_by_role("checkbox", name="slanted").uncheck()
    mix = "Toys/digit[3] + Toys/slanted"
    for each, text in ((page, mix), (other, "Toys/digit[3]"), (third, mix)):
        _button(each, "Play").click()
        each.get_by_role("img", name=f"16 running chains of {text}", exact=True).wait_for()
    assert client.predict(api_name="/running") == 3
    other.close()
    _soon(lambda: client.predict(api_name="/running") == 2)
    third.reload()  # in the middle
    _soon(lambda: client.predict(api_name="/running") == 1)
    _button(third, "Play").click()
    third.get_by_role("img", name="16 running chains of").wait_for()
    third.close()
    _button(page, "Stop").click()
    _soon(lambda: client.predict(api_name="/running") == 0)


@pytest.mark.browser
def test_a_saved_picture_restores_what_it_was_made_of(page, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    _choose_family(page, "Yard")
    page.locator("fieldset", has_text="hat role").get_by_label("NOT").check(force=True)
    _set(page, "Samples", 3)
    _set(page, "Steps", 5)
    page.get_by_label("Seed", exact=True).fill("42")
    recipe = _recipe(page).input_value()
    _button(page, "Sample").click()
    link = page.get_by_role("link", name="Save picture")
    link.wait_for()
    picture = page.locator("#picture img").get_attribute("src")
    with page.expect_download() as download:
        link.click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    page.reload()
    chooser = page.locator("#open-picture")
    chooser.wait_for()
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted")
    chooser.set_input_files(saved)
    expect(_recipe(page)).to_have_value(recipe)
    expect(page.locator("fieldset", has_text="hat role").get_by_label("NOT")).to_be_checked()
    expect(page.get_by_role("spinbutton", name="number input for Steps")).to_have_value("5")
    expect(page.get_by_role("checkbox", name="body")).to_be_visible()
    _button(page, "Sample").click()
    page.get_by_role("link", name="Save picture").wait_for()
    assert page.locator("#picture img").get_attribute("src") == picture  # the same to the last bit
    assert page.locator(".note.alert").count() == 0


@pytest.mark.browser
def test_copies_as_python_and_as_command(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _set(page, "Samples", 3)
    asked = Request("Toys/digit[3] + Toys/slanted", 3, 12, 0)
    for name, write in (("Copy as Python", state.as_python), ("Copy as command", state.as_command)):
        text = write(asked)
        _button(page, name).click()
        _soon(lambda text=text: page.evaluate("navigator.clipboard.readText()") == text)


@pytest.mark.browser
def test_pictures_without_a_good_recipe_are_explained(page, tmp_path):
    expect = pytest.importorskip("playwright.sync_api").expect
    before = _recipe(page).input_value()
    chooser = page.locator("#open-picture")
    for texts, message in (
        ({}, "carries no recipe"),
        ({"recipe": "<img src=x onerror=alert(1)> + 1"}, "'<' has no meaning in a recipe"),
        ({"recipe": "Toys/digti"}, "did you mean Toys/digit"),
        ({"recipe": "Toys/digit[3]", "num_chains": "9999"}, "`num_chains` must be a whole number"),
    ):
        info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        Image.new("RGB", (4, 4)).save(tmp_path / "hostile.png", pnginfo=info)
        chooser.set_input_files(tmp_path / "hostile.png")
        expect(page.get_by_role("alert")).to_contain_text(message)
    (tmp_path / "no.png").write_bytes(bytes(range(256)) * 4096)
    chooser.set_input_files(tmp_path / "no.png")
    expect(page.get_by_role("alert")).to_contain_text("carries no recipe")
    assert _recipe(page).input_value() == before


@pytest.mark.browser
def test_families_are_shown_one_at_a_time(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    steps = page.get_by_role("spinbutton", name="number input for Steps")
    expect(steps).to_have_value("12")
    _choose_family(page, "Zoo")
    expect(_recipe(page)).to_have_value("Zoo/cat")
    expect(page.get_by_role("checkbox", name="thick")).to_be_hidden()
    expect(page.get_by_role("checkbox", name="cat")).to_be_visible()
    _choose_family(page, "Yard")
    expect(steps).to_have_value("7")


@pytest.mark.browser
def test_page_composes_ratios_beside_a_base(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    _choose_family(page, "Yard")
    hue, hat = "ratio(Yard/hue[red], Yard/hue[any])", "ratio(Yard/hat, Yard/hat[any])"
    expect(_recipe(page)).to_have_value(f"Yard/body + {hue} + 4*{hat}")
    page.locator("fieldset", has_text="hat role").get_by_label("NOT").check(force=True)
    expect(_recipe(page)).to_have_value(f"Yard/body + {hue} + 4*ratio(~Yard/hat, Yard/hat[any])")
    page.locator("fieldset", has_text="hue value").get_by_label("any").check(force=True)
    expect(_recipe(page)).to_have_value("Yard/body + 4*ratio(~Yard/hat, Yard/hat[any])")
    expect(page.locator(".note")).to_have_count(0)
    page.get_by_role("checkbox", name="body").uncheck()
    expect(_recipe(page)).to_have_value("Yard/hue + 4*~Yard/hat")
    expect(page.locator(".note")).to_have_count(0)  # the server composes the same text


@pytest.mark.browser
def test_page_fits_a_telephone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    _button(page, "Sample").click()
    page.get_by_role("link", name="Save picture").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    _recipe(page).scroll_into_view_if_needed()
    for element in (page.locator("#picture img"), _button(page, "Sample")):
        box = element.bounding_box()
        assert box["y"] >= -1
        assert box["y"] + box["height"] <= 845


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _decode(uri):
    head, content = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))

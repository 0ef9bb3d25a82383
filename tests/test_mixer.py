"""The mixer: its state, its pictures, its API over HTTP, and the page in a browser."""

import base64
import io
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from helpers import card, expert, network
from PIL import Image

import composable_ebm as ceb
from demos.mixer import render, state
from demos.mixer.library import Library
from demos.mixer.state import AND, NOT, Choice, Limits, Request, Row
from demos.mixer.stream import Frame, stream

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
CAT = Row("Zoo/cat", "Zoo", "cat", "", ())


def toy_cards():
    # Capitals sort before the families that are shipped, so the page starts with Toys.
    shape = (1, 16, 16)
    made = [
        card("digit", tuple("0123456789"), "Toys", shape),
        card("slanted", ("upright", "slanted"), "Toys", shape),
        card("thick", ("thin", "thick"), "Toys", shape),
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
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(models))


# -- state ------------------------------------------------------------------------------------------


def test_every_expert_is_a_row_and_those_with_many_values_come_first():
    rows = state.rows(toy_cards())
    assert [row.name for row in rows] == ["Toys/digit", "Toys/slanted", "Toys/thick", "Zoo/cat"]
    assert rows[0].values == ("any", *"0123456789")
    assert rows[2] == THICK
    assert rows[3].values == ()


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
        (Choice(True, "3", AND, math.nan), Choice(True, "any", AND, 99), "Toys/digit[3] + 4*Toys/thick"),
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
    command = [sys.executable, "-m", "composable_ebm.cli", "mixer", "--port", str(port), "--num-threads", "1"]
    folder = tmp_path_factory.mktemp("server")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "COMPOSABLE_EBM_MODELS": str(models)},
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


def test_api_has_two_endpoints(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/sample",
        "/experts",
    }


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
    page.set_default_timeout(60_000)
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
    page.get_by_role("checkbox", name="slanted").uncheck()
    expect(_recipe(page)).to_have_value("Toys/digit[5] + 1.15*~Toys/thick")


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


@pytest.mark.browser
def test_families_are_shown_one_at_a_time(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    page.get_by_label("Family").click()
    page.get_by_role("option", name="Zoo").click()
    expect(_recipe(page)).to_have_value("Zoo/cat")
    expect(page.get_by_role("checkbox", name="thick")).to_be_hidden()
    expect(page.get_by_role("checkbox", name="cat")).to_be_visible()


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

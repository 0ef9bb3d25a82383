"""The mixer's page in a browser."""

import shutil
import time

import pytest
from mixer_toys import decode
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from demos.mixer import state
from demos.mixer.state import Request

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def context(browser):
    """One visitor's browser: what it has loaded once, it need not load again."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(30_000)
    yield context
    context.close()


@pytest.fixture
def page(context, toy_page):
    """The open page; afterwards, no error may be in its console, and no request left the machine."""
    page = context.new_page()
    errors, hosts = [], set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.goto(toy_page)
    _opened(page)
    yield page
    page.close()
    assert errors == []
    assert hosts == {toy_page.split("/")[2]}


def _opened(page):
    """Waits for the page's script, which names the picture's frame."""
    page.locator("#picture[role=group]").wait_for()
    _button(page, "Sample").wait_for()


def _button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def _recipe(page):
    return page.get_by_role("textbox", name="Recipe")


def _choose_family(page, name):
    page.get_by_role("radio", name=name, exact=True).check(force=True)


def _role(page, expert, role):
    page.get_by_role("group", name=f"{expert} role").get_by_label(role).check(force=True)


def _tab(page, name):
    page.get_by_role("tab", name=name).click()


def _set(page, name, value):
    page.get_by_role("spinbutton", name=f"number input for {name}").fill(str(value))
    page.keyboard.press("Tab")


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
    _tab(page, "Report")
    page.get_by_text("16 chains, 12 steps").wait_for()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_recipe_follows_the_controls_and_can_be_written_by_hand(page):
    page.get_by_role("checkbox", name="thick").check()
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + Toys/thick")
    _role(page, "thick", "NOT")
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + ~Toys/thick")
    _set(page, "thick weight", 1.15)
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + 1.15*~Toys/thick")
    _recipe(page).fill("Toys/digit[3] + Toys/thik")
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("radio", name="5", exact=True).check(force=True)
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
    expect(page.get_by_role("radio", name="4", exact=True)).to_be_checked()
    expect(page.get_by_role("checkbox", name="slanted")).not_to_be_checked()
    expect(page.locator(".note")).to_have_count(0)
    page.get_by_role("checkbox", name="slanted").check()
    expect(_recipe(page)).to_have_value("Toys/digit[4] + Toys/slanted")


def test_sample_takes_the_controls_as_they_are_when_it_is_pressed(page):
    _role(page, "slanted", "NOT")
    _button(page, "Sample").click()
    page.get_by_role("img", name="16 samples of Toys/digit[3] + ~Toys/slanted", exact=True).wait_for()


def test_page_asks_for_an_expert_where_none_is_on(page):
    for name in ("digit", "slanted"):
        page.get_by_role("checkbox", name=name).uncheck()
    expect(page.locator(".note")).to_have_text("Turn on at least one expert.")


def test_stop_keeps_the_partial_picture(page):
    _set(page, "Samples", 64)
    _button(page, "Play").click()  # without an end: a Sample may be over before a busy browser has drawn it
    page.locator("#picture img").wait_for()
    _button(page, "Stop").click()
    expect(page.locator("#picture figcaption")).to_contain_text("stopped at step", timeout=20_000)
    expect(page.get_by_role("link", name="Save picture")).to_be_visible()
    expect(_button(page, "Sample")).to_be_enabled()
    expect(_button(page, "Stop")).to_be_disabled()


def _soon(check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.2)  # to ask takes the server's time


def test_play_follows_the_controls_until_stop(page, client):
    _button(page, "Play").click()
    page.get_by_role("img", name="16 running chains of Toys/digit[3] + Toys/slanted").wait_for()
    expect(_button(page, "Sample")).to_be_disabled()
    assert client.predict(api_name="/running") == 1
    _role(page, "slanted", "NOT")
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


def test_visitors_play_different_mixes_and_a_closed_tab_frees_its_chains(page, client, browser, toy_page):
    other, third = browser.new_page(), browser.new_page()
    for each in (other, third):
        each.goto(toy_page)
        _opened(each)
    other.get_by_role("checkbox", name="slanted").uncheck()
    mix = "Toys/digit[3] + Toys/slanted"
    for each, text in ((page, mix), (other, "Toys/digit[3]"), (third, mix)):
        _button(each, "Play").click()
        each.get_by_role("img", name=f"16 running chains of {text}", exact=True).wait_for()
    assert client.predict(api_name="/running") == 3
    other.close()
    _soon(lambda: client.predict(api_name="/running") == 2)
    third.reload()  # in the middle
    _opened(third)
    _soon(lambda: client.predict(api_name="/running") == 1)
    _button(third, "Play").click()
    third.get_by_role("img", name="16 running chains of").wait_for()
    third.close()
    _button(page, "Stop").click()
    _soon(lambda: client.predict(api_name="/running") == 0)


def test_a_saved_picture_restores_what_it_was_made_of(page, tmp_path):
    _choose_family(page, "Yard")
    _role(page, "hat", "NOT")
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
    _opened(page)
    expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted")
    chooser.set_input_files(saved)
    expect(_recipe(page)).to_have_value(recipe)
    expect(page.get_by_role("group", name="hat role").get_by_label("NOT")).to_be_checked()
    expect(page.get_by_role("spinbutton", name="number input for Steps")).to_have_value("5")
    expect(page.get_by_role("checkbox", name="body")).to_be_visible()
    _button(page, "Sample").click()
    page.get_by_role("link", name="Save picture").wait_for()
    assert page.locator("#picture img").get_attribute("src") == picture  # the same to the last bit
    assert page.locator(".note.alert").count() == 0


def test_copies_as_python_and_as_command(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _set(page, "Samples", 3)
    _tab(page, "Report")
    asked = Request("Toys/digit[3] + Toys/slanted", 3, 12, 0)
    for name, write in (("Copy as Python", state.as_python), ("Copy as command", state.as_command)):
        text = write(asked)
        _button(page, name).click()
        _soon(lambda text=text: page.evaluate("navigator.clipboard.readText()") == text)


def test_pictures_without_a_good_recipe_are_explained(page, tmp_path):
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


def test_families_are_shown_one_at_a_time(page):
    steps = page.get_by_role("spinbutton", name="number input for Steps")
    expect(steps).to_have_value("12")
    _choose_family(page, "Zoo")
    expect(_recipe(page)).to_have_value("Zoo/cat")
    expect(page.get_by_role("checkbox", name="thick")).to_be_hidden()
    expect(page.get_by_role("checkbox", name="cat")).to_be_visible()
    _choose_family(page, "Yard")
    expect(steps).to_have_value("7")


def test_page_composes_ratios_beside_a_base(page):
    _choose_family(page, "Yard")
    hue, hat = "ratio(Yard/hue[red], Yard/hue[any])", "ratio(Yard/hat, Yard/hat[any])"
    expect(_recipe(page)).to_have_value(f"Yard/body + {hue} + 4*{hat}")
    _role(page, "hat", "NOT")
    expect(_recipe(page)).to_have_value(f"Yard/body + {hue} + 4*ratio(~Yard/hat, Yard/hat[any])")
    page.get_by_role("group", name="hue value").get_by_label("any").check(force=True)
    expect(_recipe(page)).to_have_value("Yard/body + 4*ratio(~Yard/hat, Yard/hat[any])")
    expect(page.locator(".note")).to_have_count(0)
    page.get_by_role("checkbox", name="body").uncheck()
    expect(_recipe(page)).to_have_value("Yard/hue + 4*~Yard/hat")
    expect(page.locator(".note")).to_have_count(0)


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


def test_experts_in_the_role_or_are_one_group_both_ways(page):
    page.get_by_role("checkbox", name="thick").check()
    for name in ("slanted", "thick"):
        _role(page, name, "OR")
    expect(_recipe(page)).to_have_value("Toys/digit[3] + (Toys/slanted | Toys/thick)")
    _recipe(page).fill("Toys/slanted + (Toys/digit[3] | 2*Toys/thick)")
    _recipe(page).press("Enter")
    expect(page.get_by_role("group", name="digit role").get_by_label("OR")).to_be_checked()
    expect(page.get_by_role("group", name="slanted role").get_by_label("AND")).to_be_checked()
    expect(page.get_by_role("slider", name="thick weight")).to_have_value("2")
    page.get_by_role("img", name="16 samples of Toys/slanted + (Toys/digit[3] | 2*Toys/thick)").wait_for()


def test_a_chosen_sample_is_explained_and_begins_the_next_run(page):
    _set(page, "Samples", 4)
    _button(page, "Sample").click()
    page.get_by_role("link", name="Save picture").wait_for()
    box = page.locator("#picture img").bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"])
    expect(page.get_by_text("pushes sample 2,")).to_be_visible()
    page.locator("#picture").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_text("pushes sample 4,")).to_be_visible()
    expect(page.get_by_alt_text("Where digit[3] pushes")).to_be_visible()
    expect(page.locator("svg.spark")).to_have_count(0)  # one table is no line yet
    _tab(page, "Start from")
    _button(page, "The chosen sample").click()
    expect(page.locator("#start-says")).to_have_text("Chains start from sample 4.")
    _button(page, "Play").click()
    page.get_by_role("img", name="4 running chains").wait_for()
    _tab(page, "Why")
    expect(page.locator("svg.spark").first).to_be_visible()
    _button(page, "Stop").click()
    expect(_button(page, "Play")).to_be_enabled()


def test_an_uploaded_picture_changes_only_where_it_is_painted(page, tmp_path):
    """The held part of every sample is the upload, to the last bit."""
    upload = Image.linear_gradient("L").resize((16, 16), Image.Resampling.BOX)
    upload.save(tmp_path / "mine.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    _tab(page, "Start from")
    page.locator("#start-file").set_input_files(tmp_path / "no.png")
    expect(page.locator("#start-says")).to_contain_text("no.png is no picture")
    page.locator("#start-file").set_input_files(tmp_path / "mine.png")
    expect(page.locator("#start-says")).to_have_text("Chains start from mine.png.")
    easel = page.locator("#easel")
    box = easel.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 30, steps=5)
    page.mouse.up()
    easel.focus()
    page.keyboard.press("ArrowLeft")  # by keyboard too
    page.keyboard.press("Space")
    _set(page, "Samples", 1)
    _button(page, "Sample").click()
    page.get_by_role("link", name="Save picture").wait_for()
    made = decode(page.locator("#picture img").get_attribute("src")).convert("L")
    below = [(x, y) for x in range(16) for y in range(8, 16)]
    assert all(abs(made.getpixel(at) - upload.getpixel(at)) <= 1 for at in below)
    above = [(x, y) for x in range(3, 13) for y in (1, 2)]
    assert any(abs(made.getpixel(at) - upload.getpixel(at)) > 20 for at in above)
    _button(page, "Noise again").click()
    expect(page.locator("#start-says")).to_have_text("Chains start from noise.")


def test_a_picture_of_data_that_is_not_there_is_explained(page):
    _tab(page, "Start from")
    _button(page, "A picture of the data").click()
    expect(page.get_by_role("alert")).to_contain_text("there is no data of Toys")


def test_a_grid_over_two_weights_fills_and_can_be_saved(page):
    _tab(page, "Explore")
    expect(page.get_by_label("Across: weight of")).to_have_value("Toys/digit[3]")
    expect(page.get_by_label("Up: weight of")).to_have_value("Toys/slanted")
    _set(page, "Grid cells a side", 3)
    _button(page, "Draw grid").click()
    expect(page.get_by_role("link", name="Save grid")).to_be_visible()
    picture = decode(page.locator("#grid img").get_attribute("src"))
    assert picture.width > 3 * 90
    assert picture.text["recipe"] == "Toys/digit[3] + Toys/slanted"
    expect(_button(page, "Play")).to_be_enabled()


def test_every_expert_is_shown_alone_beside_the_mix(page):
    _button(page, "Each expert alone, from the same noise").click()
    expect(page.locator("#strip figcaption")).to_have_text(["mix", "digit 3", "slanted"])


def test_a_run_is_saved_as_an_animation(page, tmp_path):
    _set(page, "Samples", 4)
    _button(page, "Play").click()
    page.get_by_role("img", name="4 running chains").wait_for()
    page.wait_for_timeout(600)
    _button(page, "Stop").click()
    page.get_by_role("link", name="Save picture").wait_for()
    _tab(page, "Explore")
    with page.expect_download() as download:
        _button(page, "Save run as GIF").click()
    download.value.save_as(tmp_path / "run.gif")
    saved = Image.open(tmp_path / "run.gif")
    assert saved.is_animated
    assert saved.n_frames > 2


def test_a_new_expert_appears_on_reload(page, toys):
    shutil.copytree(toys / "Toys/thick", toys / "Toys/wide")
    try:
        config = toys / "Toys/wide/config.json"
        text = config.read_text().replace('"thick"', '"wide"')
        config.write_text(text)
        page.reload()
        _opened(page)
        page.get_by_role("checkbox", name="wide").check()
        expect(_recipe(page)).to_have_value("Toys/digit[3] + Toys/slanted + Toys/wide")
        expect(page.locator(".note")).to_have_count(0)
    finally:
        shutil.rmtree(toys / "Toys/wide")


def test_page_tells_what_its_experts_cannot_do(page):
    _tab(page, "Report")
    page.get_by_role("button", name="What these experts cannot do").click()
    page.get_by_text("Makes blobs.").wait_for()

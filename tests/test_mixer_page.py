"""The mixer's page in a browser: what a visitor does, by hand and by keyboard."""

import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from helpers import card, network
from mixer_toys import decode
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import composable_ebm as ceb
from demos.mixer import state
from demos.mixer.state import Request

expect = pytest.importorskip("playwright.sync_api").expect

pytestmark = pytest.mark.browser

AXE = "node_modules/axe-core/axe.min.js"
MIX = "Toys/digit[3] + Toys/slanted"
SOFT, HARD = "ratio(Yard/hat, Yard/hat[any])", "ratio(~Yard/hat, Yard/hat[any])"


@pytest.fixture(scope="module")
def context(browser):
    """One visitor's browser: what it has loaded once, it need not load again."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(8_000)
    expect.set_options(timeout=8_000)
    yield context
    context.close()


@pytest.fixture
def page(context, toy_page):
    """The open page, nothing running; afterwards, no error may be in its console, and no request left the
    machine."""
    page = context.new_page()
    errors, hosts = [], set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    _open(page, f"{toy_page}/?still")
    page.evaluate("localStorage.clear()")
    yield page
    page.close()
    assert errors == []
    assert {host for host in hosts if host} <= {toy_page.split("/")[2], ""}


def _open(page, address):
    page.goto(address)
    page.locator("body[data-ready]").wait_for()


def _button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def _recipe(page):
    return page.locator("#recipe")


def _family(page, name):
    if name != "Yard":
        page.locator("#advanced").evaluate("element => { element.open = true; }")
    page.get_by_role("radio", name=name, exact=True).check(force=True)


def _role(page, expert, role):
    page.get_by_role("group", name=f"{expert} role").get_by_label(role).check(force=True)


def _set(page, name, value):
    page.get_by_role("slider", name=name, exact=True).evaluate(
        "(input, value) => { input.value = value;"
        " input.dispatchEvent(new Event('input', {bubbles: true}));"
        " input.dispatchEvent(new Event('change', {bubbles: true})); }",
        str(value),
    )


def _sampled(page):
    expect(page.locator("#caption")).to_contain_text("· seed")
    return page.locator("#picture img")


def _soon(check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.2)  # to ask takes the server's time


def test_a_sample_is_saved_with_its_recipe_and_restored_to_the_last_bit(page, tmp_path):
    _family(page, "Yard")
    _role(page, "hat", "NOT")
    _set(page, "Pictures", 3)
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    _set(page, "Steps", 5)
    page.get_by_label("Seed", exact=True).fill("42")
    page.keyboard.press("Tab")
    recipe = _recipe(page).input_value()
    assert HARD in recipe
    _button(page, "Sample").click()
    image = _sampled(page)
    assert image.get_attribute("alt") == f"3 samples of {recipe}"
    picture = image.get_attribute("src")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save picture").click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    assert Image.open(saved).text["recipe"] == recipe
    assert "3 chains, 5 steps" in page.locator("#report").text_content()
    page.goto(page.url.split("#")[0])  # without the mix in the address
    page.locator("body[data-ready]").wait_for()
    expect(_recipe(page)).to_have_value(MIX)
    page.locator("#restore").set_input_files(saved)
    expect(_recipe(page)).to_have_value(recipe)
    expect(page.get_by_role("group", name="hat role").get_by_label("NOT")).to_be_checked()
    expect(page.locator("#steps")).to_have_value("5")
    _button(page, "Sample").click()
    expect(page.locator("#picture img")).to_have_attribute("src", picture)


def test_controls_and_recipe_follow_each_other_however_it_is_written(page):
    page.get_by_role("checkbox", name="thick").check()
    expect(_recipe(page)).to_have_value(f"{MIX} + Toys/thick")
    expect(page.locator("#words")).to_have_text("You ask for: digit 3, slanted, thick.")
    _role(page, "thick", "NOT")
    _set(page, "thick weight", 1.15)
    expect(_recipe(page)).to_have_value(f"{MIX} + 1.15*~Toys/thick")
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    page.get_by_role("tab", name="Explore").click()
    _recipe(page).fill("Toys/digit[3] + Toys/thik")
    _recipe(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("did you mean Toys/thick")
    _recipe(page).fill("Toys/thick+(Toys/digit[4] | Toys/digit[5])")
    _recipe(page).press("Enter")
    page.get_by_role("img", name="16 samples of Toys/thick+(Toys/digit[4] | Toys/digit[5])").wait_for()
    for value, pressed in (("4", "true"), ("5", "true"), ("3", "false")):
        expect(_button(page, value)).to_have_attribute("aria-pressed", pressed)
    expect(page.get_by_role("checkbox", name="slanted")).not_to_be_checked()
    expect(page.get_by_role("tab", name="Explore")).to_have_attribute("aria-selected", "true")
    page.get_by_role("checkbox", name="slanted").check()  # and nothing that was typed is lost
    expect(_recipe(page)).to_have_value("(Toys/digit[4] | Toys/digit[5]) + Toys/slanted + Toys/thick")
    _recipe(page).fill("2*Yard/body")
    _recipe(page).press("Enter")
    expect(page.get_by_text("more than the controls can show")).to_be_visible()
    expect(page.get_by_role("checkbox", name="hat", exact=True)).to_be_disabled()
    _button(page, "Use the controls").click()
    expect(page.get_by_role("checkbox", name="hat", exact=True)).to_be_enabled()


def test_several_values_each_with_a_slider_as_either_or_all_and_ors_in_a_group(page):
    _button(page, "7").click()
    expect(_recipe(page)).to_have_value("(Toys/digit[3] | Toys/digit[7]) + Toys/slanted")
    _set(page, "digit 7 weight", 2)
    expect(_recipe(page)).to_have_value("(Toys/digit[3] | 2*Toys/digit[7]) + Toys/slanted")
    page.get_by_role("group", name="digit together").get_by_label("all of these").check(force=True)
    expect(_recipe(page)).to_have_value("Toys/digit[3] + 2*Toys/digit[7] + Toys/slanted")
    _button(page, "7").click()
    _role(page, "slanted", "OR")
    expect(page.locator("#note")).to_contain_text("choose OR for another one too")
    _role(page, "digit", "OR")
    expect(_recipe(page)).to_have_value("(Toys/digit[3] | Toys/slanted)")
    expect(page.get_by_role("group", name="One at least of").get_by_role("checkbox")).to_have_count(2)
    expect(page.locator(".note")).to_have_count(0)


def test_nothing_on_says_so_and_leaves_nothing_to_press(page):
    for name in ("digit", "slanted"):
        page.get_by_role("checkbox", name=name).uncheck()
    expect(page.get_by_role("alert")).to_contain_text("Nothing is on")
    for name in ("Play", "Sample", "Stop", "Shake"):
        expect(_button(page, name)).to_be_disabled()
    assert "at least one expert" in _button(page, "Play").get_attribute("title")


def test_play_follows_all_controls_until_stop(page, client):
    _button(page, "Play").click()
    page.get_by_role("img", name=f"16 running chains of {MIX}").wait_for()
    expect(_button(page, "Sample")).to_be_disabled()
    assert client.predict(api_name="/running") == 1
    _role(page, "slanted", "NOT")
    page.get_by_role("img", name="16 running chains of Toys/digit[3] + ~Toys/slanted").wait_for()
    expect(page.get_by_role("row", name="not slanted")).to_be_visible()
    expect(page.locator("svg.spark").first).to_be_visible()
    _set(page, "Pictures", 4)  # begins anew
    page.get_by_role("img", name="4 running chains").wait_for()
    _button(page, "New seed").click()
    expect(page.locator("#caption")).to_contain_text("playing")
    _family(page, "Zoo")
    page.get_by_role("img", name="4 running chains of Zoo/cat").wait_for()
    _button(page, "Stop").click()
    expect(page.locator("#caption")).to_contain_text("stopped at step")
    expect(page.locator(".note.alert")).to_have_count(0)
    expect(_button(page, "Play")).to_be_enabled()
    assert page.get_by_label("Seed", exact=True).input_value() in page.locator("#caption").inner_text()
    _soon(lambda: client.predict(api_name="/running") == 0)


def test_visitors_play_different_mixes_and_a_closed_tab_frees_its_chains(page, client, browser, toy_page):
    other = browser.new_page()
    _open(other, f"{toy_page}/?still")
    other.get_by_role("checkbox", name="slanted").uncheck()
    for each, text in ((page, MIX), (other, "Toys/digit[3]")):
        _button(each, "Play").click()
        each.get_by_role("img", name=f"16 running chains of {text}", exact=True).wait_for()
    assert client.predict(api_name="/running") == 2
    other.close()
    _soon(lambda: client.predict(api_name="/running") == 1)
    page.reload()  # in the middle
    page.locator("body[data-ready]").wait_for()
    _soon(lambda: client.predict(api_name="/running") == 0)


def test_the_film_strip_keeps_what_was_made_and_brings_it_back(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _set(page, "Pictures", 2)
    _button(page, "Sample").click()
    first = _sampled(page).get_attribute("src")
    page.get_by_role("checkbox", name="thick").check()
    _button(page, "New seed").click()
    _button(page, "Sample").click()
    frames = page.get_by_role("button", name="Bring back")
    expect(frames).to_have_count(2)
    page.reload()
    page.locator("body[data-ready]").wait_for()
    expect(_recipe(page)).to_have_value(f"{MIX} + Toys/thick")  # from the address
    expect(frames).to_have_count(2)
    frames.last.click()
    expect(_recipe(page)).to_have_value(MIX)
    expect(page.get_by_label("Seed", exact=True)).to_have_value("0")
    expect(page.locator("#picture img")).to_have_attribute("src", first)
    page.locator("#picture").focus()
    page.keyboard.press("Control+z")
    expect(_recipe(page)).to_have_value(f"{MIX} + Toys/thick")
    page.keyboard.press("Control+Shift+z")
    expect(_recipe(page)).to_have_value(MIX)
    page.get_by_role("button", name="Star", exact=True).first.click()
    for compare in page.get_by_role("button", name="Compare").all():
        compare.click()
    expect(page.get_by_role("dialog").get_by_role("img")).to_have_count(2)
    page.keyboard.press("Escape")
    _button(page, "Link").click()
    _soon(lambda: page.evaluate("navigator.clipboard.readText()") == page.url)


@pytest.mark.parametrize("written", [MIX.replace(" ", ""), MIX, MIX.replace("+", "%2B").replace(" ", "%20")])
def test_a_link_brings_its_mix_back_however_its_plus_is_written(page, toy_page, written):
    _open(page, f"{toy_page}/?still#mix={written}%20{'%2B' if '%2B' in written else '+'}%20Toys/thick&seed=7")
    page.reload()  # an address that differs in its mix alone is no other page
    expect(page.locator("#words")).to_have_text("You ask for: digit 3, slanted, thick.")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    assert "+" not in page.url


def test_a_chosen_picture_is_explained_and_begins_others(page, tmp_path):
    _set(page, "Pictures", 4)
    _button(page, "Sample").click()
    box = _sampled(page).bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"])
    expect(page.get_by_text("pushes picture 2,")).to_be_visible()
    page.locator("#picture").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_text("pushes picture 4,")).to_be_visible()
    expect(page.get_by_alt_text("Where digit 3 pushes")).to_be_visible()
    before = page.locator("#picture img").get_attribute("src")
    _button(page, "Keep this, vary the rest").click()
    expect(page.locator("#picture img")).not_to_have_attribute("src", before)
    expect(page.locator("#caption")).to_contain_text("step 12")
    after = page.locator("#picture img").get_attribute("src")
    kept, made = (decode(uri).convert("L") for uri in (before, after))
    first, last = (0, 0, 16, 16), (17, 17, 33, 33)
    pairs = zip(kept.crop(last).tobytes(), made.crop(last).tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1
    assert kept.crop(first).tobytes() != made.crop(first).tobytes()
    _button(page, "More like this").click()
    page.get_by_role("img", name="4 running chains").wait_for()
    expect(page.locator("#starting")).to_contain_text("Chains start from picture 4")
    _button(page, "Stop").click()
    _button(page, "Noise again").first.click()
    expect(page.locator("#starting")).to_be_hidden()
    with page.expect_download() as download:
        _button(page, "Save large").click()
    download.value.save_as(tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").width >= 512
    with page.expect_download() as download:
        _button(page, "Download all").click()
    download.value.save_as(tmp_path / "all.zip")
    assert len(zipfile.ZipFile(tmp_path / "all.zip").namelist()) == 4


def test_an_uploaded_picture_changes_only_where_it_is_painted(page, tmp_path):
    """The held part of every sample is the upload, to the last bit."""
    upload = Image.linear_gradient("L").resize((16, 16), Image.Resampling.BOX)
    upload.save(tmp_path / "mine.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.get_by_role("tab", name="Start from").click()
    page.locator("#start-file").set_input_files(tmp_path / "no.png")
    expect(page.locator("#start-says")).to_contain_text("no.png is no picture")
    page.locator("#start-file").set_input_files(tmp_path / "mine.png")
    expect(page.locator("#starting")).to_contain_text("Chains start from mine.png.")
    easel = page.locator("#easel")
    easel.scroll_into_view_if_needed()
    box = easel.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 30, steps=5)
    page.mouse.up()
    easel.focus()
    page.keyboard.press("ArrowLeft")  # by keyboard too
    page.keyboard.press("Space")
    _set(page, "Pictures", 1)
    _button(page, "Sample").click()
    made = decode(_sampled(page).get_attribute("src")).convert("L")
    below = [(x, y) for x in range(16) for y in range(8, 16)]
    assert all(abs(made.getpixel(at) - upload.getpixel(at)) <= 1 for at in below)
    above = [(x, y) for x in range(3, 13) for y in (1, 2)]
    assert any(abs(made.getpixel(at) - upload.getpixel(at)) > 20 for at in above)


def test_pictures_without_a_good_recipe_are_explained(page, tmp_path):
    before = _recipe(page).input_value()
    for texts, message in (
        ({}, "carries no recipe"),
        ({"recipe": "<img src=x onerror=alert(1)> + 1"}, "'<' has no meaning in a recipe"),
        ({"recipe": "Toys/digit[3]", "num_chains": "9999"}, "`num_chains` must be a whole number"),
    ):
        info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        Image.new("RGB", (4, 4)).save(tmp_path / "hostile.png", pnginfo=info)
        page.locator("#restore").set_input_files(tmp_path / "hostile.png")
        expect(page.get_by_role("alert")).to_contain_text(message)
    assert page.locator("#palette").get_by_role("checkbox", name="digit").is_visible()
    assert before == MIX


def test_grids_strips_films_and_programs(page, tmp_path):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    for name, write in (("Copy as Python", state.as_python), ("Copy as command", state.as_command)):
        text = write(Request(MIX, 16, 12, 0))
        _button(page, name).click()
        _soon(lambda text=text: page.evaluate("navigator.clipboard.readText()") == text)
        expect(_button(page, "Copied").first).to_be_visible()
    _button(page, "Each expert alone, from the same noise").click()
    expect(page.locator("#alone figcaption")).to_have_text(["mix", "digit 3", "slanted"])
    page.get_by_role("tab", name="Explore").click()
    expect(page.get_by_label("Across: weight of")).to_have_value("Toys/digit[3]")
    _set(page, "Cells a side", 3)
    _button(page, "Draw grid").click()
    expect(page.get_by_role("link", name="Save grid")).to_be_visible()
    assert decode(page.locator("#grid img").get_attribute("src")).text["recipe"] == MIX
    _button(page, "Play").click()
    page.get_by_role("img", name="16 running chains").wait_for()
    page.wait_for_timeout(400)
    _button(page, "Stop").click()
    with page.expect_download() as download:
        _button(page, "Save run as GIF").click()
    download.value.save_as(tmp_path / "run.gif")
    assert Image.open(tmp_path / "run.gif").is_animated
    page.get_by_role("tab", name="Start from").click()
    _button(page, "A picture of the data").click()
    expect(page.get_by_role("alert")).to_contain_text("there is no data of Toys")


def test_new_experts_appear_on_reload_and_failures_are_told(page, toys):
    wide = card("wide", ("narrow", "wide"), "Toys", (1, 16, 16))
    ceb.save_expert(toys / wide.full_name, network(wide), wide)
    try:
        page.reload()
        page.locator("body[data-ready]").wait_for()
        page.get_by_role("checkbox", name="wide").check()
        expect(_recipe(page)).to_have_value(f"{MIX} + Toys/wide")
    finally:
        shutil.rmtree(toys / wide.full_name)
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    page.get_by_text("What these experts cannot do").click()
    expect(page.get_by_text("Makes blobs.").first).to_be_visible()


def test_starts_and_surprises_are_one_click_and_one_key(page):
    start = page.locator("#starts .start").first
    expect(start.locator("img")).to_have_js_property("complete", True)  # drawn while the page was open
    start.click()
    page.get_by_role("img", name="16 running chains of Yard/body").wait_for()
    page.locator("#picture").focus()
    page.keyboard.press("r")
    expect(page.locator("#says")).to_contain_text("You ask for")
    page.keyboard.press("Escape")
    expect(_button(page, "Stop")).to_be_disabled()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Surprise me")


def test_pictures_are_marked_by_keyboard_and_dropped_and_what_cannot_be_taught_is_said(page):
    _button(page, "Sample").click()
    _sampled(page)
    _family(page, "Yard")
    _button(page, "Sample").click()
    expect(page.locator("#picture img")).to_have_attribute("alt", re.compile("samples of Yard"))
    page.get_by_role("tab", name="Teach").click()
    page.locator("#picture").focus()
    for key in "yyynnn":
        page.keyboard.press("ArrowRight")
        page.keyboard.press(key)
    expect(page.get_by_role("button", name="Remove this no")).to_have_count(3)
    dropped = page.evaluate_handle("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 9, height: 9 });
        const blob = await new Promise((done) => canvas.toBlob(done));
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], "mine.png", { type: "image/png" }));
        return transfer;
    }""")
    page.locator(".marked").first.dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.get_by_role("button", name="Remove this yes")).to_have_count(4)
    expect(page.locator("#starting")).to_be_hidden()
    expect(_button(page, "Teach it")).to_be_disabled()
    page.locator("#taught-name").fill("tired")
    _button(page, "Teach it").click()
    expect(page.locator("#teach-says")).to_contain_text("nothing to teach beside")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(browser, toy_page, scheme):
    """Where `npm install axe-core` was run, in the checkout or a folder above it."""
    found = [folder / AXE for folder in Path(__file__).resolve().parents if (folder / AXE).is_file()]
    if not found:
        pytest.skip("there is no axe-core; npm install axe-core")
    page = browser.new_page(color_scheme=scheme, bypass_csp=True)
    _open(page, f"{toy_page}/?still")
    page.add_script_tag(path=found[0])
    _button(page, "Sample").click()
    _sampled(page)
    page.locator("#picture").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    for tab in ("Why", "Explore", "Start from", "Teach"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Teach":  # what is wrong, on a phone
            page.set_viewport_size({"width": 390, "height": 844})
            _recipe(page).fill("Toys/digit[3] + Toys/slanted + Toys/thik")
            _recipe(page).press("Enter")
            page.get_by_role("alert").wait_for()
        said = page.evaluate(
            "async () => (await axe.run()).violations.map((each) => each.id + each.nodes[0].html)"
        )
        assert said == [], tab
    page.close()


@pytest.mark.parametrize("width", [360, 800, 1280, 2560])
def test_nothing_is_clipped_or_covered(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    _button(page, "Sample").click()
    _sampled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("slider", name="slanted weight").scroll_into_view_if_needed()
    for element in (page.locator("#picture img"), _button(page, "Sample")):
        box = element.bounding_box()
        assert box["y"] + min(box["height"], 100) <= 905
    for name in ("Why", "Explore", "Start from", "Teach"):
        page.get_by_role("tab", name=name).click(trial=True)
    page.get_by_role("slider", name="slanted weight").click(trial=True)
    page.get_by_role("group", name="slanted role").get_by_label("NOT").click(trial=True)
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    _recipe(page).focus()
    page.keyboard.press("End")
    page.keyboard.type(" + Toys/thik")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_in_viewport(ratio=1)
    at = """element => {
        const box = element.getBoundingClientRect();
        return document.elementFromPoint(box.x + 9, box.y + 9).id;
    }"""
    assert _recipe(page).evaluate(at) == "recipe"  # and no picture that stays where it is


def test_by_keyboard_focus_is_kept_and_whatever_it_reaches_is_seen(page):
    page.get_by_role("checkbox", name="thick").focus()
    page.keyboard.press("Space")
    expect(page.locator("#words")).to_contain_text("thick")
    for key in ("Tab", "ArrowRight"):  # to the roles, and to NOT
        page.keyboard.press(key)
    expect(page.locator("#words")).to_contain_text("no thick")
    assert page.evaluate("document.activeElement.value") == "NOT"  # though its row was drawn anew
    page.locator("#advanced").evaluate("element => { element.open = true; }")
    for name in ("Why", "Explore", "Start from", "Teach"):
        page.get_by_role("tab", name=name).click()
        lost = page.evaluate("""() => [...document.querySelectorAll("input, textarea, select, button, div")]
            .filter((each) => each.tabIndex >= 0 && !each.disabled && each.checkVisibility())
            .filter((each) => Math.min(each.offsetWidth, each.offsetHeight) < 14)
            .map((each) => each.outerHTML)""")
        assert lost == []

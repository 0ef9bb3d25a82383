"""The mixer's parts: grids over weights, strips, heat maps, animations, uploads. No page here."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import expert, points
from mixer_toys import diffused
from PIL import Image, ImageColor, ImageSequence

import composable_ebm as ceb
from composable_ebm.data import load_data
from composable_ebm.energy.analytic import Gaussian
from demos.mixer import animate, explore, heat, labelled, mix, starts, terms
from demos.mixer.animate import Recorder
from demos.mixer.explore import Axis

SHAPE = (1, 8, 8)
SAMPLER = {"kernel": "Langevin", "step_size": 0.1, "num_steps": 6}
NAMES = {
    "toys/body": expert("body", ("image",), 0, event_shape=SHAPE, attribute="image", sampler=SAMPLER),
    "toys/hat": expert("hat", ("bare", "hat"), 1, event_shape=SHAPE, sampler=SAMPLER),
    "toys/hue": expert("hue", ("red", "green", "blue"), 2, event_shape=SHAPE, sampler=SAMPLER),
    "toys/tree": expert("tree", ("tree",), 3, event_shape=SHAPE, sampler=SAMPLER),
}
HAT, HUE = "ratio(toys/hat, toys/hat[any])", "ratio(~toys/hue[red], toys/hue[any])"
MIX = f"toys/body + 4*{HAT} + 2*{HUE}"


def parse(text):
    return ceb.parse(text, NAMES)


@pytest.fixture
def engine():
    with ceb.Engine() as engine:
        yield engine


# -- the parts of a composition -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (MIX, [("toys/body", 1, 0), ("toys/hat", 4, 0), ("~toys/hue[red]", 2, 0)]),
        (
            f"toys/body + (2*{HAT} | ratio(toys/hue[blue], toys/hue[any]))",
            [("toys/body", 1, 0), ("toys/hat", 2, 1), ("toys/hue[blue]", 1, 1)],
        ),
        (
            "toys/body + 2*ratio(toys/hue[red], toys/hue[any]) + ratio(toys/hue[blue], toys/hue[any])",
            [("toys/body", 1, 0), ("toys/hue[red]", 2, 0), ("toys/hue[blue]", 1, 0)],
        ),
        ("toys/hat - 0.25*toys/tree", [("toys/hat", 1, 0), ("toys/tree", -0.25, 0)]),
    ],
)
def test_parts_are_the_experts_of_a_composition_with_their_weights(recipe, expected):
    assert [(part.name, part.weight, part.group) for part in terms.parts(parse(recipe))] == expected


@pytest.mark.parametrize("recipe", [MIX, f"toys/body + ({HAT} | 3*{HUE})", "toys/tree - 0.25*toys/hat"])
def test_a_composition_with_its_own_weights_is_the_same(recipe):
    energy = parse(recipe)
    again = terms.reweighted(energy, {part.name: part.weight for part in terms.parts(energy)})
    x = points(3, SHAPE)
    torch.testing.assert_close(again(x), energy(x))


def test_a_weight_below_zero_asks_for_the_other_value():
    x = points(3, SHAPE)
    other = parse(f"toys/body + 2.5*ratio(~toys/hat, toys/hat[any]) + 2*{HUE}")
    torch.testing.assert_close(terms.reweighted(parse(MIX), {"toys/hat": -2.5})(x), other(x))


def test_each_expert_stands_alone_beside_the_base():
    x = points(3, SHAPE)

    def is_base(energy):
        return str(energy) == "toys/body"

    found = terms.alone(parse(MIX), is_base)
    assert [name for name, _ in found] == ["toys/hat", "~toys/hue[red]"]
    torch.testing.assert_close(found[0][1](x), parse(f"toys/body + 4*{HAT}")(x))


# -- grids ----------------------------------------------------------------------------------------------


def undrawn(monkeypatch):
    """The states of each frame of a grid, in place of its pictures."""
    drawn = []
    blank = Image.new("L", (1, 1))
    monkeypatch.setattr(explore, "labelled_grid", lambda states, *rest: drawn.append(states) or blank)
    return drawn


def is_base(energy):
    return isinstance(energy, ceb.Expert) and mix.is_base(energy.card)


@pytest.mark.parametrize("recipe", [MIX, f"toys/body + (2*{HAT} | {HUE})"])
def test_a_cell_of_a_grid_is_what_sample_gives_for_its_recipe(monkeypatch, engine, recipe):
    drawn = undrawn(monkeypatch)
    across, up = Axis("toys/hat", -2, 4, 3), Axis("~toys/hue[red]", 1, 9, 2)
    *_, last = explore.weight_grid(parse(recipe), across, up, engine.submit, seed=5)
    assert last.done
    assert last.step == 6
    cells = drawn[-1].split(1)
    for i, (u, v) in enumerate([(u, v) for v in (9.0, 1.0) for u in (-2.0, 1.0, 4.0)]):
        energy = terms.reweighted(parse(recipe), {"toys/hat": u, "~toys/hue[red]": v})
        alone = ceb.sample(energy, num_chains=1, seed=5)
        assert torch.allclose(cells[i], alone.images, atol=1e-4), str(energy)


def test_cells_of_a_grid_are_evaluated_together_and_count_as_one_visitor(engine):
    asked = []

    def submit(*arguments, **options):
        asked.append(options["share"])
        return engine.submit(*arguments, **options)

    across, up = Axis("toys/hat", 1, 4, 3), Axis("~toys/hue[red]", 1, 9, 2)
    list(explore.weight_grid(parse(MIX), across, up, submit))
    assert sum(asked) == pytest.approx(1)
    assert engine.potentials_made == 1


def test_a_grid_of_noise_conditioned_experts_is_what_sample_gives(monkeypatch, engine):
    names = {
        "base": diffused("base", ("image",), 0, attribute="image"),
        "hat": diffused("hat", ("bare", "hat"), 1),
        "cat": diffused("cat", ("dog", "cat"), 2),
    }
    drawn = undrawn(monkeypatch)
    recipe = "base + 2*ratio(hat, hat[any]) + ratio(cat, cat[any])"
    axes = Axis("toys/hat", 0, 4, 2), Axis("toys/cat", 3, 5, 2)
    list(explore.weight_grid(ceb.parse(recipe, names), *axes, engine.submit, seed=2))
    text = "base + 4*ratio(hat, hat[any]) + 5*ratio(cat, cat[any])"
    expected = ceb.sample(ceb.parse(text, names), num_chains=1, seed=2).images
    assert torch.allclose(drawn[-1][1:2], expected, atol=1e-4)


def test_a_grid_has_a_column_and_a_row_for_each_weight(engine):
    across, up = Axis("toys/hat", 3, 4, 2), Axis("~toys/hue[red]", 0, 2, 3)
    frames = list(explore.weight_grid(parse(MIX), across, up, engine.submit, num_steps=3))
    picture = frames[-1].picture
    assert [frame.done for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert picture.width < picture.height  # two columns, three rows


def test_a_grid_ends_early_when_told_to(engine):
    across, up = Axis("toys/hat", 0, 4, 2), Axis("~toys/hue[red]", 0, 2, 2)
    frames = explore.weight_grid(parse(MIX), across, up, engine.submit, num_steps=10**6)
    assert not next(frames).done
    for run in engine.runs:
        run.cancel()
    *_, last = frames
    assert last.done
    assert last.step < 10**6


def test_a_cell_that_diverged_is_crossed_out():
    states, lost = torch.zeros(2, 1, 8, 8), torch.tensor([False, True])
    picture = labelled.labelled_grid(states, lost, ["a", "b"], ([1.0, 2.0], [1.0]))
    alert = ImageColor.getrgb(labelled.ALERT)
    crossed = (np.asarray(picture) == alert).all(-1).any(0).nonzero()[0]
    assert len(crossed) > labelled.CELL / 2
    assert crossed.min() > labelled.LEFT + labelled.CELL  # in the second cell alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal": Axis("~toys/hue[red]", 0, 1, 2)}, "must name two different experts"),
        ({"horizontal": Axis("toys/cap", 0, 1, 2)}, "does not name the expert 'toys/cap'"),
        ({"horizontal": Axis("toys/hat", 3, 3, 5)}, "weights of hat need a range, got 3 twice"),
    ],
)
def test_grids_that_make_no_sense_are_refused(engine, options, message):
    asked = {"horizontal": Axis("toys/hat", 0, 1, 2), "vertical": Axis("~toys/hue[red]", 0, 1, 2)}
    with pytest.raises(ValueError, match=message):
        next(explore.weight_grid(parse(MIX), submit=engine.submit, **{**asked, **options}))
    assert all(run.cancelled for run in engine.runs)


# -- strips ---------------------------------------------------------------------------------------------


def test_a_strip_is_the_mix_and_each_expert_alone_from_the_same_noise(engine):
    strip = explore.strip(parse(MIX), is_base, engine.submit, seed=3)
    assert strip.labels == ["mix", "hat", "not hue red"]
    for energy, shown in zip(strip.energies, strip.images, strict=True):
        alone = ceb.sample(energy, num_chains=1, seed=3).images[0]
        torch.testing.assert_close(shown, alone, rtol=1e-4, atol=1e-4)


def test_a_stopped_strip_keeps_what_was_reached(engine):
    def submit(*arguments, **options):
        run = engine.submit(*arguments, **options)
        run.cancel()
        return run

    strip = explore.strip(parse(MIX), is_base, submit, num_steps=10**6)
    assert strip.labels == ["mix", "hat", "not hue red"]
    assert strip.images.shape == (3, *SHAPE)


# -- heat maps --------------------------------------------------------------------------------------------


def blob(row, column):
    """An energy that wants the pixel at a place bright, weakly where all others are."""
    mean = torch.zeros(64)
    mean[row * 8 + column] = 1.0
    energy = Gaussian(mean, torch.ones(64))

    class Blob(ceb.Energy):
        event_shape = SHAPE
        data_range = (-1.0, 1.0)

        def energy(self, x, noise_level=None):
            return energy(x.flatten(1))

    return Blob().named(f"blob{row}{column}")


def test_pushes_point_where_the_score_points():
    mix = blob(1, 1) + 3 * blob(6, 6)
    found = heat.pushes(mix, torch.zeros(1, *SHAPE))
    assert [push.name for push in found] == ["blob11", "blob66"]
    assert found[1].strength == pytest.approx(3 * found[0].strength)
    assert found[0].strength == pytest.approx(1 / 8)  # one pixel of 64, pushed by 1
    scale = found[0].picture.width // 8
    for push, (row, column) in zip(found, ((1, 1), (6, 6)), strict=True):
        red = push.picture.getpixel((column * scale, row * scale))
        still = push.picture.getpixel((3 * scale, 4 * scale))
        assert red[0] > red[2] + 20
        assert abs(still[0] - still[2]) < 3


def test_pushes_share_one_symmetric_scale():
    a = blob(1, 1)
    weak, strong = heat.pushes(a + 9 * blob(6, 6), torch.zeros(1, *SHAPE))
    scale = weak.picture.width // 8
    full = strong.picture.getpixel((6 * scale, 6 * scale))
    faint = weak.picture.getpixel((1 * scale, 1 * scale))
    assert full[1] < faint[1]  # the weaker push is the paler one
    above = heat.pushes(a, torch.zeros(1, *SHAPE))[0].picture.getpixel((scale, scale))
    below = heat.pushes(a, 2 * torch.eye(64)[9].reshape(1, *SHAPE))[0].picture.getpixel((scale, scale))
    assert above[0] > above[2]
    assert below[0] < below[2]


def test_a_value_and_its_marginal_push_as_one_term():
    hat = NAMES["toys/hat"]
    x = points(1, SHAPE)
    found = heat.pushes(parse(f"toys/body + 4*{HAT}"), x)
    assert [push.name for push in found] == ["toys/body", "toys/hat"]
    together = 4 * (hat - hat["any"])
    assert found[1].strength == pytest.approx(float(together.score(x).square().mean().sqrt()), rel=1e-4)


def test_pushes_on_latents_are_seen_through_the_decoder():
    mix = ceb.parse("portraits/base + ratio(portraits/smile, portraits/smile[any])")
    faces = load_data("portraits", "test", num_images=8)
    unsmiling = int((faces.labels["smile"] == 0).nonzero()[0])
    found = heat.pushes(mix, mix.states(faces.batch(torch.tensor([unsmiling]))))
    smile = np.asarray(found[1].picture, float)
    side = len(smile)
    colour = np.abs(smile[..., 0] - smile[..., 2])
    mouth = colour[side // 2 : 3 * side // 4, side // 3 : 2 * side // 3]
    assert found[1].name == "portraits/smile"
    assert mouth.mean() > 3 * colour.mean()


def test_pushes_are_of_one_picture():
    with pytest.raises(
        ValueError, match=r"`x` must be one picture, \(1, 1 or 3, height, width\), got \(2, 1, 8, 8\)"
    ):
        heat.pushes(parse(MIX), points(2, SHAPE))


# -- animations -------------------------------------------------------------------------------------------


def grey(level, chains=2, size=8):
    return torch.full((chains, 3, size, size), float(level))


def frames_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_a_chain_is_saved_as_an_animation(format):
    recorder = Recorder(10)
    for level in (-1, 0, 1):
        states = grey(-1)
        states[1] = level
        recorder.add(states)
    data = recorder.save(1, format)
    found = frames_of(data)
    assert [round(frame.getpixel((5, 5))[0] / 64) for frame in found] == [0, 2, 4]
    assert found[0].size == (192, 192)
    assert Image.open(io.BytesIO(data)).format == format.upper()
    assert frames_of(recorder.save(None, format))[0].width == 192


def test_a_recorder_keeps_the_whole_run_in_larger_steps():
    recorder = Recorder(8)
    for step in range(1001):
        recorder.add(grey(step / 500 - 1, chains=1))
        assert len(recorder) <= 8
    kept = [float(frame.float().mean()) for frame in recorder._frames]
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert kept[0] == 0
    assert max(gaps) - min(gaps) <= 1.01  # evenly spaced, to a byte
    assert frames_of(recorder.save())[-1].getpixel((0, 0))[0] >= 253  # ends at the last frame


def test_many_chains_keep_fewer_frames():
    recorder = Recorder(1000)
    states = torch.zeros(64, 3, 64, 64)
    for _ in range(40):
        recorder.add(states)
    assert len(recorder) * states.numel() <= animate.MAX_BYTES


def test_other_chains_begin_a_new_recording():
    recorder = Recorder(8)
    recorder.add(grey(0))
    recorder.add(grey(0, chains=3))
    assert len(recorder) == 1


def test_recordings_that_cannot_be_are_refused():
    recorder = Recorder(8)
    with pytest.raises(ValueError, match="nothing to save yet"):
        recorder.save(0)
    recorder.add(grey(0))
    with pytest.raises(ValueError, match="`chain` must be from 0 to 1, got 2"):
        recorder.save(2)


# -- starts -----------------------------------------------------------------------------------------------


def file_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, *chunks, depth=8, kind=2):
    """A PNG of a header, and chunks (name, content) that need not be any good."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in (header, *chunks, (b"IEND", b"")):
        crc = zlib.crc32(name + content)
        parts.append(struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc))
    return b"".join(parts)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_an_upload_is_the_middle_of_a_picture(format):
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    state = starts.from_upload(file_of(wide, format), (3, 10, 10), (-1.0, 1.0))
    assert state.shape == (3, 10, 10)
    assert float(state[:, 2:8, 2:8].min()) > 0.9
    assert starts.from_upload(file_of(wide, format), (1, 4, 4), (0.0, 2.0)).shape == (1, 4, 4)


def test_an_upload_is_upright_and_on_white():
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # by 180 degrees
    state = starts.from_upload(file_of(turned, "JPEG", exif=exif, quality=95), (1, 8, 8))
    assert float(state[0, 6].mean()) > 0.8 > -0.8 > float(state[0, 1].mean())
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert float(starts.from_upload(file_of(clear), (3, 8, 8)).min()) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no picture that can be read; give a PNG, JPEG"),
        (b"GIF89a", "is no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
        (bytes(21 * 10**6), "too large: 21 MB of 20 at most"),
        (png(10**5, 10**5), "too large; at most 20 megapixels"),
        (png(9000, 9000), "too large, 9000 by 9000 pixels; at most 20 megapixels"),
        (png(2**31 - 1, 2**31 - 1), "too large; at most 20 megapixels"),
        (png(64, 64), "This picture is damaged"),
        (png(64, 64, (b"IDAT", b"not deflated")), "This picture is damaged"),
        (png(64, 64, (b"IDAT", zlib.compress(bytes(100))[:-8])), "This picture is damaged"),
        (png(64, 64, (b"zTXt", b"recipe\0\0" + zlib.compress(bytes(10**8)))), "is no picture|is damaged"),
        (png(0, 0), "is no picture|is damaged"),
        (file_of(Image.new("RGB", (64, 64)))[:60], "is damaged"),
        (file_of(Image.new("RGB", (64, 64)), "JPEG")[:200], "is no picture|is damaged"),
    ],
)
def test_hostile_uploads_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        starts.from_upload(data, (3, 8, 8))
    if len(data) < 10**6:
        with pytest.raises(ValueError, match=message):
            starts.mask_from(data, (3, 8, 8))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animated_uploads_are_refused(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="is animated; give a still one"):
        starts.from_upload(data, (3, 8, 8))


def test_flipped_bytes_never_raise_anything_but_a_value_error():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = bytearray(file_of(Image.fromarray(noise), format))
        for _ in range(60):
            damaged = bytearray(whole)
            for place in torch.randint(len(whole), (3,), generator=generator).tolist():
                damaged[place] = int(torch.randint(256, (), generator=generator))
            try:
                state = starts.from_upload(bytes(damaged), (3, 8, 8))
                assert state.isfinite().all()
            except ValueError:
                pass


def test_a_state_that_is_no_picture_is_refused():
    with pytest.raises(ValueError, match=r"states of shape \(2,\) are no pictures"):
        starts.from_upload(b"", (2,))


def test_what_is_painted_may_change():
    layer = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 0, 40, 20))
    mask = starts.mask_from(layer, (3, 8, 8))
    expected = torch.zeros(1, 8, 8)
    expected[0, :2, :4] = 1
    assert torch.equal(mask, expected)
    assert torch.equal(starts.mask_from(file_of(layer), (3, 8, 8)), expected)
    assert torch.equal(starts.mask_from(layer.getchannel("A"), (3, 8, 8)), expected)  # white on black
    with pytest.raises(ValueError, match="Nothing is painted"):
        starts.mask_from(Image.new("RGBA", (80, 80)), (3, 8, 8))


def test_chains_change_only_what_is_painted():
    start = starts.from_upload(file_of(Image.new("L", (8, 8), 200)), SHAPE)[None]
    layer = Image.new("L", (8, 8))
    layer.paste(255, (0, 0, 4, 8))
    mask = starts.mask_from(layer, SHAPE)
    result = ceb.sample(parse(MIX), init=start, mask=mask, num_steps=5)
    moved = (result.samples != start)[0, 0]
    assert moved[:, :4].all()
    assert not moved[:, 4:].any()


def test_data_gives_a_picture_and_says_what_it_shows():
    state, described = starts.from_data("shapes", 7)
    again, _ = starts.from_data("shapes", 7 + 256)
    assert state.shape == (3, 32, 32)
    assert torch.equal(state, again)
    assert described.startswith("shapes/test 7: ")


def test_data_that_is_not_here_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPOSABLE_EBM_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the data of celeba is not on this machine"):
        starts.from_data("celeba", 0)
    with pytest.raises(ValueError, match="there is no data of unicorns; there is of"):
        starts.from_data("unicorns", 0)
    with pytest.raises(ValueError, match=r"have shape \(3, 32, 32\), not \(1, 28, 28\)"):
        starts.from_data("shapes", 0, (1, 28, 28))

"""A user's folder of images, and CelebA, which is read in the same way."""

import json
import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from helpers import card
from PIL import Image
from torchvision.datasets import CelebA

from composable_ebm.data import LabelledImages, celeba, folder, load_data
from composable_ebm.data.copies import without_copies
from composable_ebm.data.jitter import mirrored, with_jitter
from composable_ebm.data.pictures import read_images
from composable_ebm.data.root import ENVIRONMENT_VARIABLE
from composable_ebm.data.summary import summary

N = 60
TABLE = "attributes.csv"


def colour(i):
    """The colour of image i of the test folders, by which it is recognised again."""
    return (4 * i, 255 - 4 * i, 100)


def picture(path, rgb, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, rgb).save(path)


@pytest.fixture
def photos(tmp_path):
    """A folder with a table: every third image has no smile label, in subfolders or not."""
    root = tmp_path / "photos"
    names = [f"more/{i:03}.png" if i % 2 else f"{i:03}.png" for i in range(N)]
    for i, name in enumerate(names):
        picture(root / name, colour(i))
    smile = ["yes", "no", ""]
    lines = ["file,smile,age", *(f"{name},{smile[i % 3]},{(i % 4) * 5}" for i, name in enumerate(names))]
    (root / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return root


def every_split(root, **options):
    return [folder.load(split, root=root, **options) for split in folder.SHARES]


def test_labels_belong_to_their_images_in_every_split(photos):
    parts = every_split(photos, size=4)
    assert sum(map(len, parts)) == N
    seen = []
    for data in parts:
        assert data.values == {"smile": ("no", "yes"), "age": ("0", "5", "10", "15")}
        for image, smile, age in zip(
            data.images, data.labels["smile"].tolist(), data.labels["age"].tolist(), strict=True
        ):
            i = int(image[0, 0, 0]) // 4
            seen.append(i)
            assert image.unique(dim=-1).flatten().tolist() == [c for c in colour(i) for _ in range(4)]
            assert (smile, age) == ((1, 0, -1)[i % 3], i % 4)
    assert sorted(seen) == list(range(N))


def test_images_without_an_entry_are_unlabelled(photos):
    train = folder.load("train", root=photos, size=4)
    assert 0 < len(train.where("smile")) < len(train)
    assert len(train.where("age")) == len(train)


def test_split_depends_on_the_name_alone(photos):
    before = folder.load("train", root=photos, size=4).images
    table = photos / TABLE
    lines = table.read_text(encoding="utf-8-sig").splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    after = folder.load("train", root=photos, size=4).images
    torch.testing.assert_close(after, before.flip(0))
    assert folder.split_of("000.png") == folder.split_of("000.png")


def test_splits_have_their_shares():
    n = 5000
    splits = [folder.split_of(f"{i}.png") for i in range(n)]
    for split, share in folder.SHARES.items():
        assert splits.count(split) / n == pytest.approx(share, abs=4.5 * (share * (1 - share) / n) ** 0.5)


def test_load_data_takes_the_folder_as_its_root(photos):
    data = load_data("folder", "train", root=photos)
    assert data.event_shape == (3, 32, 32)
    assert data.name == "photos/train"


def test_attributes_can_be_chosen(photos):
    assert list(folder.load(root=photos, size=4, attributes=["age"]).values) == ["age"]
    with pytest.raises(ValueError, match=r"unknown attribute of .*photos 'smiles'; did you mean 'smile'"):
        folder.load(root=photos, attributes=["smiles"])


def test_subfolders_are_classes(tmp_path):
    for i in range(N):
        picture(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", colour(i))
    parts = every_split(tmp_path, size=4)
    assert sum(map(len, parts)) == N
    for data in parts:
        assert data.values == {"class": ("cat", "dog")}
        assert [(int(image[0, 0, 0]) // 4 + 1) % 2 for image in data.images] == data.labels["class"].tolist()


# --- reading images ------------------------------------------------------------------------------


def read(path, size=2, channels=3):
    return read_images([path], size, channels, "test")[0]


def test_middle_square_is_kept(tmp_path):
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 200  # the middle third; the rest is black
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read(tmp_path / "wide.png").unique().tolist() == [200]


def test_grey_images_become_colour_and_the_reverse(tmp_path):
    Image.new("L", (4, 4), 90).save(tmp_path / "grey.png")
    assert read(tmp_path / "grey.png").unique().tolist() == [90]
    picture(tmp_path / "red.png", (255, 0, 0))
    grey = read(tmp_path / "red.png", channels=1)
    assert (grey.shape, grey.unique().tolist()) == ((1, 2, 2), [76])


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read(tmp_path / "clear.png").unique().tolist() == [255]


def test_rotation_noted_by_a_camera_is_undone(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    upright = read(tmp_path / "turned.png")
    assert upright[0, 0].max() < 60 < 200 < upright[0, 1].min()


def test_large_jpeg_is_read_small(tmp_path):
    picture(tmp_path / "large.jpg", (10, 200, 30), size=(640, 480))
    torch.testing.assert_close(
        read(tmp_path / "large.jpg", size=8).float().mean(dim=(1, 2)),
        torch.tensor([10.0, 200.0, 30.0]),
        atol=2,
        rtol=0,
    )


def test_broken_image_is_named(tmp_path):
    picture(tmp_path / "cut.png", (1, 2, 3), size=(50, 50))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image"):
            read(tmp_path / name)


def test_sixteen_bits_are_scaled_and_floats_refused_rather_than_clipped(tmp_path):
    for i, value in enumerate((0, 30_000, 65_535)):
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / f"{i}.png")
        assert read(tmp_path / f"{i}.png").unique().tolist() == [round(value / 257)]
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep.tif cannot be read .* convert it to 8 bits a channel"):
        read(tmp_path / "deep.tif")


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "LA", "YCbCr"])
def test_pictures_of_any_mode_look_as_they_do(tmp_path, mode):
    ending = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{ending}")
    assert read(tmp_path / f"a.{ending}").unique().tolist() == [255]


def test_of_a_moving_picture_the_first_frame_is_taken(tmp_path):
    first, second = (Image.new("L", (8, 8), value) for value in (40, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read(tmp_path / "a.gif").unique().tolist() == [40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"channels": 4}, r"`channels` must be 1 \(grey\) or 3 \(colour\), got 4"),
        ({"split": "tset"}, "unknown split of a folder 'tset'; did you mean 'test'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(photos, options, message):
    with pytest.raises(ValueError, match=message):
        folder.load(root=photos, **options)


# --- folders and tables that cannot be used -------------------------------------------------------


def test_folder_must_be_named_and_there(tmp_path):
    with pytest.raises(ValueError, match="needs `root`, the folder"):
        load_data("folder")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        folder.load(root=tmp_path / "absent")


def test_folder_without_pictures_says_what_it_needs(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match=r"holds no pictures .*\.jpg.* no table \(attributes.csv"):
        folder.load(root=tmp_path)


def test_empty_split_says_so(tmp_path):
    picture(tmp_path / "cat" / "0.png", (0, 0, 0))
    empty = next(split for split in folder.SHARES if split != folder.split_of("cat/0.png"))
    with pytest.raises(ValueError, match=f"none of the 1 images .* falls into the split '{empty}'"):
        folder.load(empty, root=tmp_path)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("", ValueError, r"must have a column `file` \(or .*got the columns \[\]"),
        ("name,smile\n0.png,yes\n", ValueError, r"column `file` .*, got the columns \['name', 'smile'\]"),
        ("file,smile,smile\n", ValueError, "must have different names"),
        ("file,smile\n0.png\n", ValueError, r"attributes.csv, line 2: expected 2 columns .*, got 1"),
        ("file,smile\n0.png,yes,no\n", ValueError, r"attributes.csv, line 2: expected 2 columns .*, got 3"),
        ("file,smile\n0.png,yes\n./0.png,no\n", ValueError, r"names the file '0.png' twice"),
        ("file,smile\n0.png,\n", ValueError, "attribute 'smile' has no value"),
        ("file,smile\n0.png,yes\n7.png,no\n", FileNotFoundError, r"1 of the 2 files .* first .*'7.png'"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_refused(tmp_path, table, error, message):
    picture(tmp_path / "0.png", (0, 0, 0))
    (tmp_path / TABLE).write_text(table)
    with pytest.raises(error, match=message):
        folder.load(root=tmp_path)


# --- tables as people have them -------------------------------------------------------------------


def numbered(root, count=30, **options):
    names = [f"{i:02}.png" for i in range(count)]
    for i, name in enumerate(names):
        picture(root / name, colour(i), **options)
    return names


def labels(root, attribute, split="train"):
    """File number -> value, for a folder of `numbered` pictures."""
    data = folder.load(split, root=root, size=4)
    values = data.values[attribute]
    return {
        int(image[0, 0, 0]) // 4: values[label] if label >= 0 else ""
        for image, label in zip(data.images, data.labels[attribute].tolist(), strict=True)
    }


def test_semicolons_tabs_and_utf_16_are_read(tmp_path):
    names = numbered(tmp_path)
    for delimiter, encoding in ((";", "utf-8"), ("\t", "utf-16"), (",", "utf-8-sig")):
        rows = [
            "file,smile",
            "",
            *(f"{name},{'yes' if i % 2 else 'no'}" for i, name in enumerate(names)),
            " , ",
        ]
        text = "\r\n".join(rows).replace(",", delimiter)
        (tmp_path / TABLE).write_bytes(text.encode(encoding))
        found = labels(tmp_path, "smile")
        assert found
        assert all(value == ("yes" if i % 2 else "no") for i, value in found.items())


def test_an_entry_may_be_long_quoted_and_of_several_lines(tmp_path):
    names = numbered(tmp_path)
    remarks = ['"' + "long, " * 40_000 + '"', '"he said ""no""\nand left"']
    rows = [f"{name},{remarks[i % 2]},{'yes' if i % 2 else 'no'}" for i, name in enumerate(names)]
    (tmp_path / TABLE).write_text("\n".join(["file,remark,smile", *rows]))
    data = folder.load("train", root=tmp_path, size=4, attributes=["smile"])
    assert data.values == {"smile": ("no", "yes")}


MISTAKES = {
    "unclosed to the end": ('"fine', "line 7: .*quote .* opened in this row and not closed"),
    "closed by another row's": ('"fine', "line 7: .*quote .* opened in this row and not closed"),
    "other encoding": ("sch\xf6n".encode("latin-1"), "line 7: the byte 0xf6 is no UTF-8: save"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_table_names_file_and_line(tmp_path, case):
    entry, message = MISTAKES[case]
    names = numbered(tmp_path)
    rows = [f"{name},yes,fine".encode() for name in names]
    rows[5] = b"05.png,no," + (entry if isinstance(entry, bytes) else entry.encode())
    if case == "closed by another row's":
        rows[9] = b'09.png,no,"'
    (tmp_path / TABLE).write_bytes(b"\n".join([b"file,smile,remark", *rows]))
    with pytest.raises(ValueError, match=rf"attributes.csv, {message}"):
        folder.load(root=tmp_path, size=4, attributes=["smile"])


def test_metadata_of_hugging_face_is_read_with_tags_truths_and_numbers(tmp_path):
    names = numbered(tmp_path)
    rows = [
        {"file_name": name, "tags": ["red"] * (i % 2) + ["big"], "open": i % 3 == 0, "height": i / 7}
        for i, name in enumerate(names)
    ]
    rows[4] |= {"tags": None, "open": None, "height": None}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    red, opened, height = (labels(tmp_path, name) for name in ("red", "open", "height"))
    for i in red:
        assert red[i] == ("" if i == 4 else "yes" if i % 2 else "no")
        assert opened[i] == ("" if i == 4 else "yes" if i % 3 == 0 else "no")
    assert set(height.values()) >= {"low", "middle", "high"}
    assert max(i for i, v in height.items() if v == "low") < min(i for i, v in height.items() if v == "high")
    notes = " ".join(folder.load(root=tmp_path, size=4).notes)
    assert "height has numbers: low, middle and high are cut at" in notes
    assert folder.load(root=tmp_path, size=4).values["height"] == ("low", "middle", "high")
    assert "tags has lists: each of 2 tags" in notes

    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n{cut")
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: it is no JSON"):
        folder.load(root=tmp_path)


def test_tags_in_one_entry_are_attributes(tmp_path):
    names = numbered(tmp_path)
    rows = [f'{name},"hat, {"smile" if i % 2 else "frown"}"' for i, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,tags", *rows]))
    assert all(value == ("yes" if i % 2 else "no") for i, value in labels(tmp_path, "smile").items())


def test_a_file_outside_the_folder_is_refused(tmp_path):
    (tmp_path / TABLE).write_text("file,smile\n../secret.png,yes\n")
    with pytest.raises(ValueError, match=r"line 2: '../secret.png' is not inside the folder"):
        folder.load(root=tmp_path)


# --- folders as they are --------------------------------------------------------------------------


def test_pictures_without_a_table_have_no_attributes(tmp_path):
    numbered(tmp_path)
    data = folder.load(root=tmp_path, size=4)
    assert data.values == {}
    assert "only p(x) can be learned" in " ".join(data.notes)


def test_what_is_skipped_is_counted_and_hidden_folders_are_no_classes(tmp_path):
    for i in range(N):
        picture(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", colour(i))
    for i in range(3):
        picture(tmp_path / ".thumbnails" / f"{i}.png", colour(i))
    (tmp_path / "cat/.DS_Store").touch()
    (tmp_path / "cat/a.heic").touch()
    (tmp_path / "cat/b.heic").touch()
    (tmp_path / "readme.txt").touch()
    broken = next(f"dog/x{i}.png" for i in range(99) if folder.split_of(f"dog/x{i}.png") == "train")
    (tmp_path / broken).write_text("no picture")
    data = folder.load(root=tmp_path, size=4)
    assert data.values == {"class": ("cat", "dog")}
    said = "\n".join(data.notes)
    assert "3 pictures in hidden folders" in said
    assert "2 of .heic, 1 of .txt" in said
    assert f"a file cannot be read and was skipped: {broken} (cannot identify" in said


def test_a_value_that_no_picture_for_training_has_is_no_value(tmp_path):
    for i in range(N):
        picture(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", colour(i))
    held_out = next(f"eel/{i}.png" for i in range(99) if folder.split_of(f"eel/{i}.png") == "validation")
    picture(tmp_path / held_out, colour(0))
    train, validation = (folder.load(split, root=tmp_path, size=4) for split in ("train", "validation"))
    assert train.values == validation.values == {"class": ("cat", "dog")}
    assert -1 in validation.labels["class"]
    assert "class 'eel' is no value: its 1 pictures all fall outside the training split" in train.notes


def test_the_summary_counts_pictures_by_split_and_value(tmp_path):
    for i in range(N):
        picture(tmp_path / ("cat" if i % 4 else "dog") / f"{i}.png", colour(i))
    data = [folder.load(split, root=tmp_path, size=4) for split in ("train", "validation")]
    said = summary(*data, "class")
    cats, dogs = (int((data[0].labels["class"] == i).sum()) for i in (0, 1))
    assert re.search(rf"cat +{cats} ", said)
    assert f"values of few pictures, of which little can be learned: dog ({dogs})" in said
    assert "colour, 4x4 pixels, the middle square of each" in said
    again = summary(*data, "class", told=True)
    assert again in said
    assert "pictures to learn from" not in again
    assert summary(*data, told=True) == ""


def test_grey_pictures_have_one_channel_unless_asked_otherwise(tmp_path):
    for i in range(N):
        picture(tmp_path / "a" / f"{i}.png", (4 * i,) * 3)
    assert folder.load(root=tmp_path, size=4).event_shape == (1, 4, 4)
    assert folder.load(root=tmp_path, size=4, channels=3).event_shape == (3, 4, 4)


def test_a_padded_picture_is_whole_on_the_colour_of_its_border(tmp_path):
    pixels = np.full((4, 12, 3), 40, dtype=np.uint8)
    pixels[1:3, 1:11] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    padded = read_images([tmp_path / "wide.png"], 12, 3, "test", fit="pad")[0]
    assert padded[:, :4].unique().tolist() == [40]
    assert padded[:, 5:7, 1:11].unique().tolist() == [200]


def table_of(root, names, column="colour", write=lambda name: name, table=TABLE, delimiter=","):
    rows = [f"{write(name)}{delimiter}{'red' if i % 2 else 'blue'}" for i, name in enumerate(names)]
    (root / table).write_text("\n".join([f"File{delimiter}{column}", *rows]))


@pytest.mark.parametrize(
    "write",
    [
        {"write": lambda name: f"more\\{name}"},
        {"write": lambda name: f"more/{name[:-4]}"},
        {"write": lambda name: f"more/{name}", "table": "Attributes.CSV"},
        {"write": lambda name: f"more/{name}", "delimiter": "|"},
    ],
    ids=["backslashes", "without ending", "in capitals", "bars"],
)
def test_tables_mean_the_files_that_are_there(tmp_path, write):
    table_of(tmp_path, numbered(tmp_path / "more"), **write)
    found = labels(tmp_path, "colour")
    assert found
    assert all(value == ("red" if i % 2 else "blue") for i, value in found.items())


@pytest.mark.parametrize("table", ["labels.csv", "more/metadata.csv"])
def test_a_table_that_is_not_read_is_named_where_an_attribute_is_missing(tmp_path, table):
    names = numbered(tmp_path / "train")
    (tmp_path / "more").mkdir()
    table_of(tmp_path, names, table=table)
    with pytest.raises(ValueError, match=rf"'colour'.*{table} is not read: attributes come from the first"):
        folder.load(root=tmp_path, attributes=["colour"])


def test_a_workbook_is_no_table(tmp_path):
    numbered(tmp_path)
    (tmp_path / TABLE).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"attributes.csv is a workbook.*save it as CSV"):
        folder.load(root=tmp_path)


def test_values_that_no_recipe_could_hold_become_words_and_stay_apart(tmp_path):
    values = ["кошка", "a&b", "a+b", "any", "New York", "New_York"]
    names = numbered(tmp_path, 60)
    rows = [f"{name},{values[i % 6]}" for i, name in enumerate(names)]
    (tmp_path / TABLE).write_text("\n".join(["file,what", *rows]), encoding="utf-8")
    data = folder.load(root=tmp_path, size=4)
    assert len(data.values["what"]) == 6
    card(values=data.values["what"])  # refuses what recipes cannot hold
    assert re.search("values of what are called by words: .*'any' any_", " ".join(data.notes))
    assert "New_York" in data.values["what"]


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    for i in range(N):
        picture(tmp_path / unicodedata.normalize(("NFC", "NFD")[i % 2], "été") / f"{i}.png", colour(i))
    assert folder.load(root=tmp_path, size=4).values == {"class": ("ete",)}


def test_a_value_for_each_picture_is_nothing_to_learn(tmp_path):
    names = numbered(tmp_path)
    (tmp_path / TABLE).write_text("\n".join(["file,id", *(f"{n},x{i}" for i, n in enumerate(names))]))
    with pytest.raises(ValueError, match="another value for each of its 30 pictures"):
        folder.load(root=tmp_path, size=4)


def test_train_and_test_are_no_classes(tmp_path):
    for i in range(N):
        picture(
            tmp_path / ("train" if i % 3 else "test") / ("cat" if i % 2 else "dog") / f"{i}.png", colour(i)
        )
        picture(tmp_path / "plain" / ("train" if i % 3 else "test") / f"{i}.png", colour(i))
    both = folder.load(root=tmp_path / "plain", size=4)
    assert both.values == {}
    shutil.rmtree(tmp_path / "plain")
    data = folder.load(root=tmp_path, size=4)
    assert data.values == {"class": ("cat", "dog")}
    for said in (both.notes, data.notes):
        assert "test, train are parts of one set, no classes" in " ".join(said)


def test_parts_of_a_set_may_have_a_table_each(tmp_path):
    for part, numbers in (("train", range(0, N, 2)), ("test", range(1, N, 2))):
        for i in numbers:
            picture(tmp_path / part / f"{i}.png", colour(i))
        rows = [f"{i}.png,{'cat' if i % 3 else 'dog'},{i / 7}" for i in numbers]
        (tmp_path / part / "metadata.csv").write_text("\n".join(["file_name,kind,height", *rows]))
    data = folder.load(root=tmp_path, size=4)
    assert data.values == {"kind": ("cat", "dog"), "height": ("low", "middle", "high")}
    found = labels(tmp_path, "kind")
    assert all(found[i] == ("cat" if i % 3 else "dog") for i in found)
    assert "test, train are parts of one set, no classes" in " ".join(data.notes)
    cuts = f"{N // 3 / 7:.4g} and {2 * N // 3 / 7:.4g}"  # thirds of both together
    assert f"are cut at {cuts}" in " ".join(data.notes)
    assert "no pictures" not in " ".join(data.notes)
    bare = folder.load(root=tmp_path, size=4, attributes=())
    assert "attributes that can be learned, too: kind, height" in bare.notes


def test_links_are_followed_once_and_pipes_are_not_waited_for(tmp_path):
    for i in range(N):
        picture(tmp_path / "elsewhere" / ("cat" if i % 2 else "dog") / f"{i}.png", colour(i))
    root = tmp_path / "root"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "nowhere.png").symlink_to("nowhere")
    os.mkfifo(root / "cat" / "pipe.png")
    parts = every_split(root, size=4)
    assert sum(map(len, parts)) == N
    assert parts[0].values == {"class": ("cat", "dog")}
    assert "2 of links to nowhere, pipes or devices" in " ".join(parts[0].notes)


def test_copies_and_mirror_images_of_held_out_pictures_are_not_learned_from():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    noisy = (images[:8].int() + torch.randint(-3, 4, images[:8].shape, generator=generator)).clamp(0, 255)
    learned = torch.cat([images[8:], images[:4].flip(-1), noisy[4:8].to(torch.uint8)])
    side = {"side": torch.arange(40) % 2}
    train = LabelledImages(learned, side, {"side": ("a", "b")}, "toy")
    held_out = LabelledImages(images[:8], {"side": side["side"][:8]}, {"side": ("a", "b")}, "toy")
    kept = without_copies(train, held_out)
    assert kept.images.equal(images[8:])
    assert "8 pictures were left out, for they are copies or mirror images" in kept.notes[-1]
    most = without_copies(held_out, held_out)
    assert len(most) == 8
    assert "held-out figures say more good" in most.notes[-1]


# --- CelebA --------------------------------------------------------------------------------------


def test_what_a_stranger_may_not_notice_is_said(tmp_path):
    for i in range(40):
        picture(tmp_path / f"{i:02}.png", colour(i), size=(40, 100))
    (tmp_path / "labels.csv").write_text("image,kind\n00,a\n")
    notes = folder.load(root=tmp_path).notes
    assert any(note.startswith("labels.csv is not read: attributes come from") for note in notes)
    assert any("cuts off 60% of them (--data.fit pad keeps all)" in note for note in notes)
    assert not any("cuts off" in note for note in folder.load(root=tmp_path, fit="pad").notes)
    rows = [f"{i:02}.png;red, {'round' if i % 2 else 'square'}" for i in range(40)]
    (tmp_path / TABLE).write_text("\n".join(["file;tags", *rows]))
    with pytest.raises(ValueError, match="tags has lists: each of 3 tags is an attribute of its own"):
        folder.load(root=tmp_path, attributes=["tags"])
    both = (folder.load(split, root=tmp_path) for split in ("train", "validation"))
    assert "that is little to learn from" in summary(*both)


@pytest.fixture
def celeba_root(tmp_path, monkeypatch):
    """Nine images in CelebA's own layout: five to train on, then two and two."""
    base = tmp_path / "celeba"
    base.mkdir()
    names = [f"{i + 1:06}.jpg" for i in range(9)]
    for i, name in enumerate(names):
        picture(base / "img_align_celeba" / name, (25 * i, 128, 128), size=(178, 218))
    parts = [0, 0, 0, 0, 0, 1, 1, 2, 2]
    smiling = [1 if i % 2 else -1 for i in range(9)]
    young = [1 if i < 4 else -1 for i in range(9)]
    rows = zip(names, parts, smiling, young, strict=True)
    tables = {"list_eval_partition": [], "identity_CelebA": [], "list_bbox_celeba": ["9", "image_id x y"],
              "list_landmarks_align_celeba": ["9", "x y"],
              "list_attr_celeba": ["9", "Smiling Young "]}  # fmt: skip
    for name, part, smile, age in rows:
        tables["list_eval_partition"].append(f"{name} {part}")
        tables["identity_CelebA"].append(f"{name} 1")
        tables["list_bbox_celeba"].append(f"{name}  1 2")
        tables["list_landmarks_align_celeba"].append(f"{name}  1 2")
        tables["list_attr_celeba"].append(f"{name} {smile:2} {age:2}")
    for name, lines in tables.items():
        (base / f"{name}.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)  # it knows the real sums
    return tmp_path


def test_celeba_splits_and_labels_are_its_own(celeba_root):
    train, validation, test = (load_data("celeba", split, root=celeba_root) for split in celeba.SPLITS)
    assert (len(train), len(validation), len(test)) == (5, 2, 2)
    assert train.values == {"Smiling": ("not_Smiling", "Smiling"), "Young": ("not_Young", "Young")}
    assert train.labels["Smiling"].tolist() == [0, 1, 0, 1, 0]
    assert train.labels["Young"].tolist() == [1, 1, 1, 1, 0]
    assert test.labels["Smiling"].tolist() == [1, 0]
    red = torch.cat([data.images[:, 0, 32, 32] for data in (train, validation, test)]).float()
    torch.testing.assert_close(red, 25.0 * torch.arange(9), atol=4, rtol=0)
    assert (validation.event_shape, validation.name) == ((3, 64, 64), "celeba/validation")


def test_celeba_is_found_in_the_environment_and_can_be_cut(celeba_root, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(celeba_root))
    data = celeba.load("train", size=8, num_images=3, attributes=["Young"])
    assert data.images.shape == (3, 3, 8, 8)
    assert list(data.labels) == ["Young"]


def test_celeba_errors_say_what_to_do(celeba_root, tmp_path_factory):
    absent = tmp_path_factory.mktemp("absent")
    with pytest.raises(FileNotFoundError, match=r"CelebA is in none of: .*load\(\.\.\., download=True\)"):
        celeba.load(root=absent)
    with pytest.raises(ValueError, match="unknown split of CelebA 'valid'; did you mean 'validation'"):
        celeba.load("valid")
    with pytest.raises(ValueError, match="`num_images` must be at least 1, got 0"):
        celeba.load(num_images=0, root=celeba_root)
    with pytest.raises(ValueError, match="unknown attribute of CelebA 'smiling'; did you mean 'Smiling'"):
        celeba.load(root=celeba_root, attributes=["smiling"])


def test_damaged_celeba_is_named(celeba_root, monkeypatch):
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: False)
    with pytest.raises(RuntimeError, match="corrupted") as caught:
        celeba.load(root=celeba_root)
    assert str(celeba_root / "celeba") in caught.value.__notes__[0]


def test_jittered_copies_keep_labels_and_what_they_show():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(10, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 12:20, 4:12] = 255  # a square on the left
    label = torch.randint(2, (10,), generator=generator)
    data = LabelledImages(images, {"kind": label}, {"kind": ("a", "b")}, "toy/train")
    more = with_jitter(data, 40)
    assert len(more) == 40
    assert more.images[:10].equal(images)
    assert more.labels["kind"].equal(label.repeat(4))
    copies = more.images[10:].float()
    columns = torch.arange(32.0)
    places = (copies.sum((1, 2)) * columns).sum(1) / copies.sum((1, 2, 3))
    assert 3 < float((places - 7.5).abs().max()) + 2 < 6  # moved, and still on the left
    assert float(places.std()) > 0.5
    both = mirrored(data)
    assert both.images[10:].equal(images.flip(-1))
    assert both.labels["kind"].equal(label.repeat(2))
    assert with_jitter(data, 10) is data
    assert len(with_jitter(data, 10_000)) == 80  # no picture gets more than seven

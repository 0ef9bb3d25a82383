"""A user's folder of images, and CelebA, which is read in the same way."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CelebA

from composable_ebm.data import celeba, folder, load_data
from composable_ebm.data.root import ENVIRONMENT_VARIABLE

N = 60


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
    (root / folder.TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
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
    table = photos / folder.TABLE
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
    return folder.read_images([path], size, channels, "test")[0]


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


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png cannot be read .* convert it to 8 bits a channel"):
        read(tmp_path / "deep.png")


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


def test_folder_without_table_or_classes_says_what_it_needs(tmp_path):
    picture(tmp_path / "0.png", (0, 0, 0))
    with pytest.raises(FileNotFoundError, match=r"neither a table attributes.csv .* nor a subfolder"):
        folder.load(root=tmp_path)


def test_empty_split_says_so(tmp_path):
    picture(tmp_path / "cat" / "0.png", (0, 0, 0))
    empty = next(split for split in folder.SHARES if split != folder.split_of("cat/0.png"))
    with pytest.raises(ValueError, match=f"none of the 1 images .* falls into the split '{empty}'"):
        folder.load(empty, root=tmp_path)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("", ValueError, r"must have a column `file`, got the columns \[\]"),
        ("name,smile\n0.png,yes\n", ValueError, r"column `file`, got the columns \['name', 'smile'\]"),
        ("file,smile,smile\n", ValueError, "must have different names"),
        ("file,smile\n0.png\n", ValueError, r"row 2 of .* must have 2 columns, got 1"),
        ("file,smile\n0.png,yes,no\n", ValueError, r"row 2 of .* must have 2 columns, got 3"),
        ("file,smile\n0.png,yes\n./0.png,no\n", ValueError, r"names the file '0.png' twice"),
        ("file,smile\n0.png,\n", ValueError, "attribute 'smile' has no value"),
        ("file,smile\n0.png,yes\n7.png,no\n", FileNotFoundError, r"1 of the 2 files .* first .*'7.png'"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_refused(tmp_path, table, error, message):
    picture(tmp_path / "0.png", (0, 0, 0))
    (tmp_path / folder.TABLE).write_text(table)
    with pytest.raises(error, match=message):
        folder.load(root=tmp_path)


def test_measurements_are_not_taken_for_values(tmp_path):
    lines = ["file,height"]
    for i in range(folder.MAX_VALUES + 1):
        (tmp_path / f"{i}.png").touch()
        lines.append(f"{i}.png,{i / 7}")
    (tmp_path / folder.TABLE).write_text("\n".join(lines))
    with pytest.raises(ValueError, match="attribute 'height' has 201 different values, more than 200"):
        folder.load(root=tmp_path)


# --- CelebA --------------------------------------------------------------------------------------


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

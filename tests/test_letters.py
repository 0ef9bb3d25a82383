"""Letters of the typefaces that a machine has."""

import string

import numpy as np
import pytest
import torch
from matplotlib import get_data_path

from composable_ebm.data import letters, load_data

FONTS = f"{get_data_path()}/fonts/ttf"  # DejaVu, STIX and Computer Modern, which matplotlib brings along


@pytest.fixture(scope="module")
def found():
    from pathlib import Path

    return letters.faces(Path(FONTS))


def test_faces_with_capital_letters_are_found_and_others_are_not(found):
    styles = {(face.family, face.style) for face in found}
    assert ("DejaVu Sans", "Book") in styles
    assert ("DejaVu Sans", "Bold Oblique") in styles
    assert not any("Size" in family for family, _ in styles)  # brackets of several sizes


def test_labels_are_what_the_files_say(found):
    said = {(face.family, face.style): (face.bold, face.italic, face.serif) for face in found}
    assert said["DejaVu Sans", "Book"] == (0, 0, 0)
    assert said["DejaVu Sans", "Bold Oblique"] == (1, 1, 0)
    assert said["DejaVu Serif", "Bold"] == (1, 0, 1)


def test_a_family_is_in_one_split(found):
    splits = {}
    for face in found:
        splits.setdefault(face.family, set()).add(face.split)
    assert all(len(each) == 1 for each in splits.values())


def test_every_letter_is_drawn_black_on_white_within_the_picture(found):
    for letter in string.ascii_uppercase:
        picture = letters.draw(found[0].path, letter, 64, np.random.default_rng(0))
        assert picture.shape == (1, 64, 64)
        assert picture.min() < 40
        assert (np.concatenate([picture[0, 0], picture[0, -1], picture[0, :, 0]]) == 255).all()


def test_a_split_has_every_letter_of_its_faces_alike():
    data = load_data("letters", "train", FONTS)
    counts = torch.bincount(data.labels["letter"], minlength=26)
    assert counts.min() == counts.max() > 0
    again = load_data("letters", "train", FONTS, num_images=10)
    assert torch.equal(again.images, data.images[:10])


def test_a_folder_without_fonts_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-liberation"):
        letters.load("train", tmp_path)

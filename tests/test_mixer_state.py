"""What the page asks for: numbers within limits, texts of saved pictures, and what is doubtful about it."""

import math

import pytest
from helpers import card, expert

from demos.mixer import state
from demos.mixer.state import Limits, Request
from demos.mixer.trust import doubts, unseen

LIMITS = Limits(max_chains=64, max_steps=2000)


def test_a_picture_that_was_saved_is_restored():
    texts = {"recipe": "a + b", "num_chains": "4", "num_steps": "30", "seed": "7", "sampler": "{}"}
    assert state.restored(texts, LIMITS) == Request("a + b", 4, 30, 7)
    assert state.restored({"recipe": "a"}, LIMITS) == Request("a", 16, state.DEFAULT_STEPS, 0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "carries no recipe"),
        ([], "carries no recipe"),
        ("no JSON", "carries no recipe"),
        (None, "carries no recipe"),
        ({"recipe": ["a"]}, "carries no recipe"),
        (
            {"recipe": "a", "num_chains": "1000000"},
            "picture's `num_chains` must be a whole number from 1 to 64",
        ),
        ({"recipe": "a", "num_steps": "-1"}, "`num_steps` must be"),
        ({"recipe": "a", "seed": "1e3"}, "`seed` must be"),
        ({"recipe": "a", "seed": {"a": 1}}, "`seed` must be"),
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


# -- doubts -------------------------------------------------------------------------------------------


def test_a_combination_that_was_held_out_is_told():
    cards = [
        card("hat", ("bare", "hat"), data="toys/train, 9 images, without hat+~tie, hat+hue[red]"),
        card("tie", ("open", "tie")),
        card("hue", ("red", "green", "blue")),
    ]
    assert unseen(cards, {"hat": "hat", "tie": "open"}) == ["hat and open"]
    assert unseen(cards, {"hat": "hat", "hue": "red", "tie": "tie"}) == ["hat and red"]
    assert unseen(cards, {"hat": "bare", "tie": "open", "hue": "red"}) == []
    assert unseen(cards[:1], {"hat": "hat", "tie": "open"}) == []


def test_doubts_are_told_of_ratios_and_plain_sums():
    base = expert("base", ("image",))
    hat = expert("hat", ("bare", "hat"), data="toys/train, 9 images, without hat+tie")
    tie = expert("tie", ("open", "tie"))
    said = "No picture with hat and tie was in the training data"
    assert said in doubts(hat + 2 * tie)[0]
    assert said in doubts(base + 4 * (hat - hat["any"]) + (tie - tie["any"]))[0]
    assert doubts(base + 4 * (~hat - hat["any"]) + (tie - tie["any"])) == []
    assert doubts(hat) == []


def test_a_composition_that_nothing_holds_together_is_told():
    base, hat = expert("base", ("image",)), expert("hat", ("bare", "hat"))
    assert "may be improper" in doubts(hat - 2 * base)[0]
    with pytest.raises(ValueError, match="no term with a positive weight"):
        doubts(-hat)

"""The mix: from controls to a recipe, and from any composition back to the controls, in plain words."""

import dataclasses
import math

import pytest
from helpers import card, expert
from mixer_toys import toy_cards

import composable_ebm as ceb
from composable_ebm.experts.library import Library
from demos.mixer import mix, offer
from demos.mixer.mix import AND, ANY, NOT, OR, Mix, Pick
from demos.mixer.offer import Offer
from demos.mixer.terms import parts
from demos.mixer.words import lone, words

PLACES = tuple(f"r{row}c{column}" for row in range(2) for column in range(3))
CARDS = {
    **toy_cards(),
    "Yard/tree": card("tree", ("tree",), "Yard", (1, 16, 16)),
    "Yard/spot": card("spot", PLACES, "Yard", (1, 16, 16), weight=2.0),
}
KNOWN = mix.controls(CARDS)
NAMES = {name: expert(each.name, each.values, family=each.family) for name, each in CARDS.items()}


def yard(base=True, **picks):
    return Mix("Yard", base, {f"Yard/{name}": pick for name, pick in picks.items()})


def toys(**picks):
    return Mix("Toys", True, {f"Toys/{name}": pick for name, pick in picks.items()})


MIXES = [
    (toys(digit=Pick({"3": 1}), thick=Pick({"thick": 1})), "Toys/digit[3] + Toys/thick", "digit 3, thick"),
    (
        toys(digit=Pick({ANY: 2}), thick=Pick({"thick": 0.5}, NOT)),
        "2*Toys/digit + 0.5*~Toys/thick",
        "any digit, no thick",
    ),
    (toys(digit=Pick({"7": 1.25}, NOT, True)), "1.25*~Toys/digit[7]", "not digit 7"),
    (toys(digit=Pick({"3": 1, "7": 2})), "(Toys/digit[3] | 2*Toys/digit[7])", "digit 3 or 7"),
    (toys(digit=Pick({"3": 1, "7": 2}, AND, True)), "Toys/digit[3] + 2*Toys/digit[7]", "digit 3 and 7"),
    (toys(digit=Pick({"3": 1, "7": 1}, NOT, True)), "~Toys/digit[3] + ~Toys/digit[7]", "not digit 3 or 7"),
    (
        toys(digit=Pick({"3": 1}, OR), slanted=Pick({"slanted": 1}), thick=Pick({"thick": 2}, OR)),
        "Toys/slanted + (Toys/digit[3] | 2*Toys/thick)",
        "slanted, digit 3 or thick",
    ),
    (yard(), "Yard/body", "any of Yard"),
    (yard(hat=Pick({"hat": 4})), "Yard/body + 4*ratio(Yard/hat, Yard/hat[any])", "hat"),
    (yard(hat=Pick({"hat": 1}, NOT)), "Yard/body + ratio(~Yard/hat, Yard/hat[any])", "no hat"),
    (yard(hue=Pick({"red": 2})), "Yard/body + 2*ratio(Yard/hue[red], Yard/hue[any])", "hue red"),
    (
        yard(hue=Pick({"red": 1}, NOT)),
        "Yard/body + ratio(~Yard/hue[red], Yard/hue[any])",
        "not hue red",
    ),
    (
        yard(hue=Pick({"red": 1, "blue": 2})),
        "Yard/body + (ratio(Yard/hue[red], Yard/hue[any]) | 2*ratio(Yard/hue[blue], Yard/hue[any]))",
        "hue red or blue",
    ),
    (yard(tree=Pick({"tree": 3})), "Yard/body + 3*ratio(Yard/tree, Yard/body)", "tree"),
    (
        yard(spot=Pick({"r0c1": 2, "r1c2": 2}, AND, True)),
        "Yard/body + 2*ratio(Yard/spot[r0c1], Yard/spot[any]) + 2*ratio(Yard/spot[r1c2], Yard/spot[any])",
        "row 1 column 2 and row 2 column 3",
    ),
    (
        yard(spot=Pick(dict.fromkeys(PLACES[:3], 1.0), AND, True)),
        "Yard/body + " + " + ".join(f"ratio(Yard/spot[{at}], Yard/spot[any])" for at in PLACES[:3]),
        "3 places",
    ),
    (
        yard(hue=Pick({"red": 2}, OR), hat=Pick({"hat": 4}, OR), tree=Pick({"tree": 1})),
        "Yard/body + ratio(Yard/tree, Yard/body)"
        " + (2*ratio(Yard/hue[red], Yard/hue[any]) | 4*ratio(Yard/hat, Yard/hat[any]))",
        "tree, hue red or hat",
    ),
    (
        yard(False, hue=Pick({"red": 1}), hat=Pick({"hat": 4}, NOT)),
        "Yard/hue[red] + 4*~Yard/hat",
        "hue red, no hat",
    ),
    (
        yard(False, hue=Pick({"red": 1}, NOT), hat=Pick({"hat": 4}), tree=Pick({"tree": 1})),
        "~Yard/hue[red] + 4*Yard/hat + Yard/tree",
        "hat, tree, not hue red",
    ),
]


@pytest.mark.parametrize(("wanted", "recipe", "said"), MIXES)
def test_a_mix_is_a_recipe_and_words_and_is_read_from_its_composition(wanted, recipe, said):
    assert mix.compose(KNOWN, wanted) == recipe
    assert mix.composition(KNOWN, wanted, NAMES) == ceb.parse(recipe, NAMES)
    found = mix.read(KNOWN, ceb.parse(recipe, NAMES), NAMES)
    assert mix.compose(KNOWN, found) == recipe
    assert words(KNOWN, found) == words(KNOWN, wanted) == said


@pytest.mark.parametrize(
    ("written", "as_controls"),
    [
        ("Toys/thick+Toys/digit[3]", "Toys/digit[3] + Toys/thick"),
        ("(Toys/thick | Toys/digit[3]) + Toys/slanted", "Toys/slanted + (Toys/digit[3] | Toys/thick)"),
        ("2*(Toys/digit[3] + Toys/thick)/4", "0.5*Toys/digit[3] + 0.5*Toys/thick"),
        (
            "Yard/body + 2*Yard/hue[red] - 2*Yard/hue[any]",
            "Yard/body + 2*ratio(Yard/hue[red], Yard/hue[any])",
        ),
        (
            "ratio(~Yard/hat, Yard/hat[any]) + Yard/body",
            "Yard/body + ratio(~Yard/hat, Yard/hat[any])",
        ),
    ],
)
def test_however_a_recipe_is_written_its_controls_are_found(written, as_controls):
    found = mix.read(KNOWN, ceb.parse(written, NAMES), NAMES)
    assert mix.compose(KNOWN, found) == as_controls


@pytest.mark.parametrize(
    "recipe",
    [
        "Toys/thick + (~Toys/slanted | Toys/digit[3])",  # no NOT inside an OR
        "Toys/digit[3] + Zoo/cat",  # two families
        "2*Yard/body",
        "Yard/body - Yard/hat",
        "Yard/body + 2*Yard/hue[red] - Yard/hue[any]",
        "(Toys/digit[3] | Toys/thick) + (Toys/digit[5] | Toys/slanted)",
        "ratio(Toys/thick, Toys/thick[any]) + Toys/slanted",
    ],
)
def test_what_the_controls_cannot_show_is_left_to_the_recipe(recipe):
    assert mix.read(KNOWN, ceb.parse(recipe, NAMES), NAMES) is None


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        ("portraits/smile", [("base", 1), ("smile", 1)]),
        (
            "portraits/base + 3*ratio(portraits/smile, portraits/smile[any]) + "
            "2*ratio(~portraits/beard, portraits/beard[any])",
            [("base", 1), ("smile", 3), ("~beard", 2)],
        ),
        (
            "portraits/base + (ratio(portraits/smile, portraits/smile[any]) | "
            "2*ratio(portraits/hair[red], portraits/hair[any]))",
            [("base", 1), ("smile", 1), ("hair[red]", 2)],
        ),
    ],
)
def test_experts_that_stand_on_a_base_are_parts_and_controls_as_any_other(recipe, found):
    energy = ceb.parse(recipe)
    said = [(part.name.replace("portraits/", ""), part.weight) for part in parts(energy)]
    assert said == found
    known, library = Offer().known, Library("cpu")
    shown = mix.read(known, energy, library)
    again = ceb.parse(mix.compose(known, shown), library)
    assert {part.name for part in parts(again)} == {part.name for part in parts(energy)}


def test_what_the_page_sends_is_kept_within_limits():
    sent = {
        "family": "Toys",
        "picks": {
            "Toys/thick": {"values": {"thick": 1e9, "thin?": 1}, "role": "MAYBE"},
            "Toys/digit": {"values": {"3": math.nan, "5": -3, "7": "x"}, "role": "OR"},
            "Yard/hat": {"values": {"hat": 1}},
            "Toys/gone": {"values": {"x": 1}},
        },
    }
    found = mix.shown(KNOWN, sent)
    assert found.picks == {
        "Toys/thick": Pick({"thick": mix.MAX_WEIGHT}),
        "Toys/digit": Pick({"3": 1.0, "5": 0.0, "7": 1.0}, OR),
    }


@pytest.mark.parametrize(
    "content",
    [None, [], {}, "x", {"family": "Toys", "picks": 3}, {"family": "Toys", "picks": {"Toys/thick": 3}}],
)
def test_nonsense_from_the_page_is_refused(content):
    with pytest.raises(ValueError, match="nothing that can be read; reload"):
        mix.shown(KNOWN, content)


def test_nothing_on_is_no_recipe():
    assert mix.compose(KNOWN, toys(thick=Pick({"thick": 0}))) == ""
    assert mix.compose(KNOWN, yard(False)) == ""


def test_a_lone_or_is_explained():
    assert "choose OR for another" in lone(KNOWN, toys(thick=Pick({"thick": 1}, OR)))
    assert lone(KNOWN, toys(thick=Pick({"thick": 1}, OR), slanted=Pick({"slanted": 1}, OR))) == ""
    assert lone(KNOWN, toys(digit=Pick({"3": 1, "5": 1}, OR))) == ""


def test_controls_put_the_base_first_and_places_on_a_grid():
    names = [control.name for control in KNOWN.values() if control.family == "Yard"]
    assert names == ["Yard/body", "Yard/hue", "Yard/spot", "Yard/hat", "Yard/tree"]
    assert KNOWN["Yard/spot"].grid == (2, 3)
    assert KNOWN["Toys/digit"].grid is None
    assert KNOWN["Yard/hat"].weight == 4.0
    assert KNOWN["Yard/hat"].against == "Yard/hat[any]"


def test_an_expert_of_many_values_is_switched_on_at_the_one_that_it_is_named_after(offered):
    """As of digits that are thin, thick or between: to ask for a thick one had asked for thin ones."""
    shape = (1, 28, 28)
    digits = [
        card("base", ("image",), "digits", shape, attribute="image"),
        card("digit", tuple("0123456789"), "digits", shape),
        *(card(name, (f"not_{name}", name, "between"), "digits", shape) for name in ("slanted", "thick")),
    ]
    found = offered({each.full_name: each for each in digits})
    assert found.known["digits/digit"].usual == "3"
    (start,) = found.starts
    wanted = {"digit": "7", "slanted": "slanted", "thick": "thick"}
    assert {name: [*pick.values] for name, pick in start.mix.picks.items()} == {
        f"digits/{name}": [value] for name, value in wanted.items()
    }


def test_an_expert_of_yes_and_no_is_called_by_its_attribute():
    known = mix.controls({"own/tired": card("tired", ("no", "yes"), "own")})
    assert known["own/tired"].label == "tired"
    assert words(known, Mix("own", True, {"own/tired": Pick({"yes": 1}, NOT)})) == "no tired"


# -- what is offered ----------------------------------------------------------------------------------------


@pytest.fixture
def offered(monkeypatch):
    def build(cards):
        monkeypatch.setattr(offer, "cards", lambda: (cards, {"Toys/broken": "its file is truncated"}))
        return Offer()

    return build


def test_a_mix_is_said_in_the_words_of_its_cards():
    cards = toy_cards()
    cards["Yard/hat"] = dataclasses.replace(cards["Yard/hat"], words=("bareheaded", "wearing a hat"))
    cards["Yard/hue"] = dataclasses.replace(cards["Yard/hue"], words=("in red", "in green", "in blue"))
    known = mix.controls(cards)
    assert words(known, yard(hat=Pick({"hat": 1}), hue=Pick({"red": 1, "blue": 1}))) == (
        "in red or in blue, wearing a hat"
    )
    assert words(known, yard(hat=Pick({"hat": 1}, NOT), hue=Pick({"green": 1}, NOT))) == (
        "not in green, bareheaded"
    )
    with pytest.raises(ValueError, match="`words` must be a text for each of"):
        dataclasses.replace(cards["Yard/hue"], words=("in red",))


def test_every_family_has_a_start_and_damage_is_told(offered):
    found = offered(CARDS)
    assert [start.mix.family for start in found.starts] == ["Toys", "Yard", "Zoo"]
    assert found.first == "Toys/digit[3] + Toys/slanted"
    assert found.problems == ["Toys/broken is damaged: its file is truncated"]
    assert [(each["name"], each["method"]) for each in found.families({})] == [
        ("Yard", False),
        ("Toys", True),
        ("Zoo", True),
    ]
    assert found.steps("Toys") == 12
    assert offered(toy_cards()).steps("Yard") == 7


def test_declared_starts_are_offered_where_all_that_they_want_is_there(offered):
    shape = (3, 4, 4)
    faces = [
        card("base", ("image",), "faces", shape, attribute="image"),
        card("beard", ("shaven", "beard"), "faces", shape, weight=4.0),
        card("glasses", ("bare", "glasses"), "faces", shape),
        card("smile", ("serious", "smile"), "faces", shape),
    ]
    found = offered({each.full_name: each for each in faces})
    assert [(start.title, start.photo) for start in found.starts] == [
        ("Smiling, with glasses", False),
        ("Glasses on a photo of yours", True),
    ]
    assert found.first == (
        "faces/base + 4*ratio(~faces/beard, faces/beard[any]) + ratio(faces/glasses, faces/glasses[any])"
        " + ratio(faces/smile, faces/smile[any])"
    )


def test_a_page_without_experts_says_so(offered):
    assert offered({}).problems[0].startswith("There are no experts here")
    assert offered({}).first == ""

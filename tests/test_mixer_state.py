"""The mixer's state: controls to recipes and back, and numbers within limits."""

import json
import math

import pytest
from helpers import card, expert
from mixer_toys import toy_cards

import composable_ebm as ceb
from demos.mixer import state
from demos.mixer.palette import cannot, palette
from demos.mixer.state import AND, NOT, OR, Choice, Limits, Request, Row
from demos.mixer.trust import doubts, unseen

LIMITS = Limits(max_chains=64, max_steps=2000)
DIGIT = Row("Toys/digit", "Toys", "digit", "", ("any", *"0123456789"))
THICK = Row("Toys/thick", "Toys", "thick", "NOT: thin", ())
BODY = Row("Yard/body", "Yard", "body", "", (), base=True)
HAT = Row("Yard/hat", "Yard", "hat", "NOT: bare", (), against="Yard/hat[any]", weight=4.0)
HUE = Row("Yard/hue", "Yard", "hue", "", ("any", "red", "green", "blue"), against="Yard/hue[any]")
TREE = Row("Yard/tree", "Yard", "tree", "", (), against="Yard/body")
CAT = Row("Zoo/cat", "Zoo", "cat", "", ())


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
        (Choice(True, "3", OR, 1), Choice(True, "any", OR, 2), "(Toys/digit[3] | 2*Toys/thick)"),
        (Choice(True, "3", OR, 1), Choice(True, "any", AND, 2), "2*Toys/thick + Toys/digit[3]"),
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
        (
            True,
            ("red", OR, 2),
            (OR, 4),
            (AND, 1),
            "Yard/body + ratio(Yard/tree, Yard/body)"
            " + (2*ratio(Yard/hue[red], Yard/hue[any]) | 4*ratio(Yard/hat, Yard/hat[any]))",
        ),
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
        ("(Toys/digit[3] | 0.5*Toys/thick)", "Toys"),
        ("Toys/thick + (Toys/digit | Toys/slanted)", "Toys"),
        ("Yard/body + (2*ratio(Yard/hue[red], Yard/hue[any]) | ratio(Yard/hat, Yard/hat[any]))", "Yard"),
        ("Toys/thick + (~Toys/digit | Toys/slanted)", None),  # the controls have no NOT inside an OR
        ("(Toys/digit | Toys/slanted) + Toys/thick", None),
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


# -- what the palette sends ---------------------------------------------------------------------------


def _sent(family="Toys", **rows):
    return json.dumps({"family": family, "rows": {f"{family}/{name}": row for name, row in rows.items()}})


def test_what_the_palette_sends_is_read_and_all_else_is_off():
    rows = state.rows(toy_cards())
    text = _sent(thick={"on": True, "role": "NOT", "weight": 2.5}, digit={"on": True, "value": "7"})
    family, choices = state.chosen(rows, text)
    assert state.compose(rows, choices, family) == "Toys/digit[7] + 2.5*~Toys/thick"


@pytest.mark.parametrize("weight", [-3, 1e9, None, "x", float("nan")])
def test_weights_that_the_palette_sends_are_moved_within_limits(weight):
    rows = state.rows(toy_cards())
    _, choices = state.chosen(rows, _sent(thick={"on": True, "weight": weight}))
    assert 0 <= choices[[row.name for row in rows].index("Toys/thick")].weight <= state.MAX_WEIGHT


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nonsense", "[" * 50_000, '{"family": "Toys", "rows": {"Toys/thick": 3}}', None]
)
def test_nonsense_from_the_palette_is_refused(text):
    with pytest.raises(ValueError, match="nothing that can be read; reload"):
        state.chosen(state.rows(toy_cards()), text)


def test_controls_that_have_no_answer_yet_are_what_runs():
    rows = state.rows(toy_cards())
    moved = _sent(thick={"on": True})
    assert state.wanted(rows, "", "", "Zoo/cat") == "Zoo/cat"
    assert state.wanted(rows, moved, "", "Zoo/cat") == "Toys/thick"
    assert state.wanted(rows, moved, moved, "2*Zoo/cat") == "2*Zoo/cat"  # written by hand since


def test_palette_shows_one_family_and_escapes_names():
    rows = [*state.rows(toy_cards()), Row("Zoo/<b>", "Zoo", "<b>", "", ())]
    page = palette(rows, [*state.defaults(rows)], "Yard")
    assert page.count('<div class="experts"') == 3
    assert page.count("hidden") == 2
    assert "<b>" not in page


def test_known_failures_are_told():
    assert "<b>thick</b>: Makes blobs." in cannot(toy_cards())


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

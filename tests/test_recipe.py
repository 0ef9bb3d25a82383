"""Recipes: text that parses to a composition and prints back, and text that does not."""

import contextlib
import re
import sys
import time

import pytest
import torch
from helpers import binary, expert, gaussians, points
from hypothesis import example, given, settings
from hypothesis import strategies as st

import composable_ebm as ceb
from composable_ebm.energy import Energy
from composable_ebm.energy.log_z import LogZ
from composable_ebm.experts import recipe

a, b, c = gaussians(torch.float64)
digit, thick, plain = expert(), binary(), expert("base", ("any_digit",))
VECTORS = {"a": a, "b": b, "c": c}
IMAGES = {"toys/digit": digit, "toys/thick": thick, "toys/base": plain}
NAMES = {**VECTORS, **IMAGES}

# --- round trips ---------------------------------------------------------------------------------

NUMBERS = st.floats(-1e3, 1e3).filter(lambda w: w != 0) | st.sampled_from([1.0, -1.0, 0.5, 1e-9, 1e20])


def nodes(children):
    """Expressions one level deeper than `children`, by every operator and function."""
    known = children.filter(lambda e: e.energy_range is not None)
    lists = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        st.builds(lambda e, f: e + f, children, children),
        st.builds(lambda e, f: e - f, children, children),
        st.builds(lambda e, f: e | f, children, children),
        st.builds(lambda w, e: w * e, NUMBERS, children),
        st.builds(lambda e, w: e / w, children, NUMBERS),
        st.builds(lambda e: ~e, known),
        st.builds(ceb.negate, children, st.floats(-50, 50)),
        st.builds(ceb.negate, known),
        lists.flatmap(
            lambda es: st.builds(
                ceb.Sum,
                st.just(es),
                st.none() | st.lists(NUMBERS | st.just(0.0), min_size=len(es), max_size=len(es)),
            )
        ),
        lists.flatmap(
            lambda es: st.builds(
                ceb.mixture,
                st.just(es),
                st.none() | st.lists(st.floats(0.1, 9), min_size=len(es), max_size=len(es)),
                st.none() | st.lists(st.floats(-9, 9), min_size=len(es), max_size=len(es)),
            )
        ),
    )


constants = st.builds(
    lambda high, ratio, value: LogZ([high, high / ratio], [value, 0.5]),
    st.floats(0.1, 90),
    st.floats(1.1, 9),
    st.floats(-1e4, 1e4),
)
vectors = st.recursive(st.sampled_from([a, b, c]) | constants, nodes, max_leaves=7)
images = st.recursive(
    st.sampled_from([digit, digit["0"], digit["2"], thick, ~thick, thick["any"], plain]), nodes, max_leaves=7
)


@settings(max_examples=150)
@given(vectors | images)
def test_what_is_printed_is_read_back_as_the_same_composition(energy):
    again = ceb.parse(str(energy), NAMES)
    assert again.key == energy.key
    assert str(again) == str(energy)
    images = energy.event_shape == (1, 4, 4)
    x = points(3, energy.event_shape or (2,), dtype=torch.float32 if images else torch.float64)
    torch.testing.assert_close(again(x), energy(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "2*a + b - 0.5*c",
        "-a + 2*b",
        "0*a",
        "a | b | c",
        "2*(a | b) + c",
        "a + b | c",
        "mixture([a, b], weights=[2, 1])",
        "mixture([a | b, c], weights=[1, 1])",
        "2*(mixture([a, b], weights=[2, 1]) + c | b)",
        "mixture([a, -b], weights=[2, 0.25], log_z=[0, -1.5])",
        "~a + ~(a | b)",
        "negate(a + b, threshold=-2.5)",
        "toys/digit[1] + ~toys/thick + toys/thick[any]",
        "negate(toys/thick, threshold=1)",
        "negate(~toys/thick, threshold=1)",
        "1e-09*a + 1e+20*b + 0.3333333333333333*c",
        "sum([a, b], weights=[1, 0])",
        "sum([a, a | b], weights=[0, -2]) | c",
        "a + log_z(levels=[10, 0.1], values=[2.5, 0])",
        "on_bits(toys/digit[1]) + 0.5*on_bits(~toys/thick)",
        "sum([a, b], weights=[[0.5, 1], 0])",
        "[0.5, -1, 1e-09]*a - b",
    ],
)
def test_canonical_text_prints_back_unchanged(text):
    assert str(ceb.parse(text, NAMES)) == text


def test_bounded_negation_of_a_binary_expert_is_not_confused_with_its_other_value():
    bounded = ceb.negate(thick)
    assert ceb.parse(str(bounded), NAMES).key == bounded.key != (~thick).key


def test_experts_with_a_name_of_their_own_print_it_at_every_value():
    seven = expert("seven").named("s")
    names = {"s": seven}
    for energy in (seven, seven["1"], ~seven["1"], 2 * seven["any"]):
        assert ceb.parse(str(energy), names).key == energy.key


def test_weights_of_rows_are_read_back_row_by_row():
    rows = torch.tensor([0.1, -2.0, 0.0], dtype=torch.float64)
    mix = rows * a + b / (rows + 3) | rows * c
    again = ceb.parse(str(mix), VECTORS)
    assert str(again) == str(mix)
    x = points(3, dtype=torch.float64)
    torch.testing.assert_close(again(x), mix(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ceb.parse("-2*[1, 2, 3]/4*a", VECTORS)(x), -a(x) * torch.arange(1, 4) / 2)


def test_calibrated_mixture_is_read_back_with_its_constants():
    curve = ceb.schedules.geometric(3.0, 0.3)
    sampler = ceb.Annealed(ceb.Langevin(0.05), ceb.Schedule(noise_level=curve, noise_power=2.0))
    mix = ceb.calibrate(a.float() | b.float(), sampler, num_steps=8, num_chains=16)
    a.double(), b.double()
    again = ceb.parse(str(mix), VECTORS)
    assert (again, str(again)) == (mix, str(mix))


def test_only_value_of_an_expert_and_any_are_the_same():
    assert plain["any"].key == plain["any_digit"].key == plain.key


# --- the grammar is Python's ---------------------------------------------------------------------

NUMERALS = st.sampled_from(["2", "0.5", "3.", ".25", "1e1", "-2"])
ATOMS = st.sampled_from(["a", "b", "c"])
TEXTS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "&", "|", " + ", " | "]), inner).map("".join),
        st.tuples(NUMERALS, st.just("*"), inner).map("".join),
        st.tuples(inner, st.sampled_from(["*", "/"]), NUMERALS).map("".join),
        st.tuples(st.sampled_from(["-", "~", "- ", "~ ~"]), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=200)
@given(TEXTS)
@example("a | b & c")
@example("a & b | c")
@example("-2*a | b - c & a / 2")
@example("a - b - c")
@example("-a*2 + ~b/4*3")
def test_operators_bind_as_in_python(text):
    try:
        expected = eval(text, {}, VECTORS)
    except (TypeError, ValueError):  # such as -2 ~a or ~(a + b)
        with pytest.raises(ceb.RecipeError):
            ceb.parse(text, VECTORS)
    else:
        assert ceb.parse(text, VECTORS).key == expected.key


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("ratio(a, b)", "ceb.ratio(a, b)"),
        ("c + ratio(a, c) + 2*ratio(b, c)", "c + ceb.ratio(a, c) + 2*ceb.ratio(b, c)"),
        ("negate(a)", "ceb.negate(a)"),
        ("negate(a, threshold=-1.5)", "ceb.negate(a, threshold=-1.5)"),
        ("mixture([a])", "ceb.mixture([a])"),
        ("mixture([a, b+c], log_z=[1, -2], weights=[1, 2])", "ceb.mixture([a, b+c], [1, 2], [1, -2])"),
        ("toys/digit[1]/2", "digit['1']/2"),
        ("~toys/digit[1]", "~digit['1']"),
    ],
)
def test_functions_and_values_mean_what_they_mean_in_python(text, python):
    expected = eval(python, {"ceb": ceb, "digit": digit, **VECTORS})
    assert ceb.parse(text, NAMES).key == expected.key


def test_spaces_and_line_breaks_do_not_matter():
    assert ceb.parse(" 2 * a\n\t+ b\r\n", VECTORS).key == (2 * a + b).key


# --- names ---------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of experts in which `thick` is ambiguous and `digit` is not."""
    for family, name in (("digits", "digit"), ("digits", "thick"), ("lines", "thick")):
        made = binary(name, family=family)
        ceb.save_expert(tmp_path / family / name, made.network, made.card)
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_the_catalogue_and_each_expert_is_loaded_once(models):
    mix = ceb.parse("digits/digit + ~digits/digit - lines/thick")
    assert str(mix) == "digits/digit + ~digits/digit - lines/thick"
    assert mix.operands[0].network is mix.operands[1].network


def test_name_alone_is_enough_where_it_is_the_only_one(models):
    if any(name.endswith("/digit") and name != "digits/digit" for name in ceb.catalogue()):
        pytest.skip("another digit is installed")
    assert str(ceb.parse("2*digit")) == "2*digits/digit"
    with pytest.raises(ceb.RecipeError, match=r"unknown expert 'thick'; did you mean .*/thick"):
        ceb.parse("thick")


def test_unknown_names_list_the_near_ones():
    with pytest.raises(ceb.RecipeError, match=r"unknown expert 'toys/thik'; did you mean toys/thick"):
        ceb.parse("a + toys/thik", NAMES)
    with pytest.raises(ceb.RecipeError, match="unknown expert 'zzz'; there are: a, b, c"):
        ceb.parse("zzz", VECTORS)
    with pytest.raises(ceb.RecipeError, match="there are: none"):
        ceb.parse("a", {})


def test_unknown_values_list_the_near_ones():
    with pytest.raises(ceb.RecipeError, match=r"toys/digit has no value '7'; it has 0, 1, 2 and any"):
        ceb.parse("toys/digit[7]", NAMES)
    with pytest.raises(ceb.RecipeError, match=r"has no value 'yess'.* Did you mean 'yes'\?"):
        ceb.parse("toys/thick[yess]", NAMES)


# --- text that is no recipe ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "an empty recipe; name at least one expert"),
        ("  \n ", 4, "an empty recipe"),
        ("a b", 2, "expected an operator, got 'b'"),
        ("a)", 1, r"expected an operator, got '\)'"),
        ("(a", 2, r"expected '\)', got 'the end'"),
        ("a +", 3, "expected an expert, a number or a parenthesis, got 'the end'"),
        ("a + * b", 4, "expected an expert, a number or a parenthesis, got '\\*'"),
        ("2", 0, "2 is a number, not an energy; weights go before a term: 2\\*smile"),
        ("2*3", 0, "6 is a number, not an energy"),
        ("a + 2", 2, r"\(a\) \+ 2 has no meaning: write weight\*expert"),
        ("2 | a", 2, r"2 \| \(a\) has no meaning"),
        ("2 - 1", 2, "2 - 1 has no meaning"),
        ("a * b", 2, r"\(a\) \* \(b\) has no meaning"),
        ("1/a", 1, r"1 / \(a\) has no meaning"),
        ("a/0", 1, "division by zero"),
        ("a/(2*0)", 1, "division by zero"),
        ("a/1e-320", 1, "a weight must be finite"),
        ("~2*a", 0, "~ negates an energy, not the number 2"),
        ("a + ~(a + b)", 4, r"~\(a \+ b\) needs an energy above which"),
        ("1e999*a", 0, "a number must be finite"),
        ("1e200*1e200*a", 5, "a weight must be finite"),
        ("1e200*(1e200*a)", 5, "a weight must be finite"),
        ("ratio(1e308*a, -1e308*a)", 6, "a weight must be finite, got inf"),
        ("sum([sum([a], weights=[1e308])], weights=[10])", 4, "a weight must be finite, got inf"),
        ("1e308*a + 1e308*a", 8, "a weight must be finite, got inf"),
        ("-(sum([a, a], weights=[1e308, 1e308]))", 6, "a weight must be finite, got inf"),
        ("a[1]", 2, "a has no values to choose from"),
        ("toys/digit[", 11, r"expected a value in \[ \]"),
        ("toys/digit[1", 12, r"expected '\]', got 'the end'"),
        ("a.energy", 1, "'.' has no meaning in a recipe"),
        ("exec(a)", 0, "a recipe calls nothing but ratio, .*, log_z, on_bits; got 'exec'"),
        ("a(b)", 0, "a recipe calls nothing but"),
        ("ratio(a)", 7, r"expected ',', got '\)'"),
        ("ratio(a, 2)", 9, "2 is a number, not an energy"),
        ("negate(a, thresh=1)", 10, "expected one of threshold, got 'thresh'"),
        ("negate(a, threshold=b)", 20, "expected a number, got 'b'"),
        ("negate(a, threshold=1, threshold=2)", 23, "expected one of threshold"),
        ("negate(a + b)", 7, "needs an energy above which"),
        ("mixture(a, b)", 8, r"expected '\[', got 'a'"),
        ("mixture([])", 9, "expected an expert, a number or a parenthesis"),
        ("mixture([a, b], weights=[1])", 8, "a Mixture of 2 components needs as many `weights`, got 1"),
        ("mixture([a], weights=[-1])", 8, "must be positive"),
        ("a + toys/digit", 2, "energies compose only in one image space"),
        ("a = b", 2, "expected an operator, got '='"),
    ],
)
def test_error_says_what_and_points_where(text, position, message):
    with pytest.raises(ceb.RecipeError, match=message) as caught:
        ceb.parse(text, NAMES)
    assert caught.value.position == position
    *_, excerpt, pointer = str(caught.value).split("\n")
    assert pointer.strip() == "^"
    pointed = excerpt[pointer.index("^") :][:1]
    assert pointed == text.replace("\n", " ")[position : position + 1].strip() or position == len(text)


def test_pointer_stays_near_the_place_in_long_recipes():
    with pytest.raises(ceb.RecipeError) as caught:
        ceb.parse("a + " * 50 + "? + a", VECTORS)
    *_, excerpt, pointer = str(caught.value).split("\n")
    assert excerpt[pointer.index("^")] == "?"
    assert len(excerpt) < 90


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"], a])
def test_recipe_is_text(value):
    with pytest.raises(TypeError, match="a recipe is text, got"):
        ceb.parse(value, VECTORS)


HOSTILE = {
    "attribute": "a.__class__.__mro__[1].__subclasses__()",
    "call": "__import__('os').system('true')",
    "name_call": "eval(a)",
    "dunder": "__import__",
    "lambda": "lambda: a",
    "comparison": "a == b",
    "power": "a**2",
    "quote": "'a'",
    "backslash": "a\\",
    "nul": "a\0",
    "nul_inside": "a + \0b",
    "no_break_space": "a\u00a0+ b",
    "no_break_space_at_the_end": "a\u00a0",
    "file_separator_at_the_end": "a\x1c",
    "arabic_digits": "\u0662*a",
    "fullwidth_digits": "\uff12*a",
    "superscript": "a\u00b2",
    "cyrillic_a": "\u0430",
    "mathematical_a": "\U0001d44e",
    "minus_sign": "a \u2212 b",
    "right_to_left_mark": "\u200fa",
    "byte_order_mark": "\ufeffa",
    "surrogate": "a\ud800",
    "underscored_number": "1_0*a",
    "hexadecimal": "0x10*a",
    "imaginary": "2j*a",
    "nan": "nan*a",
    "infinity": "inf*a",
    "path": "../../etc/passwd",
    "absolute_path": "/etc/passwd",
    "address": "https://example.org/a",
    "huge_number": "9" * 9_000 + "*a",
    "huge_exponent": "1e" + "9" * 4_000 + "*a",
    "huge_length": "a+" * 1_000_000 + "a",
    "huge_name": "a" * 9_000,
    "many_names": "+".join("a" * 5_000),
    "many_components": "|".join("a" * 5_000),
    "many_calls": "mixture([" + ",".join("a" * 4_000) + "])",
    "parentheses": "(" * 4_000 + "a" + ")" * 4_000,
    "open_parentheses": "(" * 9_000,
    "closed_parentheses": ")" * 9_000,
    "brackets": "[" * 9_000,
    "mixtures": "mixture([" * 1_000,
    "ratios": "ratio(" * 1_000,
    "negations_and_parentheses": "~(" * 4_000 + "a" + ")" * 4_000,
    "operators": "+" * 9_000,
    "minus_signs": "-" * 9_000,
    "tildes_on_a_number": "~" * 9_000 + "1",
    "numbers": "1*" * 4_000 + "1",
    "divisions": "1/" * 4_000 + "0*a",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(ceb.RecipeError) as caught:
        ceb.parse(text, VECTORS)
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 10_200
    assert 0 <= caught.value.position <= len(text)


SUM, OR = (f"({sign.join(f'a{i}' for i in range(99))})" for sign in "+|")
MANY = {f"a{i}": ceb.analytic.Gaussian(torch.full((2,), i / 50)).named(f"a{i}") for i in range(99)}


@pytest.mark.parametrize(
    "text",
    [
        "-" * 9_000 + SUM,
        "-~" * 4_500 + "a0",
        "~--" * 3_000 + OR,
        "~" * 9_000 + OR,
        "1*" * 4_000 + SUM,
        SUM + "*1" * 4_000,
        SUM + "*3/3" * 2_000,
        "+".join("(" * 49 + f"a{i}" + ")" * 49 for i in range(94)),
        "2*(" * 48 + SUM + ")" * 48,
        "(1)*" * 2_000 + SUM,
    ],
    ids=lambda text: text[:12],
)
def test_work_is_bounded_by_the_length_of_the_text(text):
    """Each took 0.4 to 40 s before runs and chains were folded, at one evaluation of a sum a sign."""
    start = time.process_time()
    with contextlib.suppress(ceb.RecipeError):
        ceb.parse(text, MANY)
    assert time.process_time() - start < 1


def test_folded_signs_and_factors_mean_what_python_means():
    for text in ("--a", "-~-~-a", "~~~a", "2*-a/3*7/11", "-2*a*0.1*0.1*0.1", "~~(a | b)", "---(a + b)/3/7*5"):
        try:
            expected = eval(text, {}, VECTORS)
        except ValueError:
            with pytest.raises(ceb.RecipeError):
                ceb.parse(text, VECTORS)
        else:
            assert ceb.parse(text, VECTORS).key == expected.key
    three = {"d": digit["2"]}
    for count in range(7):
        assert ceb.parse("~" * count + "d", three) == eval("~" * count + "d", {}, three)


@pytest.mark.parametrize(
    ("opening", "closing"), [("(", ")"), ("mixture([", "])"), ("negate(", ", threshold=1)"), ("2*(a | ", ")")]
)
def test_deepest_nesting_is_read_printed_and_evaluated(opening, closing):
    depth = recipe.MAX_DEPTH - 1
    start = time.process_time()

    def from_a_deep_stack(frames):
        # A web server is a hundred frames deep before it parses anything.
        return ceb.parse(text, VECTORS) if not frames else from_a_deep_stack(frames - 1)

    text = opening * depth + "b" + closing * depth
    energy = from_a_deep_stack(150)
    assert ceb.parse(str(energy), VECTORS).key == energy.key
    assert energy(points(dtype=torch.float64)).isfinite().all()
    assert time.process_time() - start < 3


def test_too_long_too_many_and_too_deep_are_said_so():
    with pytest.raises(ceb.RecipeError, match="a recipe nests at most 50 deep"):
        ceb.parse("(" * 50 + "b" + ")" * 50, VECTORS)
    with pytest.raises(ceb.RecipeError, match="a recipe has at most 10000 characters, this one 10001"):
        ceb.parse("a" + " " * 10_000, VECTORS)
    with pytest.raises(ceb.RecipeError, match="a recipe has at most 100 names, this one 101"):
        ceb.parse(" + ".join(["a"] * 101), VECTORS)


@settings(max_examples=200)
@given(st.text(alphabet="abc12.0e+-*/&|~()[],= \n_ratio", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_composition_or_a_recipe_error(text):
    with contextlib.suppress(ceb.RecipeError):
        assert isinstance(ceb.parse(text, VECTORS), Energy)


def test_nothing_is_executed():
    """No Python machinery that could run text is reached."""
    seen = []

    def watch(event, arguments):
        if watching and event in ("compile", "exec", "import", "os.system", "open", "subprocess.Popen"):
            seen.append((event, arguments))

    watching = False
    sys.addaudithook(watch)
    watching = True
    try:
        for text in HOSTILE.values():
            with pytest.raises(ceb.RecipeError):
                ceb.parse(text, VECTORS)
    finally:
        watching = False
    assert [event for event, _ in seen if not re.search("traceback|linecache", str(_))] == []

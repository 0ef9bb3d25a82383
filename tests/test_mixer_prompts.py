"""Prompts of a pipeline in the mixer: typed, weighed, negated, and followed by running chains."""

import pytest

from demos.mixer.answers import Answers
from demos.mixer.runs import Runs
from demos.mixer.state import Limits, Request

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from pipeline_toys import stable_diffusion  # noqa: E402

from composable_ebm.experts.library import Library  # noqa: E402
from composable_ebm.pipelines import load_pipeline  # noqa: E402

CASTLE, NIGHT, PEOPLE = 'sd["a castle"]', 'sd["at night"]', 'sd["people"]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    pipeline = load_pipeline(str(folder), name="sd", num_steps=6)
    runs = Runs(Library("cpu", {"sd": pipeline}), Limits())
    yield Answers(runs, keeps=False)
    runs.close()


def picked(**changes):
    picks = {
        CASTLE: {"values": {"a castle": 7.5}, "role": "AND"},
        NIGHT: {"values": {"at night": 3}, "role": "AND"},
        PEOPLE: {"values": {"people": 2}, "role": "NOT"},
    }
    return {"family": "sd", "base": True, "picks": {**picks, **changes}}


def test_a_pipeline_is_the_first_family_and_takes_prompts(answers):
    world = answers.world({}, "visitor-a")
    family = world["families"][0]
    assert (family["name"], family["prompts"], family["steps"]) == ("sd", 7.5, 6)
    assert [control["base"] for control in family["controls"]] == [True]
    assert world["starts"][0] == {
        "title": "Prompts of yours",
        "recipe": "sd",
        "photo": False,
        "family": "sd",
        "shown": True,
    }


def test_prompts_are_weighed_negated_and_read_back(answers):
    said = answers.read({"mix": picked()}, "visitor-a")
    assert said["recipe"] == (f"sd + 7.5*ratio({CASTLE}, sd) + 3*ratio({NIGHT}, sd) + 2*ratio(~{PEOPLE}, sd)")
    assert said["words"] == "a castle, at night, no people"
    again = answers.read({"recipe": said["recipe"]}, "visitor-a")
    assert again["mix"]["picks"][PEOPLE]["role"] == "NOT"
    assert again["words"] == said["words"]
    assert {part["name"] for part in again["parts"]} == {CASTLE, NIGHT, f"~{PEOPLE}"}
    either = picked(
        **{
            CASTLE: {"values": {"a castle": 2}, "role": "OR"},
            NIGHT: {"values": {"at night": 2}, "role": "OR"},
        }
    )
    said = answers.read({"mix": either}, "visitor-a")
    assert "OR" in said["problem"], said


def test_prompts_are_sampled_and_said_of_without_energies(answers):
    recipe = answers.read({"mix": picked()}, "visitor-a")["recipe"]
    last = list(answers.run({"kind": "sample", "recipe": recipe, "chains": 2, "steps": 6}, "visitor-a"))[-1]
    assert last["kind"] == "end"
    assert last["picture"].startswith("data:image/png")
    weights = {term["name"]: term["weight"] for term in last["terms"]}
    assert weights == {"sd": 1, CASTLE: 7.5, NIGHT: 3, f"~{PEOPLE}": 2}
    assert {term["energy"] for term in last["terms"]} == {""}
    pushes = answers.heat({"recipe": recipe, "picture": last["picture"]}, "visitor-a")["pushes"]
    assert len(pushes) == 4


def test_running_chains_follow_another_prompt(answers):
    runs = answers.runs
    recipe = f"sd + 5*ratio({CASTLE}, sd)"
    followed = []
    for message in runs.play(Request(recipe, 1, 6, 0), "visitor-a"):
        if message["kind"] == "frame":
            followed.append(message["recipe"])
            if len(followed) == 3:
                answers.read({"recipe": f"sd + 5*ratio({NIGHT}, sd)"}, "visitor-a")
            if "at night" in message["recipe"]:
                runs.stop("visitor-a")
    assert message["kind"] == "end"
    assert "at night" in followed[-1]


@pytest.mark.parametrize("name", ["sd", 'sd["', 'other["a"]', "sd[3]", f'sd["{"x" * 500}"]'])
def test_what_is_no_prompt_is_left_out(answers, name):
    said = answers.read({"mix": {"family": "sd", "picks": {name: {"values": {"a": 1}}}}}, "visitor-a")
    assert said["recipe"] == "sd"

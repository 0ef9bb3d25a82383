"""The mixer's API over HTTP: what it answers, and how it refuses."""

import pytest
from mixer_toys import decode

import composable_ebm as ceb
from composable_ebm.experts import catalogue


@pytest.fixture
def only_toys(toys, monkeypatch):
    monkeypatch.setattr(catalogue, "model_folders", lambda: [toys])


def test_api_has_three_endpoints(client):
    named = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    assert named == {"/sample", "/experts", "/running"}


def test_api_lists_experts(client):
    experts = {each["name"]: each for each in client.predict(api_name="/experts")}
    assert experts["Toys/thick"]["values"] == ["thin", "thick"]
    assert experts["Toys/digit"]["event_shape"] == [1, 16, 16]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("Toys/digti[3]", 4, 5, 0), "unknown expert 'Toys/digti'; did you mean Toys/digit"),
        (("Toys/digit[12]", 4, 5, 0), "has no value '12'"),
        (("", 4, 5, 0), "an empty recipe"),
        (("nan*Toys/digit[3]", 4, 5, 0), "unknown expert 'nan'"),
        (("1e999*Toys/digit[3]", 4, 5, 0), "must be finite"),
        (("-Toys/digit[3]", 4, 5, 0), "no term with a positive weight"),
        (("(" * 5000 + "Toys/digit", 4, 5, 0), "nests at most"),
        (("Toys/digit", 10**6, 5, 0), "`num_chains` must be a whole number from 1 to 64, got 1000000"),
        (("Toys/digit", 4, -5, 0), "`num_steps` must be a whole number from 0 to 2000, got -5"),
        (("Toys/digit", 4, 5, -1), "`seed` must be"),
        (("Toys/digit", "many", 5, 0), "`num_chains` must be"),
        ((17, 4, 5, 0), "`recipe` must be text, got int"),
    ],
)
def test_bad_requests_are_explained(client, request_, message):
    with pytest.raises(Exception, match=message):  # gradio_client has a class of its own for each version
        client.predict(*request_, api_name="/sample")


@pytest.mark.usefixtures("only_toys")
def test_api_samples_what_sample_samples_after_bad_requests_too(client):
    with pytest.raises(Exception, match="unknown expert 'nowhere'"):
        client.predict("nowhere", 5, 20, 7, api_name="/sample")
    recipe = "Toys/digit[3] + 2*Toys/thick"
    answer = client.predict(recipe, 5, 20, 7, api_name="/sample")
    alone = ceb.sample(ceb.parse(recipe), num_chains=5, num_steps=20, seed=7)
    assert answer["recipe"] == recipe
    assert answer["energies"] == pytest.approx(alone.energies.tolist(), rel=1e-4, abs=1e-4)
    assert "5 chains, 20 steps" in answer["report"]
    picture = decode(answer["png"])
    assert picture.text["recipe"] == recipe
    assert picture.text["seed"] == "7"

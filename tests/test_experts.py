"""Experts: their values, their files, and what is said about files that are no expert."""

import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import resource
from dataclasses import replace

import pytest
import torch
from helpers import binary, card, expert, network, points
from safetensors.torch import save
from torch import nn

import composable_ebm as ceb
from composable_ebm.experts import catalogue as catalogue_module
from composable_ebm.experts.catalogue import cards
from composable_ebm.experts.library import Library
from composable_ebm.experts.networks import NETWORKS, ConvEnergy
from composable_ebm.experts.pair import settle
from composable_ebm.experts.store import read_card

x = points(5, (1, 4, 4))

# --- values --------------------------------------------------------------------------------------


def test_value_is_one_output_of_the_network():
    digit = expert()
    for i, name in enumerate(digit.card.values):
        torch.testing.assert_close(digit[name](x), digit.network(x)[:, i])


def test_values_may_be_given_as_numbers():
    digit = expert()
    assert digit[2].key == digit["2"].key


def test_any_value_is_the_marginal():
    digit = expert()
    expected = -torch.logsumexp(-digit.network(x), dim=1)
    torch.testing.assert_close(digit["any"](x), expected)
    torch.testing.assert_close(digit(x), expected)
    torch.testing.assert_close((digit["0"] | digit["1"] | digit["2"])(x), expected)


def test_binary_expert_stands_for_its_second_value():
    thick = binary()
    torch.testing.assert_close(thick(x), thick.network(x)[:, 1])
    assert thick.key == thick["yes"].key
    assert (~thick).key == thick["no"].key
    assert [str(thick), str(~thick), str(thick["any"])] == ["toys/thick", "~toys/thick", "toys/thick[any]"]


def test_not_of_a_ten_valued_expert_is_the_mixture_of_the_other_nine():
    digit = expert(values=tuple("0123456789"))
    others = ~digit[3]
    assert [e.value for e in others.operands] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    expected = -torch.logsumexp(-digit.network(x)[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]], dim=1)
    torch.testing.assert_close(others(x), expected)
    torch.testing.assert_close((others | digit[3])(x), digit(x))


def test_given_takes_an_expert_and_an_or_of_its_values_against_one_marginal():
    base, digit = expert("base", ("all",)), expert(values=tuple("0123456789"))
    for asked in (digit[3], digit[1] | digit[7], ~digit[3]):
        mix = ceb.given(base, asked, weight=2)
        torch.testing.assert_close(mix(x), base(x) + 2 * (asked(x) - digit["any"](x)), rtol=1e-4, atol=1e-4)


def test_given_refuses_what_has_no_marginal_and_says_what_to_do():
    base, digit = expert("base", ("all",)), expert()
    bright = ceb.from_callable(lambda s: -s.flatten(1).mean(1), name="bright")
    for other in (bright, digit["any"], digit["0"] | binary(), ceb.mixture([digit["0"], digit["1"]], [1, 2])):
        with pytest.raises(TypeError, match=r"at a value of their attribute, got .* is added as it is"):
            ceb.given(base, other)


def test_not_of_the_marginal_or_of_an_only_value_is_bounded():
    assert isinstance(~expert(), ceb.Not)
    assert isinstance(~expert("base", ("all",)), ceb.Not)


def test_range_belongs_to_the_value():
    digit = expert(energy_range={"0": (1.0, 2.0), "any": (3.0, 4.0)})
    assert (digit["0"].energy_range, digit.energy_range) == ((1.0, 2.0), (3.0, 4.0))
    assert digit["1"].energy_range is None


def test_unknown_value_lists_the_values_and_the_near_one():
    with pytest.raises(KeyError, match="toys/digit has no value 7; it has 0, 1, 2 and any"):
        expert()[7]
    with pytest.raises(KeyError, match=r"has no value 'yess'.* Did you mean 'yes'\?"):
        binary()["yess"]


def test_experts_are_not_iterable():
    with pytest.raises(TypeError, match="not iterable"):
        list(expert())


def test_values_of_one_expert_share_their_network():
    digit = expert()
    assert digit["0"].network is (~digit["1"]).operands[0].network is digit.network


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved expert."""
    folder = tmp_path / "toys" / "thick"
    made = binary(
        data="toy data",
        metrics={"accuracy": 0.9},
        training={"minutes": 1.5},
        failures="none known",
        licence="MIT",
        temperature=0.5,
    )
    ceb.save_expert(folder, made.network, made.card)
    return folder


def edit(folder, **changes):
    """Changes fields of a config, or removes those that are set to None, and vouches for it."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), "digest": None, **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def replace_weights(folder, content):
    """Other weights with a config that fits them."""
    (folder / "model.safetensors").write_bytes(content)
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "parameters": 0}
    edit(folder, weights=weights)


def test_saved_expert_is_loaded_as_it_was(saved):
    made, loaded = binary(), ceb.load_expert(saved)
    torch.testing.assert_close(loaded(x), made(x), rtol=0, atol=0)
    assert loaded.key[2] == made.key[2] == 1
    assert loaded.card == read_card(saved)
    assert loaded.card.metrics == {"accuracy": 0.9}
    assert loaded.energy_range == (-1.0, 1.0)
    assert loaded.sampler_settings == made.sampler_settings
    assert not loaded.network.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_card_survives_its_text():
    full = card(temperature=0.5, metrics={"a": 1.0}, failures="ü", weights={"sha256": "0", "bytes": 1})
    assert ceb.Card.from_json(full.to_json()) == full
    assert full.full_name == "toys/digit"


def test_weights_are_described_by_hash_size_and_count(saved):
    weights = read_card(saved).weights
    content = (saved / "model.safetensors").read_bytes()
    assert weights["sha256"] == hashlib.sha256(content).hexdigest()
    assert weights["bytes"] == len(content)
    assert weights["parameters"] == sum(p.numel() for p in binary().parameters())


def refused(folder, message):
    with pytest.raises(ceb.CheckpointError, match=message) as caught:
        ceb.load_expert(folder)
    assert str(folder) in str(caught.value)


def test_truncated_weights_are_refused(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refused(saved, rf"model\.safetensors is truncated \({len(content) - 10} of {len(content)} bytes\)\. Copy")


def test_one_changed_byte_is_noticed(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(saved, r"model\.safetensors was changed: .* Copy or train the expert again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refused(
        saved, rf"cannot read .*{re.escape(name)}: No such file .* An expert is a folder with config\.json"
    )


def test_file_that_is_no_file_is_named(saved):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors").mkdir()
    refused(saved, r"cannot read .*model\.safetensors: Is a directory")


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('exploded').touch()",))


@pytest.mark.parametrize("vouched_for", [False, True])
def test_pickle_in_the_place_of_weights_is_refused_and_not_executed(
    saved, tmp_path, monkeypatch, vouched_for
):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Bomb())
    if vouched_for:
        replace_weights(saved, content)
        refused(saved, r"model\.safetensors is no safetensors file")
    else:
        (saved / "model.safetensors").write_bytes(content)
        refused(saved, "is truncated|was changed")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)  # the bomb works
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "does not fit the network in .*config.json: .*Missing key"),
        ({"extra": torch.zeros(1)}, "does not fit .*Unexpected key"),
        ({"head.weight": torch.zeros(2, 9)}, "does not fit .*size mismatch for head.weight"),
    ],
)
def test_weights_that_do_not_fit_the_network_are_refused(saved, state, message):
    whole = {k: v.contiguous() for k, v in binary().network.state_dict().items()} if state else {}
    replace_weights(saved, save({**whole, **state}))
    refused(saved, f"(?s)model.safetensors {message}")


SMALL = card(values=("no", "yes")).network


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {**SMALL, "type": "Transformer"}}, "names the network 'Transformer'; this version"),
        ({"network": {}}, "names the network None"),
        ({"network": {**SMALL, "type": ["ConvEnergy"]}}, r"names the network \['ConvEnergy'\]"),
        ({"network": {**SMALL, "depth": 3}}, "gives ConvEnergy arguments that do not fit: .*depth"),
        ({"network": {**SMALL, "patch": 3}}, "arguments that do not fit: images of 4x4 do not divide into"),
        ({"network": {**SMALL, "patch": 0}}, "arguments that do not fit"),
        ({"network": {**SMALL, "hidden": -1}}, "arguments that do not fit"),
        ({"network": {**SMALL, "widths": 4}}, "arguments that do not fit"),
        ({"network": {**SMALL, "event_shape": "1x4x4"}}, "arguments that do not fit"),
        ({"network": {**SMALL, "hidden": 16}}, "(?s)does not fit the network in .*size mismatch"),
        ({"network": {**SMALL, "num_values": 3}}, r"describes 2 values .* but its network gives 3"),
        ({"event_shape": [1, 8, 8]}, r"describes 2 values of shape \(1, 8, 8\), but its network"),
        ({"values": ["a", "b", "c"], "energy_range": {}}, "describes 3 values"),
        ({"format": 2}, "does not describe an expert: expected format 1; was it written by another version"),
        ({"format": None}, "expected format 1"),
        ({"pickle": "model.pkl", "author": "me"}, "an expert: unknown field author, pickle"),
        ({"values": None, "network": None}, "missing field values, network"),
        ({"values": "yes"}, "field values must be a list"),
        ({"values": ["yes", "yes"]}, "must be distinct names other than 'any'"),
        ({"values": ["any", "none"]}, "must be distinct names other than 'any'"),
        ({"values": []}, "must be distinct names"),
        ({"values": [0, 1]}, "values are named by a word or a whole number, .* got 0"),
        ({"values": ["light brown", "red"]}, "got 'light brown'"),
        ({"event_shape": 4}, "field event_shape must be a list"),
        ({"attribute": 3}, "field attribute must be text"),
        ({"sampler": []}, "field sampler must be an object"),
        ({"energy_range": {"yes": 3}}, "does not describe an expert: `energy_range of yes` must be two num"),
        ({"energy_range": {"yes": ["low", "high"]}}, r"must be two numbers, low before high, got \('low'"),
        ({"energy_range": {"yes": [1, 0]}}, r"low before high, got \(1, 0\)"),
        ({"energy_range": {"yes": [0, math.nan]}}, r"low before high, got \(0, nan\)"),
        ({"energy_range": {"maybe": [0, 1]}}, "`energy_range` is of the values and any, got one of 'maybe'"),
        ({"data_range": [1, -1]}, r"`data_range` must be two numbers, low before high, got \(1, -1\)"),
        ({"data_range": [1, 1]}, "`data_range` must be two numbers"),
        ({"data_range": [-1, math.inf]}, "`data_range` must be two numbers"),
        ({"data_range": [-1, "one"]}, "`data_range` must be two numbers"),
        ({"data_range": [-1, 0, 1]}, "`data_range` must be two numbers"),
        ({"data_range": [False, True]}, "`data_range` must be two numbers"),
        ({"event_shape": [1, -4, 4]}, r"`event_shape` must be whole numbers of at least 1, got \(1, -4, 4\)"),
        ({"event_shape": [1.0, 4, 4]}, "`event_shape` must be whole numbers"),
        ({"event_shape": [10**9, 10**9]}, "`event_shape` must be whole numbers"),
        ({"weight": math.nan}, "`weight` must be a positive number, got nan"),
        ({"weight": "three"}, "`weight` must be a positive number, got 'three'"),
        ({"weight": -1}, "`weight` must be a positive number, got -1"),
        ({"weight": True}, "`weight` must be a positive number, got True"),
        ({"temperature": 0}, "`temperature` must be a positive number, got 0"),
        ({"noise_conditioned": "no"}, "`noise_conditioned` must be true or false, got 'no'"),
        ({"failures": ["none"]}, "`failures` must be text"),
        ({"sampler": {"kernel": 3}}, "`sampler` must name its kernel, got 3"),
        ({"sampler": {"kernel": "MALA", "num_steps": -5}}, "num_steps of `sampler` must be .* got -5"),
        ({"sampler": {"kernel": "MALA", "step_size": "small"}}, "step_size of `sampler` must be a positive"),
        ({"sampler": {"kernel": "MALA", "anneal": 3}}, "anneal of `sampler` must be an object, got 3"),
        ({"sampler": {"kernel": "MALA", "grad_clip": math.inf}}, "numbers of `sampler` must be finite"),
        ({"weights": {"sha256": "0", "bytes": "many"}}, "bytes of `weights` must be a whole number"),
        ({"network": {**SMALL, "hidden": True}}, "arguments that do not fit: hidden is a number, got True"),
        ({"base": 3}, "`base` must be text, got 3"),
        ({"noise_conditioned": True}, "describes a network of noise levels, and ConvEnergy takes none"),
        ({"network": {**SMALL, "num_values": 1_000_000}}, "describes 2 values .* its network gives 1000000"),
        ({"network": {**SMALL, "hidden": 10**9}}, "(?s)does not fit the network .*size mismatch"),
        ({"network": {**SMALL, "widths": [4] * 20_000}}, "takes more than 30000 calls to make"),
        *(
            ({field: name}, "are named by letters, digits and underscores, so that recipes can be read back")
            for field in ("family", "name")
            for name in ("../../etc", "a/b", "a b", "", "7", "\u0430", "a;b", "con\n")
        ),
    ],
)  # fmt: skip
def test_config_that_does_not_fit_is_refused(saved, changes, message):
    edit(saved, **changes)
    refused(saved, message)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "\xff", "[" * 100_000, '{"format": 1}', "{}\0"]
)
def test_config_that_is_no_description_is_refused(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refused(saved, r"config\.json does not describe an expert")


def test_description_that_was_changed_is_noticed_whatever_was_changed(saved):
    path = saved / "config.json"
    text = path.read_text()
    for old, new in (("none known", "none"), ('"minutes": 1.5', '"minutes": 15'), ('"MIT"', '"BSD"')):
        path.write_text(text.replace(old, new))
        refused(saved, r"config\.json does not describe .* was changed since .* delete its line 'digest'")
    content = json.loads(text)
    path.write_text(json.dumps(content, indent=7, sort_keys=True))  # laid out in another way
    assert ceb.load_expert(saved) == ceb.load_expert(saved)
    del content["digest"]
    path.write_text(json.dumps({**content, "failures": "more"}))
    assert ceb.load_expert(saved).card.failures == "more"


def test_what_a_description_promises_takes_no_memory_before_it_is_compared(saved):
    for options in ({"hidden": 10**9}, {"widths": [10**6]}, {"widths": [4] * 2_000_000}):
        edit(saved, network={**SMALL, **options})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(saved, "does not fit|more than the 4000000 that it can need")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null"])
def test_links_to_what_has_no_end_are_not_read(saved, place):
    for name in ("model.safetensors", "config.json"):
        (saved / name).unlink()
        (saved / name).symlink_to(place)
        refused(saved, f"cannot read .*{name}: it is no file")


# --- writing -------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """A user's own network, which reads a number off a tensor while it is built."""

    def __init__(self, strength=1.0, values=2):
        super().__init__()
        self.strength = nn.Parameter(torch.full((values,), torch.linspace(0, strength, 2)[1].item()))

    def forward(self, x):
        return x.flatten(1).square().sum(1, keepdim=True) * self.strength


@pytest.fixture
def own():
    yield ceb.register_network(Quadratic)
    del NETWORKS["Quadratic"]


def own_card(**changes):
    return card("own", ("no", "yes"), network={"type": "Quadratic", "strength": 3.0}, **changes)


def test_network_class_of_a_user_is_saved_and_loaded(tmp_path, own):
    ceb.save_expert(tmp_path / "toys" / "own", own(3.0), own_card())
    loaded = ceb.load_expert(tmp_path / "toys" / "own")
    assert type(loaded.network) is Quadratic
    torch.testing.assert_close(loaded(x), 3 * x.flatten(1).square().sum(1))
    assert ceb.sample(loaded, num_chains=2, num_steps=2).samples.shape == (2, 1, 4, 4)


def test_names_of_networks_are_taken_once(own):
    assert ceb.register_network(Quadratic) is Quadratic
    with pytest.raises(ValueError, match=r"another network called RBM, in .*rbm"):
        ceb.register_network(type("RBM", (nn.Module,), {}))
    with pytest.raises(TypeError, match="must be a class of modules"):
        ceb.register_network(Quadratic())


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    folder, made = tmp_path / "expert", binary()
    broken = binary(seed=3)
    broken.network.head.bias.data[1] = math.nan
    cases = [
        (Quadratic(3.0), own_card(), r"this is a Quadratic. Register your own class where"),
        (made.network, own_card(), "its card describes the network 'Quadratic', and this is a ConvEnergy"),
        (made.network, card(), r"its network does not fit its card: size mismatch for head.weight"),
        (broken.network, broken.card, "is not finite in head.bias"),
        (made.network, replace(made.card, values=("a",), energy_range={}), "describes 1 values"),
    ]
    for net, description, message in cases:
        with pytest.raises(ValueError, match=message):
            ceb.save_expert(folder, net, description)
    assert not folder.exists()


def test_network_that_gives_other_outputs_than_values_is_not_saved(tmp_path, own):
    with pytest.raises(ValueError, match=r"must give energies \(2, 3\), one a value, got \(2, 2\)"):
        ceb.save_expert(tmp_path / "own", own(3.0), card("own", ("a", "b", "c"), network=own_card().network))


def disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_expert_and_nothing_else(saved, monkeypatch, failing):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    other = binary(seed=9)
    monkeypatch.setattr(f"os.{failing}", disk_full)
    with pytest.raises(OSError, match="No space left"):
        ceb.save_expert(saved, other.network, other.card)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    monkeypatch.undo()
    torch.testing.assert_close(ceb.load_expert(saved)(x), binary()(x))


@pytest.mark.parametrize(("renamed", "holds"), [(0, "before"), (1, "before"), (2, "after"), (3, "after")])
def test_a_kill_while_an_expert_is_written_leaves_the_one_before_or_after(saved, renamed, holds):
    """Killed before the weights, the card, and the weights again are renamed, and after all."""
    other, replace = binary(seed=9), os.replace
    if not (child := os.fork()):
        calls = itertools.count()

        def killed(*names):
            if next(calls) == renamed:
                os._exit(9)
            replace(*names)

        os.replace = killed
        ceb.save_expert(saved, other.network, other.card)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    held = {"before": binary(), "after": other}[holds]
    torch.testing.assert_close(ceb.load_expert(saved)(x), held(x))
    settle(saved)
    torch.testing.assert_close(ceb.load_expert(saved)(x), held(x))
    names = {p.name for p in saved.iterdir() if not p.name.startswith(".")}
    assert names == {"config.json", "model.safetensors"}


def test_weights_of_another_card_name_the_file_and_the_fix(saved):
    other = binary(seed=9)
    ceb.save_expert(saved.parent / "other", other.network, other.card)
    os.replace(saved.parent / "other/model.safetensors", saved / "model.safetensors")
    refused(saved, "model.safetensors was changed: its SHA-256.*Copy or train the expert again")


def test_files_are_readable_by_others(saved):
    assert {p.stat().st_mode & 0o777 for p in saved.iterdir()} == {0o644}


# --- names ---------------------------------------------------------------------------------------


@pytest.fixture
def models(saved, monkeypatch):
    """The saved expert as the only one there is, and no network."""
    root = saved.parents[1]
    monkeypatch.setattr(catalogue_module, "model_folders", lambda: [root])

    def offline(repository):
        raise OSError(f"no connection for {repository}")

    monkeypatch.setattr(catalogue_module, "_download", offline)
    return root


def test_experts_are_found_by_name(models):
    assert list(ceb.catalogue()) == ["toys/thick"]
    assert str(ceb.load_expert("toys/thick")) == "toys/thick"


def test_folders_are_searched_in_order(saved, tmp_path, monkeypatch):
    first, second = tmp_path / "first", saved.parents[1]
    made = binary(seed=9)
    ceb.save_expert(first / "toys" / "thick", made.network, made.card)
    monkeypatch.setenv("COMPOSABLE_EBM_MODELS", f"{first}:{second}:{tmp_path / 'absent'}")
    assert catalogue_module.model_folders()[:2] == [first, second]
    torch.testing.assert_close(ceb.load_expert("toys/thick")(x), made(x))


def test_models_in_the_working_folder_are_found(saved, tmp_path, monkeypatch):
    saved.parents[0].rename(tmp_path / "there")
    (tmp_path / "models").mkdir()
    (tmp_path / "there").rename(tmp_path / "models" / "toys")
    monkeypatch.chdir(tmp_path)
    assert ceb.catalogue()["toys/thick"] == tmp_path / "models" / "toys" / "thick"


def test_unknown_names_list_the_near_ones(models):
    with pytest.raises(KeyError, match=r"no expert named 'toys/thik'\. Did you mean toys/thick\?"):
        ceb.load_expert("toys/thik")
    with pytest.raises(KeyError, match=r"no expert named 'thick'\. Did you mean toys/thick\?"):
        ceb.load_expert("thick")
    with pytest.raises(KeyError, match=r"no expert named 'zzz'\. There are: toys/thick\."):
        ceb.load_expert("zzz")


def test_unknown_repositories_say_what_the_hub_said(models):
    with pytest.raises(KeyError, match=r"The Hub did not give one either: no connection for someone/expert"):
        ceb.load_expert("someone/expert")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc", "a/b/c", "toys/../thick", "", "\0", "a\nb"])
def test_names_that_are_paths_are_no_experts(models, name):
    with pytest.raises(KeyError, match="no expert named"):
        ceb.load_expert(name)


def test_experts_come_from_the_hub(models, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue_module, "_download", lambda repository: saved)
    torch.testing.assert_close(ceb.load_expert("someone/expert")(x), binary()(x))


def test_damaged_experts_do_not_hide_the_others(models):
    made = expert()
    ceb.save_expert(models / "toys" / "digit", made.network, made.card)
    (models / "toys" / "thick" / "config.json").write_text("{")
    good, bad = cards()
    assert list(good) == ["toys/digit"]
    assert "does not describe an expert" in bad["toys/thick"]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_experts_whose_weights_are_no_numbers_are_not_listed(models, broken):
    library = Library()
    assert list(library) == list(cards()[0]) == ["toys/thick"]
    state = {name: value.contiguous() for name, value in binary().network.state_dict().items()}
    name = next(iter(state))
    state[name] = torch.full_like(state[name], broken, memory_format=torch.contiguous_format)
    replace_weights(models / "toys" / "thick", save(state))
    good, bad = cards()
    assert not good
    assert not list(library)
    assert re.search("model.safetensors holds weights that are no numbers.*diverged", bad["toys/thick"])
    with pytest.raises(ceb.CheckpointError, match=r"no numbers, in .*Train the expert again"):
        ceb.parse("toys/thick", library)


# --- networks ------------------------------------------------------------------------------------


def test_network_gives_one_float_per_value():
    net = network(card(values=tuple("0123456789")))
    assert net(x).shape == (5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energies = net(x)
    assert energies.dtype == torch.float32
    torch.testing.assert_close(energies, net(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("side", [4, 10, 28])
def test_network_takes_sides_that_do_not_halve_evenly(side):
    net = ConvEnergy((3, side, side), num_values=2, widths=(4, 4, 4), hidden=8)
    assert net(torch.zeros(2, 3, side, side)).shape == (2, 2)


def test_architecture_is_all_but_the_number_of_values():
    three, two, wide = (
        network(card(values=v, network=n)).architecture
        for v, n in [
            (("0", "1", "2"), card().network),
            (("0", "1"), {**card().network, "num_values": 2}),
            (("0", "1", "2"), {**card().network, "hidden": 9}),
        ]
    )
    assert three == two != wide


def test_options_rebuild_the_network():
    net = network(card())
    again = ConvEnergy(**json.loads(json.dumps(net.options)))
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), net(x))


def test_cards_are_changed_by_copying():
    assert replace(card(), licence="MIT").licence == "MIT"

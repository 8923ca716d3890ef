"""What lies on a hub, as figures."""

from __future__ import annotations

import json
import math
import os
import resource
from datetime import datetime, timezone

import numpy as np
import pytest
import torch

from merge_kit import status
from merge_kit.contributions import PAYLOAD, SIGNATURE, folder_of, list_entries, live
from merge_kit.federation import BASE_WEIGHTS, read_federation
from merge_kit.parameters import Role, roles_of
from merge_kit.status import survey
from merge_kit.tensorfile import TensorFile, specs_of
from tests.merge_kit.helpers import load

NOON = datetime(2026, 11, 25, 12, tzinfo=timezone.utc)


@pytest.fixture
def rows(hub):
    """The survey of the hub, two days after the fixtures' publications."""

    def look():
        return survey(hub, read_federation(hub.root), NOON)

    return look


def weights_of(parcel):
    """All weights of a vector, without head and statistics, as one float64 array."""
    tensors = load(parcel.payload)
    roles = roles_of(specs_of(tensors), ("fc",))
    return np.concatenate(
        [t.double().numpy().ravel() for n, t in tensors.items() if roles[n] is Role.WEIGHT]
    )


def test_a_row_says_what_the_site_said(contribute, hub, rows):
    parcel = contribute("north", counts={"round": 30, "lobed": 3, "granular": 0})
    federation = read_federation(hub.root)
    (row,) = rows()
    size = parcel.manifest.payload.size
    assert row == {
        "site": "north",
        "id": parcel.manifest.id,
        "state": "ready",
        "absent_counts": {},
        "group_counts": {},
        "other_images": 0,
        "problem": None,
        "created": "2026-11-23T12:00:00Z",
        "age_days": 2.0,
        "class_counts": {"round": 30, "lobed": "<5", "granular": 0},
        "balanced_accuracy": {"value": 0.8, "low": 0.7, "high": 0.9},
        "macro_auroc": {"value": 0.8, "low": 0.7, "high": 0.9},
        "bytes": size,
        "norm": parcel.manifest.payload.norm,
        "compression": None,
        "cosine": pytest.approx(1.0, abs=1e-12),
        "statistics": [],
        "signature": "admitted",
        "public_key": federation.key_of("north"),
        "compatible": True,
    }
    assert size == parcel.payload.stat().st_size


def test_cosines_are_to_the_mean_of_the_current_vectors(contribute, rows):
    """Against numpy, on whole vectors in float64."""
    parcels = {f"s{seed}": contribute(f"s{seed}", seed=seed) for seed in (1, 2, 3)}
    vectors = {name: weights_of(parcel) for name, parcel in parcels.items()}
    mean = np.mean(list(vectors.values()), axis=0)
    expected = {
        name: float(tau @ mean / np.linalg.norm(tau) / np.linalg.norm(mean))
        for name, tau in vectors.items()
    }
    assert {row["site"]: row["cosine"] for row in rows()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("together", [1, 1000, 5000])
def test_cosines_are_the_same_however_few_tensors_are_held_at_once(
    hub, contribute, monkeypatch, together
):
    """And however many vectors there are, only a few files are open."""
    for seed in (1, 2, 3):
        contribute(f"s{seed}", seed=seed)
    federation = read_federation(hub.root)
    with TensorFile(hub.fetch(BASE_WEIGHTS)) as base:
        specs, roles = base.specs, roles_of(base.specs, federation.classifier)
    three = live(list_entries(hub, federation))
    expected = status.cosines_to_mean(three, specs, roles)
    monkeypatch.setattr(status, "_TOGETHER", together)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        found = status.cosines_to_mean(three * 10, specs, roles)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == pytest.approx(expected * 10, rel=1e-12)


def test_cosines_are_remembered_until_the_vectors_are_others(hub, contribute, rows, monkeypatch):
    contribute("north", seed=1)
    contribute("south", seed=2)
    before, read = rows(), []
    measure = status.cosines_to_mean
    monkeypatch.setattr(status, "cosines_to_mean", lambda *a: read.append(1) or measure(*a))
    assert rows() == before
    assert read == []
    contribute("west", seed=3)
    after = {row["site"]: row["cosine"] for row in rows()}
    assert read == [1]
    assert after["north"] != {row["site"]: row["cosine"] for row in before}["north"]
    south, away = hub.root / "contributions" / "south", hub.root / "away"
    south.rename(away)
    two = {row["site"]: row["cosine"] for row in rows()}
    assert two["north"] not in (after["north"], before[0]["cosine"])
    away.rename(south)
    assert {row["site"]: row["cosine"] for row in rows()} == after


def test_the_counts_of_many_are_added_up(hub, contribute, ok):
    for number in range(9):
        few = 3 if number else 0
        contribute(f"site-{number}", counts={"round": 30 + number, "lobed": few, "granular": 9})
    said = ok("status", hub.root)
    table = said[said.index("training images of each class") :].splitlines()
    rows = [line.split("  ") for line in table[2:7]]
    found = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert found[0] == ["class", "images", "contributions with any", "most in one"]
    assert found[2:] == [
        ["round", "306", "9 of 9", "38"],
        ["lobed", "~20", "8 of 9", "<5"],  # each hidden count as the middle of 1 to 4
        ["granular", "81", "9 of 9", "9"],
    ]


def test_an_opposite_vector_shows_a_negative_cosine(contribute, rows):
    def step(sign):
        def change(name, tensor):
            return tensor + sign * 0.01 if tensor.is_floating_point() else tensor

        return change

    for name, sign in (("north", 1), ("south", 1), ("odd", -1)):
        contribute(name, change=step(sign))
    found = {row["site"]: row["cosine"] for row in rows()}
    assert found == pytest.approx({"north": 1.0, "south": 1.0, "odd": -1.0}, abs=1e-3)


def test_a_vector_of_zeros_has_no_cosine(contribute, rows):
    contribute("north", change=lambda name, tensor: tensor)
    assert math.isnan(rows()[0]["cosine"])


@pytest.mark.parametrize(
    ("admit", "signed", "state", "signature"),
    [
        (True, True, "ready", "admitted"),
        (False, True, "not admitted", "not admitted"),
        (True, False, "not admitted", "unsigned"),
    ],
)
def test_states_follow_the_signature(contribute, hub, rows, admit, signed, state, signature):
    parcel = contribute("north", admit=admit)
    if not signed:
        (hub.root / folder_of(parcel.manifest) / SIGNATURE).unlink()
    assert [(row["state"], row["signature"]) for row in rows()] == [(state, signature)]


def test_a_replaced_contribution_has_no_say_in_the_mean(contribute, rows):
    old, new = contribute("north", seed=1), contribute("north", seed=2)
    states = {row["id"]: (row["state"], row["cosine"]) for row in rows()}
    assert states[old.manifest.id] == ("replaced", None)
    assert states[new.manifest.id] == ("ready", pytest.approx(1.0, abs=1e-12))


def test_a_refused_one_comes_last_with_its_sentence(contribute, hub, rows):
    bad, good = contribute("north"), contribute("south")
    payload = hub.root / folder_of(bad.manifest) / PAYLOAD
    payload.write_bytes(bytes(payload.stat().st_size))
    first, last = rows()
    assert (first["site"], first["state"]) == ("south", "ready")
    assert first["id"] == good.manifest.id
    assert (last["site"], last["state"]) == ("north", "refused")
    assert last["problem"].startswith(f"contribution north/{bad.manifest.id[:12]}: the payload is ")


def test_nothing_on_the_hub_is_no_row(rows):
    assert rows() == []


def test_the_command_prints_json_for_a_program(contribute, hub, run_cli, federation):
    contribute("north", change=lambda name, tensor: tensor)
    parcel = contribute("south", seed=1)
    (hub.root / folder_of(parcel.manifest) / PAYLOAD).write_bytes(b"")
    result = run_cli("status", hub.root, "--json")
    facts = json.loads(result.stdout, parse_constant=lambda text: pytest.fail(text))
    assert result.exit_code == 0
    assert facts["contract"] == federation.contract_hash
    assert facts["admitted"] == ["north", "south"]
    north, south = facts["contributions"]
    assert (north["site"], north["state"], north["cosine"]) == ("north", "ready", None)
    assert (south["site"], south["state"]) == ("south", "refused")


def test_the_command_prints_a_table_for_a_person(contribute, hub, run_cli):
    contribute("north")
    contribute("south", admit=False)
    result = run_cli("status", hub.root)
    assert result.exit_code == 0
    assert "Federation 'cells'" in result.stdout
    for word in ("north", "south", "ready", "round", "granular"):
        assert word in result.stdout


@pytest.fixture
def last_words(run_cli, hub):
    """What the command says is to be done next."""
    return lambda: run_cli("status", hub.root).stdout.partition("Next: ")[2]


def test_what_is_ready_is_to_be_merged(contribute, hub, last_words):
    contribute("north")
    assert last_words() == (
        f"merge the 1 that are ready with\n  merge-kit merge {hub.root} --out merged\n"
    )


def test_a_site_that_is_not_admitted_is_to_be_asked_first(contribute, hub, last_words, tmp_path):
    contribute("south", admit=False)
    key = (tmp_path / "south" / "keys" / "site.pub").read_text().strip()
    first = (
        "ask each site that is not admitted whether the key is its own, and admit it with\n"
        f"  merge-kit admit {hub.root} south {key}\n"
    )
    assert last_words() == first
    contribute("north")
    assert last_words() == (
        f"{first}or merge the 1 that are ready without with\n"
        f"  merge-kit merge {hub.root} --skip-refused --out merged\n"
    )


def test_who_did_not_sign_or_sent_something_damaged_is_to_publish_again(
    contribute, hub, last_words
):
    (hub.root / folder_of(contribute("south").manifest) / SIGNATURE).unlink()
    (hub.root / folder_of(contribute("west").manifest) / PAYLOAD).write_bytes(b"")
    assert last_words() == "ask south, west to publish again.\n"
    contribute("north")
    assert last_words() == (
        "ask south, west to publish again, or merge the 1 that are ready without with\n"
        f"  merge-kit merge {hub.root} --skip-refused --out merged\n"
    )


def test_a_site_that_is_silent_is_named(hub, run_cli):
    key = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
    assert run_cli("admit", hub.root, "west", key).exit_code == 0
    result = run_cli("status", hub.root)
    assert "Admitted and not heard of yet: west" in result.stdout


def test_odd_names_on_a_hub_do_not_stop_status(contribute, hub, run_cli):
    contribute("north")
    odd = hub.root / "contributions" / "a\\b\x1b[2J" / "x"
    odd.mkdir(parents=True)
    result = run_cli("status", hub.root)
    assert result.exit_code == 0
    assert "\x1b[2J" not in result.output


def test_all_values_of_the_gram_matrix_are_needed_once(contribute, rows):
    """A head or a running mean that is far off does not move the cosine."""

    def change(name, tensor):
        if name.startswith("fc.") or "running" in name:
            return tensor + 100.0
        return tensor + 0.01 if tensor.is_floating_point() else tensor

    contribute("north", change=change)
    contribute("south", change=lambda n, t: t + 0.01 if t.is_floating_point() else t)
    assert [row["cosine"] for row in rows()] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert torch.get_default_dtype() == torch.float32


def test_a_vector_without_change_of_the_body_has_no_cosine(hub, contribute, run_cli):
    contribute("north", seed=1)
    contribute("south", seed=2, change=lambda name, tensor: tensor)
    shown = run_cli("status", hub.root)
    assert shown.exit_code == 0, shown.stderr
    assert "nan" not in shown.stdout
    found = json.loads(run_cli("status", hub.root, "--json").stdout)
    assert [row["cosine"] is None for row in found["contributions"]] == [False, True]


def test_a_vector_has_one_row_whatever_lies_beside_it(contribute, rows):
    contribute("north", beside=["gram", "fisher"])
    contribute("south", seed=1)
    found = {row["site"]: (row["state"], row["statistics"]) for row in rows()}
    assert len(rows()) == 2
    assert found == {"north": ("ready", ["fisher", "gram"]), "south": ("ready", [])}
    assert all(row["cosine"] < 1 for row in rows())


def test_statistics_stay_with_the_vector_that_they_speak_of(contribute, rows):
    old = contribute("north", seed=1, beside=["fisher"])
    new = contribute("north", seed=2)
    found = {row["id"]: row["statistics"] for row in rows()}
    assert found == {old.manifest.id: ["fisher"], new.manifest.id: []}


def test_damaged_statistics_are_refused_and_do_not_count(contribute, hub, rows):
    parcel = contribute("north", beside=["fisher"])
    for payload in hub.root.glob(f"contributions/north/*/{PAYLOAD}"):
        if parcel.manifest.id not in str(payload):
            payload.write_bytes(b"")
    vector, fisher = rows()
    assert (vector["state"], vector["statistics"]) == ("ready", [])
    assert fisher["state"] == "refused"
    assert "the payload is not what the site signed" in fisher["problem"]


def test_the_command_names_the_statistics_of_each_vector(contribute, hub, run_cli):
    parcel = contribute("north", beside=["gram", "fisher"])
    contribute("south", seed=1)
    result = run_cli("status", hub.root)
    assert f"Statistics of north {parcel.manifest.id[:8]}: fisher and gram\n" in result.stdout
    assert "Statistics of south" not in result.stdout
    assert "Next: merge the 2 that are ready" in result.stdout

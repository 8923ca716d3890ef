"""What lies on a hub, checked."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from merge_kit import payloads, publishing, signing, site
from merge_kit.contributions import (
    MANIFEST,
    PAYLOAD,
    SIGNATURE,
    Trust,
    bundle,
    current,
    entry_at,
    folder_of,
    list_entries,
    read_local,
    speaks_of,
    walk_entries,
    without_superseded,
)
from merge_kit.errors import (
    BaseMismatchError,
    ContributionError,
    NonFiniteError,
    UnreachableError,
    VectorError,
)
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.files import canonical_json, sha256_file
from merge_kit.hub import FolderHub
from merge_kit.manifest import Manifest
from merge_kit.parameters import roles_of, vector_specs
from merge_kit.payloads import check_payload, check_payloads
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.conftest import write_run, write_statistics
from tests.merge_kit.helpers import load, says, settle

ZEROS = "sha256:" + "0" * 64


@pytest.fixture
def place(hub):
    """The folder of a published manifest."""

    def find(manifest):
        return hub.root / folder_of(manifest)

    return find


@pytest.fixture
def only(hub):
    """The one entry on the hub."""

    def find():
        (entry,) = list_entries(hub, read_federation(hub.root))
        return entry

    return find


@pytest.fixture
def check(hub):
    """Check the payload of a contribution as merge does."""

    def run(contribution, federation=None):
        federation = federation or read_federation(hub.root)
        with TensorFile(hub.fetch("base/model.safetensors")) as base:
            roles = roles_of(base.specs, federation.classifier)
            return check_payload(contribution, federation, vector_specs(base.specs, roles), roles)

    return run


@pytest.fixture
def post(hub, tmp_path):
    """Sign a manifest with the key of a joined site and put it on the hub."""

    def put(manifest, payload, signer="north", *, folder=None, sign=True):
        key = tmp_path / signer / site.KEY_FILE
        signature = signing.sign(key, signing.MANIFEST_CONTEXT, manifest.to_bytes())
        files = bundle(manifest, payload, signature)
        if not sign:
            del files[SIGNATURE]
        hub.publish(folder or folder_of(manifest), files)
        return manifest

    return put


def altered(parcel, **changes):
    return Manifest.model_validate({**parcel.manifest.model_dump(), **changes})


def test_a_published_contribution_is_trusted(contribute, only, check):
    parcel = contribute("north")
    found = only().contribution
    assert (found.site, found.id) == ("north", parcel.manifest.id)
    assert found.manifest == parcel.manifest
    assert found.trust is Trust.ADMITTED
    assert found.label == f"contribution north/{parcel.manifest.id[:12]}"
    check(found)


def test_a_site_that_is_not_admitted_is_a_stranger(contribute, only, tmp_path):
    contribute("north", admit=False)
    found = only().contribution
    assert found.trust is Trust.STRANGER
    assert found.key == signing.public_key(tmp_path / "north" / site.KEY_FILE)


def test_without_a_signature_a_contribution_is_unsigned(contribute, only, place):
    (place(contribute("north").manifest) / SIGNATURE).unlink()
    found = only().contribution
    assert (found.trust, found.key) == (Trust.UNSIGNED, None)


def test_entries_are_sorted_by_id_and_none_is_lost(contribute, hub):
    ids = [contribute(f"s{n}", seed=n).manifest.id for n in range(5)]
    entries = list_entries(hub, read_federation(hub.root))
    assert [entry.id for entry in entries] == sorted(ids)


def test_a_forged_signature_is_refused(contribute, only, place, tmp_path):
    """Somebody else's signature under the site's public key."""
    manifest = contribute("north").manifest
    mine = signing.public_key(tmp_path / "north" / site.KEY_FILE)
    signing.create_key(tmp_path / "forger.pem")
    forged = signing.sign(tmp_path / "forger.pem", signing.MANIFEST_CONTEXT, manifest.to_bytes())
    content = canonical_json({"key": mine, "signature": forged.signature})
    (place(manifest) / SIGNATURE).write_bytes(content)
    assert only().problem == (
        f"{folder_of(manifest)}/manifest.json does not carry a valid signature: it was changed "
        "after it was signed, or signed by somebody else; ask the site to publish again."
    )


def test_another_key_for_an_admitted_site_is_refused(contribute, only, place, tmp_path):
    manifest = contribute("north").manifest
    mine = signing.public_key(tmp_path / "north" / site.KEY_FILE)
    other = signing.create_key(tmp_path / "forger.pem")
    forged = signing.sign(tmp_path / "forger.pem", signing.MANIFEST_CONTEXT, manifest.to_bytes())
    content = canonical_json({"key": forged.key, "signature": forged.signature})
    (place(manifest) / SIGNATURE).write_bytes(content)
    assert only().problem == (
        f"{folder_of(manifest)} is signed with {other}, but site 'north' is admitted with {mine}: "
        "it is refused."
    )


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"3", b"\xff", b"null", b"[" * 200_000], ids=lambda c: str(c[:9])
)
def test_a_broken_signature_is_named(contribute, only, place, content):
    manifest = contribute("north").manifest
    (place(manifest) / SIGNATURE).write_bytes(content)
    assert only().problem == (f"{folder_of(manifest)}/manifest.sig is no signature: publish again.")


def test_swapped_manifests_are_refused(contribute, hub, place):
    """Both are genuine and signed; they only lie in each other's place."""
    manifests = [contribute("north", seed=s).manifest for s in (1, 2)]
    one, two = (place(m) for m in manifests)
    for name in (MANIFEST, SIGNATURE):
        first, second = (one / name).read_bytes(), (two / name).read_bytes()
        (one / name).write_bytes(second)
        (two / name).write_bytes(first)
    entries = list_entries(hub, read_federation(hub.root))
    here, there = (folder_of(m) for m in manifests)
    assert {entry.problem for entry in entries} == {
        f"{here} holds contribution north/{manifests[1].id}: it was moved or changed; "
        "it is refused.",
        f"{there} holds contribution north/{manifests[0].id}: it was moved or changed; "
        "it is refused.",
    }


def test_a_contribution_in_another_sites_folder_is_refused(contribute, hub, place):
    manifest = contribute("north").manifest
    shutil.copytree(place(manifest), hub.root / "contributions" / "south" / manifest.id)
    south, north = sorted(
        list_entries(hub, read_federation(hub.root)), key=lambda entry: entry.site, reverse=True
    )
    assert north.contribution
    assert south.problem == (
        f"contributions/south/{manifest.id} holds contribution north/{manifest.id}: "
        "it was moved or changed; it is refused."
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"base": ZEROS},
            f" was taken from the base {ZEROS}, this federation's base is BASE: "
            "it cannot be merged here.",
        ),
        (
            {"federation": ZEROS},
            f" was made for the federation {ZEROS}, this one is CONTRACT: "
            "it cannot be merged here.",
        ),
        (
            {"preprocessing": ZEROS},
            " was trained with other preprocessing than the federation's: "
            "its site must train again.",
        ),
        (
            {"class_counts": {"round": 1, "lobed": 1}},
            " counts the classes wrongly: 'granular' is missing or unknown.",
        ),
        (
            {"class_counts": {"round": 1, "lobed": 1, "granular": 1, "odd": 1}},
            " counts the classes wrongly: 'odd' is missing or unknown.",
        ),
        (
            {"group_counts": {"dark": 9}},
            " counts the groups wrongly: 'dark' is missing or unknown.",
        ),
        (
            {"absent_counts": {"round": 9}},
            " counts what images lack wrongly: 'round' is missing or unknown.",
        ),
    ],
    ids=[
        *("base", "federation", "preprocessing", "class missing", "class unknown"),
        *("group unknown", "lacking of no use"),
    ],
)
def test_a_manifest_for_something_else_is_refused(
    contribute, hub, federation, post, changes, sentence
):
    parcel = contribute("north")
    manifest = post(altered(parcel, **changes), parcel.payload)
    found = {e.id: e.problem for e in list_entries(hub, read_federation(hub.root))}
    sentence = sentence.replace("BASE", federation.base_fingerprint)
    sentence = sentence.replace("CONTRACT", federation.contract_hash)
    assert found[manifest.id] == f"{folder_of(manifest)}{sentence}"
    assert found[parcel.manifest.id] is None


@pytest.mark.parametrize("name", [MANIFEST, PAYLOAD])
def test_an_incomplete_entry_is_named(contribute, only, hub, place, name):
    manifest = contribute("north").manifest
    (place(manifest) / name).unlink()
    assert only().problem == (
        f"{hub.root} has no file {folder_of(manifest)}/{name}: is it the right hub, and complete?"
    )


def test_a_link_out_of_the_hub_is_refused(contribute, only, place, tmp_path):
    manifest = contribute("north").manifest
    payload = place(manifest) / PAYLOAD
    payload.rename(tmp_path / "elsewhere")
    payload.symlink_to(tmp_path / "elsewhere")
    assert only().problem == (
        f"{payload} is a symbolic link: a hub must hold the files themselves."
    )


def test_a_replaced_payload_of_the_same_length_is_refused(contribute, only, place, check):
    manifest = contribute("north").manifest
    payload = place(manifest) / PAYLOAD
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)
    size = len(data)
    with says(
        ContributionError,
        f"contribution north/{manifest.id[:12]}: the payload is not what the site signed "
        f"({size} bytes, {size} announced): it is damaged or replaced; "
        "remove its folder from the hub and let the site publish again.",
    ):
        check(only().contribution)


def test_a_cut_payload_is_refused(contribute, only, place, check):
    manifest = contribute("north").manifest
    payload = place(manifest) / PAYLOAD
    payload.write_bytes(payload.read_bytes()[:-100])
    size = manifest.payload.size
    with says(
        ContributionError,
        f"contribution north/{manifest.id[:12]}: the payload is not what the site signed "
        f"({size - 100} bytes, {size} announced): it is damaged or replaced; "
        "remove its folder from the hub and let the site publish again.",
    ):
        check(only().contribution)


def resigned(parcel, post, path):
    """The parcel's manifest for another payload, signed by the site itself."""
    stated = {"sha256": sha256_file(path), "size": path.stat().st_size, "norm": 1.0}
    return post(altered(parcel, payload=stated), path)


def test_the_vector_of_another_site_is_refused(contribute, hub, post, check):
    contribute("south", seed=2)
    parcel, stolen = contribute("north"), contribute("south", seed=3)
    manifest = resigned(parcel, post, stolen.payload)
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    with says(
        ContributionError,
        f"contribution north/{manifest.id[:12]}: the payload is of site 'south': it is refused.",
    ):
        check(entries[manifest.id])


def with_metadata(parcel):
    with TensorFile(parcel.payload) as file:
        return next(iter(file.metadata.items()))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"fc.weight": torch.zeros(2, 2)},
            VectorError,
            ": tensor 'fc.weight' is F32 [2, 2], the base asks for F32 [3, ",
        ),
        ({"fc.weight": None}, VectorError, " lacks the tensor 'fc.weight' that the base has."),
        ({"x": torch.zeros(1)}, VectorError, " has the tensor 'x' that the base does not have."),
        (
            {"fc.bias": torch.tensor([1.0, float("nan"), 1.0])},
            VectorError,
            ": tensor 'fc.bias' holds 1 value(s) that are NaN or infinite: ",
        ),
    ],
    ids=["shape", "missing", "extra", "nan"],
)
def test_a_signed_payload_that_does_not_fit_is_refused(
    contribute, hub, post, check, tmp_path, change, error, sentence
):
    parcel = contribute("north")
    tensors = {k: v for k, v in {**load(parcel.payload), **change}.items() if v is not None}
    write_tensors(tmp_path / "odd", tensors, with_metadata(parcel))
    manifest = resigned(parcel, post, tmp_path / "odd")
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    with pytest.raises(error) as caught:
        check(entries[manifest.id])
    assert sentence in str(caught.value)


def test_a_vector_of_another_base_is_refused_whatever_the_manifest_says(
    contribute, hub, federation, post, check, tmp_path
):
    parcel = contribute("north")
    key, text = with_metadata(parcel)
    text = text.replace(federation.base_fingerprint, ZEROS)
    write_tensors(tmp_path / "odd", load(parcel.payload), (key, text))
    manifest = resigned(parcel, post, tmp_path / "odd")
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    with says(
        BaseMismatchError,
        f"contribution north/{manifest.id[:12]} was taken from the base {ZEROS}, this "
        f"federation's base is {federation.base_fingerprint}: it cannot be merged here.",
    ):
        check(entries[manifest.id])


def test_a_norm_above_the_policy_is_refused(contribute, only, check, federation):
    found = contribute("north").manifest
    strict = federation.model_copy(update={"policy": Policy(maximum_norm=0.001)})
    with says(
        ContributionError,
        f"contribution north/{found.id[:12]} has the norm {found.payload.norm:.4g}, "
        "above the 0.001 of the federation's policy (fewer steps or a lower learning rate give a "
        "smaller one): it is refused.",
    ):
        check(only().contribution, strict)


def test_a_later_contribution_replaces_the_earlier_one(contribute, hub):
    first, second = contribute("north", seed=1), contribute("north", seed=2)
    entries = list_entries(hub, read_federation(hub.root))
    assert second.manifest.supersedes == f"sha256:{first.manifest.id}"
    assert [entry.id for entry in current(entries)] == [second.manifest.id]


def test_a_site_cannot_replace_what_another_one_published(contribute, hub, post):
    theirs, mine = contribute("south"), contribute("north")
    other = post(altered(mine, supersedes=f"sha256:{theirs.manifest.id}"), mine.payload)
    alive = {entry.id for entry in current(list_entries(hub, read_federation(hub.root)))}
    assert alive == {theirs.manifest.id, mine.manifest.id, other.id}


@pytest.mark.parametrize("signed", [True, False])
def test_nobody_can_replace_a_contribution_in_a_sites_name(contribute, hub, post, tmp_path, signed):
    """Without the site's key a manifest may claim to replace; the signed one stays."""
    real = contribute("north")
    claim = altered(real, supersedes=f"sha256:{real.manifest.id}")
    signing.create_key(tmp_path / "forger" / site.KEY_FILE)
    post(claim, real.payload, "forger", sign=signed)
    kept = [e.contribution for e in list_entries(hub, read_federation(hub.root)) if e.contribution]
    assert real.manifest.id in {c.id for c in without_superseded(kept)}


def test_a_stranger_may_replace_its_own(contribute, hub):
    first = contribute("north", seed=1, admit=False)
    second = contribute("north", seed=2, admit=False)
    alive = [entry.id for entry in current(list_entries(hub, read_federation(hub.root)))]
    assert alive == [second.manifest.id] != [first.manifest.id]


def test_a_local_copy_is_checked_alike(contribute, hub, place, tmp_path):
    manifest = contribute("north").manifest
    shutil.copytree(place(manifest), tmp_path / "copy")
    federation = read_federation(hub.root)
    found = read_local(tmp_path / "copy", federation)
    assert (found.id, found.trust) == (manifest.id, Trust.ADMITTED)
    (tmp_path / "copy" / SIGNATURE).write_bytes(b"{}")
    with says(ContributionError, f"{tmp_path} is no contribution: it has no manifest.json; "
              "give a folder as it lies on a hub."):  # fmt: skip
        read_local(tmp_path, federation)
    with pytest.raises(ContributionError, match="is no signature: publish again"):
        read_local(tmp_path / "copy", federation)


def test_what_is_on_the_hub_is_what_was_shown(contribute, place):
    """Three files: the vector's bytes, the canonical manifest, key and signature."""
    parcel = contribute("north")
    folder = place(parcel.manifest)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, SIGNATURE, PAYLOAD]
    assert (folder / MANIFEST).read_bytes() == parcel.manifest.to_bytes()
    assert (folder / PAYLOAD).read_bytes() == parcel.payload.read_bytes()
    assert set(json.loads((folder / SIGNATURE).read_bytes())) == {"key", "signature"}


def test_a_site_that_trained_under_another_contract_is_refused(contribute, hub, tmp_path, only):
    """The coordinator starts again with other classes; the old contribution does not fit."""
    contribute("north")
    federation = read_federation(hub.root)
    text = federation.model_copy(update={"label_schema": 2}).to_yaml()
    hub.replace(FEDERATION_FILE, text.encode(), hub.read(FEDERATION_FILE))
    joined = site.open_site(tmp_path / "north")
    write_run(joined, tmp_path / "run")
    with pytest.raises(Exception, match="ask the coordinator, and join again"):
        publishing.prepare(joined, tmp_path / "run", hub)
    assert "was made for the federation" in only().problem


def test_a_norm_other_than_the_manifest_says_is_refused(contribute, hub, post, check):
    """Policy and status speak of the norm: it must be the payload's own."""
    parcel = contribute("north")
    stated = {**parcel.manifest.payload.model_dump(), "norm": 0.001}
    manifest = post(altered(parcel, payload=stated), parcel.payload)
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    with says(
        ContributionError,
        f"contribution north/{manifest.id[:12]} has the norm "
        f"{parcel.manifest.payload.norm:.4g}, its manifest says 0.001: it is refused.",
    ):
        check(entries[manifest.id])


def test_an_unsound_payload_replaces_nothing(contribute, hub, place):
    first, second = contribute("north", seed=1), contribute("north", seed=2)
    (place(second.manifest) / PAYLOAD).write_bytes(b"")
    federation = read_federation(hub.root)
    entries = check_payloads(
        list_entries(hub, federation), federation, hub.fetch("base/model.safetensors")
    )
    problems = {entry.id: entry.problem for entry in current(entries)}
    assert problems.keys() == {first.manifest.id, second.manifest.id}
    assert problems[first.manifest.id] is None
    assert "(0 bytes, " in problems[second.manifest.id]


# Statistics beside a vector


@pytest.fixture
def beside(hub):
    """The contribution of one kind on the hub."""

    def find(kind):
        entries = list_entries(hub, read_federation(hub.root))
        (found,) = [entry.contribution for entry in entries if entry.kind == kind]
        return found

    return find


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_statistics_are_listed_and_checked_with_their_vector(contribute, hub, beside, check, kind):
    vector = contribute("north", beside=[kind]).manifest
    found = beside(kind)
    assert found.trust is Trust.ADMITTED
    assert speaks_of(found, beside("vector"))
    assert found.manifest.about == vector.payload.sha256
    check(found)
    federation = read_federation(hub.root)
    entries = check_payloads(
        list_entries(hub, federation), federation, hub.fetch("base/model.safetensors")
    )
    assert {entry.kind for entry in entries if entry.contribution.checked} == {"vector", kind}


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_bound_on_the_norm_is_for_vectors_alone(contribute, beside, check, federation, kind):
    contribute("north", beside=[kind])
    norm = beside("vector").manifest.payload.norm
    strict = federation.model_copy(update={"policy": Policy(maximum_norm=1.01 * norm)})
    assert beside(kind).manifest.payload.norm > 1.01 * norm
    check(beside("vector"), strict)
    check(beside(kind), strict)


@pytest.mark.parametrize(
    ("kind", "other", "sentence"),
    [
        ("vector", "fisher", ": unknown key 'about'"),
        ("gram", "fisher", " is announced as gram and holds fisher: it is refused."),
        ("fisher", "gram", " is announced as fisher and holds gram: it is refused."),
        ("fisher", "vector", ": the key 'kind' is missing."),
    ],
)
def test_a_signed_payload_of_another_kind_is_refused(
    contribute, hub, post, check, beside, kind, other, sentence
):
    parcel = contribute("north", beside=["fisher", "gram"])
    payload = beside(other).payload
    stated = {"sha256": sha256_file(payload), "size": payload.stat().st_size, "norm": 1.0}
    changes = {"payload": stated, "created_at": "2026-11-24T12:00:00Z", "kind": kind}
    if kind != "vector":
        changes["about"] = parcel.manifest.payload.sha256
    manifest = post(altered(parcel, **changes), payload)
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    with pytest.raises((ContributionError, VectorError)) as caught:
        check(entries[manifest.id])
    assert sentence in str(caught.value)


def test_statistics_announced_for_another_vector_are_refused(contribute, hub, post, check, beside):
    """Else a site's figures could be hung on a vector that they do not speak of."""
    contribute("north", beside=["fisher"])
    found = beside("fisher")
    changed = {**found.manifest.model_dump(), "about": ZEROS}
    manifest = post(Manifest.model_validate(changed), found.payload)
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    with says(
        ContributionError,
        f"contribution north/{manifest.id[:12]} is announced for the vector {ZEROS} and holds the "
        f"fisher of {found.manifest.about}: it is refused.",
    ):
        check(entries[manifest.id])


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"site": "south"}, ": the payload is of site 'south': it is refused."),
        ({"base": ZEROS}, f" was taken from the base {ZEROS}, this federation's base is "),
        ({"federation": ZEROS}, f" was made for the federation {ZEROS}, this one is "),
    ],
    ids=["site", "base", "federation"],
)
def test_statistics_of_another_site_or_contract_are_refused(
    contribute, hub, check, beside, tmp_path, header, sentence
):
    contribute("north")
    joined, run = site.open_site(tmp_path / "north"), tmp_path / "north" / "runs" / "seed0"
    write_statistics(joined, run, "fisher", header=header)
    publishing.publish(joined, run, hub, publishing.prepare(joined, run, hub, "fisher"))
    with pytest.raises((ContributionError, BaseMismatchError)) as caught:
        check(beside("fisher"))
    assert sentence in str(caught.value)


def test_damaged_statistics_say_what_they_were(contribute, hub, beside, place):
    contribute("north", beside=["gram"])
    (place(beside("gram").manifest) / PAYLOAD).write_bytes(b"")
    federation = read_federation(hub.root)
    entries = check_payloads(
        list_entries(hub, federation), federation, hub.fetch("base/model.safetensors")
    )
    assert {entry.kind: entry.problem is None for entry in entries} == {
        "vector": True, "gram": False,
    }  # fmt: skip


def test_nobody_elses_statistics_speak_of_a_vector(contribute, hub):
    """The same figures by another site, under another key or none, about another vector."""
    parcel = contribute("north", beside=["fisher"])
    contribute("south", beside=["fisher"])
    found = {(e.site, e.kind): e.contribution for e in list_entries(hub, read_federation(hub.root))}
    fisher, vector = found["north", "fisher"], found["north", "vector"]
    assert speaks_of(fisher, vector)
    assert not speaks_of(found["south", "fisher"], vector)
    assert not speaks_of(replace(fisher, key=None), vector)
    assert not speaks_of(replace(fisher, key=found["south", "fisher"].key), vector)
    other = altered(parcel, kind="fisher", about=ZEROS)
    assert not speaks_of(replace(fisher, manifest=other), vector)


def bytes_read():
    """What this process has asked the system to read, from files and caches alike."""
    path = Path("/proc/self/io")
    if not path.is_file():
        pytest.skip("this system does not say what a process reads")
    return int(path.read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def reading(check, only):
    """The result of a check and how many times the payload's size was read for it."""

    def run(federation=None):
        contribution = only().contribution
        begun = bytes_read()
        checked = check(contribution, federation)
        return checked, (bytes_read() - begun) / contribution.manifest.payload.size

    return run


def test_a_payload_is_read_once_and_then_remembered(contribute, hub, reading):
    contribute("north")
    settle(hub.root)
    checked, times = reading()
    assert not checked.remembered
    assert 1 <= times < 1.2
    checked, times = reading()
    assert checked.remembered
    assert times < 0.2


def test_a_remembered_payload_still_has_to_meet_the_policy(contribute, hub, reading, federation):
    found = contribute("north").manifest
    settle(hub.root)
    reading()
    strict = federation.model_copy(update={"policy": Policy(maximum_norm=0.001)})
    with pytest.raises(ContributionError, match=r"above the 0\.001 of the federation's policy"):
        reading(strict)
    assert found.payload.norm > 0.001


def test_a_payload_that_is_replaced_after_it_was_remembered_is_refused(
    contribute, hub, place, reading
):
    manifest = contribute("north").manifest
    settle(hub.root)
    assert reading()[0]
    payload = place(manifest) / PAYLOAD
    content = payload.read_bytes()
    payload.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ContributionError, match="damaged or replaced"):
        reading()


def test_a_remembered_vector_with_a_bad_value_is_refused_by_name_each_time(
    contribute, hub, post, place, check, tmp_path
):
    parcel = contribute("north")
    tensors = {**load(parcel.payload), "fc.bias": torch.tensor([1.0, float("inf"), 1.0])}
    write_tensors(tmp_path / "odd", tensors, with_metadata(parcel))
    manifest = resigned(parcel, post, tmp_path / "odd")
    settle(hub.root)
    entries = {e.id: e.contribution for e in list_entries(hub, read_federation(hub.root))}
    for _ in range(2):
        with says(
            NonFiniteError,
            f"{place(manifest) / PAYLOAD}: tensor 'fc.bias' holds 1 value(s) that are NaN or "
            "infinite: the site must train again and publish a sound vector.",
        ):
            check(entries[manifest.id])


def test_damage_is_said_before_the_format_is(contribute, only, place, check):
    """The digest speaks first, even where the header can no longer be read."""
    manifest = contribute("north").manifest
    payload = place(manifest) / PAYLOAD
    data = bytearray(payload.read_bytes())
    data[7] = 255
    payload.write_bytes(data)
    with pytest.raises(ContributionError, match="not what the site signed") as caught:
        check(only().contribution)
    assert "header" not in str(caught.value)


def test_payloads_are_checked_alike_by_several_threads(contribute, hub, place):
    damaged = [contribute(f"s{n}", seed=n).manifest for n in range(6)][2]
    (place(damaged) / PAYLOAD).write_bytes(b"")
    federation = read_federation(hub.root)
    entries, base = list_entries(hub, federation), hub.fetch("base/model.safetensors")
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(check_payloads(entries, federation, base))
    torch.set_num_threads(threads)
    # Whether a check is remembered depends on the clock: a file has to be two seconds old.
    assert [(e.id, e.problem) for e in found[0]] == [(e.id, e.problem) for e in found[1]]
    assert [e.id for e in found[0]] == [e.id for e in entries]
    assert [e.id for e in found[0] if e.problem] == [damaged.id]


class Recorded(FolderHub):
    """Says what it was asked for, takes its time, and does not answer in one place."""

    def __init__(self, root, silent=None):
        super().__init__(root)
        self.silent, self.asked = silent, []

    def list(self, folder):
        self.asked.append(folder)
        return super().list(folder)

    def read(self, name):
        self.asked.append(name)
        time.sleep(0.02 * (len(self.asked) % 3))  # what was asked last is answered first
        if self.silent and name.startswith(self.silent):
            raise UnreachableError("the line is down.")
        return super().read(name)


def test_entries_read_side_by_side_are_those_that_are_there_in_order(hub, contribute, federation):
    parcels = [contribute(f"s{seed:02d}", seed=seed) for seed in range(12)]
    (hub.root / folder_of(parcels[5].manifest) / MANIFEST).write_text("{}")
    federation = read_federation(hub.root)
    found = list(walk_entries(Recorded(hub.root), federation))
    assert [entry.site for entry in found] == [f"s{seed:02d}" for seed in range(12)]
    assert [entry.site for entry in found if entry.problem] == ["s05"]
    for entry in found:
        assert entry == entry_at(hub, federation, entry.site, entry.id)


def test_a_hub_that_falls_silent_is_not_taken_for_an_empty_one(hub, contribute):
    parcels = [contribute(f"s{seed}", seed=seed) for seed in range(4)]
    silent = Recorded(hub.root, folder_of(parcels[2].manifest))
    with says(UnreachableError, "the line is down."):
        list_entries(silent, read_federation(hub.root))


def test_a_publisher_reads_its_own_entries_alone(hub, contribute, tmp_path):
    contribute("north", seed=1)
    contribute("south", seed=2)
    joined = site.open_site(tmp_path / "north")
    write_run(joined, tmp_path / "north" / "runs" / "seed3", seed=3)
    recorded = Recorded(hub.root)
    parcel = publishing.prepare(joined, tmp_path / "north" / "runs" / "seed3", recorded)
    assert parcel.replaces.site == "north"
    assert not [name for name in recorded.asked if "south" in name]


def test_not_even_the_header_of_what_was_found_sound_is_read_again(
    contribute, hub, only, check, reading, federation, monkeypatch
):
    contribute("north")
    settle(hub.root)
    reading()
    with monkeypatch.context() as closed:
        closed.setattr(payloads, "TensorFile", lambda path: pytest.fail(f"{path} is opened"))
        assert reading()[0].remembered
    other = federation.model_copy(update={"name": "another"})  # another contract: all is checked
    with pytest.raises(BaseMismatchError, match="was made for the federation"):
        reading(other)
    found = only().contribution
    payload = found.manifest.payload
    more = payload.model_copy(update={"norm": 2 * payload.norm})
    told = found.manifest.model_copy(update={"payload": more})
    with pytest.raises(ContributionError, match="has the norm"):
        check(replace(found, manifest=told))

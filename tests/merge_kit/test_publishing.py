"""From a finished run to a contribution on the hub."""

from __future__ import annotations

import pytest

from merge_kit import publishing, signing, site
from merge_kit.contributions import MANIFEST, PAYLOAD, SIGNATURE, current, folder_of, list_entries
from merge_kit.errors import ContributionError, FederationError, VectorError
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.manifest import Manifest
from tests.conftest import write_run
from tests.merge_kit.helpers import listing, says


@pytest.fixture
def north(hub, tmp_path):
    """A joined and admitted site."""
    joined = site.join(hub, "north", tmp_path / "north")
    federation = read_federation(hub.root).admit("north", signing.public_key(joined.key_file))
    hub.replace(FEDERATION_FILE, federation.to_yaml().encode())
    return joined


@pytest.fixture
def run(north):
    """A finished run of the site."""

    def make(seed=0, joined=north):
        folder = north.root / "runs" / f"seed{seed}"
        write_run(joined, folder, seed=seed)
        return folder

    return make


def publish(north, hub, run, **options):
    parcel = publishing.prepare(north, run, hub, **options)
    return parcel, publishing.publish(north, run, hub, parcel)


def alive(hub):
    return [entry.id for entry in current(list_entries(hub, read_federation(hub.root)))]


def test_preparing_sends_and_writes_nothing(north, hub, run):
    folder = run()
    before = listing(folder)
    publishing.prepare(north, folder, hub)
    assert listing(folder) == before
    assert list_entries(hub, read_federation(hub.root)) == []


def test_publishing_twice_gives_one_contribution(north, hub, run):
    folder = run()
    first, new = publish(north, hub, folder)
    again, newer = publish(north, hub, folder)
    assert (new, newer) == (True, False)
    assert again.manifest == first.manifest
    assert alive(hub) == [first.manifest.id]


def test_a_publication_killed_before_it_reached_the_hub_goes_on(north, hub, run):
    """The manifest was written into the run folder; the same contribution arrives."""
    folder = run()
    parcel = publishing.prepare(north, folder, hub)
    (folder / MANIFEST).write_bytes(parcel.manifest.to_bytes())
    assert publish(north, hub, folder) == (parcel, True)


def test_a_run_that_never_arrived_replaces_what_arrived_meanwhile(north, hub, run):
    late = run(1)
    publishing.write_atomic(
        late / MANIFEST, publishing.prepare(north, late, hub).manifest.to_bytes()
    )
    quick, _ = publish(north, hub, run(2))
    parcel, _ = publish(north, hub, late)
    assert parcel.manifest.supersedes == f"sha256:{quick.manifest.id}"
    assert alive(hub) == [parcel.manifest.id]


def test_a_damaged_copy_on_the_hub_is_named_and_not_overwritten(north, hub, run):
    folder = run()
    parcel, _ = publish(north, hub, folder)
    place = folder_of(parcel.manifest)
    (hub.root / place / PAYLOAD).write_bytes(b"cut")
    with says(
        ContributionError,
        f"{hub.root}/{place} is there already, but damaged: ask the coordinator to remove this "
        "folder, then publish again.",
    ):
        publish(north, hub, folder)
    assert hub.read(f"{place}/{PAYLOAD}") == b"cut"


def test_the_policy_of_today_hides_small_counts(north, hub, run, federation):
    """The coordinator has raised the minimum since the run."""
    folder = run()
    strict = federation.model_copy(update={"policy": Policy(minimum_class_count=50)})
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode())
    counts = publishing.prepare(north, folder, hub).manifest.class_counts
    assert set(counts.values()) == {"<50"}


def test_a_new_run_replaces_the_old_one(north, hub, run):
    first, _ = publish(north, hub, run(1))
    second, _ = publish(north, hub, run(2))
    assert second.replaces is not None
    assert second.replaces.id == first.manifest.id
    assert alive(hub) == [second.manifest.id]


def test_a_third_run_replaces_the_second(north, hub, run):
    parcels = [publish(north, hub, run(seed))[0] for seed in (1, 2, 3)]
    assert parcels[2].manifest.supersedes == f"sha256:{parcels[1].manifest.id}"
    assert alive(hub) == [parcels[2].manifest.id]


def test_alongside_keeps_both(north, hub, run):
    first, _ = publish(north, hub, run(1))
    second, _ = publish(north, hub, run(2), alongside=True)
    assert (second.manifest.supersedes, second.replaces) == (None, None)
    assert sorted(alive(hub)) == sorted([first.manifest.id, second.manifest.id])


def test_a_forgery_in_the_sites_name_is_not_what_a_new_run_replaces(north, hub, run):
    """An unsigned manifest with a later date must not shield the old contribution."""
    first, _ = publish(north, hub, run(1))
    later = {"created_at": "2027-01-01T00:00:00Z"}
    forged = Manifest.model_validate({**first.manifest.model_dump(), **later})
    hub.publish(folder_of(forged), {MANIFEST: forged.to_bytes(), "payload.safetensors": b""})
    second, _ = publish(north, hub, run(2))
    assert second.manifest.supersedes == f"sha256:{first.manifest.id}"


def test_the_signature_is_the_sites(north, hub, run):
    parcel, _ = publish(north, hub, run())
    (entry,) = list_entries(hub, read_federation(hub.root))
    assert entry.contribution.key == signing.public_key(north.key_file)
    assert hub.has(f"{folder_of(parcel.manifest)}/{SIGNATURE}")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_changed_vector_is_refused(north, hub, run, damage):
    folder = run()
    path = folder / publishing.VECTOR
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with says(
        ContributionError,
        f"{path} is not the vector that the run made: it is missing or was changed; "
        "run 'merge-kit finetune' again.",
    ):
        publishing.prepare(north, folder, hub)


def test_an_unfinished_run_is_refused(north, hub, tmp_path):
    draft = tmp_path / publishing.DRAFT
    with says(
        ContributionError,
        f"{draft} does not exist: the run is not finished; run 'merge-kit finetune' again.",
    ):
        publishing.prepare(north, tmp_path, hub)


def test_the_run_of_another_site_is_refused(north, hub, run, tmp_path):
    """It would be signed with the wrong key, and refused by everybody."""
    folder = run(joined=site.join(hub, "south", tmp_path / "south"))
    with says(
        ContributionError,
        f"{folder} is a run of site 'south' and not of 'north': "
        "publish it from its own site's folder.",
    ):
        publishing.prepare(north, folder, hub)


def test_a_run_under_another_contract_is_refused(north, hub, run, federation):
    other = federation.model_copy(update={"label_schema": 2})
    folder = run(joined=site.Site(north.root, north.config, other))
    with says(
        ContributionError,
        f"{folder} was trained for the contract {other.contract_hash}, site 'north' joined "
        f"{federation.contract_hash}: run 'merge-kit finetune' again.",
    ):
        publishing.prepare(north, folder, hub)


def test_a_contract_that_changed_on_the_hub_is_refused(north, hub, run, federation):
    folder = run()
    other = federation.model_copy(update={"label_schema": 2})
    hub.replace(FEDERATION_FILE, other.to_yaml().encode())
    with says(
        FederationError,
        f"{hub.root} holds the contract {other.contract_hash}, site 'north' joined "
        f"{federation.contract_hash}: ask the coordinator, and join again if the change is wanted.",
    ):
        publishing.prepare(north, folder, hub)


def test_a_norm_above_the_policy_is_refused_at_the_site(north, hub, run, federation):
    folder = run()
    strict = federation.model_copy(update={"policy": Policy(maximum_norm=0.001)})
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode())
    norm = publishing.read_draft(folder / publishing.DRAFT).payload.norm
    with says(
        VectorError,
        f"{folder / publishing.VECTOR} has the norm {norm:.4g}, above the policy's 0.001: "
        "train with fewer steps or a lower learning rate.",
    ):
        publishing.prepare(north, folder, hub)

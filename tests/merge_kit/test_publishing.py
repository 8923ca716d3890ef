"""From a finished run to a contribution on the hub."""

from __future__ import annotations

import pytest

from merge_kit import publishing, signing, site
from merge_kit.contributions import MANIFEST, PAYLOAD, SIGNATURE, current, folder_of, list_entries
from merge_kit.errors import ContributionError, FederationError, PolicyError
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.manifest import Manifest
from tests.conftest import write_run, write_statistics
from tests.merge_kit.helpers import listing, says


@pytest.fixture
def north(hub, tmp_path):
    """A joined and admitted site."""
    joined = site.join(hub, "north", tmp_path / "north")
    federation = read_federation(hub.root).admit("north", signing.public_key(joined.key_file))
    hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
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
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode(), hub.read(FEDERATION_FILE))
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
    hub.replace(FEDERATION_FILE, other.to_yaml().encode(), hub.read(FEDERATION_FILE))
    with says(
        FederationError,
        f"{hub.root} holds the contract {other.contract_hash}, site 'north' joined "
        f"{federation.contract_hash}: ask the coordinator, and join again if the change is wanted.",
    ):
        publishing.prepare(north, folder, hub)


def test_a_norm_above_the_policy_is_refused_at_the_site(north, hub, run, federation):
    folder = run()
    strict = federation.model_copy(update={"policy": Policy(maximum_norm=0.001)})
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode(), hub.read(FEDERATION_FILE))
    norm = publishing.read_draft(folder / publishing.DRAFT).payload.norm
    with says(
        PolicyError,
        f"the vector has the norm {norm:.4g}, above the 0.001 of the federation's policy (fewer "
        "steps or a lower learning rate give a smaller one): nothing was sent.",
    ):
        publishing.prepare(north, folder, hub)


# Statistics beside a vector


def publish_all(north, hub, run, **options):
    parcels = publishing.prepare_all(north, run, hub, **options)
    return [(p.manifest, publishing.publish(north, run, hub, p)) for p in parcels]


@pytest.fixture
def full(north, run):
    """A finished run with statistics of both kinds."""

    def make(seed=0):
        folder = run(seed)
        for kind in ("gram", "fisher"):
            write_statistics(north, folder, kind, seed=seed)
        return folder

    return make


def test_the_vector_goes_first_and_then_the_statistics_that_there_are(north, hub, run):
    folder = run()
    assert [m.kind for m, _ in publish_all(north, hub, folder)] == ["vector"]
    write_statistics(north, folder, "gram")
    assert [(m.kind, new) for m, new in publish_all(north, hub, folder)] == [
        ("vector", False),
        ("gram", True),
    ]


def test_each_is_a_contribution_of_its_own(north, hub, full):
    published = publish_all(north, hub, full())
    vector = published[0][0]
    assert [m.kind for m, _ in published] == ["vector", "fisher", "gram"]
    assert [m.about for m, _ in published] == [None, *[vector.payload.sha256] * 2]
    for manifest, _ in published:
        assert listing(hub.root / folder_of(manifest)) == [MANIFEST, SIGNATURE, PAYLOAD]
        assert hub.read(f"{folder_of(manifest)}/{MANIFEST}") == manifest.to_bytes()
    assert sorted(alive(hub)) == sorted(m.id for m, _ in published)


def test_publishing_everything_twice_changes_nothing(north, hub, full):
    folder = full()
    first, again = publish_all(north, hub, folder), publish_all(north, hub, folder)
    assert [m for m, _ in again] == [m for m, _ in first]
    assert [new for _, new in again] == [False] * 3


def test_a_vector_replaces_a_vector_and_statistics_their_like_about_the_same(north, hub, full):
    old, folder = publish_all(north, hub, full(1)), full(2)
    new = publish_all(north, hub, folder)
    assert [m.supersedes for m, _ in new] == [f"sha256:{old[0][0].id}", None, None]
    write_statistics(north, folder, "fisher", seed=9)
    again = publish_all(north, hub, folder)
    assert [m.supersedes for m, _ in again] == [
        f"sha256:{old[0][0].id}",
        f"sha256:{new[1][0].id}",
        None,
    ]
    assert new[1][0].id not in alive(hub)


def test_a_vector_alongside_keeps_the_other_and_its_statistics(north, hub, full):
    folder = full(2)
    first = publish_all(north, hub, full(1))
    second = publish_all(north, hub, folder, alongside=True)
    assert sorted(alive(hub)) == sorted(m.id for m, _ in (*first, *second))
    write_statistics(north, folder, "gram", seed=9)
    third = publish_all(north, hub, folder, alongside=True)
    assert third[2][0].supersedes == f"sha256:{second[2][0].id}"


def test_statistics_are_held_back_when_the_site_says_so(north, hub, full, run_cli):
    folder = full()
    result = run_cli("publish", north.root, "--run", folder, "--no-statistics")
    assert result.exit_code == 0, result.stderr
    assert "  held back    fisher, gram\n" in result.stdout
    assert [entry.kind for entry in list_entries(hub, read_federation(hub.root))] == ["vector"]
    assert not list(folder.glob("*.manifest.json"))
    assert "held back" not in run_cli("publish", north.root, "--run", folder).stdout


def test_statistics_of_another_vector_are_refused_at_the_site(north, hub, full):
    """The run was made again, on a GPU, and gave other bytes."""
    folder = full()
    write_run(north, folder, seed=5)
    with says(
        ContributionError,
        f"{folder}/fisher.safetensors speaks of another vector than {folder}/vector.safetensors: "
        f"run 'merge-kit statistics' again, or remove {folder}/fisher.manifest.draft.json.",
    ):
        publishing.prepare_all(north, folder, hub)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_changed_statistics_are_refused(north, hub, full, damage):
    folder = full()
    path = folder / "gram.safetensors"
    path.unlink()
    if damage == "changed":
        path.write_bytes(b"x")
    with says(
        ContributionError,
        f"{path} is not the gram that was made: it is missing or was changed; "
        "run 'merge-kit statistics' again.",
    ):
        publishing.prepare_all(north, folder, hub)


def test_the_policy_hides_small_counts_of_statistics_too(north, hub, full, federation):
    """The bound on the norm is one for vectors alone: statistics have other units."""
    folder = full()
    norm = publishing.read_draft(folder / publishing.DRAFT).payload.norm
    policy = Policy(minimum_class_count=50, maximum_norm=1.01 * norm)
    strict = federation.model_copy(update={"policy": policy})
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode(), hub.read(FEDERATION_FILE))
    for manifest, _ in publish_all(north, hub, folder):
        assert set(manifest.class_counts.values()) == {"<50"}
        assert (manifest.payload.norm > 1.01 * norm) is (manifest.kind != "vector")

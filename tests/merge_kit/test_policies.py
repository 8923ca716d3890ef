"""Policies: what leaves a site, and what may be merged; in doubt nothing."""

from __future__ import annotations

import json

import pytest

from merge_kit import auditlog, policies, publishing, signing, site
from merge_kit.contributions import folder_of, list_entries
from merge_kit.errors import PolicyError
from merge_kit.federation import FEDERATION_FILE, Bounds, Policy, read_federation
from merge_kit.hub import open_hub
from merge_kit.manifest import Manifest
from merge_kit.policies import POLICY_FILE
from tests.conftest import write_run

OTHER = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="


@pytest.fixture
def north(hub, tmp_path):
    """A site with a finished run."""
    joined = site.join(hub, "north", tmp_path / "north")
    write_run(joined, joined.root / "runs" / "a", seed=1)
    return joined.root


@pytest.fixture
def publish(run_cli, north):
    """The command; gives the exit code and what it said."""

    def go(*arguments):
        found = run_cli("publish", north, "--run", north / "runs" / "a", *arguments)
        return found.exit_code, found.output + found.stderr

    return go


def nothing_left(hub, north):
    return not (hub.root / "contributions").exists() and not (north / auditlog.LOG).exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("minimum_examples: 1000", "counts 60 training images for certain, and the site's own"),
        ("maximum_norm: 0.001", "above the 0.001 of the site's own policy"),
        ("maximum_epsilon: 8", "states no differential privacy, and the site's own policy asks"),
        ("allowed_hubs: [s3://hospital]", "lets nothing go to"),
        ("allowed_hubs: []", "it allows no hub: nothing was sent."),
        ("allowed_kinds: [moments]", "does not let vector leave the site; it allows moments"),
        ("allowed_kinds: []", "it allows nothing: nothing was sent."),
        ("forbidden_fields: [training]", "does not let the field 'training' of a manifest leave"),
        ("second_signature: [OTHER]", "has to be approved by a second person before it leaves"),
        ("second_signature: [KEY]", "names the site's own key under 'second_signature'"),
        ("maximum_nrom: 1", "unknown key 'maximum_nrom'; did you mean 'maximum_norm'?"),
        ("maximum_norm: none", "'maximum_norm': input should be a valid number"),
        ("maximum_norm: -1", "'maximum_norm': input should be greater than 0"),
        ("forbidden_fields: [payload]", "'forbidden_fields"),
        ("second_signature: [me]", "is no public key"),
        ("maximum_norm: [", "not valid YAML"),
        ("", "must hold keys and values (YAML mapping)."),
    ],
    ids=lambda value: value[:30],
)
def test_what_the_site_does_not_allow_does_not_leave_it(hub, north, publish, text, sentence):
    key = signing.public_key(north / "keys" / "site.pem")
    (north / POLICY_FILE).write_text(text.replace("KEY", key).replace("OTHER", OTHER) + "\n")
    for arguments in ((), ("--dry-run",)):
        code, said = publish(*arguments)
        if arguments and "second" in text and "me" not in text:
            continue  # what would leave may be looked at before it is approved
        assert code == 1, said
        assert sentence in said
    assert nothing_left(hub, north)


def test_a_policy_that_cannot_be_read_lets_nothing_go(hub, north, publish):
    (north / POLICY_FILE).symlink_to(north / "gone.yaml")
    code, said = publish()
    assert code == 1
    assert POLICY_FILE in said
    assert nothing_left(hub, north)


def test_a_policy_that_all_meets_lets_it_go(hub, north, publish):
    (north / POLICY_FILE).write_text(
        f"minimum_examples: 60\nmaximum_norm: 1000\nallowed_hubs: [{hub.root}]\n"
        "allowed_kinds: [vector]\nforbidden_fields: [privacy, other_images]\n"
    )
    code, said = publish()
    assert code == 0, said


@pytest.mark.parametrize("federations", [1.0, 1000.0])
def test_the_federation_cannot_loosen_what_the_site_asks(hub, north, publish, federations):
    federation = read_federation(hub.root)
    loose = federation.model_copy(update={"policy": Policy(maximum_norm=federations)})
    hub.replace(FEDERATION_FILE, loose.to_yaml().encode(), hub.read(FEDERATION_FILE))
    (north / POLICY_FILE).write_text("maximum_norm: 0.5\n")
    assert publish()[0] == 1
    assert nothing_left(hub, north)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Policy(minimum_examples=61), "counts 60 training images for certain, and the federation"),
        (
            Policy(maximum_epsilon=3.0),
            "states no differential privacy, and the federation's policy",
        ),
        (Policy(maximum_norm=0.001), "above the 0.001 of the federation's policy"),
    ],
    ids=["examples", "epsilon", "norm"],
)
def test_the_federations_policy_holds_at_the_site_and_at_the_merger(
    hub, north, publish, policy, sentence
):
    code, _ = publish()
    assert code == 0
    strict = read_federation(hub.root).model_copy(update={"policy": policy})
    hub.replace(FEDERATION_FILE, strict.to_yaml().encode(), hub.read(FEDERATION_FILE))
    (entry,) = list_entries(hub, read_federation(hub.root))
    assert sentence in entry.problem
    code, said = publish()
    assert code == 1
    assert sentence in said


def test_hidden_counts_count_as_one_image(contribute):
    """Whoever asks for ten images is not satisfied by five times "<5"."""
    few = contribute("few", counts={"round": 4, "lobed": 9, "granular": 3})
    assert few.manifest.class_counts == {"round": "<5", "lobed": 9, "granular": "<5"}
    assert policies.examples_of(few.manifest) == 11
    bounds = Bounds(minimum_examples=11)
    assert policies.breach(few.manifest, bounds, "x") is None
    assert policies.breach(few.manifest, Bounds(minimum_examples=12), "x")


def test_a_stated_epsilon_is_held_against_the_bound(contribute):
    manifest = contribute("north").manifest
    stated = {"privacy": {"epsilon": 4.0, "delta": 1e-5}}
    told = Manifest.model_validate({**manifest.model_dump(mode="json"), **stated})
    assert policies.breach(told, Bounds(maximum_epsilon=4.0), "x") is None
    found = policies.breach(told, Bounds(maximum_epsilon=3.9), "the policy")
    assert found == "states an epsilon of 4, above the 3.9 of the policy"


@pytest.mark.parametrize(
    ("place", "allowed", "fits"),
    [
        ("s3://a/b", "s3://a/b", True),
        ("s3://a/b/c", "s3://a/b", True),
        ("s3://a/b/c", "s3://a/b/", True),
        ("s3://a/bc", "s3://a/b", False),
        ("s3://a", "s3://a/b", False),
        ("/srv/hub", "/srv", True),
        ("/srv2/hub", "/srv", False),
        ("/srv/../etc/hub", "/srv", False),
        ("/etc/../srv/hub", "/srv", True),
        ("/srv/hub", "file:///srv", True),
        ("/srv/hub", "srv", False),
        ("/srv/hub", "", False),
        ("s3://a/b/../c", "s3://a/b", False),
        ("s3://a/b/./c", "s3://a/b", False),
        ("sftp://me@host/b/../c", "sftp://me@host/b", False),
    ],
)
def test_hubs_are_allowed_by_whole_parts(contribute, place, allowed, fits):
    manifest = contribute("north").manifest
    policy = policies.SitePolicy.model_construct(allowed_hubs=(allowed,))
    if fits:
        policies.check_site(manifest, policy, place)
    else:
        with pytest.raises(PolicyError):
            policies.check_site(manifest, policy, place)


@pytest.mark.parametrize("way", ["dots", "link"])
def test_no_way_round_leads_to_a_hub_that_is_not_allowed(hub, north, publish, tmp_path, way):
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to(hub.root)
    place = tmp_path / "allowed" / ("link" if way == "link" else f"../{hub.root.name}")
    (north / POLICY_FILE).write_text(f"allowed_hubs: [{tmp_path / 'allowed'}]\n")
    code, said = publish("--hub", place)
    assert code == 1
    assert "the site's own policy lets nothing go to" in said
    assert nothing_left(hub, north)


def test_a_link_to_an_allowed_hub_is_allowed(hub, north, publish, tmp_path):
    (tmp_path / "link").symlink_to(hub.root)
    (north / POLICY_FILE).write_text(f"allowed_hubs: [{tmp_path / 'link'}]\n")
    code, said = publish()
    assert code == 0, said


# A second person


@pytest.fixture
def second(north, tmp_path):
    """Somebody whose approval the site's policy asks for."""
    key = signing.create_key(tmp_path / "second.pem")
    (north / POLICY_FILE).write_text(f"second_signature: [{key}]\n")
    return tmp_path / "second.pem"


def test_with_the_second_signature_it_leaves(hub, north, publish, second, ok):
    said = ok("approve", north, "--run", north / "runs" / "a", "--key", second)
    assert "Dry run: nothing was sent" in said
    assert f"Approved by {signing.public_key(second)}: vector" in said
    assert not (hub.root / "contributions").exists()
    code, said = publish()
    assert code == 0, said


def test_an_approval_is_of_one_contribution(hub, north, publish, second, ok, run_cli):
    ok("approve", north, "--run", north / "runs" / "a", "--key", second)
    write_run(site.open_site(north), north / "runs" / "b", seed=2)
    found = run_cli("publish", north, "--run", north / "runs" / "b")
    assert found.exit_code == 1
    assert "has to be approved by a second person" in found.stderr


def test_only_whom_the_policy_names_approves(north, publish, second, run_cli, ok, tmp_path):
    other = tmp_path / "other.pem"
    signing.create_key(other)
    found = run_cli("approve", north, "--run", north / "runs" / "a", "--key", other)
    assert found.exit_code == 1
    assert "does not name under 'second_signature'" in found.stderr
    # Nor does an approval that somebody else has written by hand.
    ok("approve", north, "--run", north / "runs" / "a", "--key", second)
    (path,) = (north / policies.APPROVALS).iterdir()
    joined = site.open_site(north)
    parcel = publishing.prepare(joined, north / "runs" / "a", open_hub(joined.config.hub))
    forged = signing.sign(other, signing.APPROVAL_CONTEXT, parcel.manifest.to_bytes())
    path.write_text(json.dumps({"key": forged.key, "signature": forged.signature}))
    code, said = publish()
    assert code == 1
    assert "which the site's own policy does not name" in said
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "key": signing.public_key(second)}))
    assert "has to be approved by a second person" in publish()[1]


def test_the_sites_own_signature_is_no_second_one(north, second, run_cli, publish, hub):
    own = signing.public_key(north / "keys" / "site.pem")
    (north / POLICY_FILE).write_text(f"second_signature: [{signing.public_key(second)}, {own}]\n")
    for key in (second, north / "keys" / "site.pem"):
        found = run_cli("approve", north, "--run", north / "runs" / "a", "--key", key)
        assert found.exit_code == 1
        assert (
            f"{north / POLICY_FILE} names the site's own key under 'second_signature': let a second"
            in found.stderr
        )
    assert not (north / policies.APPROVALS).exists()


def test_the_commands_of_two_people_are_named_with_all_their_options(
    hub, north, publish, second, ok, run_cli
):
    run = north / "runs" / "a"
    code, said = publish("--compress", "topk:0.5")
    assert code == 1
    assert f"run 'merge-kit approve {north} --run {run} --key <their key>'" in said
    said = ok(
        "approve", north, "--run", run, "--key", second, "--hub", hub.root, "--alongside",
        "--no-statistics", "--compress", "topk:0.5",
    )  # fmt: skip
    command = f"merge-kit publish {north} --run {run} --hub {hub.root} --alongside --no-statistics"
    assert f"{command} --compress topk:0.5\n" in said
    shown = said.split("merge-kit publish ")[1].split()
    assert run_cli("publish", *shown).exit_code == 0


def test_what_was_approved_and_published_stays_so(hub, north, publish, second, ok):
    ok("approve", north, "--run", north / "runs" / "a", "--key", second)
    assert publish()[0] == 0
    code, said = publish()
    assert code == 0
    assert "Already published" in said
    (entry,) = list_entries(hub, read_federation(hub.root))
    assert folder_of(entry.contribution.manifest).endswith(entry.id)


def test_what_a_count_is_of_is_summed_by_kind(contribute):
    """Groups and images of no class count; of images with several classes each counts once."""
    manifest = contribute("north").manifest
    told = manifest.model_copy(update={"group_counts": {"white": 7, "odd": "<5"}})
    assert policies.examples_of(told) == policies.examples_of(manifest) + 8
    told = manifest.model_copy(update={"other_images": 9})
    assert policies.examples_of(told) == policies.examples_of(manifest) + 9
    assert policies.examples_of(manifest.model_copy(update={"images": 40})) == 40
    assert policies.examples_of(manifest.model_copy(update={"images": "<5"})) == 1


def test_the_largest_norm_is_of_vectors_alone(contribute):
    """A Fisher diagonal has no step length."""
    manifest = contribute("north").manifest
    bounds = Bounds(maximum_norm=manifest.payload.norm / 2)
    assert policies.breach(manifest, bounds, "x")
    assert policies.breach(manifest.model_copy(update={"kind": "fisher"}), bounds, "x") is None


def test_an_approval_is_signed_as_one(north, second, ok, publish):
    """A signature that the second person has given to something else is none."""
    ok("approve", north, "--run", north / "runs" / "a", "--key", second)
    joined = site.open_site(north)
    parcel = publishing.prepare(joined, north / "runs" / "a", open_hub(joined.config.hub))
    (path,) = (north / policies.APPROVALS).iterdir()
    signed = signing.sign(second, signing.MANIFEST_CONTEXT, parcel.manifest.to_bytes())
    path.write_text(json.dumps({"key": signed.key, "signature": signed.signature}))
    code, said = publish()
    assert code == 1
    assert "has to be approved by a second person" in said


def test_the_policy_is_read_again_before_anything_leaves(hub, north):
    joined = site.open_site(north)
    parcel = publishing.prepare(joined, north / "runs" / "a", hub)
    (north / POLICY_FILE).write_text("allowed_kinds: []\n")
    with pytest.raises(PolicyError, match="it allows nothing: nothing was sent"):
        publishing.publish(joined, north / "runs" / "a", hub, parcel)
    assert nothing_left(hub, north)

"""Hubs of sites' own: whoever has one speaks for itself alone, and hides nothing in silence."""

from __future__ import annotations

import shutil

import pytest

from merge_kit import copies, signing, site
from merge_kit.contributions import PAYLOAD, folder_of
from merge_kit.federation import FEDERATION_FILE
from merge_kit.hub import FolderHub
from merge_kit.schema import now
from tests.merge_kit.attacks.test_signatures import note


@pytest.fixture
def home(field):
    """A hub of its own for a site, north's or mallory's, which that site can write at will."""

    def make(name):
        place = field.root / f"hub-of-{name}"
        place.mkdir()
        joined = site.join(field.hub, name, field.root / name)
        key = signing.public_key(joined.key_file)
        field.ok("admit", field.hub.root, name, key, "--hub", place)
        return place

    return make


def foreign(place, entry):
    return (
        f"{place}/{entry} lies in the hub of site 'mallory', which speaks for itself alone: it is "
        "refused; ask site 'mallory' to remove it."
    )


def test_the_contribution_of_another_site_in_an_own_hub(field, home):
    """A sound one, which that site had signed and never sent: it is merged for nobody."""
    place, entry = home("mallory"), folder_of(field.north.manifest)
    shutil.copytree(field.hub.root / entry, place / entry)
    shutil.rmtree(field.hub.root / entry)
    field.before("--exclude", "mallory")
    field.refused(foreign(place, entry), "mallory")
    field.ignored("--site", "south")


def test_a_forgery_in_the_name_of_another_site_in_an_own_hub(field, home):
    field.before()
    parcel, place = field.mallory(), home("mallory")
    manifest = field.altered(parcel, site="north")
    hub, field.hub = field.hub, FolderHub(place)
    entry = field.put(manifest, parcel.payload, "mallory")
    field.hub = hub
    field.refused(foreign(place, entry), "mallory")


def test_the_withdrawal_of_another_site_in_an_own_hub(field, home):
    """Well-formed, even signed by the victim's own key: north's contribution stays what it is."""
    field.before()
    place = home("mallory")
    hub, field.hub = field.hub, FolderHub(place)
    entry = note(field, field.north, field.key("north"))
    field.hub = hub
    field.refused(foreign(place, entry), "mallory")


def test_a_federation_file_in_an_own_hub(field, home):
    """Nobody reads it, nor a base beside it."""
    field.before()
    place = home("mallory")
    shutil.copytree(field.hub.root / "base", place / "base")
    text = (field.hub.root / FEDERATION_FILE).read_text()
    (place / FEDERATION_FILE).write_text(text.replace("name: cells", "name: other"))
    (place / "copy.yaml").write_text("rubbish")
    field.ignored()


def test_a_damaged_copy_on_the_federations_hub_of_what_an_own_hub_holds(field, home):
    """Whoever may write to the federation's hub stops nobody who has a hub of its own."""
    field.before()
    place, entry = home("north"), folder_of(field.north.manifest)
    shutil.copytree(field.hub.root / entry, place / entry)
    (field.hub.root / entry / "manifest.json").write_text("{}")
    field.ignored()
    shutil.rmtree(field.hub.root / entry)
    field.ignored()


def test_a_forged_withdrawal_hides_no_true_one(field, home):
    """The attacker's note, on either hub, beside the site's own: it stays withdrawn."""
    field.before("--exclude", "north")
    place = home("north")
    field.mallory()
    note(field, field.north, field.key("mallory"))
    field.ok("withdraw", field.root / "north", "--all")
    field.ignored()
    mine, theirs = (root / "withdrawals" / "north" for root in (place, field.hub.root))
    mine.rename(field.root / "kept")
    theirs.rename(mine)
    (field.root / "kept").rename(theirs)
    field.ignored()


def test_an_address_that_was_changed_by_whoever_may_write(field, tmp_path, ok, run_cli):
    """The coordinator has signed it with everything else."""
    hub, place = tmp_path / "signed", tmp_path / "hub-of-north"
    place.mkdir()
    ok("init", hub, "--backbone", "test_resnet", "--weights", "none", "--input-size", 32,
       "--classes", "a,b")  # fmt: skip
    joined = site.join(FolderHub(hub), "north", tmp_path / "joined")
    ok("admit", hub, "north", signing.public_key(joined.key_file), "--hub", place)
    text = (hub / FEDERATION_FILE).read_text()
    (hub / FEDERATION_FILE).write_text(text.replace(str(place), str(tmp_path / "mallorys")))
    refused = run_cli("merge", hub, "--out", tmp_path / "refused")
    assert refused.exit_code == 1
    assert "is not as its coordinator has signed it" in refused.stderr


def test_an_own_hub_that_was_taken_away(field, home, tmp_path):
    """A site is left out by whoever merges, never by whoever can cut the line."""
    place, entry = home("north"), folder_of(field.north.manifest)
    shutil.copytree(field.hub.root / entry, place / entry)
    shutil.rmtree(field.hub.root / entry)
    place.rename(tmp_path / "away")
    for options in ((), ("--skip-refused",)):
        refused = field.run_cli("merge", field.hub.root, "--out", field.root / "refused", *options)
        assert refused.exit_code == 1
        assert f"the hub of site 'north', {place}, cannot be asked (" in refused.stderr
        assert refused.stderr.endswith("leave the site out with --exclude north.\n")


def test_a_copys_note_planted_to_hide_an_own_hub(field, home):
    """Every command that goes by it says so; and it hides nothing of a hub at another address."""
    place, payload = home("north"), field.hub.root / folder_of(field.north.manifest) / PAYLOAD
    content, federation = payload.read_bytes(), field.federation()
    field.ok("withdraw", field.root / "north", "--all")  # on both hubs
    shutil.rmtree(field.hub.root / "withdrawals")
    payload.write_bytes(content)
    field.before("--exclude", "north")
    told = {"site": "north", "hub": str(place), "asked": now()}
    elsewhere = copies.CopiedHub.model_validate({**told, "hub": "/elsewhere"})
    copies.write(field.hub, federation, {"north": elsewhere})
    field.ignored()
    copies.write(field.hub, federation, {"north": copies.CopiedHub.model_validate(told)})
    said = field.run_cli("merge", field.hub.root, "--out", field.root / "hidden")
    assert said.stderr.startswith(
        f"Note: {field.hub.root} is a copy, and the own hubs of north are not asked: what is newer "
    )


def test_a_copys_note_that_cannot_be_read(field, home):
    home("north")
    (field.hub.root / copies.FILE).write_text("hubs: [")
    refused = field.run_cli("merge", field.hub.root, "--out", field.root / "refused")
    assert refused.exit_code == 1
    assert f"{field.hub.root / copies.FILE}, line 1: not valid YAML." in refused.stderr

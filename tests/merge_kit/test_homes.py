"""Hubs that sites have of their own: who has one, what counts there, and what is read."""

from __future__ import annotations

import pytest
import yaml

from merge_kit import signing, site
from merge_kit.federation import FEDERATION_FILE, read_federation


@pytest.fixture
def own(tmp_path):
    """A folder for a site's own hub."""

    def make(name):
        place = tmp_path / f"hub-of-{name}"
        place.mkdir()
        return place

    return make


@pytest.fixture
def key_of(hub, tmp_path):
    """Join as a site; gives its public key."""

    def join(name):
        return signing.public_key(site.join(hub, name, tmp_path / name).key_file)

    return join


def hubs(hub):
    return read_federation(hub.root).own_hubs


# Who has one.


def test_admitting_a_site_with_a_hub_of_its_own(hub, key_of, own, ok):
    place, key = own("north"), key_of("north")
    said = ok("admit", hub.root, "north", key, "--hub", place)
    assert f"  its own hub  {place}\n" in said
    (told,) = yaml.safe_load((hub.root / FEDERATION_FILE).read_text())["sites"]
    assert told == {"name": "north", "public_key": key, "hub": str(place)}
    assert "is admitted already" in ok("admit", hub.root, "north", key)
    assert hubs(hub) == {"north": str(place)}


def test_a_federation_without_such_hubs_keeps_its_bytes(hub, key_of, ok):
    ok("admit", hub.root, "north", key_of("north"))
    assert "hub" not in yaml.safe_load((hub.root / FEDERATION_FILE).read_text())["sites"][0]
    assert b'"hub"' not in read_federation(hub.root).to_sign()


def test_the_hub_of_a_site_changes_and_goes(hub, key_of, own, ok):
    first, second, key = own("first"), own("second"), key_of("north")
    ok("admit", hub.root, "north", key)
    ok("admit", hub.root, "north", key, "--hub", first)
    ok("admit", hub.root, "north", key, "--hub", second)
    assert hubs(hub) == {"north": str(second)}
    assert "its own hub  none" in ok("admit", hub.root, "north", key, "--hub", "none")
    assert hubs(hub) == {}
    assert "is admitted already" in ok("admit", hub.root, "north", key, "--hub", "none")


def test_rotation_revocation_and_admission_anew_leave_the_hub(hub, key_of, own, ok, tmp_path):
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    _, fresh = site.rotate_key(site.open_site(tmp_path / "north"))
    ok("admit", hub.root, "north", fresh, "--rotate")
    assert hubs(hub) == {"north": str(place)}
    ok("revoke", hub.root, "north")
    assert hubs(hub) == {"north": str(place)}
    _, fresh = site.rotate_key(site.open_site(tmp_path / "north"))
    ok("admit", hub.root, "north", fresh)
    assert hubs(hub) == {"north": str(place)}


def test_two_sites_have_no_hub_in_common(hub, key_of, own, ok, run_cli):
    place = own("north")
    ok("admit", hub.root, "north", key_of("north"), "--hub", place)
    ok("revoke", hub.root, "north")
    refused = run_cli("admit", hub.root, "south", key_of("south"), "--hub", place)
    assert refused.exit_code == 1
    assert f"{place} is the hub of the site 'north'" in refused.stderr
    text = (hub.root / FEDERATION_FILE).read_text()
    key = key_of("south")
    added = f"sites:\n- name: south\n  public_key: {key}\n  hub: {place}\n"
    (hub.root / FEDERATION_FILE).write_text(text.replace("sites: []\n", added))
    refused = run_cli("status", hub.root)
    assert f"the hub {place} is named for two sites" in refused.stderr


def test_the_federations_own_hub_is_no_sites(hub, key_of, run_cli):
    refused = run_cli("admit", hub.root, "north", key_of("north"), "--hub", f"{hub.root}/")
    assert refused.exit_code == 2
    assert "is the federation's hub: leave it out." in refused.stderr


def test_an_address_in_the_file_is_checked_with_its_line(hub, key_of, ok, run_cli):
    ok("admit", hub.root, "north", key_of("north"))
    path = hub.root / FEDERATION_FILE
    lines = path.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("  public_key:")) + 1
    path.write_text("\n".join([*lines[:at], "  hub: ../elsewhere", *lines[at:], ""]))
    refused = run_cli("status", hub.root)
    assert f"{path}, line {at + 1}: 'sites.0.hub': a hub in a folder is" in refused.stderr


def test_a_hub_that_cannot_be_asked_yet_is_named_at_once(hub, key_of, run_cli, tmp_path):
    place = tmp_path / "gone"
    said = run_cli("admit", hub.root, "north", key_of("north"), "--hub", place)
    assert said.exit_code == 0
    assert said.stderr == (
        f"Note: the hub of site 'north', {place}, cannot be asked (the hub {place} is not there: "
        "check the path, or mount the share): try again, or leave the site out with --exclude "
        "north. Until it can, nobody merges without that option.\n"
    )
    assert hubs(hub) == {"north": str(place)}

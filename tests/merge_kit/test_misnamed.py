"""Files that look like a policy and that nobody reads."""

from __future__ import annotations

import pytest

from merge_kit import auditlog, site
from merge_kit.policies import POLICY_FILE
from tests.conftest import write_run


@pytest.fixture
def north(hub, ok, tmp_path):
    """An admitted site with a run."""
    ok("join", hub.root, "--site", "north", "--folder", tmp_path / "north")
    ok("admit", hub.root, "north", tmp_path / "north" / "keys" / "site.pub")
    write_run(site.open_site(tmp_path / "north"), tmp_path / "north" / "runs" / "a", seed=1)
    return tmp_path / "north"


@pytest.fixture
def publish(run_cli, north):
    """The command; gives the exit code and the error."""

    def go(*arguments):
        found = run_cli("publish", north, "--run", north / "runs" / "a", *arguments)
        return found.exit_code, found.stderr

    return go


def nothing_left(hub, north):
    return not (hub.root / "contributions").exists() and not (north / auditlog.LOG).exists()


MISNAMED = [
    "policy.yml", "Policy.yaml", "POLICY.YAML", "policy.yaml.txt", "policy", "policy.txt",
    "policy.json", "policies.yaml", "polcy.yaml", "site-policy.yaml", "policy.yaml ",
    ".policy.yaml",
]  # fmt: skip
HARMLESS = ["policy.yaml~", ".policy.yaml.swp", "policy.yaml.bak", "public.yaml", "site.json"]


@pytest.mark.parametrize("name", MISNAMED)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the right one"])
def test_a_policy_by_another_name_lets_nothing_go(hub, north, publish, name, beside):
    """Whoever wrote it believes in it."""
    (north / name).write_text("maximum_norm: 0.001\n")
    if beside:
        (north / POLICY_FILE).write_text("maximum_norm: 1000\n")
    for arguments in ((), ("--dry-run",)):
        assert publish(*arguments) == (
            1,
            f"Error: {north / name} is read by nobody: a site's policy is {north / POLICY_FILE}: "
            "rename it, or remove it.\n",
        )
    assert nothing_left(hub, north)


def test_a_policy_in_the_copy_of_the_federation_lets_nothing_go(hub, north, publish):
    path = north / "federation" / POLICY_FILE
    path.write_text("maximum_norm: 0.001\n")
    assert publish() == (
        1,
        f"Error: {path} is read by nobody: a site's policy is {north / POLICY_FILE}: move it "
        "there, or remove it.\n",
    )
    assert nothing_left(hub, north)


@pytest.mark.parametrize("name", ["policy.yaml", *MISNAMED])
def test_a_policy_beside_a_federation_stops_who_reads_it(hub, north, publish, name, run_cli):
    (hub.root / name).write_text("maximum_norm: 0.001\n")
    sentence = (
        f"Error: {hub.root / name} is read by nobody: a federation's policy stands in "
        "federation.yaml under 'policy', and 'merge-kit sign' signs it after a change; remove it.\n"
    )
    assert publish() == (1, sentence)
    assert run_cli("status", hub.root).stderr == sentence
    assert nothing_left(hub, north)


def test_what_an_editor_leaves_beside_a_policy_is_let_be(hub, north, publish):
    (north / "policy").mkdir()
    for name in HARMLESS:
        (north / name).write_text("maximum_norm: 0.001\n")
        (hub.root / name).write_text("maximum_norm: 0.001\n")
    assert publish() == (0, "")

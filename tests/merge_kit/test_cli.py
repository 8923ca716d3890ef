"""The door: one program, real processes where it matters."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest

from merge_kit import cli, site
from merge_kit.cli import COMMANDS
from merge_kit.commands.options import pairs, typed_pairs
from merge_kit.errors import UsageError
from merge_kit.recipe import make_recipe, read_recipe
from tests.conftest import write_statistics
from tests.merge_kit.helpers import listing, says

HEAVY = ("torch", "timm", "numpy", "pydantic", "safetensors", "cryptography", "sklearn")


def program(*arguments, code=None):
    """Run merge-kit as a process of its own."""
    start = ["-c", code] if code else ["-m", "merge_kit"]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, merge_kit.cli\n"
        "try:\n    merge_kit.cli.main(['--help'])\n"
        f"except SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules])"
    )
    done = program(code=code)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Usage: merge-kit" in done.stdout


def test_help_lists_every_command_in_the_order_of_a_days_work(run_cli):
    result = run_cli("--help")
    shown = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line]
    assert result.exit_code == 0
    assert [word for word in shown if word in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run_cli, name):
    result = run_cli(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: merge-kit {name} ")


def test_the_version_is_printed(run_cli):
    result = run_cli("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("merge-kit, version 0.")


@pytest.mark.parametrize(
    "arguments",
    [("smerge",), ("merge",), ("merge", "x", "--odd"), ("--odd",), ("status", "--json")],
    ids=" ".join,
)
def test_wrong_use_exits_with_2(run_cli, arguments):
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_a_failure_is_one_sentence_on_stderr_and_exit_1(tmp_path):
    done = program("status", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"Error: {tmp_path} is not a federation: it has no federation.yaml; "
        "create one with 'merge-kit init'.\n"
    )


def test_our_own_usage_errors_exit_with_2(run_cli, hub):
    result = run_cli("merge", hub.root, "--recipe", "r.yaml", "--method", "mean")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: --recipe says it all: leave the other merge options out, or edit it.\n"
    )


@pytest.mark.parametrize("place", [0, 1, 2, None])
def test_a_traceback_is_shown_only_when_asked_for(run_cli, tmp_path, place):
    arguments = ["status", tmp_path]
    if place is not None:
        arguments.insert(place, "--debug")
    result = run_cli(*arguments)
    assert result.exit_code == 1
    assert ("Traceback" in result.stderr) is (place is not None)
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path} is not a federation")


def test_the_job_from_contributions_to_a_model(contribute, hub, run_cli, tmp_path):
    contribute("north", seed=1)
    contribute("south", seed=2)
    result = run_cli("merge", hub.root, "--method", "ties", "--option", "density=0.5",
                     "--weights", "north=3,south=1", "--out", tmp_path / "m")  # fmt: skip
    assert result.exit_code == 0
    assert "ties of 2 contributions" in result.stdout
    assert f"Next: evaluate it with\n  merge-kit evaluate {tmp_path / 'm'}" in result.stdout
    record = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert record["recipe"]["options"]["density"] == 0.5
    assert {c["site"]: c["weight"] for c in record["contributions"]} == {"north": 1.5, "south": 0.5}


def test_a_printed_recipe_is_a_recipe(run_cli, hub, tmp_path):
    result = run_cli("merge", hub.root, "--method", "ties", "--scale", "0.3", "--print-recipe")
    (tmp_path / "r.yaml").write_text(result.stdout)
    given = {"method": "ties", "scale": 0.3}
    assert read_recipe(tmp_path / "r.yaml") == make_recipe(given, "here")
    assert "merged-ties" not in listing(tmp_path)


def test_a_recipe_file_and_options_give_the_same_model(contribute, hub, run_cli, tmp_path):
    contribute("north")
    (tmp_path / "r.yaml").write_text("method: sum\nscale: 0.5\n")
    runs = [("--recipe", tmp_path / "r.yaml"), ("--method", "sum", "--scale", "0.5")]
    for name, options in zip("ab", runs, strict=True):
        assert run_cli("merge", hub.root, *options, "--out", tmp_path / name).exit_code == 0
    for name in listing(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_local_copies_are_merged_like_the_hub_and_count_once(contribute, hub, run_cli, tmp_path):
    contribute("north")
    folder = next((hub.root / "contributions" / "north").iterdir())
    for name, folders in {"hub": (), "local": (folder, folder)}.items():
        result = run_cli("merge", hub.root, *folders, "--out", tmp_path / f"by-{name}")
        assert result.exit_code == 0, result.stderr
    left, right = (tmp_path / f"by-{name}" / "provenance.json" for name in ("hub", "local"))
    assert left.read_bytes() == right.read_bytes()


def test_what_is_left_out_is_said(contribute, hub, run_cli, tmp_path):
    contribute("north")
    parcel = contribute("south", admit=False)
    result = run_cli("merge", hub.root, "--skip-refused", "--out", tmp_path / "m")
    assert result.exit_code == 0
    assert f"Left out: contribution south/{parcel.manifest.id[:12]} is signed" in result.stderr


def test_a_site_joins_and_is_admitted(hub, run_cli, tmp_path):
    joined = run_cli("join", hub.root, "--site", "north", "--folder", tmp_path / "north")
    assert joined.exit_code == 0
    key = (tmp_path / "north" / "keys" / "site.pub").read_text().strip()
    assert f"merge-kit admit {hub.root} north {key}" in joined.stdout
    assert "Site 'north' is admitted; 1 in all." in run_cli("admit", hub.root, "north", key).stdout
    assert "is admitted already" in run_cli("admit", hub.root, "north", key).stdout


def test_a_dry_run_shows_what_leaves_and_sends_nothing(contribute, hub, run_cli, tmp_path):
    parcel = contribute("north")
    run = tmp_path / "north" / "runs" / "seed0"
    result = run_cli("publish", tmp_path / "north", "--run", run, "--dry-run")
    assert result.exit_code == 0
    assert "What leaves the site:" in result.stdout
    assert f'"sha256": "{parcel.manifest.payload.sha256}"' in result.stdout
    assert "Dry run: nothing was sent" in result.stdout
    sent = run_cli("publish", tmp_path / "north", "--run", run)
    assert "Already published: " in sent.stdout


def test_statistics_are_shown_before_they_leave_and_published_with_the_vector(
    contribute, hub, run_cli, tmp_path
):
    contribute("north")
    root, run = tmp_path / "north", tmp_path / "north" / "runs" / "seed0"
    write_statistics(site.open_site(root), run, "fisher")
    shown = run_cli("publish", root, "--run", run, "--dry-run")
    size = (run / "fisher.safetensors").stat().st_size
    assert f"  the fisher   {run / 'fisher.safetensors'} ({size / 2**20:.1f} MiB)\n" in shown.stdout
    assert shown.stdout.count("Dry run: nothing was sent to ") == 2
    assert '"kind": "fisher"' in shown.stdout
    assert f'"size": {size}' in shown.stdout
    assert len(listing(hub.root / "contributions" / "north")) == 1
    sent = run_cli("publish", root, "--run", run)
    assert sent.stdout.count("Already published: ") == 1
    assert sent.stdout.count("\nPublished: ") == 1
    assert len(listing(hub.root / "contributions" / "north")) == 2


def test_methods_are_listed_with_their_papers(run_cli):
    result = run_cli("methods")
    assert result.exit_code == 0
    for words in ("mean: ", "ties: ", "density=0.2", "2306.01708"):
        assert words in result.stdout


def test_a_federation_is_created(run_cli, tmp_path):
    result = run_cli("init", tmp_path / "My_hub", "--backbone", "test_resnet", "--weights", "none",
                     "--classes", "a, b,c", "--input-size", "32")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "Federation 'my-hub' in " in result.stdout
    assert "classes   a, b, c" in result.stdout
    assert f"merge-kit join {tmp_path / 'My_hub'} --site <name>" in result.stdout


def test_one_class_is_not_enough(run_cli, tmp_path):
    result = run_cli("init", tmp_path / "h", "--backbone", "test_resnet", "--classes", "a,")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: --classes: name at least two classes, with commas between them.\n"
    )


def test_name_value_options_are_read_with_their_types():
    given = ("a=1", "b=0.5", "c=true", "d=[1, 2]", "e = word ", "f=x=y")
    assert typed_pairs(given, "--option") == {
        "a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "word", "f": "x=y"
    }  # fmt: skip
    assert pairs(("a=1",), "--option") == {"a": "1"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("a",), "--option a: write it as --option NAME=VALUE."),
        (("=1",), "--option =1: write it as --option NAME=VALUE."),
        (("a=1", "a=2"), "--option a is given twice: give it once."),
        (("a=[1",), "--option: a value is not a plain number, word or list."),
    ],
)
def test_malformed_options_are_refused(given, sentence):
    with says(UsageError, sentence):
        typed_pairs(given, "--option")


def test_methods_say_what_they_need(run_cli):
    result = run_cli("methods", "slerp", "dare", "ties")
    assert result.exit_code == 0
    needs = [
        line.split("needs")[1].strip() for line in result.stdout.splitlines() if "needs" in line
    ]
    assert needs == ["the vectors", "the vectors, the recipe's seed", "exactly 2 vectors"]


def test_an_unknown_method_is_answered_with_the_nearest(run_cli):
    result = run_cli("methods", "tise")
    assert result.exit_code == 2
    assert result.stderr == "Error: unknown method 'tise'; did you mean 'ties'?\n"


@pytest.mark.parametrize("fails", [False, True])
def test_a_command_is_imported_without_looking_for_garbage(tmp_path, monkeypatch, fails):
    lines = ["import gc", "LOOKED = gc.isenabled()", *["raise ImportError('odd')"] * fails]
    (tmp_path / f"imported_{fails}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) if fails else nullcontext():
        assert cli._imported(f"imported_{fails}").LOOKED is False
    assert gc.isenabled()

"""Every file in a merged model's folder is accounted for."""

from __future__ import annotations

import re
import shutil

import pytest

from merge_kit.tensorfile import write_tensors
from tests.merge_kit.helpers import load

CARD, PROVENANCE, WEIGHTS = "README.md", "provenance.json", "model.safetensors"


def edit(bench, change):
    path = bench.folder / CARD
    path.write_text(change(path.read_text()))


def test_a_card_to_which_lines_were_added_is_unknown(merged):
    edit(merged, lambda text: text.replace("## Use", "Ours.\n\n## Use") + "\nMore.\n")
    assert merged.differing() == {}
    assert merged.states()[CARD] == (
        "unknown",
        "says all that a merge writes, and more that somebody added",
    )
    verdict = merged.verify().stdout.splitlines()[-1]
    assert verdict.endswith(" tensors of this model. Nothing here vouches for README.md.")


@pytest.mark.parametrize(
    ("old", "new"), [("| admitted |", "| unsigned |"), ("Not a medical device.", "")]
)
def test_a_card_that_says_other_things_differs(merged, old, new):
    edit(merged, lambda text: text.replace(old, new))
    text = merged.differing().pop(CARD)
    assert text.startswith("lacks the line '")
    assert old in text
    assert text.endswith("' that a merge writes: what it says of the model may be wrong.")


def test_a_card_of_another_version_cannot_be_compared(merged):
    edit(merged, lambda text: text.replace("Not a medical device.", "Take care."))
    merged.state(software={"merge_kit": "0.0.9", "torch": "1.0"})
    assert merged.differing() == {}
    state, text = merged.states()[CARD]
    assert (state, text) == ("unknown", "another version of merge-kit wrote it, or somebody did")


@pytest.mark.parametrize("what", ["removed", "a folder"])
def test_a_card_that_is_gone_differs(merged, what):
    (merged.folder / CARD).unlink()
    if what == "a folder":
        (merged.folder / CARD).mkdir()
    assert merged.differing() == {CARD: "is missing, or cannot be read."}


def test_the_card_is_compared_with_who_was_trusted_then(merged):
    """A site that was admitted since changes nothing."""
    merged.state_of("a", trust="not admitted")
    assert "| not admitted |" in merged.differing()[CARD]
    edit(merged, lambda text: re.sub(r"(\n\| a .*)\| admitted", r"\1| not admitted", text))
    assert merged.differing() == {}


def test_other_files_are_unknown(merged):
    (merged.folder / "run_me.py").write_text("")
    (merged.folder / "notes").mkdir()
    (merged.folder / "notes" / "x.txt").write_text("")
    (merged.folder / "rebuilt").write_text("")
    (merged.folder / "bad\x1b[2J").write_text("")
    (merged.folder / "masks").mkdir()
    (merged.folder / "masks" / "a.safetensors").write_text("")
    result = merged.verify()
    assert result.exit_code == 0
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line[:7] == "unknown"]
    names = ["bad?[2J", "masks/a.safetensors", "notes", "rebuilt", "run_me.py"]
    assert lines == [[name, *"no merge by this recipe writes it".split()] for name in names]
    assert f"Nothing here vouches for {', '.join(names)}." in result.stdout


def test_what_is_in_the_header_of_the_weights_is_compared(merged):
    tensors = load(merged.folder / WEIGHTS)
    write_tensors(merged.folder / WEIGHTS, tensors, ("format", "tf"))
    assert merged.differing() == {
        WEIGHTS: "its header says other things than a merge writes there."
    }


def test_without_a_rebuild_what_depends_on_it_is_unknown(bench):
    bench.merge("--method", "emr")
    shutil.rmtree(bench.places[0])
    names = [CARD, *[f"masks/{name}.safetensors" for name in "abc"], PROVENANCE]
    found = {s: text for s, (state, text) in bench.states().items() if state == "unknown"}
    assert found == dict.fromkeys(names, "was not compared: nothing was merged again")


def test_where_something_differs_the_provenance_is_not_called_sound(merged):
    merged.state_of("a", weight=7.0)
    assert merged.states()[PROVENANCE] == (
        "unknown",
        "what differs from its statements is said above",
    )

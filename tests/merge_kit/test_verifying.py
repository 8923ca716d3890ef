"""A merged model is made again and compared: real folders, the real command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.contributions import MANIFEST, PAYLOAD, ROOT, SIGNATURE, list_entries
from merge_kit.federation import Policy, read_federation
from merge_kit.methods import METHODS
from merge_kit.remembered import VARIABLE
from merge_kit.tensorfile import TensorFile, fingerprint_file, write_tensors
from tests.merge_kit.helpers import blob, listing, load, quick, settle

CARD = "README.md"
ZEROS = "sha256:" + "0" * 64


def bytes_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_untouched_model_is_verified_and_nothing_is_written(merged, tmp_path):
    before = bytes_under(tmp_path)
    result = merged.verify()
    assert result.exit_code == 0
    assert bytes_under(tmp_path) == before
    federation = read_federation(merged.hub.root)
    found = merged.record["merged"]
    labels = sorted(merged.labels, key=lambda label: label.split("/")[1])
    assert result.stdout.splitlines() == [
        f"ok       contract           federation 'cells', {federation.contract_hash}",
        "ok       config.json        as the contract gives it",
        f"ok       base               has the stated fingerprint {federation.base_fingerprint}",
        *[f"ok       {label:<17}  signed with the admitted key; payload as stated"
          for label in labels],
        f"ok       model.safetensors  has the stated fingerprint {found}",
        "ok       weights            follow from the recipe and the manifests",
        f"ok       rebuilt            merging again gives the stated fingerprint {found}",
        "ok       README.md          as merging again gives it",
        "ok       provenance.json    each statement was compared, but for the versions and what "
        "was refused",
        "",
        "Verified: merging again gives the very tensors of this model.",
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_any_method_is_verified(bench, contribute, method):
    kind = METHODS[method].statistics
    for name in "abcde" if kind else "de":
        contribute(name, seed=ord(name), beside=[kind] if kind else [])
    left_out = "abcde"[METHODS[method].maximum or 5 :]
    bench.merge("--method", method, *[x for name in left_out for x in ("--exclude", name)])
    assert bench.differing() == {}


def test_statistics_that_were_used_are_looked_for_too(bench, contribute, hub):
    """One that is gone, and one whose figures were changed."""
    for name in "abc":
        contribute(name, seed=ord(name), beside=["fisher"])
    bench.merge("--method", "fisher")
    assert bench.differing() == {}
    entries = [e for e in list_entries(hub, read_federation(hub.root)) if e.kind == "fisher"]
    gone, changed = sorted(entries, key=lambda entry: entry.site)[:2]
    for path in (hub.root / ROOT / gone.site / gone.id).iterdir():
        path.unlink()
    payload = changed.contribution.payload
    data = bytearray(payload.read_bytes())
    data[-3] ^= 1
    payload.write_bytes(data)
    odd = bench.differing()
    assert set(odd) == {f"{e.site}/{e.id[:12]}" for e in (gone, changed)} | {"rebuilt"}
    assert "damaged or replaced" in odd[f"{changed.site}/{changed.id[:12]}"]


def test_a_model_in_another_dtype_and_with_options_is_verified(bench, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "method: dare\noptions: {rule: ties}\nweights: {a: 1, b: 2, c: 3}\nscale: 0.7\n"
        "dtype: bfloat16\nseed: 5\nnorm: average\nhead: method\n"
    )
    bench.merge("--recipe", tmp_path / "r.yaml")
    assert bench.differing() == {}


# what can have been changed: the subjects that differ, and a part of what is said of the last one


def weights(bench):
    bench.change_weights(lambda t: t["fc.bias"].add_(1))


def weights_and_statement(bench):
    """The careful forger: the provenance agrees with the file."""
    weights(bench)
    bench.state(merged=fingerprint_file(bench.folder / "model.safetensors"))


def nan(bench):
    bench.change_weights(lambda t: t["fc.bias"].fill_(float("nan")))
    bench.state(merged=fingerprint_file(bench.folder / "model.safetensors"))


def last_digit(bench):
    def change(tensors):
        value = tensors["fc.weight"].view(-1)[:2]
        value.copy_(torch.nextafter(value, torch.full((2,), 9.0)))

    bench.change_weights(change)
    bench.state(merged=fingerprint_file(bench.folder / "model.safetensors"))


def another_tensor(bench):
    bench.change_weights(lambda t: t.update(extra=torch.zeros(2)))
    bench.state(merged=fingerprint_file(bench.folder / "model.safetensors"))


def statement(bench):
    bench.state(merged=ZEROS)


def model_gone(bench):
    (bench.folder / "model.safetensors").unlink()


def model_damaged(bench):
    (bench.folder / "model.safetensors").write_bytes(blob(b"{"))


def config(bench):
    path = bench.folder / "config.json"
    path.write_text(path.read_text().replace("lobed", "round"))


def config_gone(bench):
    (bench.folder / "config.json").unlink()


def config_longer(bench):
    with (bench.folder / "config.json").open("a") as file:
        file.write(" ")


def contract(bench):
    bench.state(federation={**bench.record["federation"], "hash": ZEROS})


def federation_name(bench):
    bench.state(federation={**bench.record["federation"], "name": "sells"})


def base_statement(bench):
    bench.state(base=ZEROS)


def base_file(bench):
    path = bench.hub.root / "base" / "model.safetensors"
    write_tensors(path, {**load(path), "fc.bias": torch.ones(3)})


def base_gone(bench):
    (bench.hub.root / "base" / "model.safetensors").unlink()


def scale(bench):
    bench.state(recipe={**bench.record["recipe"], "scale": 1.25})


def unknown_method(bench):
    bench.state(recipe={**bench.record["recipe"], "method": "tise"})


def too_large_a_scale(bench):
    bench.state(recipe={**bench.record["recipe"], "scale": 1e100})


def share(bench):
    bench.state_of("a", weight=7.0)


def one_left_out(bench):
    bench.state(contributions=[c for c in bench.record["contributions"] if c["site"] != "a"])


@pytest.mark.parametrize(
    ("change", "subjects", "words"),
    [
        (weights, ["model.safetensors"], "one of the two was changed after the merge"),
        (weights_and_statement, ["rebuilt", CARD],
         "; 3 of N values of model.safetensors differ, by at most 1, in 'fc.bias'."),
        (nan, ["rebuilt", CARD], "differ, by at most inf, in 'fc.bias'."),
        (last_digit, ["rebuilt", CARD],
         "'fc.weight'. So little may be rounding: methods with linear"),
        (another_tensor, ["rebuilt", CARD], "; model.safetensors has other tensors than the base."),
        (statement, ["model.safetensors", "rebuilt", CARD],
         "; model.safetensors holds what merging again gives, so the statement is wrong."),
        (model_gone, ["model.safetensors"], "model.safetensors does not exist: check the path."),
        (model_damaged, ["model.safetensors"], "model.safetensors is no safetensors file"),
        (config, ["config.json"], "right weights may give wrong predictions."),
        (config_longer, ["config.json"], "is not what the contract gives"),
        (config_gone, ["config.json"], "is missing, or cannot be read."),
        (contract, ["contract"], f"contract {ZEROS}, the hub is 'cells'"),
        (federation_name, ["contract"], "is of the federation 'sells' with the contract"),
        (base_statement, ["base", "a", "b", "c", "rebuilt"], "takes the base and every vector."),
        (base_file, ["base", "a", "b", "c", "rebuilt"], "takes the base and every vector."),
        (base_gone, ["base", "a", "b", "c", "rebuilt"], "takes the base and every vector."),
        (scale, ["rebuilt", CARD], "values of model.safetensors differ, by at most"),
        (unknown_method, ["rebuilt"],
         "the recipe in provenance.json: unknown method 'tise'; did you mean 'ties'?"),
        (too_large_a_scale, ["rebuilt"], "that are NaN or infinite"),
        (share, ["weights", CARD],
         "provenance.json states 7 for a/ID, by the recipe and the manifests"),
        (one_left_out, ["weights", "rebuilt", CARD], "values of model.safetensors differ"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_was_changed_is_named(merged, change, subjects, words):
    size = sum(t.numel() for t in load(merged.folder / "model.safetensors").values())
    change(merged)
    found = merged.differing()
    names = {label: label.split("/")[0] for label in merged.labels}
    assert sorted(names.get(subject, subject) for subject in found) == sorted(subjects)
    words = words.replace("N values", f"{size} values").replace("a/ID", merged.labels[0])
    said = [text for subject, text in found.items() if subject != CARD][-1]
    assert said.endswith(words) if words.endswith(".") else words in said


def test_a_forged_model_is_told_from_its_rebuild(merged):
    weights(merged)
    report = json.loads(merged.verify("--json").stdout)
    (rebuilt,) = [c for c in report["checks"] if c["subject"] == "rebuilt"]
    assert rebuilt["state"] == "ok"
    assert "; 3 of " in rebuilt["text"]


def removed(bench):
    shutil.rmtree(bench.places[0])


def payload_changed(bench):
    path = bench.places[0] / PAYLOAD
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def payload_gone(bench):
    (bench.places[0] / PAYLOAD).unlink()


def signature_gone(bench):
    (bench.places[0] / SIGNATURE).unlink()


def signature_broken(bench):
    (bench.places[0] / SIGNATURE).write_bytes(b"{}")


def manifest_changed(bench):
    path = bench.places[0] / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"steps":10', b'"steps":11'))


def another_place(bench):
    bench.state_of("a", id="0" * 64)


def payload_statement(bench):
    bench.state_of("a", payload=ZEROS)


def key_statement(bench):
    other = next(c for c in bench.record["contributions"] if c["site"] == "b")
    bench.state_of("a", public_key=other["public_key"])


def signature_statement(bench):
    other = next(c for c in bench.record["contributions"] if c["site"] == "b")
    bench.state_of("a", signature=other["signature"])


def trust_statement(bench):
    bench.state_of("a", trust="unsigned")


def no_longer_admitted(bench):
    sites = read_federation(bench.hub.root).sites
    bench.change_federation(sites=tuple(site for site in sites if site.name != "a"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (removed, "is not on the hub: its site withdrew it, or somebody removed it; the model "
         "still holds what it gave: merge again without it, or give a copy of it with --from."),
        (another_place, "is not on the hub: "),
        (payload_changed, "the payload is not what the site signed"),
        (payload_gone, "/payload.safetensors: is it the right hub, and complete?"),
        (signature_gone, "its signature on the hub is of none."),
        (signature_broken, "manifest.sig is no signature: publish again."),
        (manifest_changed, "does not carry a valid signature"),
        (payload_statement, f"provenance.json states the payload {ZEROS}, its manifest sha256:"),
        (key_statement, "provenance.json states the key ed25519:"),
        (signature_statement, "provenance.json states another signature than lies on the hub."),
        (trust_statement, "provenance.json calls it 'unsigned', by the federation file on the hub "
         "it is 'admitted': the list of sites was changed, or the statement."),
        (no_longer_admitted, "provenance.json calls it 'admitted', by the federation file on the "
         "hub it is 'not admitted': "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_contribution_that_is_not_as_stated_is_named(merged, change, words):
    change(merged)
    label, rebuilt = merged.differing().items()
    assert label[0].startswith("a/")
    assert words in label[1]
    assert rebuilt == ("rebuilt", "not done: it takes the base and every vector.")


def test_every_missing_contribution_is_named(merged):
    for place in merged.places[1:]:
        shutil.rmtree(place)
    result = merged.verify()
    lines = [line for line in result.stdout.splitlines() if line.startswith("DIFFERS")]
    assert [line.split()[1] for line in lines] == [
        *sorted(merged.labels[1:], key=lambda label: label.split("/")[1]), "rebuilt"
    ]  # fmt: skip
    assert result.stdout.splitlines()[-1].startswith("Not verified: 3 of 10 differ: ")


def test_a_copy_stands_in_for_what_left_the_hub(merged, tmp_path):
    shutil.copytree(merged.places[0], tmp_path / "kept" / "a")
    shutil.rmtree(merged.places[0])
    assert merged.differing("--from", tmp_path / "kept" / "a") == {}


def test_a_copy_that_was_changed_is_refused(merged, tmp_path):
    shutil.copytree(merged.places[0], tmp_path / "kept")
    (tmp_path / "kept" / PAYLOAD).write_bytes(bytes(merged.parcels[0].manifest.payload.size))
    assert list(merged.differing("--from", tmp_path / "kept")) == [merged.labels[0], "rebuilt"]


def test_what_may_change_after_a_merge_does_not_matter(bench):
    """A stricter policy, a site that was admitted since, a contribution that was replaced."""
    (first, *_), sites = bench.parcels, read_federation(bench.hub.root).sites
    bench.change_federation(sites=tuple(site for site in sites if site.name != "a"))
    bench.merge("--allow-unsigned")
    bench.change_federation(
        sites=sites, policy=Policy(maximum_norm=first.manifest.payload.norm / 9)
    )
    assert bench.differing() == {}


def test_what_nobody_vouches_for_is_said(bench):
    (bench.places[0] / SIGNATURE).unlink()
    sites = read_federation(bench.hub.root).sites
    bench.change_federation(sites=tuple(site for site in sites if site.name != "b"))
    bench.merge("--allow-unsigned")
    result = bench.verify()
    assert result.exit_code == 0
    said = {line.split()[1].split("/")[0]: line for line in result.stdout.splitlines() if line}
    assert said["a"].endswith("not signed: nobody vouches for it; payload as stated")
    assert said["b"].endswith(
        "signed, by a key that the federation does not admit; payload as stated"
    )


def test_other_versions_are_noted(merged):
    merged.state(software={"merge_kit": "0.0.9", "torch": "1.0"})
    result = merged.verify()
    assert result.exit_code == 0
    notes = [line for line in result.stdout.splitlines() if line.startswith("note")]
    assert notes[0].startswith("note     it was merged with merge-kit 0.0.9, this is merge-kit 0.")
    assert notes[1] == f"note     it was merged with torch 1.0, this is torch {torch.__version__}"


def identity(path):
    with TensorFile(path) as file:
        return list(file.identity())


def forge_memory(records, path, change):
    """Change a file, and make what is remembered of it speak of the changed one."""
    before = identity(path)
    change()
    for name in listing(records):
        record = json.loads((records / name).read_bytes())
        if record["identity"] == before:
            record["identity"] = identity(path)
        (records / name).write_text(json.dumps(record))


@pytest.mark.parametrize("which", ["payload", "base"])
def test_verify_does_not_believe_what_is_remembered(merged, monkeypatch, tmp_path, which):
    """A forged memory fools a merge; it does not fool who checks again."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    settle(merged.hub.root)
    merged.merge("--replace")
    records = tmp_path / "cache" / "checked"
    if which == "payload":
        forge_memory(records, merged.places[0] / PAYLOAD, lambda: payload_changed(merged))
        subject, words = merged.labels[0], "the payload is not what the site signed"
    else:
        path = merged.hub.root / "base" / "model.safetensors"
        forge_memory(records, path, lambda: base_file(merged))
        subject, words = "base", "has the fingerprint"
    merged.merge("--replace")
    assert words in merged.differing()[subject]


# a provenance from anybody


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", " is not sound JSON: it was changed or damaged."),
        (b"\xff", " is not sound JSON: it was changed or damaged."),
        (b"[" * 200_000, " is not sound JSON: it was changed or damaged."),
        (b'{"a": NaN}', " is not sound JSON: it was changed or damaged."),
        (b'{"a": 1, "a": 2}', " names the key 'a' twice: it is refused."),
        (b'{"a": ' + b"9" * 5000 + b"}", " is not sound JSON: it was changed or damaged."),
        (b"[]", ": 'the document': input should be an object."),
        (b'{"format": 1}', ": the key 'base' is missing."),
        (b'{"format": 1, "federation": null}', ": 'federation': input should be an object (got "
         "None)."),
        (b'{"format": 1, "federation": {}}', ": the key 'federation.name' is missing."),
    ],
    ids=["empty", "bytes", "deep", "nan", "twice", "digits", "list", "plain", "null", "lacking"],
)  # fmt: skip
def test_a_provenance_that_cannot_be_read_is_said(hub, tmp_path, run_cli, content, sentence):
    path = tmp_path / "model" / "provenance.json"
    path.parent.mkdir()
    path.write_bytes(content)
    result = run_cli("verify", path.parent, "--hub", hub.root)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {path}{sentence}\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "'format': input should be 1 (got 2)."),
        ({"odd": 1}, "unknown key 'odd'; known are format, federation, base, merged, recipe, "
         "contributions, refused, software, head, norms, distilled."),
        ({"contributions": []}, "'the document': a recipe goes with contributions."),
        ({"contributions": [], "recipe": None}, "'the document': contributions are missing."),
        ({"contributions": "twice"}, "'contributions': a contribution is named twice."),
        ({"id": "../../../../etc"}, "'contributions.0.id': string should match pattern "
         "'^[0-9a-f]{64}$' (got '../../../../etc')."),
        ({"site": "../.."}, "'contributions.0.site': a name has 1 to 63 characters: a-z, 0-9, and "
         "hyphens inside (got '../..')."),
        ({"weight": "1e999"}, "'contributions.0.weight': input should be a valid number "
         "(got '1e999')."),
        ({"trust": "\x1b[2J"}, "'contributions.0.trust': input should be 'admitted', 'not "
         "admitted' or 'unsigned' (got '\\x1b[2J')."),
    ],
    ids=["format", "key", "none", "nothing", "twice", "id", "site", "weight", "trust"],
)  # fmt: skip
def test_a_provenance_that_breaks_the_format_is_refused(merged, changes, sentence):
    record = merged.record
    if changes.get("contributions") == "twice":
        changes = {"contributions": record["contributions"][:1] * 2}
    if set(changes) & set(record["contributions"][0]):
        changes = {"contributions": [{**record["contributions"][0], **changes}]}
    merged.state(**changes)
    result = merged.verify()
    path = merged.folder / "provenance.json"
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {path}: {sentence}\n"


def test_what_a_stranger_wrote_does_not_reach_the_terminal(merged):
    merged.state(recipe={**merged.record["recipe"], "method": "\x1b[2J"})
    assert "unknown method '?[2J'" in merged.verify().stdout
    assert "unknown method '?[2J'" in merged.differing()["rebuilt"]


def paths_of(node, path=()):
    """Every place in a JSON document."""
    yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from paths_of(value, (*path, key))


def with_value(node, path, value):
    if not path:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = with_value(node[path[0]], path[1:], value)
    return copy


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.text(max_size=9),
    st.floats(allow_nan=False, allow_infinity=False), st.just([]), st.just({}), st.just({"a": [1]}),
    st.sampled_from(["mean", "ties", "dare", "karcher", ZEROS, "0" * 64, "float16", "../x", "a"]),
)  # fmt: skip


@pytest.fixture(params=["ties", "dare"])
def merged_by(bench, request):
    bench.merge("--method", request.param)
    return bench


def test_no_provenance_makes_it_crash(merged_by):
    """Any value in any place gives a verdict or one sentence."""
    record = merged_by.record
    places = sorted(set(paths_of(record)), key=str)

    @quick
    @given(st.sampled_from(places), odd)
    def change(path, value):
        changed = json.dumps(with_value(record, path, value))
        (merged_by.folder / "provenance.json").write_text(changed)
        result = merged_by.verify()
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert ("Error: " in result.stderr) is not bool(result.stdout)
        assert result.stderr.count("\n") <= 1

    change()


def test_a_folder_without_provenance_is_no_merged_model(hub, tmp_path, run_cli):
    result = run_cli("verify", tmp_path, "--hub", hub.root)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {tmp_path} is no merged model: it has no provenance.json; give a folder that "
        "'merge-kit merge' made.\n"
    )


@pytest.mark.parametrize("options", [[], ["--base", "base"], ["more", "--hub", "hub"]])
def test_without_a_hub_there_is_nothing_to_compare_with(merged, run_cli, options):
    result = run_cli("verify", merged.folder, *options)
    assert result.exit_code == 2
    assert result.stderr == (
        f"Error: {merged.folder} was merged from a hub: give it with --hub, and nothing after the "
        "folder.\n"
    )

"""Files that an admitted site signs, and that exhaust, break or skew whoever reads them."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch

from merge_kit import vector
from merge_kit.federation import FEDERATION_FILE, Policy
from merge_kit.files import canonical_json
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.tensorheader import HEADER_LIMIT
from tests.merge_kit.helpers import blob, entry, load


def header_of(path):
    with TensorFile(path) as file:
        return json.loads(file.metadata[vector.METADATA_KEY])


def rewritten(change, told=None):
    """The bytes of the attacker's vector with other tensors, or another header."""

    def make(path):
        tensors, header = load(path), header_of(path)
        change(tensors)
        header.update(told or {})
        write_tensors(path, tensors, (vector.METADATA_KEY, canonical_json(header).decode()))
        return path.read_bytes()

    return make


BOMBS = {
    "length of 2^63": (
        (1 << 63).to_bytes(8, "little") + b"{}",
        f" has a header of {1 << 63} bytes, above the limit of {HEADER_LIMIT}: it is no "
        "safetensors file, or one made to exhaust memory.",
    ),
    "header of 100 MB": (
        blob(b"{" + b" " * (100 << 20)),
        f" has a header of {(100 << 20) + 1} bytes, above the limit of {HEADER_LIMIT}: it is no "
        "safetensors file, or one made to exhaust memory.",
    ),
    "deep JSON": (
        blob(b'{"a":' + b"[" * 1_000_000),
        " is no safetensors file: its header is not valid JSON.",
    ),
    "a name twice": (
        blob(b'{"a":1,"a":2}'),
        " names 'a' twice in its header: it is refused.",
    ),
    "path as a name": (
        blob({"../x": entry(0, 1)}, b"x"),
        " has a tensor with the unsafe name '../x': it is refused.",
    ),
    "escape as a name": (
        blob({"\x1b[2J": entry(0, 1)}, b"x"),
        " has a tensor with the unsafe name '\\x1b[2J': it is refused.",
    ),
    "overlap": (
        blob({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"),
        ": tensor 'b' starts at byte 1 instead of 2: the tensors must cover the file without holes "
        "or overlaps.",
    ),
    "billions of values": (
        blob({"a": entry(0, 1, "U8", [2**40, 2**40])}, b"x"),
        f": tensor 'a' (U8 [{2**40}, {2**40}]) needs {2**80} bytes and is given 1.",
    ),
    "pickle": (
        pickle.dumps({"w": [1.0] * 9}, protocol=2),
        " is a pickled checkpoint, not safetensors: pickles can run code and are not read; convert "
        "it with torch.load(weights_only=True) and safetensors.torch.save_file.",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_made_to_exhaust_or_to_lie(field, kind):
    field.before()
    content, sentence = BOMBS[kind]
    field.signed_payload(content)
    field.refused(f"{field.payload}{sentence}", "mallory")


def test_a_path_in_the_metadata(field):
    field.before()
    field.signed_payload(rewritten(lambda tensors: None, {"site": "../../etc"}))
    field.refused(
        f"{field.payload}: 'site': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside "
        "(got '../../etc').", "mallory",
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(field, value):
    field.before()
    label = field.signed_payload(rewritten(lambda t: t["fc.bias"].fill_(value)))
    assert label
    field.refused(
        f"{field.payload}: tensor 'fc.bias' holds 3 value(s) that are NaN or infinite: the site "
        "must train again and publish a sound vector.", "mallory",
    )  # fmt: skip


def test_another_base(field):
    field.before()
    other = "sha256:" + "7" * 64
    label = field.signed_payload(rewritten(lambda t: None, {"base": other}))
    field.refused(
        f"{label} was taken from the base {other}, this federation's base is "
        f"{field.federation().base_fingerprint}: it cannot be merged here.", "mallory",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "what"),
    [(torch.zeros(4), "F32 [4]"), (torch.zeros(3, dtype=torch.float64), "F64 [3]")],
    ids=["shape", "dtype"],
)
def test_other_shapes_or_dtypes(field, value, what):
    field.before()
    field.signed_payload(rewritten(lambda t: t.update({"fc.bias": value})))
    field.refused(
        f"{field.payload}: tensor 'fc.bias' is {what}, the base asks for F32 [3].", "mallory"
    )


def scaled(field):
    """A vector of a million times the length, of an honest manifest."""

    def change(tensors):
        for name, values in tensors.items():
            if values.is_floating_point() and not name.endswith(("running_mean", "running_var")):
                values.mul_(1e6)

    norm = field.mallory().manifest.payload.norm
    return field.signed_payload(rewritten(change), norm=norm * 1e6), norm * 1e6


def test_a_vector_scaled_by_a_million_is_refused_by_a_policy_alone(field):
    """By default it is merged: `status` shows it, and a bound on the norm refuses it."""
    field.before()
    label, norm = scaled(field)
    taken = field.model()
    assert taken["model.safetensors"] != field.expected["model.safetensors"]
    rows = json.loads(field.ok("status", field.hub.root, "--json"))["contributions"]
    norms = {row["site"]: row["norm"] for row in rows}
    assert norms["mallory"] > 1e5 * max(norms["north"], norms["south"])
    strict = field.federation().model_copy(update={"policy": Policy(maximum_norm=100.0)})
    field.hub.replace(FEDERATION_FILE, strict.to_yaml().encode(), field.hub.read(FEDERATION_FILE))
    place = field.place.relative_to(field.hub.root)
    assert label
    field.refused(
        f"{place} has the norm {norm:.4g}, above the 100 of the federation's policy (fewer steps "
        "or a lower learning rate give a smaller one): it is refused.", "mallory",
    )  # fmt: skip


def test_a_norm_that_the_manifest_understates(field):
    field.before()
    label = field.signed_payload(rewritten(lambda t: t["fc.weight"].fill_(1e3)))
    sentence = f"{label} has the norm "
    out = field.run_cli("merge", field.hub.root, "--out", field.root / "refused")
    assert out.exit_code == 1
    assert out.stderr.startswith(f"Error: {sentence}")
    assert ", its manifest says 1: it is refused. Leave it out with --exclude mallory" in out.stderr
    field.ignored("--skip-refused")


def told_as(form, shape):
    return {"encoding": {"fc.weight": {"form": form, "dtype": "F32", "shape": shape}}}


def width(field):
    return load(field.north.payload)["fc.weight"].shape


def compressed(field, kind):
    """A vector whose classifier is stored smaller, and what is wrong with it."""
    shape, parts, form = list(width(field)), {}, "sparse"
    if kind in ("outside", "twice"):
        places = {"outside": [5, 50_000], "twice": [5, 5]}[kind]
        stored = (torch.tensor(places) - (1 << 15)).to(torch.int16)
        parts = {"counts": torch.tensor([2], dtype=torch.int32), "places": stored}
        parts["values"] = torch.ones(2)
        sentence = "has places that do not rise, or lie outside of it: it is refused."
    elif kind == "terabytes of zeros":
        shape, form = [2**40, 2], "zero"
        sentence = f"is F32 [{2**40}, 2], the base asks for F32 {list(width(field))}."
    else:
        shape, form = [2**20, 2**20], "factors"
        parts = {"left": torch.zeros(2**20, 1), "right": torch.zeros(1, 2**20)}
        sentence = f"is F32 [{2**20}, {2**20}], the base asks for F32 {list(width(field))}."

    def change(tensors):
        del tensors["fc.weight"]
        tensors.update({f"fc.weight@{part}": values for part, values in parts.items()})

    return rewritten(change, told_as(form, shape)), sentence


@pytest.mark.parametrize("kind", ["outside", "twice", "terabytes of zeros", "factors of terabytes"])
def test_a_compressed_vector_made_to_break_its_reader(field, kind):
    """An index out of range, one that stands twice, or a small file that stands for terabytes."""
    field.before()
    content, sentence = compressed(field, kind)
    field.signed_payload(content)
    field.refused(f"{field.payload}: tensor 'fc.weight' {sentence}", "mallory")

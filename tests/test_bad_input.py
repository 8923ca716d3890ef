"""Bad input, row by row: the exact sentence, the exit status, and nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch

from merge_kit import publishing
from merge_kit.tensorfile import TensorFile, fingerprint, read_all, write_tensors
from tests.bench import Bench, Table, open_bench
from tests.conftest import write_run

ROWS = Table()
row = ROWS.row


@pytest.fixture
def bench(tmp_path, hub, contribute) -> Bench:
    return open_bench(tmp_path, hub, contribute)


HEADER = "file,label,split\n"
GOOD = HEADER + "".join(
    f"{i}.png,{'round' if i % 2 else 'lobed'},{'val' if i > 8 else 'train'}\n" for i in range(12)
)


@row()
def unreadable_image(b):
    (b.data / "3.png").write_bytes(b"not an image")
    path = b.data / "3.png"
    return b.finetune(b.table(GOOD)), (
        f"{path} cannot be read as an image (not a PNG, JPEG, TIFF, BMP, WebP, "
        "JPEG 2000 or DICOM file, or an unusual variant): replace or remove the file, "
        "or pass --skip-unreadable."
    )


@row()
def truncated_image(b):
    path = b.data / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    return b.finetune(b.table(GOOD)), (
        f"{path} cannot be read as an image (truncated): replace or remove the file, "
        "or pass --skip-unreadable."
    )


@row()
def empty_folder(b):
    (b.tmp / "empty").mkdir()
    return b.finetune(b.tmp / "empty"), (
        f"{b.tmp / 'empty'} holds no images: give a folder of class folders, or one with a "
        "labels.csv."
    )


@row()
def unknown_label(b):
    return b.finetune(b.table(HEADER + "0.png,round,train\n1.png,lobbed,train\n")), (
        f"{b.data}/labels.csv line 3: label 'lobbed' is no class of this federation (nearest: "
        "lobed): correct it or pass --map lobbed=CLASS."
    )


@row()
def duplicate_file(b):
    return b.finetune(b.table(HEADER + "0.png,round,train\n0.png,round,train\n")), (
        f"{b.data}/labels.csv line 3 lists 0.png, as does {b.data}/labels.csv line 2: remove "
        "one of the two."
    )


@row()
def patient_in_two_splits(b):
    text = "file,label,patient,split\n0.png,round,p1,train\n1.png,lobed,p1,val\n"
    return b.finetune(b.table(text)), (
        "patient p1 is in two splits, train (0.png) and val (1.png): put all images of a patient "
        "into one."
    )


@row()
def label_file_without_header(b):
    return b.finetune(b.table("0.png,round\n1.png,lobed\n")), (
        f"{b.data}/labels.csv line 1 must be a header with the columns file and label (found: "
        "0.png, round): add it or rename the columns."
    )


@row()
def csv_not_utf8(b):
    return b.finetune(b.table(HEADER.encode() + b"0.png,r\xf6und,train\n")), (
        f"{b.data}/labels.csv line 2 is not UTF-8: save it as CSV UTF-8."
    )


@row()
def listed_file_missing(b):
    return b.finetune(b.table(HEADER + "0.png,round,train\n99.png,lobed,val\n")), (
        f"{b.data}/labels.csv line 3 lists 99.png, but {b.data}/99.png is no file: correct the "
        "path or pass --images FOLDER."
    )


@row()
def only_one_class(b):
    text = HEADER + "".join(f"{i}.png,round,{'val' if i > 8 else 'train'}\n" for i in range(12))
    return b.finetune(b.table(text)), (
        "the training split holds a single class (train 9, val 3, test 0): give images of other "
        "classes, from other patients, too."
    )


@row()
def where_matches_nothing(b):
    return b.finetune(b.table(GOOD), "--where", "split=holdout"), (
        f"{b.data}/labels.csv has no row where split=holdout (split: known: train, val): correct "
        "--where."
    )


@row()
def data_missing(b):
    return b.finetune(b.data / "absent.csv"), (
        f"{b.data}/absent.csv does not exist: give a folder of class folders, a CSV file or a "
        "MedMNIST .npz."
    )


@row(2)
def unknown_training_option(b):
    config = b.tmp / "training.yaml"
    config.write_text("learning_rat: 0.1\n")
    return b.finetune(b.table(GOOD), "--config", config), (
        f"{config}, line 1: unknown key 'learning_rat'; did you mean 'learning_rate'?"
    )


@row(2)
def device_not_there(b):
    return b.finetune(b.table(GOOD), "--device", "cuda:7"), (
        "the device 'cuda:7' is not there: use --device auto, or see 'merge-kit doctor'."
    )


@row()
def not_a_site_folder(b):
    return ["finetune", b.tmp, "--data", b.data], (
        f"{b.tmp} is not a site's folder: it has no site.yaml; run 'merge-kit join' first."
    )


@row()
def wrong_base(b):
    with TensorFile(b.hub.fetch("base/model.safetensors")) as file:
        tensors = {name: t + 1 for name, t in read_all(file)}
    write_tensors(b.hub.root / "base" / "model.safetensors", tensors)
    return ["join", b.hub.root, "--site", "south", "--folder", b.tmp / "south"], (
        f"{b.hub.root}/base/model.safetensors has the fingerprint {fingerprint(tensors.items())}, "
        f"the federation 'cells' expects {b.site.federation.base_fingerprint}: fetch the base "
        "again."
    )


@row()
def hub_is_no_federation(b):
    return ["join", b.data, "--site", "south"], (
        f"{b.data} is not a federation: it has no federation.yaml; create one with "
        "'merge-kit init'."
    )


@row()
def hub_is_missing(b):
    return ["status", b.tmp / "nowhere"], (
        f"the hub {b.tmp / 'nowhere'} is not there: check the path, or mount the share."
    )


@row()
def hub_of_unknown_kind(b):
    return ["status", "ftp://example.org/hub"], (
        "'ftp://example.org/hub': there are no hubs of the kind 'ftp'; there are folders (a "
        "path, or file://), hf://, s3://, gs://, az:// and sftp://."
    )


@row()
def site_name_with_a_slash(b):
    return ["join", b.hub.root, "--site", "../x", "--folder", b.tmp / "x"], (
        "site '../x': 'name': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside (got "
        "'../x')."
    )


@row()
def federation_not_yaml(b):
    (b.hub.root / "federation.yaml").write_text("name: [unclosed\n")
    return ["status", b.hub.root], f"{b.hub.root}/federation.yaml, line 2: not valid YAML."


@row()
def federation_with_unknown_key(b):
    path = b.hub.root / "federation.yaml"
    text = path.read_text()
    path.write_text(text + "polcy: {}\n")
    line = text.count("\n") + 1
    return ["status", b.hub.root], (
        f"{path}, line {line}: unknown key 'polcy'; did you mean 'policy'?"
    )


@row()
def federation_with_a_key_twice(b):
    path = b.hub.root / "federation.yaml"
    text = path.read_text()
    path.write_text(text + "name: other\n")
    line, first = text.count("\n") + 1, text.split("\n").index("name: cells") + 1
    return ["status", b.hub.root], (
        f"{path}, line {line}: the key 'name' stands there already, in line {first}: leave one of "
        "the two."
    )


@row()
def admit_a_word_for_a_key(b):
    return ["admit", b.hub.root, "south", "letmein"], (
        "'letmein' is no public key: it must read 'ed25519:' and 44 characters, as 'merge-kit "
        "join' prints it."
    )


@row(2)
def publish_without_a_run(b):
    return ["publish", b.site.root], (
        f"{b.site.root} has no finished run: run 'merge-kit finetune {b.site.root}' first."
    )


@row()
def vector_of_wrong_shape(b):
    path = b.publish_altered(lambda t: t.update({"fc.bias": torch.zeros(4)}))
    return b.merge(f"{path}: tensor 'fc.bias' is F32 [4], the base asks for F32 [3].")


@row()
def vector_of_foreign_dtype(b):
    path = b.publish_altered(lambda t: t.update({"fc.bias": torch.zeros(3).double()}))
    return b.merge(f"{path}: tensor 'fc.bias' is F64 [3], the base asks for F32 [3].")


@row()
def vector_lacks_a_tensor(b):
    path = b.publish_altered(lambda t: t.pop("fc.bias"))
    return b.merge(f"{path} lacks the tensor 'fc.bias' that the base has.")


@row()
def vector_with_an_extra_tensor(b):
    path = b.publish_altered(lambda t: t.update({"extra": torch.zeros(1)}))
    return b.merge(f"{path} has the tensor 'extra' that the base does not have.")


@row()
def vector_with_nan(b):
    path = b.publish_altered(lambda t: t["fc.bias"].fill_(float("nan")))
    return b.merge(
        f"{path}: tensor 'fc.bias' holds 3 value(s) that are NaN or infinite: the site must train "
        "again and publish a sound vector."
    )


@row()
def vector_truncated(b):
    run = b.site.root / "runs" / "x"
    write_run(b.site, run)
    content = (run / publishing.VECTOR).read_bytes()
    path = b.publish_bytes(content[:-100])
    return b.merge(
        f"{path} is truncated: it should have {len(content)} bytes and has {len(content) - 100}; "
        "copy it again."
    )


@row()
def vector_with_a_header_bomb(b):
    path = b.publish_bytes((2**40).to_bytes(8, "little") + b"{}" + b" " * 64)
    return b.merge(
        f"{path} has a header of {2**40} bytes, above the limit of {16 * 2**20}: it is no "
        "safetensors file, or one made to exhaust memory."
    )


@row()
def vector_with_duplicate_header_keys(b):
    entry = '"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    path = b.publish_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    return b.merge(f"{path} names 'a' twice in its header: it is refused.")


@row()
def pickle_in_place_of_a_vector(b):
    torch.save({"fc.bias": torch.zeros(3)}, b.tmp / "x.pt")
    path = b.publish_bytes((b.tmp / "x.pt").read_bytes())
    return b.merge(
        f"{path} is a pickled checkpoint, not safetensors: pickles can run code and are not read; "
        "convert it with torch.load(weights_only=True) and safetensors.torch.save_file."
    )


@row()
def pickle_for_the_base(b):
    torch.save({"fc.bias": torch.zeros(3)}, b.tmp / "x.pt")
    arguments = ["init", b.tmp / "h", "--backbone", "test_resnet", "--classes", "a,b"]
    return [*arguments, "--weights", b.tmp / "x.pt"], (
        f"{b.tmp / 'x.pt'} is not a safetensors file: pickled checkpoints can run code and are "
        "refused; pass --allow-pickle to convert it with torch's weights-only loader."
    )


@row()
def payload_replaced(b):
    path = Path(b.publish_altered(lambda t: None))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    size, name = len(content), path.parent.name[:12]
    return b.merge(
        f"contribution north/{name}: the payload is not what the site signed ({size} bytes, "
        f"{size} announced): it is damaged or replaced; remove its folder from the hub "
        "and let the site publish again."
    )


@row()
def stranger(b):
    parcel = b.contribute("south", admit=False)
    key = (b.tmp / "south" / "keys" / "site.pub").read_text().strip()
    return ["merge", b.hub.root, "--out", b.tmp / "out"], (
        f"contribution south/{parcel.manifest.id[:12]} is signed by a key that is not admitted: "
        f"check it with the site and run 'merge-kit admit <hub> south {key}'. Leave it out with "
        "--exclude south or --skip-refused."
    )


@row()
def nothing_to_merge(b):
    return ["merge", b.hub.root], (
        "no contribution can be merged: sites publish with 'merge-kit publish', "
        "'merge-kit status' shows what is there."
    )


@row()
def unknown_method(b):
    return ["merge", b.hub.root, "--method", "tise"], (
        "the command line: unknown method 'tise'; did you mean 'ties'?"
    )


@row()
def unknown_recipe_key(b):
    recipe = b.tmp / "recipe.yaml"
    recipe.write_text("method: ties\nsclae: 2\n")
    return ["merge", b.hub.root, "--recipe", recipe], (
        f"{recipe}, line 2: unknown key 'sclae'; did you mean 'scale'?"
    )


@row()
def density_out_of_range(b):
    return ["merge", b.hub.root, "--method", "ties", "--option", "density=1.5"], (
        "the command line, options of ties: 'density': input should be less than or equal to 1 "
        "(got 1.5)."
    )


@row(2)
def output_exists(b):
    b.contribute("south")
    (b.tmp / "out").mkdir()
    return ["merge", b.hub.root, "--out", b.tmp / "out"], (
        f"{b.tmp / 'out'} exists already: choose another --out, or pass --replace."
    )


@row(2)
def unknown_backbone(b):
    return ["init", b.tmp / "h", "--backbone", "resnet5O", "--classes", "a,b"], (
        f"timm {timm.__version__} has no model 'resnet5O'; did you mean 'resnet50'?"
    )


@row(2)
def one_class_only(b):
    return ["init", b.tmp / "h", "--backbone", "test_resnet", "--classes", "a"], (
        "--classes: name at least two classes, with commas between them."
    )


@row()
def weights_of_another_architecture(b):
    weights = b.hub.root / "base" / "model.safetensors"
    arguments = ["init", b.tmp / "h", "--backbone", "test_vit", "--classes", "a,b"]
    return [*arguments, "--weights", weights], (
        f"{weights} lacks the tensor 'blocks.0.attn.proj.bias' (78 in all) of 'test_vit': is it "
        "another architecture?"
    )


@row()
def evaluate_what_is_no_model(b):
    return ["evaluate", b.data, "--data", b.table(GOOD)], (
        f"{b.data} is no model: give a timm folder (config.json, model.safetensors), a site's "
        "folder, a run, a federation, or a CSV of predictions."
    )


@row()
def verify_what_is_no_merged_model(b):
    return ["verify", b.data, "--hub", b.hub.root], (
        f"{b.data} is no merged model: it has no provenance.json; give a folder that "
        "'merge-kit merge' made."
    )


@row(2)
def two_models_of_one_name(b):
    return ["evaluate", b.hub.root, b.hub.root, "--data", b.table(GOOD)], (
        "two models are called 'base': tell them apart with NAME=FOLDER."
    )


@row()
def models_of_other_classes(b):
    other = b.checkpoint("other", label_names=["round", "lobed", "striped"])
    return ["evaluate", b.base, other, "--data", b.table(GOOD), "--out", b.tmp / "e"], (
        f"{other} has the classes round, lobed, striped, {b.base} has round, lobed, granular: "
        "evaluate them separately, or use 'merge-kit compare' for the classes in common."
    )


@row()
def imported_probabilities_that_do_not_sum_to_one(b):
    lines = [f"{i}.png,0.5,0.5,0.5" for i in range(12)]
    path = b.table("\n".join(["file,p_round,p_lobed,p_granular", *lines]) + "\n", "clinic.csv")
    return ["evaluate", path, "--data", b.table(GOOD), "--split", "all", "--out", b.tmp / "e"], (
        f"{path} line 2: the probabilities sum to 1.5, not to 1: give softmax outputs; where a "
        "case may have several classes, say so with --multi-label."
    )


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_gives_its_sentence(name, bench, run_cli):
    ROWS.check(name, bench, run_cli)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_no_space_left_is_said_and_nothing_is_left(bench, run_cli, small_disk):
    bench.contribute("south")
    (small_disk / "ballast").write_bytes(b"\0" * 500_000)
    result = run_cli("merge", bench.hub.root, "--out", small_disk / "out")
    assert result.exit_code == 1
    assert "cannot be written: no space left (0 MiB free): make room and run the same" in (
        result.stderr
    )
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


def test_read_only_hub_is_said(bench, run_cli, small_disk):
    shutil.copytree(bench.hub.root, small_disk / "hub", ignore=lambda *_: ["base"])
    write_run(bench.site, bench.site.root / "runs" / "one")
    (bench.site.root / "runs" / "one" / "summary.json").write_text("{}")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = run_cli("publish", bench.site.root, "--hub", small_disk / "hub")
    assert result.exit_code == 1
    assert "cannot be written: Read-only file system: choose a folder that you may" in result.stderr

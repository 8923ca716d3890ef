"""Bad input to merge, on a hub and without one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from merge_kit import publishing
from merge_kit.tensorfile import TensorFile, fingerprint, read_all, write_tensors
from tests.bench import Bench, Table, open_bench
from tests.conftest import write_run

ROWS = Table()
row, rows = ROWS.row, ROWS.rows


@pytest.fixture
def bench(tmp_path, hub, contribute) -> Bench:
    return open_bench(tmp_path, hub, contribute)


FORMS = {"on a hub": True, "plain": False}


def merge_both(b: Bench, on_hub: object, *options: object, names: str = "south") -> list[object]:
    """Merge what sites or checkpoints of these names have, in one form or the other."""
    if on_hub:
        for name in names.split():
            b.contribute(name, seed=len(name))
        return ["merge", b.hub.root, *options, "--out", b.tmp / "out"]
    return b.plain(*[b.checkpoint(name) for name in names.split()], *options)


@rows({"inf": "inf", "minus": "-inf", "nan": "nan"})
def infinite_scale(b, scale):
    return ["merge", b.hub.root, "--scale", scale], (
        f"the command line: 'scale': input should be a finite number (got {scale})."
    )


@rows({"inf": ".inf", "nan": ".nan"})
def infinite_scale_in_yaml(b, scale):
    recipe = b.tmp / "recipe.yaml"
    recipe.write_text(f"method: ties\nscale: {scale}\n")
    return merge_both(b, False, "--recipe", recipe), (
        f"{recipe}, line 2: 'scale': input should be a finite number (got {scale[1:]})."
    )


@row()
def key_twice_in_a_recipe(b):
    recipe = b.tmp / "recipe.yaml"
    recipe.write_text("method: ties\noptions:\n  density: 0.1\n  density: 0.9\n")
    return merge_both(b, False, "--recipe", recipe), (
        f"{recipe}, line 4: the key 'density' stands there already, in line 3: leave one of the "
        "two."
    )


@row()
def references_in_a_recipe(b):
    recipe = b.tmp / "recipe.yaml"
    recipe.write_text("method: &m mean\ngroups:\n- match: fc.*\n  method: *m\n")
    return merge_both(b, False, "--recipe", recipe), (
        f"{recipe}, line 4: a reference (*name) has no place here: write it out."
    )


@rows({"true": "true", "text": "two"})
def option_of_another_type(b, value):
    got = {"true": "True", "two": "'two'"}[value]
    arguments = merge_both(b, False, "--method", "ties", "--option", f"density={value}")
    return arguments, (
        f"the command line, options of ties: 'density': input should be a valid number (got {got})."
    )


@rows(FORMS)
def infinite_weight(b, on_hub):
    return merge_both(b, on_hub, "--weights", "south=.inf"), (
        "the command line: 'weights.south': input should be a finite number (got inf)."
    )


@rows({"0": 0, "1.5": 1.5, "-1": -1, "nan": ".nan"})
def density(b, density):
    bound = "less than or equal to 1" if density == 1.5 else "greater than 0"
    fault = f"input should be {bound} (got {density})"
    if density == ".nan":
        fault = "input should be a finite number (got nan)"
    arguments = merge_both(b, False, "--method", "dare", "--option", f"density={density}")
    return arguments, f"the command line, options of dare: 'density': {fault}."


@rows(
    {
        "clipping": ("centred-clipping", 10_001),
        "median": ("geometric-median", 10**30),
        "karcher": ("karcher", 10_001),
        "wudi": ("wudi", 10_001),
    }
)
def endless_iterations(b, chosen):
    method, count = chosen
    arguments = merge_both(b, False, "--method", method, "--option", f"iterations={count}")
    return arguments, (
        f"the command line, options of {method}: 'iterations': input should be less than or equal "
        f"to 10000 (got {count})."
    )


@rows(FORMS)
def one_vector_only(b, on_hub):
    return merge_both(b, on_hub, "--method", "slerp"), (
        "'slerp' needs at least 2 vectors, there is 1: wait for more sites, or take another method."
    )


@rows(FORMS, status=2)
def a_gpu_that_is_not_there(b, on_hub):
    return merge_both(b, on_hub, "--device", "cuda:77"), (
        "the device 'cuda:77' is not there: give --device cpu, or see 'merge-kit doctor'."
    )


@rows(FORMS, status=2)
def a_device_without_float64(b, on_hub):
    return merge_both(b, on_hub, "--device", "mps"), (
        "--device mps: merges run on cpu, or on cuda, cuda:1 and so on."
    )


@row()
def two_identical_contributions(b):
    parcel = b.contribute("south")
    folder = b.hub.root / "contributions" / "south" / parcel.manifest.id
    copy = shutil.copytree(folder, b.tmp / "copy")
    return ["merge", b.hub.root, folder, copy, "--method", "slerp"], (
        "'slerp' needs at least 2 vectors, there is 1: wait for more sites, or take another method."
    )


@row()
def two_identical_checkpoints(b):
    one = b.checkpoint("south")
    other = shutil.copytree(one, b.tmp / "copy")
    return b.plain(one, other, "--method", "slerp"), (
        "'slerp' needs at least 2 vectors, there is 1: wait for more sites, or take another method."
    )


@rows(FORMS)
def too_many_vectors(b, on_hub):
    return merge_both(b, on_hub, "--method", "slerp", names="a ab abc"), (
        "'slerp' merges at most 2 vectors, there are 3: choose with --site, or take another method."
    )


@rows(FORMS)
def zero_vector(b, on_hub):
    arguments = merge_both(b, on_hub, "--method", "nuslerp")
    if on_hub:
        b.contribute("zero", change=lambda name, tensor: tensor)
    else:
        shutil.copytree(b.base, b.tmp / "zero")
        arguments.insert(2, b.tmp / "zero")
    others = 44 if on_hub else 46  # the head is merged like the weights
    return arguments, (
        f"site 'zero': its vector is all zeros in what 'nuslerp' merges ('bn1.bias' and {others} "
        "more) and has no direction: leave it out with --exclude zero, or merge these tensors by "
        "another method."
    )


@row()
def zero_vector_in_a_group(b):
    """Elsewhere it is not zero: a rule looks at the tensors that it merges."""

    def still(tensors):
        tensors["fc.weight"].copy_(start)

    with TensorFile(b.base / "model.safetensors") as file:
        start = file.read("fc.weight")
    recipe = b.tmp / "recipe.yaml"
    recipe.write_text("method: mean\ngroups:\n- match: fc.weight\n  method: nuslerp\n")
    return b.plain(b.checkpoint("south"), b.checkpoint("zero", still), "--recipe", recipe), (
        "site 'zero': its vector is all zeros in what 'nuslerp' merges ('fc.weight') and has no "
        "direction: leave it out with --exclude zero, or merge these tensors by another method."
    )


@rows(FORMS)
def more_attackers_than_sites_allow(b, on_hub):
    arguments = merge_both(b, on_hub, "--method", "krum", "--option", "attackers=2", names="a ab")
    return arguments, (
        "'krum' cannot be used: 2 attacker(s) among 2 cannot be told apart, at least 7 vectors are "
        "needed: lower 'attackers' or wait for more sites."
    )


@rows(FORMS)
def more_kept_than_there_are(b, on_hub):
    options = ("--option", "attackers=0", "--option", "keep=9")
    arguments = merge_both(b, on_hub, "--method", "multi-krum", *options, names="a ab abc")
    return arguments, (
        "'multi-krum' cannot be used: 'keep' is 9 and there are 3 vectors: lower it."
    )


@rows(FORMS)
def weight_of_nobody(b, on_hub):
    return merge_both(b, on_hub, "--weights", "south=1,west=2"), (
        "site 'west' has a weight but no contribution: give each contributing site one weight."
    )


@rows(FORMS)
def method_that_asks_for_statistics(b, on_hub):
    return merge_both(b, on_hub, "--method", "regmean"), (
        "site 'south' has published no gram statistics for its vector: ask it to run 'merge-kit "
        "statistics <folder> --kind gram' and to publish again, or take another method (plain "
        "checkpoints have none)."
    )


@row(2)
def base_alone(b):
    return ["merge", b.base], (
        f"{b.base} is no hub, it has no federation.yaml: merge a hub with 'merge-kit merge HUB', "
        "or checkpoints with 'merge-kit merge BASE CHECKPOINT...'."
    )


@rows({"contributions": "contributions/south/x", "base": "base/merged"}, status=2)
def output_in_the_hubs_own_folders(b, place):
    b.contribute("south")
    out = b.hub.root / place
    return ["merge", b.hub.root, "--out", out], (
        f"{out} lies in the folder '{place.split('/')[0]}' of the federation in {b.hub.root}: "
        "choose another --out."
    )


@row(2)
def plain_output_in_the_hubs_own_folders(b):
    out = b.hub.root / "contributions" / "south"
    return ["merge", b.base, b.checkpoint("south"), "--out", out], (
        f"{out} lies in the folder 'contributions' of the federation in {b.hub.root}: choose "
        "another --out."
    )


@rows({"skip": "--skip-refused", "unsigned": "--allow-unsigned"}, status=2)
def option_of_a_hub(b, option):
    return merge_both(b, False, option), (
        "--skip-refused and --allow-unsigned are for contributions on a hub: leave them out, a "
        "checkpoint carries no signature."
    )


@rows({name: name for name in ("examples", "sqrt-examples", "steps")})
def weights_by_images(b, scheme):
    return merge_both(b, False, "--weights", scheme), (
        f"'weights: {scheme}' needs numbers of images and steps, which only contributions tell: "
        "use 'uniform', or a number for each name."
    )


@row()
def weights_by_images_in_a_group(b):
    recipe = b.tmp / "recipe.yaml"
    recipe.write_text("method: sum\ngroups:\n- match: fc.*\n  method: mean\n  weights: examples\n")
    return merge_both(b, False, "--recipe", recipe), (
        "'weights: examples' needs numbers of images and steps, which only contributions tell: use "
        "'uniform', or a number for each name."
    )


@row()
def checkpoint_missing(b):
    return b.plain(b.tmp / "nowhere"), f"{b.tmp}/nowhere does not exist: check the path."


@row()
def checkpoint_pickled(b):
    torch.save({"fc.bias": torch.zeros(3)}, b.data / "model.pth")
    return b.plain(b.data), (
        f"{b.data}/model.pth is a pickled checkpoint, not safetensors: pickles can run code and "
        "are not read; convert it with torch.load(weights_only=True) and "
        "safetensors.torch.save_file."
    )


@row()
def checkpoint_without_a_shard(b):
    one = b.checkpoint("south")
    (one / "model.safetensors").rename(one / "model-00001-of-00002.safetensors")
    index = one / "model.safetensors.index.json"
    where = {"fc.bias": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return b.plain(one), (
        f"{index} names the shard 'model-00002-of-00002.safetensors', which is not there: copy the "
        "whole folder again."
    )


@row()
def checkpoint_of_another_architecture(b):
    one = b.checkpoint("south", lambda t: [t.pop("fc.bias"), t.pop("conv1.0.weight")])
    return b.plain(one), (
        f"{one} lacks the tensor 'conv1.0.weight' that the base has (2 in all): is it another "
        "architecture?"
    )


@row()
def checkpoint_with_an_extra_tensor(b):
    one = b.checkpoint("south", lambda t: t.update({"extra": torch.zeros(1)}))
    return b.plain(one), (
        f"{one} has the tensor 'extra' that the base does not have (1 in all): is it another "
        "architecture?"
    )


@row()
def checkpoint_of_another_shape(b):
    one = b.checkpoint("south", lambda t: t.update({"bn1.weight": torch.zeros(4)}))
    with TensorFile(b.base / "model.safetensors") as file:
        shape = list(file.specs["bn1.weight"].shape)
    return b.plain(one), (
        f"{one}: tensor 'bn1.weight' is F32 [4], the base's is F32 {shape}: is it another "
        "architecture, or a head that no config.json names?"
    )


@row()
def checkpoint_quantised(b):
    one = b.checkpoint("south", lambda t: t.update({"fc.bias": torch.zeros(3).to(torch.int8)}))
    return b.plain(one), (
        f"{one}: tensor 'fc.bias' is I8 [3], the base's is F32 [3]: convert it first."
    )


@row()
def checkpoint_with_nan(b):
    one = b.checkpoint("south", lambda t: t["fc.bias"].fill_(float("nan")))
    return b.plain(one, "--method", "median"), (
        f"{one}: tensor 'fc.bias' holds 3 value(s) that are NaN or infinite: give a sound "
        "checkpoint."
    )


@row()
def integer_table_differs(b):
    base = b.file("b", w=torch.ones(2), table=torch.tensor([1, 2]))
    one = b.file("one", w=torch.zeros(2), table=torch.tensor([2, 1]))
    return ["merge", base, one], (
        f"{one}: the integer table 'table' differs from the base's: is it another architecture or "
        "input size?"
    )


@row()
def tied_tensor_dropped_without_a_word(b):
    tied = torch.arange(4.0)
    base = b.file("b", embed__weight=tied, head__weight=tied.clone())
    one = b.file("one", embed__weight=tied + 1)
    return ["merge", base, one], (
        f"{one} lacks the tensor 'head.weight', which equals 'embed.weight' in the base: if they "
        "are tied, save it with both names or with safetensors.torch.save_model, which records the "
        "tie."
    )


@row()
def heads_of_different_classes(b):
    head = {"fc.weight": torch.zeros(4, 96), "fc.bias": torch.zeros(4)}
    one, other = b.checkpoint("south"), b.checkpoint("west", lambda t: t.update(head))
    return b.plain(one, other), (
        f"the heads differ, 'fc.bias' is F32 [3] in {one} and F32 [4] in {other}: only checkpoints "
        "of the same classes can be merged."
    )


@row()
def classes_in_another_order(b):
    one = b.checkpoint("south", label_names=["lobed", "round", "granular"])
    return b.plain(one), (
        f"class 0 is 'lobed' in {one}/config.json and 'round' in {b.base}/config.json: only "
        "checkpoints with the same classes in the same order can be merged."
    )


@row()
def another_number_of_class_names(b):
    one = b.checkpoint("south", label_names=["round", "lobed"])
    return b.plain(one), (
        f"{one}/config.json names 2 classes, {b.base}/config.json names 3: only checkpoints of the "
        "same classes can be merged."
    )


@row()
def class_names_for_another_head(b):
    names = ["round", "lobed"]
    one = b.checkpoint("south", label_names=names, num_classes=3)
    config = json.loads((b.base / "config.json").read_bytes())
    (b.base / "config.json").write_text(json.dumps({**config, "label_names": names}))
    return b.plain(one), (
        f"{b.base}/config.json names 2 classes, but the head 'fc.bias' beside it has 3 rows: copy "
        "both again, or correct it."
    )


@row()
def another_number_of_classes_than_the_head(b):
    one = b.checkpoint("south", num_classes=4)
    return b.plain(one), (
        f"{one}/config.json: 'num_classes' is 4, but the head 'fc.bias' beside it has 3 rows: copy "
        "both again, or correct it."
    )


@row()
def configuration_of_another_architecture(b):
    one = b.checkpoint("south", architecture="test_resnet_d")
    return b.plain(one), (
        f"{one}/config.json is of a 'test_resnet_d', {b.base}/config.json of a 'test_resnet': only "
        "checkpoints of one architecture can be merged; correct the file that is wrong."
    )


@row()
def vector_without_its_metadata(b):
    write_run(b.site, b.tmp / "run")
    with TensorFile(b.tmp / "run" / publishing.VECTOR) as file:
        tensors = dict(read_all(file))
    path = b.tmp / "bare.safetensors"
    write_tensors(path, tensors)
    return b.plain(path), (
        f"{path} is no checkpoint of this base: its weights have 0.067 times the base's length, as "
        "a task vector without its metadata would; give the checkpoint, or the vector's file as "
        "merge-kit wrote it."
    )


@rows({"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64})
def difference_that_overflows(b, dtype):
    base = b.file("b", v=torch.ones(9), w=torch.tensor([-3e38, 1.0]))
    large = torch.tensor([1e300 if dtype is torch.float64 else 3e38, 1.0], dtype=dtype)
    one = b.file("one", v=torch.ones(9), w=large)
    return ["merge", base, one, "--method", "median", "--out", b.tmp / "out"], (
        f"{one}: tensor 'w' has values so large that the difference from the base's overflows "
        "float32: give a sound checkpoint."
    )


@row()
def classifier_that_is_not_there(b):
    config = json.loads((b.base / "config.json").read_bytes())
    config["pretrained_cfg"]["classifier"] = "head"
    (b.base / "config.json").write_text(json.dumps(config))
    return b.plain(b.checkpoint("south")), (
        "the classifier 'head' has no tensor 'head.weight': correct 'classifier' in the base's "
        "config.json."
    )


@row()
def configuration_that_is_no_json(b):
    one = b.checkpoint("south")
    (one / "config.json").write_text("{")
    return b.plain(one), f"{one}/config.json is not valid JSON: copy it again, or remove it."


@row()
def bare_vector_of_another_base(b):
    write_run(b.site, b.tmp / "run")
    with TensorFile(b.base / "model.safetensors") as file:
        tensors = {name: t + 1 for name, t in read_all(file)}
    write_tensors(b.base / "model.safetensors", tensors)
    path = b.tmp / "run" / publishing.VECTOR
    return b.plain(path), (
        f"{path} was taken from the base {b.site.federation.base_fingerprint}, the given base is "
        f"{fingerprint(tensors.items())}: give the base that it was taken from."
    )


@row(2)
def one_name_for_two_checkpoints(b):
    one, other = b.checkpoint("south"), b.checkpoint("west-coast")
    return b.plain(f"a={one}", f"a={other}"), (
        "two checkpoints are called 'a': tell them apart with NAME=PATH."
    )


@row(2)
def name_of_nobody(b):
    return merge_both(b, False, "--exclude", "west"), (
        "no checkpoint is called 'west'; there are south."
    )


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_gives_its_sentence(name, bench, run_cli):
    ROWS.check(name, bench, run_cli)

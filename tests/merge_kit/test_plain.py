"""Merging without a federation: real timm folders, as timm and Hugging Face write them."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, save_torch_state_dict
from timm.models._hub import save_config_for_hf

from merge_kit import plain, vector
from merge_kit.contributions import PAYLOAD, folder_of
from merge_kit.parameters import Role, role_of, roles_of, variance_of
from merge_kit.recipe import make_recipe
from merge_kit.tensorfile import TensorFile, fingerprint_file, specs_of, write_tensors
from tests.merge_kit.helpers import listing, load

LABELS = ("round", "lobed", "granular")
KINDS = {
    "a": (torch.float16, "5GB"),
    "b": (torch.bfloat16, "100KB"),
    "c": (torch.float32, "200KB"),
}
HEAD = {"test_resnet": "fc", "test_vit": "head"}


def write(folder, model, *, dtype=torch.float32, shard="5GB", labels=LABELS, config=True):
    """A timm folder, whole or in shards."""
    folder.mkdir()
    state = model.state_dict()
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_torch_state_dict(stored, folder, max_shard_size=shard)
    if config:
        named = {"label_names": list(labels)} if labels else None
        save_config_for_hf(model, folder / "config.json", model_config=named)
    return {name: tensor.clone() for name, tensor in stored.items()}


def make(architecture, classes, seed=None):
    """The base, or what a seed's training has made of it."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=classes)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    step = 0.02 * torch.randn(tensor.shape, generator=generator)
                    tensor += step.abs() if name.endswith("running_var") else step
                else:
                    tensor += seed
    return model


@pytest.fixture
def folders(tmp_path):
    """base/ and a/, b/, c/ of an architecture, in three precisions; their state dicts."""

    def run(architecture="test_resnet", base_classes=3, **options):
        base_labels = LABELS if base_classes == 3 else None
        states = {
            "base": write(tmp_path / "base", make(architecture, base_classes), labels=base_labels)
        }
        for seed, (name, (dtype, shard)) in enumerate(KINDS.items(), start=1):
            model = make(architecture, 3, seed)
            states[name] = write(tmp_path / name, model, dtype=dtype, shard=shard, **options)
        return states

    return run


@pytest.fixture
def merge(run_cli, tmp_path):
    """Merge by the command; what it printed, and the folder."""

    def run(*inputs, base="base", out="out", options=()):
        paths = [tmp_path / text for text in inputs]
        result = run_cli("merge", tmp_path / base, *paths, *options, "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return result.stdout, tmp_path / out

    return run


def doubled(states, names):
    """Each state in float64 after float32, as differences are taken; base first."""
    return [
        {k: v.float().double() if v.is_floating_point() else v for k, v in states[n].items()}
        for n in ("base", *names)
    ]


def literal_mean(states, names, roles):
    base, *tuned = doubled(states, names)
    return {
        name: base[name] + torch.stack([t[name] - base[name] for t in tuned]).mean(dim=0)
        for name, role in roles.items()
        if role in (Role.WEIGHT, Role.HEAD)
    }


def literal_ties(states, names, roles, density=0.2):
    """arXiv 2306.01708, over the whole flat vector."""
    base, *tuned = doubled(states, names)
    keys = [name for name, role in roles.items() if role in (Role.WEIGHT, Role.HEAD)]
    flat = torch.stack(
        [torch.cat([(t[k] - base[k]).float().double().reshape(-1) for k in keys]) for t in tuned]
    )
    keep = int(density * flat.shape[1])
    for row in flat:
        threshold = row.abs().sort(descending=True).values[keep]
        row[row.abs() < threshold] = 0
    signs = flat.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    agree = (flat.sign() == signs) & (flat != 0)
    merged = (flat * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    sizes = [base[k].numel() for k in keys]
    parts = merged.split(sizes)
    return {k: base[k] + part.reshape(base[k].shape) for k, part in zip(keys, parts, strict=True)}


def literal_slerp(states, names, roles):
    """Shoemake 1985 on the weights of each tensor, half of the way."""
    _, one, other = doubled(states, names)
    found = {}
    for name, role in roles.items():
        if role not in (Role.WEIGHT, Role.HEAD):
            continue
        v0, v1 = one[name].reshape(-1), other[name].reshape(-1)
        cosine = (v0 @ v1) / (v0.norm() * v1.norm())
        if cosine.abs() > 0.9995:
            found[name] = (one[name] + other[name]) / 2
            continue
        angle = torch.acos(cosine)
        share = torch.sin(angle / 2) / torch.sin(angle)
        found[name] = share * one[name] + share * other[name]
    return found


def literal_norm(states, names, roles):
    _, *tuned = doubled(states, names)
    found = {}
    for name, role in roles.items():
        if role is Role.NORM_MEAN:
            means = torch.stack([t[name] for t in tuned])
            variances = torch.stack([t[variance_of(name)] for t in tuned])
            found[name] = means.mean(dim=0)
            spread = variances + (means - means.mean(dim=0)) ** 2
            found[variance_of(name)] = spread.mean(dim=0)
        elif role is Role.COUNTER:
            found[name] = torch.stack([t[name] for t in tuned]).amax(dim=0)
    return found


@pytest.mark.parametrize("architecture", HEAD)
@pytest.mark.parametrize(
    ("method", "literal", "names"),
    [("mean", literal_mean, "abc"), ("ties", literal_ties, "abc"), ("slerp", literal_slerp, "ab")],
    ids=["mean", "ties", "slerp"],
)
def test_timm_folders_of_any_precision_and_in_shards_give_one(
    folders, merge, architecture, method, literal, names
):
    states = folders(architecture)
    _, out = merge(*names, options=["--method", method])
    roles = roles_of(specs_of(states["base"]), (HEAD[architecture],))
    expected = literal(states, names, roles) | literal_norm(states, names, roles)
    merged = load(out / "model.safetensors")
    assert merged.keys() == expected.keys() == states["base"].keys()
    for name, tensor in merged.items():
        wanted = expected[name].to(tensor.dtype)
        assert tensor.dtype == states["base"][name].dtype
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8, msg=name)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert all(torch.equal(merged[name], t) for name, t in model.state_dict().items())
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 3)
    assert listing(out) == ["README.md", "config.json", "model.safetensors", "provenance.json"]
    assert json.loads((out / "config.json").read_text())["label_names"] == list(LABELS)


@pytest.mark.parametrize("architecture", HEAD)
@pytest.mark.parametrize("method", ["mean", "ties", "sum"])
def test_a_head_that_the_base_does_not_have_is_the_mean_of_heads(
    folders, merge, architecture, method
):
    states = folders(architecture, base_classes=10)
    printed, out = merge("a", "b", options=["--method", method, "--weights", "a=3,b=1"])
    assert (
        "The head is new (3 classes, the base has 10): it is the weighted mean of the checkpoints' "
        "heads, whatever the method.\n"
    ) in printed
    merged, head = load(out / "model.safetensors"), HEAD[architecture]
    for leaf in ("weight", "bias"):
        one, other = (states[n][f"{head}.{leaf}"].double() for n in "ab")
        expected = (3 * one + other) / 4
        torch.testing.assert_close(merged[f"{head}.{leaf}"].double(), expected, rtol=1e-6, atol=0)
    assert json.loads((out / "provenance.json").read_text())["recipe"]["head"] == "seen"
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert (model.num_classes, model.pretrained_cfg["label_names"]) == (3, list(LABELS))


def test_a_new_head_does_not_change_the_body(folders, merge, tmp_path):
    """With another head in the base, TIES trims the same vector of the body's weights."""
    states = folders(base_classes=10)
    _, out = merge("a", "b", "c", options=["--method", "ties"])
    roles = roles_of(specs_of(states["base"]), ("fc",))
    body = {name: role for name, role in roles.items() if role is Role.WEIGHT}
    merged = load(out / "model.safetensors")
    for name, expected in literal_ties(states, "abc", body).items():
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-8)


def test_a_base_without_a_head_gets_the_checkpoints(folders, merge, tmp_path):
    folders()
    headless = timm.create_model("test_resnet", num_classes=0)
    headless.load_state_dict(make("test_resnet", 3).state_dict(), strict=False)
    write(tmp_path / "bare", headless, labels=None)
    printed, out = merge("a", "b", base="bare")
    assert "The head is new (3 classes, the base has none)" in printed
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 3


def test_the_bases_config_serves_when_the_checkpoints_have_none(folders, merge):
    folders(base_classes=10, config=False)
    _, out = merge("a", "b")
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert torch.equal(model.fc.weight, load(out / "model.safetensors")["fc.weight"])
    assert model.num_classes == 3


def content(folder):
    return {name: (folder / name).read_bytes() for name in listing(folder)}


def test_order_repetition_and_shards_do_not_change_a_byte(folders, merge, tmp_path):
    states = folders()
    (tmp_path / "whole" / "b").mkdir(parents=True)
    write_tensors(tmp_path / "whole" / "b" / "model.safetensors", states["b"], ("other", "x"))
    config = (tmp_path / "b" / "config.json").read_bytes()
    (tmp_path / "whole" / "b" / "config.json").write_bytes(config)
    _, first = merge("a", "b", "c", options=["--method", "ties"], out="first")
    printed, second = merge(
        "c", "whole/b", "a", "b", "a", options=["--method", "ties"], out="second"
    )
    assert content(first) == content(second)
    assert f"{tmp_path}/a is given twice: it counts once.\n" in printed
    assert f"{tmp_path}/b and {tmp_path}/whole/b hold the same tensors: they count once" in printed
    assert "ties of 3 checkpoints" in printed


def test_a_bare_vector_is_as_good_as_its_checkpoint(folders, merge, tmp_path):
    states = folders()
    base = tmp_path / "base" / "model.safetensors"
    fingerprint = fingerprint_file(base)
    header = vector.VectorHeader(base=fingerprint, federation="sha256:" + "0" * 64, site="west")
    with TensorFile(base) as file:
        roles = roles_of(file.specs, ("fc",))
        vector.subtract(file, states["b"], roles, header, tmp_path / "b.safetensors")
    _, one = merge("a", "b", "c", out="one")
    printed, other = merge("a", "b.safetensors", "c", out="other")
    merged = (one / "model.safetensors").read_bytes()
    assert merged == (other / "model.safetensors").read_bytes()
    assert "\n  west " in printed
    record = json.loads((other / "provenance.json").read_text())
    assert {i["name"]: i["kind"] for i in record["inputs"]} == {
        "a": "checkpoint",
        "west": "vector",
        "c": "checkpoint",
    }


def test_payloads_merge_alone_as_they_do_on_their_hub(contribute, hub, run_cli, merge, tmp_path):
    """Every site has as many images: the federation's weights are uniform too."""
    parcels = [contribute(name, seed=seed) for seed, name in enumerate(("north", "south"))]
    arguments = ("--method", "ties", "--head", "method")
    result = run_cli("merge", hub.root, *arguments, "--out", tmp_path / "on-hub")
    assert result.exit_code == 0
    payloads = [hub.root / folder_of(p.manifest) / PAYLOAD for p in parcels]
    _, out = merge(*payloads, base="hub/base", options=arguments)
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "on-hub" / "model.safetensors").read_bytes()
    assert (out / "config.json").read_text() == (hub.root / "base" / "config.json").read_text()


def test_files_alone_give_a_folder_without_a_configuration(folders, merge, tmp_path):
    states = folders()
    for name in ("a", "b", "base"):
        write_tensors(tmp_path / f"{name}.safetensors", states[name])
    printed, out = merge("a.safetensors", "b.safetensors", base="base.safetensors")
    assert listing(out) == ["README.md", "model.safetensors", "provenance.json"]
    assert printed.endswith(f"\nNext: load {out}/model.safetensors into your model.\n")
    _, named = merge("a", "b", out="named")
    assert load(named / "model.safetensors").keys() == load(out / "model.safetensors").keys()


def test_provenance_and_card_say_what_was_merged_and_no_path(folders, run_cli, tmp_path):
    folders()
    inputs = [f"first={tmp_path / 'a'}", f"second={tmp_path / 'b'}"]
    arguments = ("--weights", "first=1,second=3", "--out", tmp_path / "out")
    assert run_cli("merge", tmp_path / "base", *inputs, *arguments).exit_code == 0
    out = tmp_path / "out"
    record = json.loads((out / "provenance.json").read_text())
    given = {"method": "mean", "weights": {"first": 1.0, "second": 3.0}}
    assert record["recipe"] == make_recipe(given, "x", plain.DEFAULTS).model_dump(mode="json")
    assert record["base"] == fingerprint_file(tmp_path / "base" / "model.safetensors")
    assert record["merged"] == fingerprint_file(out / "model.safetensors")
    assert {i["name"]: i["weight"] for i in record["inputs"]} == {"first": 0.5, "second": 1.5}
    one = next(i for i in record["inputs"] if i["name"] == "first")
    assert one["fingerprint"] == fingerprint_file(tmp_path / "a" / "model.safetensors")
    text = (out / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "timm"
    assert f"| first | checkpoint | `{one['fingerprint'][7:19]}` | 0.500 |" in text
    assert "0. round\n1. lobed\n2. granular\n" in text
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0])["method"] == "mean"
    for name, data in content(out).items():
        assert str(tmp_path).encode() not in data, name


def test_a_recipe_that_says_nothing_of_images_needs_none(folders, run_cli, tmp_path):
    folders()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: mean\nscale: 0.5\n")
    for more in (("--recipe", recipe), ("--method", "mean", "--scale", 0.5)):
        result = run_cli("merge", tmp_path / "base", tmp_path / "a", *more, "--print-recipe")
        shown = yaml.safe_load(result.stdout)
        assert (shown["weights"], shown["head"], shown["scale"]) == ("uniform", "method", 0.5)


def test_groups_need_no_numbers_of_images_either(folders, run_cli, tmp_path):
    states = folders()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: sum\ngroups:\n- match: fc.*\n  method: mean\n")
    inputs = [tmp_path / name for name in "abc"]
    more = ("--recipe", recipe, "--out", tmp_path / "out")
    assert run_cli("merge", tmp_path / "base", *inputs, *more).exit_code == 0
    merged = load(tmp_path / "out" / "model.safetensors")["fc.weight"]
    expected = literal_mean(states, "abc", {"fc.weight": Role.HEAD})["fc.weight"]
    torch.testing.assert_close(merged, expected.float(), rtol=1e-6, atol=1e-8)


def test_heads_by_their_mean_when_the_recipe_says_so(folders, merge):
    states = folders()
    _, out = merge("a", "b", options=["--method", "ties", "--head", "seen", "--weights", "a=1,b=3"])
    expected = (states["a"]["fc.weight"].double() + 3 * states["b"]["fc.weight"].double()) / 4
    merged = load(out / "model.safetensors")["fc.weight"].double()
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)


def test_norm_statistics_follow_the_weights_and_never_a_negative_one(folders, merge):
    """b is subtracted from the weights; of the images it saw nothing is pooled."""
    states = folders()
    _, out = merge("a", "b", "c", options=["--method", "sum", "--weights", "a=3,b=-1,c=1"])
    merged = load(out / "model.safetensors")
    base, a, b, c = doubled(states, "abc")
    mean = next(n for n in merged if n.endswith("running_mean"))
    expected = (3 * a[mean] + c[mean]) / 4
    torch.testing.assert_close(merged[mean].double(), expected, rtol=1e-6, atol=1e-8)
    w = "conv1.0.weight"
    assert role_of(w, specs_of(merged)[w], ()) is Role.WEIGHT
    expected = base[w] + 3 * (a[w] - base[w]) - (b[w] - base[w]) + (c[w] - base[w])
    torch.testing.assert_close(merged[w].double(), expected, rtol=1e-6, atol=1e-8)


def test_some_are_chosen_by_name(folders, merge):
    folders()
    _, two = merge("a", "b", out="two")
    _, chosen = merge("a", "b", "c", options=["--site", "a", "--site", "b"], out="chosen")
    _, without = merge("a", "b", "c", options=["--exclude", "c"], out="without")
    assert content(two) == content(chosen) == content(without)


def test_the_recipe_says_in_which_precision_to_write(folders, run_cli, tmp_path):
    folders()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: mean\ndtype: bfloat16\n")
    result = run_cli("merge", tmp_path / "base", tmp_path / "a", tmp_path / "c", "--recipe",
                     recipe, "--out", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0
    dtypes = {s.dtype for s in specs_of(load(tmp_path / "out" / "model.safetensors")).values()}
    assert dtypes == {torch.bfloat16, torch.int64}


def test_a_base_in_half_precision_and_in_shards(folders, merge, tmp_path):
    states = folders()
    model = make("test_resnet", 3)
    half = write(tmp_path / "half", model, dtype=torch.bfloat16, shard="100KB")
    _, out = merge("a", "b", base="half")
    roles = roles_of(specs_of(half), ("fc",))
    merged = load(out / "model.safetensors")
    for name, expected in literal_mean({**states, "base": half}, "ab", roles).items():
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-6, atol=1e-8)


def test_other_preprocessing_is_said(folders, merge, tmp_path):
    folders()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    printed, _ = merge("a", "b")
    one, other = (f"{tmp_path}/{name}/config.json" for name in "ab")
    assert any(
        f"{x} has another mean than {y}, which the merged model has.\n" in printed
        for x, y in ((one, other), (other, one))
    )


def test_an_existing_merged_model_gives_way_when_asked(folders, merge, run_cli, tmp_path):
    folders()
    _, out = merge("a", "b")
    before = content(out)
    arguments = ["merge", tmp_path / "base", tmp_path / "a", "--out", out]
    assert run_cli(*arguments).stderr == (
        f"Error: {out} exists already: choose another --out, or pass --replace.\n"
    )
    assert content(out) == before
    assert run_cli(*arguments, "--replace").exit_code == 0
    assert content(out) != before


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (("ties",), (6, 0)),
        (("ties",), (0, 0)),
        (("ties", "--option", "scope=tensor"), (6, 0)),
        (("model-stock",), (6, 0)),
        (("geometric-median",), (0, 0)),
    ],
    ids=str,
)
def test_tensors_without_values_are_merged_into_such(run_cli, tmp_path, options, sizes):
    for number, name in enumerate(("base", "a", "b")):
        tensors = {f"t{at}": torch.full((size, 2), number**2) for at, size in enumerate(sizes)}
        write_tensors(
            tmp_path / name, {key: tensor.float() for key, tensor in tensors.items()}, ("x", name)
        )
    paths = [tmp_path / name for name in ("base", "a", "b")]
    result = run_cli("merge", *paths, "--method", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    merged = load(tmp_path / "out" / "model.safetensors")
    assert [tuple(tensor.shape) for tensor in merged.values()] == [(size, 2) for size in sizes]
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["merged"] == fingerprint_file(tmp_path / "out" / "model.safetensors")


def test_a_main_rule_that_nothing_is_left_for_needs_no_direction(folders, merge, tmp_path):
    folders()
    recipe = {"method": "model-stock", "groups": [{"method": "mean", "match": "*"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, grouped = merge("a", "b", out="grouped", options=("--recipe", tmp_path / "recipe.yaml"))
    _, mean = merge("a", "b")
    assert (grouped / "model.safetensors").read_bytes() == (mean / "model.safetensors").read_bytes()

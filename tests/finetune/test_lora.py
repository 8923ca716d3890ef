"""LoRA at a site: what is trained, that it can go on, and that its vector merges as a dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import levers, lora, losses, network, training
from finetune.options import TrainingOptions
from finetune.tasks import Task
from merge_kit import forms, signing, vector
from merge_kit import site as sites
from merge_kit.creation import create
from merge_kit.errors import UsageError
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.files import sha256_file
from merge_kit.hub import FolderHub
from merge_kit.manifest import read_draft
from merge_kit.runs import latest_run
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.conftest import CLASSES
from tests.finetune.pictures import images, write_table
from tests.merge_kit.helpers import load, says

CPU = torch.device("cpu")
QUICK = TrainingOptions(
    lora=2, steps=4, validations=2, batch_size=8, head_steps=0, augment="none", warmup=0,
    learning_rate=1e-2,
)  # fmt: skip
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def hub(tmp_path):
    """A federation with a small vision transformer."""
    create(
        tmp_path / "hub",
        name="cells",
        architecture="test_vit",
        classes=CLASSES,
        weights="none",
        model_args={"img_size": 32},
        preprocessing={"input_size": (3, 32, 32), "crop_pct": 1.0},
        policy=Policy(),
        seed=1,
    )
    return FolderHub(tmp_path / "hub")


@pytest.fixture
def make_task(hub):
    def make(**options):
        model = network.load(hub.root / "base")
        torch.manual_seed(5)
        nn.init.normal_(network.head_of(model).weight, std=0.1)
        train, validation = images((0, 1, 2) * 6, seed=1), images([0, 1, 2] * 3, seed=2)
        seen = losses.seen_classes(train.labels(), 3)
        return Task(model, train, validation, seen, QUICK.model_copy(update=options), CPU)

    return make


@pytest.fixture
def train(make_task, tmp_path):
    """Train in a fresh place; gives the result, and the weights before."""

    def go(**options):
        task = make_task(**options)
        start = {n: t.detach().clone() for n, t in task.model.state_dict().items()}
        place = tmp_path / f"run{len(list(tmp_path.iterdir()))}" / "checkpoint.pt"
        return training.train(task, place, lambda event: None), start

    return go


def adapted(model):
    return {
        n for n, _ in model.named_parameters() if n.endswith(tuple(f"{x}.weight" for x in LAYERS))
    }


def squares(trained):
    return sum(float(forms.product(f).square().sum()) for f in trained.factors.values())


def test_only_the_linear_layers_of_the_blocks_and_the_head_change(train, make_task):
    trained, start = train()
    changed = {n for n, t in trained.state.items() if not torch.equal(t, start[n])}
    layers = adapted(make_task().model)
    assert len(layers) == 4 * 6
    assert changed == layers | {"head.weight", "head.bias"}
    assert set(trained.factors) == layers


def test_the_weights_are_the_base_and_the_product_of_the_factors(train):
    trained, start = train()
    for name, pair in trained.factors.items():
        rows, columns = start[name].shape
        assert (pair.left.shape, pair.right.shape) == ((rows, 2), (2, columns))
        assert torch.equal(trained.state[name], start[name] + forms.product(pair))
        assert pair.left.any()


def test_training_starts_from_the_base(make_task):
    model = make_task().model
    before = network.logits(model, images([0, 1, 2]), CPU)
    lora.attach(model, 2, 16.0, seed=0)
    torch.testing.assert_close(network.logits(model, images([0, 1, 2]), CPU), before)
    lora.remove(model)
    assert torch.equal(network.logits(model, images([0, 1, 2]), CPU), before)


def test_alpha_over_the_rank_scales_the_product():
    adapter = lora.Adapter(torch.zeros(2, 3), rank=1, alpha=5.0, seed=0)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        adapter.B.copy_(torch.tensor([[1.0], [-1.0]]))
    expected = [[5.0, 10.0, 15.0], [-5.0, -10.0, -15.0]]
    assert adapter(torch.zeros(2, 3)).tolist() == expected
    state = {
        "x.parametrizations.weight.original": torch.ones(2, 3),
        "x.parametrizations.weight.0.A": adapter.A.detach(),
        "x.parametrizations.weight.0.B": adapter.B.detach(),
    }
    dense, factors = lora.plain(state, 1, 5.0)
    assert forms.product(factors["x.weight"]).tolist() == expected
    assert dense["x.weight"].tolist() == [[6.0, 11.0, 16.0], [-4.0, -9.0, -14.0]]


def test_the_draw_depends_on_the_seed_and_the_layer(make_task):
    def drawn(seed):
        model = make_task().model
        lora.attach(model, 2, 16.0, seed)
        return [p.detach() for n, p in model.named_parameters() if n.endswith(".A")]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], first[5])


def test_only_the_last_blocks_are_adapted(train):
    trained, _ = train(blocks=0.5)
    assert {name.split(".")[1] for name in trained.factors} == {"3", "4", "5"}


def test_a_backbone_without_such_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.fc = nn.Linear(4, 3)
    model.pretrained_cfg = {"classifier": "fc"}
    with says(
        UsageError,
        "--lora adapts linear layers called qkv, proj, fc1, fc2 in blocks, and Sequential has none "
        "to train: leave --lora out for this backbone.",
    ):
        lora.attach(model, 2, 16.0, 0)


def test_a_rank_beyond_the_layers_is_refused(make_task):
    with says(UsageError, "--lora 65 is larger than a layer: give a rank of at most 64."):
        lora.attach(make_task().model, 65, 16.0, 0)


def test_the_pull_is_the_gradient_of_half_the_squared_length_of_the_product(make_task):
    model = make_task().model
    lora.attach(model, 2, 16.0, 0)
    factors = [p for n, p in model.named_parameters() if n.endswith((".A", ".B"))]
    with torch.no_grad():
        for p in factors:
            p.add_(0.1 * torch.randn_like(p))
    adapters = [m for m in model.modules() if isinstance(m, lora.Adapter)]
    wanted = sum((a.scale * a.B @ a.A).square().sum() for a in adapters) * (0.3 / 2)
    expected = torch.autograd.grad(wanted, factors)
    for p in factors:
        p.grad = torch.zeros_like(p)
    lora.pull(model, 0.3)
    for p, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_distance_shortens_the_product_and_sharpness_changes_it(train):
    plain = squares(train(steps=8)[0])
    assert squares(train(steps=8, distance=10.0)[0]) < 0.9 * plain
    assert squares(train(steps=8, sharpness=0.05)[0]) != plain


@pytest.mark.parametrize(
    "options", [{}, {"distance": 0.1, "sharpness": 0.05}], ids=["plain", "more"]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(make_task, tmp_path, options):
    whole = training.train(make_task(**options), tmp_path / "a.pt", lambda event: None)

    class Stopped(Exception):
        pass

    def stop(event):
        if event["event"] == "checkpoint" and event["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        training.train(make_task(**options), tmp_path / "b.pt", stop)
    again = training.train(make_task(**options), tmp_path / "b.pt", lambda event: None)
    assert all(torch.equal(again.state[n], t) for n, t in whole.state.items())
    for name, pair in whole.factors.items():
        assert all(map(torch.equal, again.factors[name], pair))


def test_frozen_norms_are_no_obstacle(make_task):
    task = make_task(norm="fixed")
    levers.freeze(task.model, task.options)
    lora.attach(task.model, 2, 16.0, 0)


# By the commands


@pytest.fixture
def federated(hub, run_cli, tmp_path):
    """Two sites that have trained with LoRA and published."""
    for seed, name in enumerate(("north", "south")):
        joined = sites.join(hub, name, tmp_path / name)
        federation = read_federation(hub.root).admit(name, signing.public_key(joined.key_file))
        hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
        counts = {"round": 8, "lobed": 6, "granular": 6}
        table = write_table(tmp_path / "images" / name, counts, seed=seed)
        quick = ("--steps", 3, "--head-steps", 10, "--batch-size", 8, "--device", "cpu")
        rate = ("--learning-rate", 0.01, "--lora", 2, "--validations", 1)
        for command in (
            ("finetune", tmp_path / name, "--data", table, *quick, *rate),
            ("publish", tmp_path / name),
        ):
            result = run_cli(*command)
            assert result.exit_code == 0, result.output
    return {name: latest_run(tmp_path / name) for name in ("north", "south")}


def dense_twin(path: Path, target: Path) -> Path:
    """The same vector, all of it stored dense."""
    with vector.opened(path) as file:
        told = json.loads(file.metadata[vector.METADATA_KEY])
        del told["encoding"]
        header = vector.VectorHeader.model_validate(told)
        text = vector.canonical_json(header.model_dump()).decode()
        tensors = {name: file.read(name) for name in file.specs}
        write_tensors(target, tensors, (vector.METADATA_KEY, text))
    return target


def test_vectors_with_factors_go_from_publish_to_verify(federated, hub, run_cli, tmp_path):
    merged, table = tmp_path / "merged", tmp_path / "images" / "north" / "labels.csv"
    for line in (
        f"merge {hub.root} --method sum --keep-sum --out {merged}",
        f"verify {merged} --hub {hub.root}",
        f"status {hub.root}",
        f"compare {merged} {hub.root}/base --data {table} --split val --out {tmp_path}/compared",
        f"merge {hub.root} --method ties --dry-run",
        f"select {hub.root} --method sum --scales 0.5,1 --data {table} --out-recipe {merged}.yaml",
    ):
        result = run_cli(*line.split())
        assert result.exit_code == 0, result.output
    base, sums = load(hub.root / "base" / "model.safetensors"), load(merged / "model.safetensors")
    name = "blocks.2.mlp.fc1.weight"
    learnt = base[name].double()
    for run in federated.values():
        with vector.opened(run / "vector.safetensors") as file:
            learnt += file.read(name).double()
    torch.testing.assert_close(sums[name].double(), learnt, rtol=1e-6, atol=1e-7)
    assert not torch.equal(sums[name], base[name])


def test_the_run_is_a_plain_model_and_the_manifest_tells_the_dense_norm(federated):
    run = federated["north"]
    model = network.load(run / "model")
    draft = read_draft(run / "manifest.draft.json")
    start = network.load(run.parents[1] / "federation" / "base").state_dict()
    total = sum(
        float((t - start[n]).double().square().sum()) for n, t in model.state_dict().items()
    )
    assert draft.payload.norm == pytest.approx(total**0.5, rel=1e-4)
    assert draft.payload.size == (run / "vector.safetensors").stat().st_size
    # 24 layers of rank 2, the head and the header, where the dense one has 1.4 MB.
    factors = sum(2 * 4 * (m + n) for m, n in [(192, 64), (64, 64), (192, 64), (64, 192)] * 6)
    assert factors < draft.payload.size < factors + 20_000


def test_a_merge_of_factors_is_a_merge_of_the_dense_vectors(federated, hub, run_cli, tmp_path):
    small = [run / "vector.safetensors" for run in federated.values()]
    dense = [dense_twin(p, tmp_path / f"{n}.dense") for n, p in zip("ab", small, strict=True)]
    for method in ("mean", "sum", "ties", "dare", "tsv-m", "geometric-median"):
        for inputs, out in ((small, "small"), (dense, "dense")):
            target = ("--method", method, "--out", tmp_path / method / out)
            result = run_cli("merge", hub.root / "base", *inputs, *target)
            assert result.exit_code == 0, result.output
        for file in ("model.safetensors", "provenance.json"):
            one, other = (tmp_path / method / out / file for out in ("small", "dense"))
            assert one.read_bytes() == other.read_bytes(), method


def test_the_dense_twin_counts_once_beside_the_factors(federated, hub, run_cli, tmp_path):
    small = federated["north"] / "vector.safetensors"
    twin = dense_twin(small, tmp_path / "twin.safetensors")
    with TensorFile(small) as one, TensorFile(twin) as other:
        assert len(one.specs) != len(other.specs)
    other = federated["south"] / "vector.safetensors"
    out = ("--out", tmp_path / "once")
    result = run_cli("merge", hub.root / "base", small, twin, other, *out)
    assert result.exit_code == 0, result.output
    assert "hold the same tensors: they count once." in result.output


def broken(tensors, told):
    tensors["blocks.0.mlp.fc1.weight@left"] = torch.ones(192, 3)


def beyond(tensors, told):
    tensors["blocks.0.mlp.fc1.weight@left"].fill_(3e38)
    tensors["blocks.0.mlp.fc1.weight@right"].fill_(2.0)


def endless(tensors, told):
    """A few bytes that would take days to read, if it were not refused by its shape."""
    for part in ("left", "right"):
        del tensors[f"blocks.0.mlp.fc1.weight@{part}"]
    entry = {"form": "zero", "dtype": "F32", "shape": [2**40]}
    told["encoding"]["blocks.0.mlp.fc1.weight"] = entry


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            broken,
            "has the factors F32 [192, 3] and F32 [2, 64], and needs F32 [192, r] and F32 [r, 64] "
            "of one rank r: it is refused.",
        ),
        (beyond, "holds 12288 value(s) that are NaN or infinite"),
        (endless, "is F32 [1099511627776], the base asks for F32 [192, 64]."),
    ],
    ids=["ranks", "overflow", "size"],
)
def test_signed_factors_that_are_broken_are_refused_by_name(
    federated, hub, run_cli, tmp_path, change, sentence
):
    run = federated["north"]
    tensors = load(run / "vector.safetensors")
    with TensorFile(run / "vector.safetensors") as file:
        told = json.loads(file.metadata[vector.METADATA_KEY])
    change(tensors, told)
    text = vector.canonical_json(told).decode()
    write_tensors(run / "vector.safetensors", tensors, (vector.METADATA_KEY, text))
    draft = read_draft(run / "manifest.draft.json")
    path = run / "vector.safetensors"
    payload = {"sha256": sha256_file(path), "size": path.stat().st_size}
    changed = draft.model_copy(update={"payload": draft.payload.model_copy(update=payload)})
    (run / "manifest.draft.json").write_text(changed.model_dump_json())
    assert run_cli("publish", tmp_path / "north").exit_code == 0
    result = run_cli("merge", hub.root, "--out", tmp_path / "m")
    assert result.exit_code == 1
    assert f"tensor 'blocks.0.mlp.fc1.weight' {sentence}" in result.stderr

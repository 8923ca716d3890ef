"""Where blocks are worked on: placement on an emulated device, and CUDA where there is a GPU."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext

import pytest
import torch

from merge_kit import devices, engine, running
from merge_kit.devices import CPU
from merge_kit.errors import MergeKitError
from merge_kit.estimate import estimate
from merge_kit.notes import Notes
from merge_kit.parameters import roles_of
from merge_kit.recipe import make_recipe
from merge_kit.tensorfile import write_tensors
from tests.merge_kit.emulated import PLACE, Emulated, MisplacedError
from tests.merge_kit.helpers import says
from tests.merge_kit.test_invariance import BASE_PRINT, EVERY, many, run, same, world

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
MORE = [
    *({"method": "pcb", "options": {"inter": inter}} for inter in ("normalised", "pairs")),
    *({"method": "dare", "options": {"rescale": how}} for how in ("l1", "none")),
    {"method": "della", "options": {"rule": "median", "rescale": "l1"}},
    {"method": "breadcrumbs", "options": {"scope": "row"}},
    {"method": "low-rank", "options": {"rule": "karcher"}},
    {"method": "emr", "options": {"rescale": "means"}},
    {"method": "ace", "options": {"threshold": 0.0, "numerator": "plain", "prior": False}},
    {"method": "ace", "options": {"threshold": 1000.0}},
    {"method": "fisher", "options": {"normalise": False, "floored": "add"}},
    {"method": "fedgma", "options": {"reduction": "sum"}},
    {"method": "ties", "options": {"vote": "counts", "reduction": "sum"}, "dtype": "bfloat16"},
    {"method": "median", "options": {"even": "lower"}, "dtype": "float16"},
    {"method": "mean", "weights": {f"s{i}": 1 / (i + 1) for i in range(5)}, "scale": 0.3},
]
MORE_TOO = pytest.mark.parametrize("data", MORE, ids=lambda r: " ".join(map(str, r.values())))


@pytest.fixture
def on_device():
    """Code that works on a tensor of the device, within a lane."""

    def run(function):
        with Emulated().lane():
            return function(torch.ones(3).to(PLACE))

    return run


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.stack([x, torch.ones(3)]),
        lambda x: torch.zeros(3).add_(x),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.clamp(torch.tensor(0.0), torch.tensor(2.0)),
        lambda x: torch.where(x > 0, x, torch.zeros(3)),
        lambda x: x.numpy(),
    ],
)
def test_the_emulated_device_refuses_what_a_gpu_refuses(on_device, mistake):
    with pytest.raises(MisplacedError):
        on_device(mistake)


def test_the_emulated_device_computes(on_device):
    def work(x):
        y = torch.zeros(3, dtype=torch.float64, device=x.device)
        y.add_(x, alpha=2)[1] = 7.0
        assert y.device == PLACE
        assert x.numpy(force=True).tolist() == [1, 1, 1]
        assert (y > 6).nonzero().tolist() == [[1]]
        return (y / torch.tensor(2.0)).cpu()

    assert on_device(work).tolist() == [1, 3.5, 1]


def test_the_emulated_device_is_touched_in_lanes_only(on_device):
    left = on_device(lambda x: x)
    with pytest.raises(MisplacedError, match="outside a lane"):
        left.add(1)


def merged(open_file, data, device, **kept):
    """Tensors, and all that comes with them, of a merge on a device."""
    base, made, recipe = world(open_file, data, 5)
    return run(base, made, recipe, device=device, **kept)


@EVERY
def test_every_method_works_on_the_device_from_block_to_result(open_file, data):
    """Byte by byte what it gives on the CPU: the blocks are the same."""
    _check_emulated(open_file, data)


@MORE_TOO
def test_options_that_take_another_way_work_on_the_device(open_file, data):
    _check_emulated(open_file, data)


def _check_emulated(open_file, data):
    device = Emulated()
    expected, parts = merged(open_file, data, CPU)
    found, theirs = merged(open_file, data, device)
    assert same(expected, found)
    assert device.lanes
    for part, other in zip(parts, theirs, strict=True):
        assert other.values.device.type == "cpu"
        assert (part.masks is None) == (other.masks is None)
        if part.masks is not None:
            assert torch.equal(part.masks, other.masks)
            assert torch.equal(part.rescalers, other.rescalers)


def test_a_tie_is_settled_by_a_pass_within_a_block(open_file):
    tensors = [{"w": torch.tensor([1.0, 2, 3])}, {"w": torch.tensor([-1.0, 2, 3])}]
    sources = [
        engine.Source(f"{i}", f"s{i}", open_file(t), (1.0,), 1) for i, t in enumerate(tensors)
    ]
    base = open_file({"w": torch.zeros(3)})
    recipe = make_recipe({"method": "ties", "options": {"density": 1.0}}, "test")
    (part,) = engine.merge(base, sources, roles_of(base.specs, ()), recipe, device=Emulated())
    assert part.values.tolist() == [1, 2, 3]


def test_inner_products_of_many_vectors_come_back_too(open_file):
    base, made, recipe = *many(open_file, 34), make_recipe({"method": "krum"}, "test")
    assert same(run(base, made, recipe)[0], run(base, made, recipe, device=Emulated())[0])


def test_a_running_sum_is_made_on_the_cpu(open_file):
    base, made, recipe = world(open_file, {"method": "mean"}, 5)
    device, sums = Emulated(), running.from_scratch(made, recipe)
    found, parts = run(base, made, recipe, sums=sums, device=device)
    assert same(run(base, made, recipe)[0], found)
    assert any(part.pair for part in parts)
    assert not device.lanes


def test_what_one_device_measured_is_not_used_on_another(open_file, tmp_path):
    base, made, recipe = world(open_file, {"method": "karcher"}, 5)
    lanes = []
    for name in ("one", "one", "other"):
        device, notes = Emulated(name=name), Notes(tmp_path, BASE_PRINT)
        run(base, made, recipe, notes=notes, device=device)
        lanes.append(device.lanes)
    assert lanes[0] == lanes[2] > lanes[1]


def test_an_estimate_runs_where_the_merge_would(open_file):
    base, made, recipe = world(open_file, {"method": "pcb"}, 5)
    device = Emulated()
    assert estimate(base, made, roles_of(base.specs, ("head",)), recipe, device).readings == 3.0
    assert device.lanes


@pytest.fixture
def emulated(monkeypatch):
    """The command line finds the emulated device under the name of a GPU."""
    device = Emulated()
    choose = devices.choose
    monkeypatch.setattr(devices, "choose", lambda n: device if n == "cuda" else choose(n))
    return device


def test_a_model_says_on_what_it_was_merged(hub, contribute, run_cli, emulated, tmp_path):
    for seed, name in enumerate(("north", "south")):
        contribute(name, seed=seed)
    out = tmp_path / "merged"
    merge = ("merge", hub.root, "--method", "median", "--device", "cuda", "--out", out)
    assert f"MiB of {PLACE}" in run_cli(*merge, "--dry-run").stdout
    assert run_cli(*merge).exit_code == 0
    assert emulated.lanes
    record = json.loads((out / "provenance.json").read_bytes())
    assert record["software"]["device"] == emulated.name
    here = run_cli("verify", out, "--hub", hub.root)
    assert here.exit_code == 0
    assert (
        f"note     it was merged on {emulated.name}, this is cpu: unless the methods are linear "
        "the last digits may differ (--device takes another)\n"
    ) in here.stdout
    assert "note" not in run_cli("verify", out, "--hub", hub.root, "--device", "cuda").stdout


def test_checkpoints_are_merged_on_the_device_too(tmp_path, run_cli, emulated):
    for name in ("base", "one", "two"):
        write_tensors(tmp_path / f"{name}.safetensors", {"w": torch.ones(3)})
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two")]
    assert run_cli("merge", *files, "--device", "cuda", "--out", tmp_path / "out").exit_code == 0
    assert emulated.lanes
    record = json.loads((tmp_path / "out" / "provenance.json").read_bytes())
    assert record["software"]["device"] == emulated.name


def test_a_merge_on_the_cpu_never_touches_cuda(hub, contribute, run_cli, monkeypatch, tmp_path):
    def touched(*_, **__):
        raise AssertionError("CUDA was touched")

    for name in ("_lazy_init", "is_available", "Stream", "stream", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    contribute("north")
    result = run_cli("merge", hub.root, "--out", tmp_path / "merged")
    assert (result.exit_code, result.exception) == (0, None)


class Stream:
    """Stands in for a stream of a GPU."""

    def __init__(self, place):
        self.synchronised = 0

    def synchronize(self):
        self.synchronised += 1


@pytest.fixture
def cuda(monkeypatch):
    """The real thing but for the streams, which need a GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return devices.Cuda(torch.device("cuda:0"), "cuda (none)")


def test_a_lane_waits_for_its_stream_and_hands_it_on(cuda):
    for _ in range(3):
        with cuda.lane():
            assert not cuda._idle
    (stream,) = cuda._idle
    assert stream.synchronised == 3


def test_lanes_that_are_open_together_have_streams_of_their_own(cuda):
    with cuda.lane(), cuda.lane():
        pass
    assert len({id(stream) for stream in cuda._idle}) == 2


def test_a_gpu_that_is_full_gives_a_sentence(cuda):
    with (
        says(
            MergeKitError,
            "cuda:0 has too little memory for this merge: end what else runs on it, or give "
            "--device cpu.",
        ),
        cuda.lane(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert [stream.synchronised for stream in cuda._idle] == [1]


@pytest.fixture
def gpu():
    return devices.choose("cuda")


def _check_on_gpu(open_file, data, gpu):
    expected, _ = merged(open_file, data, CPU)
    found, _ = merged(open_file, data, gpu)
    if running.fits(make_recipe(data, "test")):
        assert same(expected, found)
    torch.testing.assert_close(found, expected)


@cuda_only
@EVERY
def test_a_gpu_gives_what_the_cpu_gives(open_file, data, gpu):
    """Linear rules to the bit, the others to what float32 keeps."""
    _check_on_gpu(open_file, data, gpu)


@cuda_only
@MORE_TOO
def test_options_that_take_another_way_give_the_same_on_a_gpu(open_file, data, gpu):
    _check_on_gpu(open_file, data, gpu)


@cuda_only
@pytest.mark.parametrize("method", ["mean", "ties", "pcb", "median", "dare", "fedgma"])
def test_neither_order_nor_threads_matter_on_a_gpu(open_file, method, gpu):
    base, made, recipe = world(open_file, {"method": method}, 5)
    before, found = torch.get_num_threads(), []
    try:
        for threads, sources in ((1, made), (4, made[::-1])):
            torch.set_num_threads(threads)
            found.append(run(base, sources, recipe, device=gpu)[0])
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@cuda_only
def test_a_merge_leaves_nothing_on_the_gpu(open_file, gpu):
    base, made, recipe = world(open_file, {"method": "ties"}, 5)
    left = []
    for _ in range(3):
        run(base, made, recipe, device=gpu)
        gc.collect()
        left.append(torch.cuda.memory_allocated(gpu.place))
    assert left[0] == left[1] == left[2]


@cuda_only
def test_a_merge_that_does_not_fit_on_the_gpu_is_refused(open_file, gpu):
    base, made, recipe = world(open_file, {"method": "median"}, 5)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6, gpu.place)
    try:
        with pytest.raises(MergeKitError, match="too little memory for this merge"):
            run(base, made, recipe, device=gpu)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu.place)

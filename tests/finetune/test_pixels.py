"""Images become batches: timm's view of each, a cache that is never wrong, repeatable changes."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from finetune.cases import Case
from finetune.pixels import augment, centre, decode, normalise, resize, stored_size
from merge_kit.errors import DataError, ImageError, MergeKitError
from merge_kit.federation import Preprocessing
from tests.finetune.pictures import SMALL, draw, images

VIEWS = {
    "resnet at 224": Preprocessing(),
    "mobilenet, mean of a half": Preprocessing(
        input_size=(3, 128, 128),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
    ),
    "whole image": Preprocessing(input_size=(3, 96, 96), crop_pct=1.0),
    "odd border": Preprocessing(input_size=(3, 65, 65), crop_pct=0.95, interpolation="bilinear"),
}


@pytest.fixture
def real_images(shared_data: Path) -> list[Image.Image]:
    """One cell of each laboratory, square; and cut to odd oblongs as a phone or a scanner gives."""
    root = shared_data / "wbc_multisite"
    with (root / "labels.csv").open(encoding="utf-8") as file:
        by_site = {row["site"]: row["file"] for row in csv.DictReader(file)}
    found = [Image.open(root / name).convert("RGB") for name in by_site.values()]
    return [*found, found[0].crop((0, 0, 144, 101)), found[1].crop((0, 0, 97, 144))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images."""
    for number, pixels in enumerate(draw([0, 1, 2, 0, 1, 2])):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def cases(folder: Path) -> list[Case]:
    return [Case(p.name, p, 0) for p in sorted(folder.glob("*.png"))]


def spare_files(cache: Path) -> list[str]:
    return [name for name in os.listdir(cache) if not name.endswith(".npy") or name[0] == "."]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_view_is_that_of_timm(real_images, view):
    config = view.model_dump(exclude={"sixteen_bit"})
    transform = create_transform(**config, is_training=False)
    for image in real_images:
        stored = torch.from_numpy(resize(image, view).copy()).permute(2, 0, 1)[None]
        ours, theirs = centre(stored, view)[0], transform(image)
        grey_levels = (ours - theirs).abs() * torch.tensor(view.std).view(3, 1, 1) * 255
        assert ours.shape == theirs.shape
        assert grey_levels.max() <= 1.01


def test_stored_images_have_timms_size_before_the_crop():
    assert stored_size(Preprocessing()) == 256
    assert stored_size(VIEWS["odd border"]) == 68


def test_normalise_by_hand():
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    found = normalise(black_and_white, VIEWS["mobilenet, mean of a half"])
    assert found[0].flatten().tolist() == [-1, -1, -1]
    assert found[1].flatten().tolist() == [1, 1, 1]


def test_decoding_gives_the_pixels_of_the_files_in_order(folder):
    found, left_out = decode(cases(folder), SMALL)
    assert np.array_equal(found.pixels, draw([0, 1, 2, 0, 1, 2]))
    assert left_out == []
    assert [case.file for case in found.cases] == [f"{n}.png" for n in range(6)]


def test_a_batch_is_channels_first_and_in_the_asked_order(folder):
    found, _ = decode(cases(folder), SMALL)
    batch = found.batch([4, 1])
    assert batch.shape == (2, 3, 32, 32)
    assert np.array_equal(batch[0].permute(1, 2, 0), found.pixels[4])


def test_a_cache_hit_gives_the_same_pixels_and_opens_no_image(folder, tmp_path):
    first, _ = decode(cases(folder), SMALL, cache=tmp_path / "cache")
    done = []
    again, _ = decode(
        cases(folder), SMALL, cache=tmp_path / "cache", progress=lambda *at: done.append(at)
    )
    assert done == []
    assert np.array_equal(first.pixels, again.pixels)
    assert spare_files(tmp_path / "cache") == []


def test_the_cache_sees_that_a_file_was_replaced(folder, tmp_path):
    decode(cases(folder), SMALL, cache=tmp_path / "cache")
    Image.new("RGB", (32, 32), "white").save(folder / "3.png")
    again, _ = decode(cases(folder), SMALL, cache=tmp_path / "cache")
    assert (again.pixels[3] == 255).all()


def test_the_cache_of_another_view_is_not_taken(folder, tmp_path):
    decode(cases(folder), SMALL, cache=tmp_path / "cache")
    nearest = SMALL.model_copy(update={"sixteen_bit": "minmax"})
    done = []
    decode(cases(folder), nearest, cache=tmp_path / "cache", progress=lambda *at: done.append(at))
    assert done == [(6, 6)]


def test_what_a_killed_decoding_left_is_not_believed(folder, tmp_path):
    whole, _ = decode(cases(folder), SMALL, cache=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").glob("*.npy")
    half = stored.read_bytes()[:-5000]
    stored.unlink()
    stored.with_name(f".{stored.name}.partial").write_bytes(half)
    again, _ = decode(cases(folder), SMALL, cache=tmp_path / "cache")
    assert np.array_equal(again.pixels, whole.pixels)
    assert spare_files(tmp_path / "cache") == []


def test_a_damaged_cache_is_made_again(folder, tmp_path):
    whole, _ = decode(cases(folder), SMALL, cache=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").glob("*.npy")
    half = stored.read_bytes()[:-5000]
    stored.unlink()  # `whole` still maps the old file
    stored.write_bytes(half)
    again, _ = decode(cases(folder), SMALL, cache=tmp_path / "cache")
    assert np.array_equal(again.pixels, whole.pixels)


def test_an_unreadable_image_is_named_and_leaves_no_half_cache(folder, tmp_path):
    (folder / "2.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"2\.png cannot be read"):
        decode(cases(folder), SMALL, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreadable_images_are_left_out_by_name(folder, tmp_path):
    (folder / "0.png").write_bytes(b"not an image")
    (folder / "4.png").write_bytes(b"")
    found, left_out = decode(cases(folder), SMALL, cache=tmp_path / "cache", skip_unreadable=True)
    assert [case.file for case in found.cases] == ["1.png", "2.png", "3.png", "5.png"]
    assert np.array_equal(found.pixels, draw([0, 1, 2, 0, 1, 2])[[1, 2, 3, 5]])
    assert [Path(s.split(" cannot")[0]).name for s in left_out] == ["0.png", "4.png"]
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_readable_image_at_all_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="no image can be read"):
        decode(cases(tmp_path), SMALL, skip_unreadable=True)


def test_a_full_disk_gives_its_sentence(folder, small_disk):
    view = SMALL.model_copy(update={"input_size": (3, 256, 256)})
    with pytest.raises(MergeKitError, match="no space left"):
        decode(cases(folder), view, cache=small_disk)
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 256 KiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k none '{place}' 2>/dev/null") != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    os.system(f"umount '{place}'")


def view_of(policy: str, flip: str = "none", seed: int = 3) -> torch.Tensor:
    view = SMALL.model_copy(update={"crop_pct": 0.8})
    batch = images([0, 1, 2] * 8, preprocessing=view).batch(range(24))
    return augment(batch, view, policy, flip, torch.Generator().manual_seed(seed))


def test_augmentation_depends_on_the_generator_alone():
    assert torch.equal(view_of("strong", "both"), view_of("strong", "both"))
    assert not torch.equal(view_of("strong", "both"), view_of("strong", "both", seed=4))


def test_no_augmentation_is_the_view_at_evaluation():
    view = SMALL.model_copy(update={"crop_pct": 0.8})
    batch = images([0, 1, 2] * 8, preprocessing=view).batch(range(24))
    assert torch.equal(view_of("none", "both"), centre(batch, view))


@pytest.mark.parametrize("policy", ["light", "strong"])
def test_augmented_images_are_images_of_the_networks_size(policy):
    found = view_of(policy, "both")
    low = (0 - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    high = (1 - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    assert found.shape == (24, 3, 32, 32)
    assert found.dtype == torch.float32
    assert (found >= low.view(1, 3, 1, 1) - 1e-5).all()
    assert (found <= high.view(1, 3, 1, 1) + 1e-5).all()
    assert len({tuple(image.flatten()[:5].tolist()) for image in found}) == 24


@pytest.mark.parametrize(("flip", "ways"), [("horizontal", [[3]]), ("both", [[3], [2], [2, 3]])])
def test_flips_mirror_some_images_and_leave_the_others(flip, ways):
    plain, flipped = view_of("light"), view_of("light", flip)
    kept = (plain - flipped).abs().amax(dim=(1, 2, 3)) < 1e-4
    mirrored = [(plain.flip(way) - flipped).abs().amax(dim=(1, 2, 3)) < 1e-4 for way in ways]
    assert torch.stack([kept, *mirrored]).sum(dim=0).eq(1).all()
    assert kept.any()
    assert all(some.any() for some in mirrored)


def test_augmentation_keeps_the_middle_of_the_image():
    batch = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    batch[..., 12:20, 12:20] = 255
    found = augment(batch, SMALL, "light", "both", torch.Generator().manual_seed(0))
    inside, corner = found[..., 14:18, 14:18].mean(), found[..., :4, :4].mean()
    assert inside > corner + 2

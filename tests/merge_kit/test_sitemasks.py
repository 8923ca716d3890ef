"""What a merged model keeps of each site."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit.blocks import BLOCK
from merge_kit.engine import Part, Source
from merge_kit.errors import NonFiniteError, RecipeError, VectorError
from merge_kit.files import canonical_json
from merge_kit.sitemasks import (
    MaskHeader,
    MaskWriter,
    check_masks,
    find_masks,
    pack,
    packed_spec,
    read_header,
    unmasked,
    unpack,
)
from merge_kit.tensorfile import TensorFile, specs_of, write_tensors
from merge_kit.tensorheader import TensorSpec
from tests.merge_kit.helpers import assemble, listing, load, quick, says

A, B, C = "a" * 64, "b" * 64, "c" * 64
MERGED = "sha256:" + "1" * 64


def masks_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


@pytest.fixture
def write(tmp_path, store):
    """Write the masks of parts: of the sites north (b...) and south (a...), unless told."""

    def make(parts, sources=((B, "north"), (A, "south")), folder="merged"):
        made = [Source(id_, site, store({}), (), 1) for id_, site in sources]
        with MaskWriter(tmp_path / folder, made) as writer:
            assert list(writer.seen(parts)) == list(parts)
            writer.finish(MERGED)
        return tmp_path / folder / "masks"

    return make


@pytest.fixture
def store(tmp_path):
    """Write tensors and open them until the test ends."""
    opened = []

    def make(tensors, metadata=None, name=None):
        path = tmp_path / (name or f"{len(opened)}.safetensors")
        write_tensors(path, tensors, metadata)
        opened.append(TensorFile(path))
        return opened[-1]

    yield make
    for file in opened:
        file.close()


@pytest.fixture
def masked(store):
    """A file of masks with any tensors and header."""

    def make(tensors, name="north.safetensors", **changes):
        header = {
            "format": 1,
            "site": "north",
            "contribution": B,
            "merged": MERGED,
            "rescalers": dict.fromkeys(tensors, 1.0),
            **changes,
        }
        return store(tensors, ("merge-kit", canonical_json(header).decode()), name)

    return make


def part(name, begin, masks, rescalers=(1.0, 2.0)):
    factors = torch.tensor(rescalers, dtype=torch.float64)
    return Part(name, begin, torch.zeros(masks.shape[1]), masks, rescalers=factors)


def test_eight_values_fill_a_byte_from_its_lowest_bit():
    """1 + 2 + 16, and a ninth value in a byte of its own."""
    row = [True, True, False, False, True, False, False, False, True]
    assert pack(masks_of(row)).tolist() == [[19, 1]]
    assert unpack(torch.tensor([19, 1], dtype=torch.uint8), 9).tolist() == row


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(1, 3))
def test_bits_come_back(row, sites):
    packed = torch.from_numpy(pack(masks_of(*[row] * sites)))
    assert packed.shape == (sites, packed_spec(TensorSpec(torch.float32, (len(row),))).elements)
    assert all(unpack(line, len(row)).tolist() == row for line in packed)


def test_each_site_has_a_file_with_its_rows_in_the_order_of_the_ids(write):
    """South comes first: its id does. Nine values: two bytes."""
    rows = masks_of([True] * 9, [False] * 8 + [True])
    folder = write([part("w", 0, rows, (0.5, 3.0)), part("z", 0, masks_of([False], [True]))])
    assert listing(folder) == ["north.safetensors", "south.safetensors"]
    south, north = load(folder / "south.safetensors"), load(folder / "north.safetensors")
    assert {name: bits.tolist() for name, bits in south.items()} == {"w": [255, 1], "z": [0]}
    assert {name: bits.tolist() for name, bits in north.items()} == {"w": [0, 1], "z": [1]}
    with TensorFile(folder / "north.safetensors") as file:
        assert read_header(file) == MaskHeader(
            site="north", contribution=B, merged=MERGED, rescalers={"w": 3.0, "z": 2.0}
        )


def test_the_bytes_of_a_file(write):
    (path, _) = sorted(write([part("w", 0, masks_of([True, False], [False, True]))]).iterdir())
    header = (
        f'{{"contribution":"{B}","format":1,"merged":"{MERGED}",'
        '"rescalers":{"w":2.0},"site":"north"}'
    ).replace('"', '\\"')
    table = (
        f'{{"__metadata__":{{"merge-kit":"{header}"}},'
        '"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    ).encode()
    table += b" " * (-len(table) % 8)
    assert path.read_bytes() == len(table).to_bytes(8, "little") + table + b"\x02"


def test_a_tensor_of_several_blocks_is_put_together(write):
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(2, 2 * BLOCK + 13, generator=generator) < 0.5
    cuts = [0, BLOCK, 2 * BLOCK, 2 * BLOCK + 13]
    folder = write([part("w", a, whole[:, a:b].clone()) for a, b in itertools.pairwise(cuts)])
    for site, row in zip(("south", "north"), whole, strict=True):
        bits = load(folder / f"{site}.safetensors")["w"]
        assert torch.equal(unpack(bits, whole.shape[1]), row)


def test_several_contributions_of_one_site_have_a_file_each(write):
    rows = masks_of([True], [False], [True])
    folder = write(
        [part("w", 0, rows, (1.0, 1.0, 1.0))], ((A, "north"), (C, "north"), (B, "south"))
    )
    names = [f"north.{'a' * 12}.safetensors", f"north.{'c' * 12}.safetensors", "south.safetensors"]
    assert listing(folder) == names
    assert [load(folder / name)["w"].item() for name in names] == [1, 1, 0]


def test_without_masks_nothing_is_written(write):
    assert not write([Part("w", 0, torch.zeros(3))]).exists()


@pytest.mark.parametrize("rescaler", [float("inf"), float("nan")])
def test_a_part_of_which_nothing_is_left_is_refused(write, tmp_path, rescaler):
    """And of those before it no file is left."""
    sound = part("v", 0, masks_of([True], [False]))
    with says(
        RecipeError,
        "nothing is left of the sites' vectors in the tensor 'w', so their own models could not "
        "come back: choose a 'scale', and an 'alpha' of 'lines', other than 0.",
    ):
        write([sound, part("w", 0, masks_of([True], [False]), (1.0, rescaler))])
    assert listing(tmp_path / "merged" / "masks") == []


def test_masks_are_found_by_the_sites_name(write, tmp_path):
    folder = write([part("w", 0, masks_of([True], [True]))]).parent
    assert find_masks(folder, "north") == folder / "masks" / "north.safetensors"
    with says(
        VectorError, f"{folder} has no masks of the site '../south'; there are north, south."
    ):
        find_masks(folder, "../south")
    with says(
        VectorError,
        f"{tmp_path} keeps no masks of its sites: merge with '--method emr', which writes them.",
    ):
        find_masks(tmp_path, "north")


def test_a_model_comes_back_by_hand(masked, store):
    """theta_0 + 1.5 M (theta - theta_0): 1 + 1.5 * 2, 2, 3 - 1.5 * 4; the head is the merged."""
    base = store({"head": torch.tensor([7.0]), "w": torch.tensor([1.0, 2.0, 3.0])})
    merged = store({"head": torch.tensor([9.0]), "w": torch.tensor([3.0, 5.0, -1.0])})
    masks = masked({"w": torch.tensor([0b101], dtype=torch.uint8)}, rescalers={"w": 1.5})
    found = assemble(unmasked(merged, base, masks, read_header(masks)), merged.specs)
    assert {name: t.tolist() for name, t in found.items()} == {
        "head": [9.0],
        "w": [4.0, 2.0, -3.0],
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_tensors_come_back_block_by_block_in_the_merged_dtype(masked, store, dtype):
    size = 2 * BLOCK + 13
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(2, size, generator=generator) for _ in range(2))
    bits = torch.rand(2 * size, generator=generator) < 0.5
    base, merged = store({"w": start}), store({"w": end.to(dtype)})
    masks = masked({"w": torch.from_numpy(pack(bits[None])[0])}, rescalers={"w": 0.75})
    check_masks(masks, read_header(masks), merged, base)
    found = assemble(unmasked(merged, base, masks, read_header(masks)), merged.specs)["w"]
    difference = end.to(dtype).double() - start.double()
    expected = start.double() + 0.75 * difference * bits.reshape(2, size)
    assert torch.equal(found, expected.to(dtype))


def test_a_value_that_overflows_is_refused_by_name(masked, store):
    base, merged = store({"w": torch.tensor([0.0])}), store({"w": torch.tensor([1e38])})
    masks = masked({"w": torch.tensor([1], dtype=torch.uint8)}, rescalers={"w": 10.0})
    with says(
        NonFiniteError,
        "the model of the site 'north': tensor 'w' holds 1 value(s) that are NaN or infinite: "
        "its masks are damaged; merge again.",
    ):
        list(unmasked(merged, base, masks, read_header(masks)))


WEIGHTS = {"count": torch.tensor(3), "w": torch.zeros(9)}
BITS = torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "changes", "sentence"),
    [
        (
            {"w": BITS},
            {"rescalers": {}},
            "{path}: the tensor 'w' has a mask or a rescaler but not both.",
        ),
        (
            {"w": BITS},
            {"rescalers": {"w": 1.0, "x": 1.0}},
            "{path}: the tensor 'x' has a mask or a rescaler but not both.",
        ),
        (
            {"v": BITS},
            {},
            "{path} has a mask of 'v', which the merged model and the base do not both have as "
            "floats of one shape.",
        ),
        (
            {"count": BITS[:1]},
            {},
            "{path} has a mask of 'count', which the merged model and the base do not both have "
            "as floats of one shape.",
        ),
        (
            {"w": BITS[:1]},
            {},
            "{path}: the mask of 'w' is U8 [1], the merged model asks for U8 [2].",
        ),
        (
            {"w": BITS.float()},
            {},
            "{path}: the mask of 'w' is F32 [2], the merged model asks for U8 [2].",
        ),
    ],
    ids=["no rescaler", "no mask", "unknown", "integers", "too short", "dtype"],
)
def test_masks_that_do_not_fit_are_refused(masked, store, tensors, changes, sentence):
    merged, masks = store(WEIGHTS), masked(tensors, **changes)
    with says(VectorError, sentence.format(path=masks.path)):
        check_masks(masks, read_header(masks), merged, merged)


def test_a_base_of_other_shapes_is_refused(masked, store):
    merged, base = store(WEIGHTS), store({**WEIGHTS, "w": torch.zeros(3, 3)})
    masks = masked({"w": BITS})
    with says(
        VectorError,
        f"{masks.path} has a mask of 'w', which the merged model and the base do not both have as "
        "floats of one shape.",
    ):
        check_masks(masks, read_header(masks), merged, base)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "'format': input should be 1 (got 2)."),
        ({"sites": "x"}, "unknown key 'sites'; did you mean 'site'?"),
        ({"site": "../x"}, "'site': a name has 1 to 63 characters: a-z, 0-9, and hyphens inside "
         "(got '../x')."),
        ({"contribution": "b"}, "'contribution': string should match pattern '^[0-9a-f]{64}$' "
         "(got 'b')."),
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused(masked, changes, sentence):
    masks = masked({"w": BITS}, **changes)
    with says(VectorError, f"{masks.path}: {sentence}"):
        read_header(masks)


def test_a_file_without_our_header_is_refused(store):
    for metadata in (None, ("format", "pt")):
        file = store({"w": BITS}, metadata)
        with says(
            VectorError,
            f"{file.path} holds no masks: its header lacks the metadata 'merge-kit'.",
        ):
            read_header(file)
    file = store({"w": BITS}, ("merge-kit", "{"))
    with says(VectorError, f"{file.path}: the metadata 'merge-kit' is not JSON."):
        read_header(file)


def test_masks_under_another_sites_name_are_refused(masked):
    masks = masked({"w": BITS}, "south.safetensors")
    with says(
        VectorError,
        f"{masks.path} holds the masks of the site 'north': it was renamed; merge again.",
    ):
        read_header(masks)
    assert read_header(masked({"w": BITS}, f"north.{'b' * 12}.safetensors")).site == "north"


def test_specs_are_those_of_the_packed_bits():
    assert packed_spec(specs_of({"w": torch.zeros(3, 3)})["w"]) == TensorSpec(torch.uint8, (2,))

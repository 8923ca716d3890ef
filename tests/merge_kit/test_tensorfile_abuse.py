"""Files that break the format, and the exact sentence that each must give."""

from __future__ import annotations

import json
import os

import pytest
import torch

from merge_kit.errors import TensorFileError
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.merge_kit.helpers import blob, entry, says

TWO = {"a": entry(0, 4), "b": entry(4, 8)}
NO_HOLES = "the tensors must cover the file without holes or overlaps."
FIELDS = "tensor 'a' must have exactly the fields dtype, shape and data_offsets."
WHOLE = ": tensor 'a' has a shape or offsets that are not whole numbers."
NOT_JSON = " is no safetensors file: its header is not valid JSON."
NO_OBJECT = " is no safetensors file: its header is not a JSON object."
METADATA = " has metadata that is not text: it is refused."
KNOWN = "use one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL."


def unsafe(name):
    return f" has a tensor with the unsafe name {name!r}: it is refused."


def with_shape(shape):
    return blob({"a": entry(0, 4, shape=shape)}, bytes(4))


ABUSE = {
    "empty file": (b"", " is no safetensors file: it has only 0 bytes; copy it again."),
    "nine bytes": (bytes(9), " is no safetensors file: it has only 9 bytes; copy it again."),
    "header bomb": (
        (16 * 2**20 + 1).to_bytes(8, "little") + b"{}",
        " has a header of 16777217 bytes, above the limit of 16777216: "
        "it is no safetensors file, or one made to exhaust memory.",
    ),
    "huge length": (
        b"\xff" * 8 + b"{}",
        " has a header of 18446744073709551615 bytes, above the limit of 16777216: "
        "it is no safetensors file, or one made to exhaust memory.",
    ),
    "truncated header": (
        (100).to_bytes(8, "little") + b'{"a":',
        " is truncated inside its header: copy it again.",
    ),
    "truncated data": (
        blob(TWO, bytes(7)),
        " is truncated: it should have {size} bytes and has {found}; copy it again.",
    ),
    "trailing bytes": (
        blob(TWO, bytes(9)),
        " has extra bytes at its end: it should have {size} bytes and has {found}; copy it again.",
    ),
    "hole": (
        blob({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)),
        f": tensor 'b' starts at byte 6 instead of 4: {NO_HOLES}",
    ),
    "hole at the start": (
        blob({"a": entry(2, 4)}, bytes(4)),
        f": tensor 'a' starts at byte 2 instead of 0: {NO_HOLES}",
    ),
    "overlap": (
        blob({"a": entry(0, 5), "b": entry(4, 8)}, bytes(8)),
        f": tensor 'b' starts at byte 4 instead of 5: {NO_HOLES}",
    ),
    "same bytes twice": (
        blob({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
        f": tensor 'b' starts at byte 0 instead of 4: {NO_HOLES}",
    ),
    "duplicate tensor": (
        blob(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        " names 'a' twice in its header: it is refused.",
    ),
    "duplicate field": (
        blob(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        " names 'dtype' twice in its header: it is refused.",
    ),
    "unknown field": (blob({"a": {**entry(0, 4), "extra": 1}}, bytes(4)), f": {FIELDS}"),
    "missing field": (blob({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)), f": {FIELDS}"),
    "entry is a list": (blob({"a": [0, 4]}, bytes(4)), f": {FIELDS}"),
    "unknown dtype": (
        blob({"a": entry(0, 4, "F8_E4M3")}, bytes(4)),
        f": tensor 'a' has the dtype 'F8_E4M3', which is not supported; {KNOWN}",
    ),
    "dtype is a list": (
        blob({"a": entry(0, 4, ["U8"])}, bytes(4)),
        f": tensor 'a' has the dtype ['U8'], which is not supported; {KNOWN}",
    ),
    "negative shape": (with_shape([-4]), WHOLE),
    "two negative sizes": (with_shape([-2, -2]), WHOLE),
    "float shape": (with_shape([4.0]), WHOLE),
    "bool shape": (with_shape([4, True]), WHOLE),
    "text shape": (with_shape("4"), WHOLE),
    "shape that overflows": (with_shape([2**48, 2**48]), WHOLE),
    "shape beyond the data": (
        with_shape([2**40, 0, 2**40, 5]),
        ": tensor 'a' (U8 [1099511627776, 0, 1099511627776, 5]) needs 0 bytes and is given 4.",
    ),
    "one offset": (blob({"a": {**entry(0, 4), "data_offsets": [0]}}, bytes(4)), WHOLE),
    "negative offset": (blob({"a": {**entry(0, 4), "data_offsets": [-4, 0]}}, bytes(4)), WHOLE),
    "backward offsets": (
        blob({"a": entry(4, 0, shape=[4])}, bytes(4)),
        ": tensor 'a' (U8 [4]) needs 4 bytes and is given -4.",
    ),
    "too few bytes": (
        blob({"a": entry(0, 4, "F32", [2])}, bytes(4)),
        ": tensor 'a' (F32 [2]) needs 8 bytes and is given 4.",
    ),
    "way out of the folder": (blob({"../x": entry(0, 4)}, bytes(4)), unsafe("../x")),
    "dots": (blob({"a..b": entry(0, 4)}, bytes(4)), unsafe("a..b")),
    "empty name": (blob({"": entry(0, 4)}, bytes(4)), unsafe("")),
    "NUL in a name": (blob({"a\0b": entry(0, 4)}, bytes(4)), unsafe("a\0b")),
    "slash": (blob({"/etc/x": entry(0, 4)}, bytes(4)), unsafe("/etc/x")),
    "backslash": (blob({"a\\b": entry(0, 4)}, bytes(4)), unsafe("a\\b")),
    "line break": (blob({"a\nb": entry(0, 4)}, bytes(4)), unsafe("a\nb")),
    "terminal escape": (blob({"a\x9b2J": entry(0, 4)}, bytes(4)), unsafe("a\x9b2J")),
    "right to left": (blob({"a\u202eb": entry(0, 4)}, bytes(4)), unsafe("a\u202eb")),
    "half a character": (blob({"a\ud800": entry(0, 4)}, bytes(4)), unsafe("a\ud800")),
    "half a character twice": (
        blob(b'{"\\ud800":0,"\\ud800":0}'),
        " names '\\ud800' twice in its header: it is refused.",
    ),
    "metadata is a number": (blob({"__metadata__": {"k": 1}}), METADATA),
    "metadata is a list": (blob({"__metadata__": ["k"]}), METADATA),
    "deep nesting": (blob(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), NOT_JSON),
    "cut JSON": (blob(b'{"a":{}'), NOT_JSON),
    "two objects": (blob(b"{}{}"), NOT_JSON),
    "not UTF-8": (blob(b'{"\xff":1}'), NOT_JSON),
    "number of too many digits": (blob(b'{"a":' + b"9" * 5000 + b"}"), NOT_JSON),
    "a list": (blob(b"[1]"), NO_OBJECT),
    "blank first": (blob(b" {}"), NO_OBJECT),
    "nothing in the header": (blob(b"") + bytes(8), NO_OBJECT),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(20), None),
}
PICKLED = (
    " is a pickled checkpoint, not safetensors: pickles can run code and are not "
    "read; convert it with torch.load(weights_only=True) and safetensors.torch.save_file."
)


@pytest.mark.parametrize("case", ABUSE)
def test_abuse_is_refused_with_its_sentence(tmp_path, case):
    content, sentence = ABUSE[case]
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    whole = 8 + int.from_bytes(content[:8], "little") + 8
    if sentence is None:
        length = int.from_bytes(content[:8], "little")
        sentence = (
            f" has a header of {length} bytes, above the limit of 16777216: "
            "it is no safetensors file, or one made to exhaust memory."
        )
    if "{size}" in sentence:
        sentence = sentence.format(size=whole, found=len(content))
    with says(TensorFileError, f"{path}{sentence}"):
        TensorFile(path)


def test_the_sound_file_that_the_table_spoils_is_accepted(tmp_path):
    (tmp_path / "t").write_bytes(blob(TWO, bytes(range(8))))
    with TensorFile(tmp_path / "t") as file:
        assert file.read("b").tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_in_place_of_safetensors_is_never_read(tmp_path, zipped):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    with says(TensorFileError, f"{path}{PICKLED}"):
        TensorFile(path)


@pytest.mark.parametrize("magic", [b"PK", b"\x80\x02", b"\x80\x04"])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path, magic):
    """The length's low bytes may look like the start of a zip file or a pickle."""
    length = int.from_bytes(magic, "little")
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(length)
    (tmp_path / "t").write_bytes(blob(header, bytes(4)))
    with TensorFile(tmp_path / "t") as file:
        assert file.read("a").tolist() == [0] * 4


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with says(TensorFileError, f"{tmp_path} is a folder, not a safetensors file."):
        TensorFile(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with says(TensorFileError, f"{tmp_path}/no does not exist: check the path."):
        TensorFile(tmp_path / "no")


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_file_cut_anywhere_is_refused(tmp_path, cut):
    write_tensors(tmp_path / "t", {"a": torch.ones(4), "b": torch.ones(8)}, ("k", "v"))
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(TensorFileError):
        TensorFile(tmp_path / "t")


def test_a_refused_file_is_closed(tmp_path, recwarn):
    """Descriptors are plain numbers: a leak would show as a rising number."""
    (tmp_path / "t").write_bytes(b"no")
    numbers = set()
    for _ in range(5):
        with pytest.raises(TensorFileError):
            TensorFile(tmp_path / "t")
        with (tmp_path / "t").open("rb") as file:
            numbers.add(file.fileno())
    assert len(numbers) == 1


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    sentence = f"{tmp_path}/pipe is a device or a pipe, not a safetensors file."
    with says(TensorFileError, sentence):
        TensorFile(tmp_path / "pipe")

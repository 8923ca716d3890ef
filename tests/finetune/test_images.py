"""Image files of many kinds become upright RGB images of 8 bits, or one clear sentence."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.processing import apply_voi_lut
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from finetune import images
from finetune.images import read_image
from merge_kit.errors import ImageError, MissingExtraError

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
SKIP = "or pass --skip-unreadable."


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves an array or image under a name and gives the path."""

    def save(name: str, picture: Any, **options: Any) -> Path:
        path = tmp_path / name
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.save(path, **options)
        return path

    return save


@pytest.fixture
def dicom(tmp_path: Path) -> Callable[..., Path]:
    """Writes a DICOM file of the given pixels; keywords become or replace elements."""

    def write(
        pixels: np.ndarray, *, name: str = "a.dcm", compress: Any = None, **tags: Any
    ) -> Path:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
        dataset.Modality = "DX"
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
        if pixels.ndim == 3:
            dataset.PlanarConfiguration = 0
        dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        dataset.PixelData = pixels.tobytes()
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        dataset.HighBit = dataset.BitsStored - 1
        if compress is not None:
            dataset.compress(compress)
        path = tmp_path / name
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


def grey(path: Path, **options: Any) -> np.ndarray:
    """One channel of an image, after a look that all three are the same."""
    pixels = np.asarray(read_image(path, **options))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path.as_posix()} cannot be read as an image (")
    assert message.endswith(SKIP)
    return message


def lut(first: int, bits: int, entries: list[int]) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return [item]


# -- pictures


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "jp2"])
def test_grey_is_repeated_into_three_channels_without_a_change(saved, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(f"a.{suffix}", RAMP, **options)
    image = read_image(path)
    assert image.mode == "RGB"
    assert (grey(path) == RAMP).all()


def test_a_jpeg_keeps_its_colours(saved) -> None:
    path = saved("a.jpg", Image.new("RGB", (8, 8), (200, 100, 50)), quality=95)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (0, 0, 0)),
        ("LA", (200, 0), (0, 0, 0)),
    ],
)
def test_other_modes_become_rgb_over_black(saved, mode, colour, expected) -> None:
    path = saved("a.tif", Image.new(mode, (4, 4), colour))
    assert read_image(path).getpixel((1, 1)) == expected


def test_a_palette_is_looked_up_and_its_transparent_entry_is_black(saved) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    image = read_image(saved("a.png", picture, transparency=1))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (0, 0, 0)]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_orientation_of_a_tiff_is_honoured(tmp_path, compression, dtype) -> None:
    a = np.arange(6, dtype=dtype).reshape(2, 3) * (np.iinfo(dtype).max // 255)
    upright = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.T, np.rot90(a, -1), np.rot90(a, 2).T]
    path = tmp_path / "a.tif"
    for orientation, expected in enumerate([*upright, np.rot90(a)], start=1):
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(path, a, extratags=[tag], compression=compression)
        assert grey(path).tolist() == (expected // (np.iinfo(dtype).max // 255)).tolist()


def test_the_preview_behind_a_camera_jpeg_is_left_alone(saved) -> None:
    picture, preview = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (4, 4))
    path = saved("a.jpg", picture, format="MPO", save_all=True, append_images=[preview])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert (grey(path) == np.full((8, 8), 255)).all()


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("png", np.uint8),
        ("png", np.uint16),
        ("jpg", np.uint8),
        ("tif", np.uint8),
        ("webp", np.uint8),
    ],
)
def test_exif_orientation_is_honoured(saved, suffix: str, dtype) -> None:
    picture = np.zeros((8, 16), dtype)
    picture[:, 8:] = np.iinfo(dtype).max
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to view
    upright = grey(saved(f"a.{suffix}", picture, exif=exif))
    assert upright.shape == (16, 8)
    assert upright[:7].max() < 30
    assert upright[9:].min() > 225


def test_metadata_does_not_travel_with_the_pixels(saved) -> None:
    exif = Image.Exif()
    exif[0x010E] = "Mrs Canary"
    image = read_image(saved("a.jpg", RAMP, exif=exif, comment=b"canary"))
    assert image.info == {}
    assert not image.getexif()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_from_the_full_range_or_from_the_values(saved, suffix) -> None:
    path = saved(f"a.{suffix}", np.array([[0, 257, 32768, 2570]], np.uint16))
    assert grey(path).tolist() == [[0, 1, 128, 10]]
    path = saved(f"b.{suffix}", np.array([[1000, 2000, 3000]], np.uint16))
    assert grey(path, sixteen_bit="minmax").tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("byteorder", "photometric"), [("<", "minisblack"), (">", "minisblack"), ("<", "miniswhite")]
)
def test_a_tiff_of_another_writer_reads_the_same(tmp_path, byteorder, photometric) -> None:
    path = tmp_path / "a.tif"
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    tifffile.imwrite(path, values, byteorder=byteorder, photometric=photometric)
    expected = [[0, 100, 255]] if photometric == "minisblack" else [[255, 155, 0]]
    assert grey(path).tolist() == expected


def test_sixteen_bit_colour_reads_from_its_full_range_only(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.full((4, 4, 3), 257 * 40, np.uint16), photometric="rgb")
    assert read_image(path).getpixel((0, 0)) == (40, 40, 40)
    assert "16-bit colour" in refusal(path, sixteen_bit="minmax")


def test_an_image_of_one_value_scales_to_black_instead_of_dividing_by_zero(saved) -> None:
    path = saved("a.png", np.full((4, 4), 1234, np.uint16))
    assert grey(path, sixteen_bit="minmax").max() == 0


# -- refusals


def test_a_multi_page_tiff_is_refused(saved) -> None:
    page = Image.fromarray(RAMP)
    message = refusal(saved("a.tif", page, save_all=True, append_images=[page, page]))
    assert "(it holds 3 pages): save the page that the label speaks of as a file" in message


def test_an_animated_webp_is_refused(saved) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved("a.webp", frames[0], save_all=True, append_images=frames[1:])
    assert "(it holds 2 frames)" in refusal(path)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_tiff_without_a_defined_range_is_refused(saved, dtype) -> None:
    message = refusal(saved("a.tif", RAMP.astype(dtype)))
    assert "floating-point values, whose range is not defined): save it with 8 or 16" in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_a_truncated_file_is_refused(saved, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes()[:-2000])
    refusal(path)


def test_the_message_for_a_truncated_jpeg_is_one_sentence(saved) -> None:
    path = saved("a.jpg", RAMP)
    path.write_bytes(path.read_bytes()[:-40])
    assert refusal(path) == (
        f"{path.as_posix()} cannot be read as an image (truncated): "
        "replace or remove the file, or pass --skip-unreadable."
    )


def test_a_png_with_a_flipped_byte_is_refused(saved) -> None:
    path = saved("a.png", RAMP)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(content)
    assert "(damaged: " in refusal(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert "(not a PNG, JPEG, TIFF" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "(no such file)" in refusal(tmp_path / "a.png")
    assert "(no such file)" in refusal(tmp_path / "a.dcm")
    refusal(tmp_path)


def test_postscript_is_never_handed_to_its_interpreter(saved) -> None:
    assert "(not a PNG, JPEG, TIFF" in refusal(saved("a.eps", Image.new("RGB", (8, 8))))


@pytest.mark.parametrize("pillow_limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_decompression_bomb_is_refused(saved, monkeypatch, pillow_limit) -> None:
    path = saved("a.png", Image.new("1", (20_000, 10_000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    assert "that are safe to decode" in refusal(path)


# -- DICOM


def test_eight_bit_dicom_is_read_as_it_is_with_and_without_suffix(dicom) -> None:
    assert (grey(dicom(RAMP)) == RAMP).all()
    assert (grey(dicom(RAMP, name="1.2.840.55")) == RAMP).all()


def test_monochrome1_is_inverted(dicom) -> None:
    path = dicom(RAMP, PhotometricInterpretation="MONOCHROME1")
    assert (grey(path) == 255 - RAMP).all()


def test_rescale_then_the_first_window_gives_the_full_output_range(dicom) -> None:
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]])
    path = dicom(
        (hounsfield + 1024).astype(np.uint16),
        BitsStored=12,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=[40, 300],
        WindowWidth=[400, 2000],
    )
    assert grey(path).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windowing_agrees_with_pydicom(dicom, function: str) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = dicom(
        values, BitsStored=12, WindowCenter=1800.5, WindowWidth=900, VOILUTFunction=function
    )
    oracle = apply_voi_lut(values, pydicom.dcmread(path)) / 4095 * 255
    assert np.abs(grey(path) - oracle).max() <= 0.5 + 1e-9


def test_a_negative_rescale_slope_keeps_dark_dark_inside_the_window(dicom) -> None:
    path = dicom(
        np.array([[0, 50, 100]], np.uint8),
        RescaleSlope=-1,
        RescaleIntercept=100,
        WindowCenter=50,
        WindowWidth=100,
        VOILUTFunction="LINEAR_EXACT",
    )
    assert grey(path).tolist() == [[255, 128, 0]]


def test_a_window_of_width_one_is_a_threshold_and_of_width_zero_is_absent(dicom) -> None:
    assert set(grey(dicom(RAMP, WindowCenter=100, WindowWidth=1)).ravel()) == {0, 255}
    for function in ("LINEAR", "LINEAR_EXACT"):
        path = dicom(RAMP, WindowCenter=100, WindowWidth=0, VOILUTFunction=function)
        assert (grey(path) == RAMP).all()


def test_a_voi_lut_goes_before_a_window(dicom) -> None:
    path = dicom(
        np.array([[9, 10, 11, 12, 13]], np.uint8),
        VOILUTSequence=lut(10, 8, [255, 0, 51, 102]),
        WindowCenter=128,
        WindowWidth=256,
    )
    assert grey(path).tolist() == [[255, 255, 0, 51, 102]]


def test_an_eight_bit_lut_of_many_entries_does_not_wrap(dicom) -> None:
    ramp = (np.arange(4096) // 16).tolist()
    path = dicom(
        np.array([[0, 800, 4095]], np.uint16), BitsStored=12, VOILUTSequence=lut(0, 8, ramp)
    )
    assert grey(path).tolist() == [[0, 50, 255]]


def test_a_modality_lut_goes_before_the_window(dicom) -> None:
    path = dicom(
        np.array([[0, 1, 2]], np.uint8),
        ModalityLUTSequence=lut(0, 16, [1000, 0, 500]),
        WindowCenter=500,
        WindowWidth=1000,
        VOILUTFunction="LINEAR_EXACT",
    )
    assert grey(path).tolist() == [[255, 0, 128]]


def test_without_a_window_the_stored_bits_or_the_values_give_the_range(dicom) -> None:
    path = dicom(np.array([[0, 1000, 2000]], np.uint16), BitsStored=12, PixelPaddingValue=0)
    assert grey(path).tolist() == [[0, 62, 125]]
    assert grey(path, sixteen_bit="minmax").tolist() == [[0, 0, 255]]


def test_signed_values_are_scaled_from_their_signed_range(dicom) -> None:
    path = dicom(np.array([[-2048, 0, 2047]], np.int16), BitsStored=12)
    assert grey(path).tolist() == [[0, 128, 255]]


def test_colour_dicom_keeps_its_colours_and_knows_no_window(dicom) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (np.asarray(read_image(dicom(pixels))) == pixels).all()
    windowed = dicom(pixels, WindowCenter=9, WindowWidth=9)
    assert (np.asarray(read_image(windowed)) == pixels).all()
    ybr = np.broadcast_to(np.array([76, 85, 255], np.uint8), (8, 8, 3))
    red = read_image(dicom(ybr, PhotometricInterpretation="YBR_FULL")).getpixel((0, 0))
    assert np.abs(np.array(red) - (255, 0, 0)).max() <= 2


def test_a_dicom_palette_is_looked_up(dicom) -> None:
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in (("Red", [0, 65535]), ("Green", [257 * 9, 0]), ("Blue", [0, 257])):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    image = read_image(dicom(np.array([[0, 1]], np.uint8), **tags))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(0, 9, 0), (255, 0, 1)]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=["rle", "jpeg2000"])
def test_losslessly_compressed_dicom_reads_the_same(dicom, syntax) -> None:
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 4
    path = dicom(values, BitsStored=12, compress=syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert (grey(path) == np.rint(values / 4095 * 255)).all()


def encapsulated(path: Path, syntax: Any, frame: bytes, photometric: str) -> Path:
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PhotometricInterpretation = photometric
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_a_dicom_with_a_jpeg_inside_reads_as_rgb(dicom) -> None:
    jpeg = BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(jpeg, "JPEG", quality=95, subsampling=2)
    path = dicom(np.zeros((16, 16, 3), np.uint8))
    encapsulated(path, JPEGBaseline8Bit, jpeg.getvalue(), "YBR_FULL_422")
    assert np.abs(np.array(read_image(path).getpixel((5, 5))) - (200, 100, 50)).max() <= 3


def test_a_compressed_dicom_without_a_decoder_names_the_package(dicom) -> None:
    path = encapsulated(dicom(RAMP), JPEGLosslessSV1, b"\xff\xd8\xff\xd9", "MONOCHROME2")
    message = refusal(path)
    assert "(no decoder for JPEG Lossless, Non-Hierarchical, First-Order Prediction" in message
    assert "pip install pylibjpeg-libjpeg (GPL-3) or pip install python-gdcm, or" in message


def test_a_damaged_compressed_dicom_is_refused(dicom) -> None:
    path = encapsulated(dicom(RAMP), JPEGBaseline8Bit, b"\xff\xd8broken", "MONOCHROME2")
    assert "pixel data cannot be decoded): replace or remove the file" in refusal(path)


def test_a_multi_frame_dicom_is_refused(dicom) -> None:
    message = refusal(dicom(RAMP, NumberOfFrames=30))
    assert "(it holds 30 frames): save the frame that the label speaks of" in message


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation HSV"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 pixels"),
        ({"PixelData": RAMP.tobytes()[:-10]}, "(truncated)"),
        ({"VOILUTFunction": "X", "WindowCenter": 9, "WindowWidth": 9}, "unknown VOI LUT function"),
    ],
)
def test_a_dicom_that_cannot_be_shown_is_refused(dicom, tags, reason) -> None:
    assert reason in refusal(dicom(RAMP, **tags))


def test_a_dicom_without_pixels_or_cut_in_its_header_is_refused(dicom) -> None:
    path = dicom(RAMP)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    assert "(a DICOM file without integer pixel data)" in refusal(path)
    path.write_bytes(path.read_bytes()[:200])
    refusal(path)


def test_a_file_that_only_claims_to_be_dicom_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(b"not dicom" * 40)
    assert "the mark DICM at byte 128 is missing" in refusal(path)


def test_missing_pydicom_names_the_extra(dicom, monkeypatch) -> None:
    path = dicom(RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'merge-kit\[dicom\]'"):
        read_image(path)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [({"Modality": "US"}, "modality US"), ({"BurnedInAnnotation": "YES"}, "BurnedIn"), ({}, None)],
)
def test_images_with_possible_names_in_them_are_reported(dicom, caplog, tags, reason) -> None:
    with caplog.at_level(logging.WARNING):
        read_image(dicom(RAMP, PatientName="Canary^Mrs", **tags))
    assert (reason in caplog.text) if reason else (caplog.text == "")
    assert "Canary" not in caplog.text


# -- warnings


def test_warnings_of_the_decoders_stay_inside(dicom) -> None:
    path = dicom(RAMP, PixelData=RAMP.tobytes() + bytes(100))
    with pytest.warns(UserWarning, match="larger than the given"):
        _ = pydicom.dcmread(path).pixel_array
    assert (grey(path) == RAMP).all()


def test_the_warning_filters_are_back_after_threads_have_read(saved) -> None:
    path = saved("a.png", Image.new("RGB", (256, 256)))
    before = warnings.filters[:]
    threads = [
        threading.Thread(target=lambda: [read_image(path) for _ in range(20)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    assert images._readers == []

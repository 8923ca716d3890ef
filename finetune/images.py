"""One image file of a hospital -> one 8-bit RGB image.

PNG, JPEG, TIFF, BMP, WebP and JPEG 2000 through Pillow; DICOM through pydicom (the extra `dicom`).
Whatever a site stores, the network sees the same thing: upright, three channels, 0..255. Colour
profiles (ICC) are not applied, because scanners that write them and scanners that do not would
otherwise be treated differently.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from merge_kit.errors import ImageError, MissingExtraError

if TYPE_CHECKING:
    from pydicom import Dataset

SixteenBit = Literal["full", "minmax"]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".dcm", ".dicom"}
)
MAX_PIXELS = 178_956_970  # where Pillow, too, calls an image a decompression bomb

# Named, because Pillow's other plugins do more than decode: EPS starts Ghostscript.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "JPEG2000")
_DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
_DICOM_COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262
_TIFF_MIN_IS_WHITE = 0

logger = logging.getLogger(__name__)


def read_image(path: Path, *, sixteen_bit: SixteenBit = "full") -> Image.Image:
    """Read one image file; the result has mode "RGB" (uint8), is upright and carries no metadata.

    Grey is repeated into three channels. Transparent pixels are laid over black: what a file hides
    under its alpha channel is arbitrary, and black is what a detector that saw nothing gives.
    Values of more than 8 bits become 0..255 linearly, for `sixteen_bit="full"` from the full range
    of the format (0..65535), for `"minmax"` from the smallest to the largest value of this image.

    DICOM: modality LUT or rescale, then the VOI LUT or else the first window (its output range
    becomes 0..255; a window of a width that the standard forbids counts as absent), then the
    inversion of MONOCHROME1 (DICOM PS3.3 C.11.1, C.11.2, C.7.6.3.1.2). Without LUT and window,
    `sixteen_bit` decides as for other files: the range of the stored bits, or this image's values
    (padding left out). An image that may show a patient's name in its pixels is reported to the
    module's logger.

    Raises ImageError (what is wrong with this file, and the way out) and MissingExtraError.
    """
    with _without_warnings():
        try:
            if is_dicom(path):
                return _read_dicom(path, sixteen_bit)
            return _read_picture(path, sixteen_bit)
        except (ImageError, MissingExtraError):
            raise
        # Decoders raise nearly anything on a damaged file (SyntaxError, struct.error, KeyError).
        except Exception as error:
            raise _unreadable(path, _reason(error)) from error


def is_dicom(path: Path) -> bool:
    """Whether the name ends in .dcm or .dicom, or the file has DICOM's mark "DICM" at byte 128."""
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_picture(path: Path, sixteen_bit: SixteenBit) -> Image.Image:
    # Given a path instead of a file, Pillow (13.0) maps an uncompressed TIFF into memory and, where
    # its orientation tag asks for a quarter turn, cuts the rows at the wrong length.
    with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
        _check_size(path, *image.size)
        frames = getattr(image, "n_frames", 1)
        # MPO is a camera's JPEG with a preview behind it: the first image is the picture.
        if frames > 1 and image.format != "MPO":
            raise _several(path, frames, "page" if image.format == "TIFF" else "frame")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            scaled = _scale_sixteen_bit(image, sixteen_bit)
            return _to_rgb(_transposed(image, Image.fromarray(scaled)))
        if image.mode in ("I", "F"):
            raise _unreadable(
                path,
                "signed, 32-bit or floating-point values, whose range is not defined",
                "save it with 8 or 16 bits unsigned",
            )
        if sixteen_bit == "minmax" and _is_sixteen_bit_colour(image):
            raise _unreadable(
                path,
                "16-bit colour, which can only be scaled from its full range",
                "save it with 8 bits or read it without min-max scaling",
            )
        return _to_rgb(ImageOps.exif_transpose(image))


def _transposed(original: Image.Image, pixels: Image.Image) -> Image.Image:
    """Turn `pixels`, which were taken from `original`, upright by the EXIF data of `original`."""
    pixels.getexif().update(original.getexif())
    return ImageOps.exif_transpose(pixels)


def _scale_sixteen_bit(image: Image.Image, sixteen_bit: SixteenBit) -> NDArray[np.uint8]:
    """The grey values of an image of 9 to 16 bits as uint8, shape (H, W)."""
    values = np.asarray(image).astype(np.float32)  # loads, so that a TIFF's own rotation is done
    tags: Any = getattr(image, "tag_v2", {})
    low, high = 0.0, 2.0 ** max(tags.get(_TIFF_BITS_PER_SAMPLE, (16,))) - 1
    if sixteen_bit == "minmax":
        low, high = float(values.min()), float(values.max())
    unit = _unit(values, low, high)
    # Pillow inverts white-is-zero TIFFs of 8 bits, but not those of 16.
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_MIN_IS_WHITE:
        unit = 1 - unit
    return _bytes(unit)


def _is_sixteen_bit_colour(image: Image.Image) -> bool:
    # Pillow opens these as 8-bit colour; only the decoder's arguments still tell of 16 bits.
    tiles: Any = getattr(image, "tile", ())
    return bool(tiles) and ";16" in str(tiles[0][3])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    rgb = image.convert("RGB")
    rgb.info.clear()  # EXIF and comments may name a patient and must not travel with the pixels
    return rgb


def _read_dicom(path: Path, sixteen_bit: SixteenBit) -> Image.Image:
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtraError("dicom", "reading DICOM files") from error
    try:
        dataset = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError as error:
        raise _unreadable(path, "not a DICOM file: the mark DICM at byte 128 is missing") from error
    _warn_of_burned_in_text(path, dataset)
    _check_dicom(path, dataset)
    stored = _decode_dicom(path, dataset)
    photometric = dataset.PhotometricInterpretation
    if photometric in _DICOM_COLOUR:
        return Image.fromarray(_bytes(_unit(stored, 0, 2**dataset.BitsStored - 1)))
    if photometric == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        colours = apply_color_lut(stored, dataset)[..., :3]
        return Image.fromarray(_bytes(_unit(colours, 0, np.iinfo(colours.dtype).max)))
    return Image.fromarray(_bytes(_dicom_grey(dataset, stored, sixteen_bit))).convert("RGB")


def _check_dicom(path: Path, dataset: Dataset) -> None:
    if "PixelData" not in dataset:
        raise _unreadable(path, "a DICOM file without integer pixel data")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise _several(path, frames, "frame")
    _check_size(path, dataset.Columns, dataset.Rows)
    photometric = dataset.PhotometricInterpretation
    known = _DICOM_COLOUR | {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"}
    if photometric not in known:
        raise _unreadable(
            path, f"photometric interpretation {photometric}", "export it as RGB or MONOCHROME2"
        )


def _decode_dicom(path: Path, dataset: Dataset) -> NDArray[Any]:
    """The stored values, shape (H, W) or (H, W, 3), colour already as RGB."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    # pylibjpeg-libjpeg is GPL-3, so that the extra cannot bring it along.
    way_out = "run pip install pylibjpeg-libjpeg (GPL-3) or pip install python-gdcm"
    try:
        available = not syntax.is_compressed or get_decoder(syntax).is_available
    except NotImplementedError:
        available, way_out = False, "export it uncompressed"
    if not available:
        raise _unreadable(path, f"no decoder for {syntax.name} is installed", way_out)
    try:
        stored: NDArray[Any] = pixel_array(dataset, allow_excess_frames=False)
    except RuntimeError as error:
        raise _unreadable(
            path,
            f"its {syntax.name} pixel data cannot be decoded",
            f"replace or remove the file, or {way_out}",
        ) from error
    return stored


def _warn_of_burned_in_text(path: Path, dataset: Dataset) -> None:
    modality = dataset.get("Modality")
    if modality in ("US", "SC", "XC"):
        reason = f"modality {modality}"
    elif str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        reason = "BurnedInAnnotation is YES"
    else:
        return
    logger.warning("%s may show patient data in its pixels (%s): check it.", path, reason)


def _dicom_grey(
    dataset: Dataset, stored: NDArray[Any], sixteen_bit: SixteenBit
) -> NDArray[np.floating[Any]]:
    """Stored values to 0..1 by modality LUT, VOI LUT or window, and inversion."""
    values, low, high = _modality(dataset, stored)
    window = _first_window(dataset)
    if dataset.get("VOILUTSequence"):
        values, high = _look_up(dataset, dataset.VOILUTSequence[0], values)
        unit = _unit(values, 0, high)
    elif window is not None:
        unit = _window(values, *window)
    else:
        if sixteen_bit == "minmax" and dataset.BitsStored > 8:
            seen = values[stored != dataset.get("PixelPaddingValue")]
            low, high = (float(seen.min()), float(seen.max())) if seen.size else (low, high)
        unit = _unit(values, low, high)
    return 1 - unit if dataset.PhotometricInterpretation == "MONOCHROME1" else unit


def _modality(dataset: Dataset, stored: NDArray[Any]) -> tuple[NDArray[Any], float, float]:
    """Values after the modality LUT or the rescale, and the range that they may take."""
    if dataset.get("ModalityLUTSequence"):
        values, high = _look_up(dataset, dataset.ModalityLUTSequence[0], stored)
        return values, 0.0, high
    bits = dataset.BitsStored
    signed = dataset.PixelRepresentation == 1
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        return stored, *ends
    slope, intercept = float(slope), float(intercept)
    low, high = sorted(end * slope + intercept for end in ends)
    return stored * slope + intercept, low, high


def _look_up(dataset: Dataset, item: Dataset, values: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Apply one LUT; the second result is the largest value of its bit depth (PS3.3 C.11.1.1).

    pydicom's own `apply_voi` is not used: its index wraps at 255 when the entries have 8 bits.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    table = item.LUTData
    if isinstance(table, bytes):
        order = ">" if dataset.file_meta.TransferSyntaxUID.is_little_endian is False else "<"
        wide = len(table) >= 2 * (entries or 2**16)
        table = np.frombuffer(table, f"{order}u2" if wide else "u1")
    lut = np.asarray(table)[: entries or 2**16]  # 0 stands for 65536, which 16 bits cannot hold
    index = np.rint(values).astype(np.int64) - first
    return lut[np.clip(index, 0, len(lut) - 1)], 2.0**bits - 1


def _first_window(dataset: Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window, None where there is none to be used."""
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    return centre, width, function


def _first(value: Any) -> float | None:
    if value is None or isinstance(value, (int, float, str)):
        return None if value in (None, "") else float(value)
    return float(value[0]) if len(value) else None


def _window(
    values: NDArray[Any], centre: float, width: float, function: str
) -> NDArray[np.floating[Any]]:
    """Map values to 0..1 by a window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    x = values.astype(np.float64)
    if function == "SIGMOID":
        sigmoid: NDArray[np.float64] = 1 / (1 + np.exp(-4 * (x - centre) / width))
        return sigmoid
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise ValueError(f"unknown VOI LUT function {function}")
    if width == 0:
        return (x > centre).astype(np.float64)
    return np.clip((x - centre) / width + 0.5, 0, 1)


def _unit(values: NDArray[Any], low: float, high: float) -> NDArray[np.floating[Any]]:
    """Map low..high to 0..1; an image of one value only becomes 0."""
    if high <= low:
        return np.zeros(values.shape)
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)


def _bytes(unit: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    return np.asarray(np.rint(unit * 255), dtype=np.uint8)


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _unreadable(
            path,
            f"{width} x {height} pixels, more than the {MAX_PIXELS} that are safe to decode",
            "crop or downscale it",
        )


def _several(path: Path, count: int, kind: str) -> ImageError:
    return _unreadable(
        path,
        f"it holds {count} {kind}s",
        f"save the {kind} that the label speaks of as a file of its own",
    )


def _unreadable(path: Path, reason: str, way_out: str = "replace or remove the file") -> ImageError:
    return ImageError(
        f"{path.as_posix()} cannot be read as an image ({reason}): "
        f"{way_out}, or pass --skip-unreadable."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, TIFF, BMP, WebP, JPEG 2000 or DICOM file, or an unusual variant"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {MAX_PIXELS} pixels that are safe to decode"
    text = " ".join(str(error).split())
    if isinstance(error, EOFError) or re.search("truncated|less than expected", text, re.I):
        return "truncated"
    return f"damaged: {text}".rstrip(".: ")


_filters_lock = threading.Lock()
_readers: list[warnings.catch_warnings[None]] = []


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Python warnings while any thread decodes.

    Pillow and pydicom warn about oddities that do not change the pixels. The warning filters belong
    to the process, so with several reading threads only the first one in saves them and only the
    last one out restores them; a plain `catch_warnings` in each thread would restore out of order.
    """
    with _filters_lock:
        _readers.append(warnings.catch_warnings())
        if len(_readers) == 1:
            _readers[0].__enter__()
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _filters_lock:
            saved = _readers.pop()
            if not _readers:
                saved.__exit__(None, None, None)

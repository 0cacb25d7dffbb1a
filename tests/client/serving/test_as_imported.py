"""What a model is asked about equals what the import stored and training read, pixel for pixel."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.data.framing import AS_STORED, Framing, framing_of, prepared_folder, site_framing
from client.data.sitekey import load_key, study_pseudonym
from client.data.store import read_pairs
from client.serving.grounding import picture_box
from client.serving.picture import WHOLE, placed, prepared, read_picture
from common.errors import DatasetInvalid, ImageUnreadable
from common.model.images import ImageProcessor, load_pixels, read_processor
from common.model.tiny import tiny_base_directory
from tests.client.data.synthetic_dicom import Planted, base_image, dataset_for
from tests.client.data.test_dicom import lut_item
from tests.client.data.test_import_table import run_import

CLIP = ImageProcessor(224, 224, 224, (224, 224), 3, 1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
REAL = Path(__file__).parents[4] / "shared" / "data" / "iu-xray"


def study(number: int) -> Planted:
    accession, patient = f"XR{number}", f"{771000 + number}"
    return Planted(accession, patient, "Brandt", "Zofia", "19500102", "20200304", "M^K", (), (), False, "")


def dataset(number: int, *, side: int = 160, inverted: bool = False, shown: Any = None) -> Dataset:
    image = base_image(np.random.default_rng([5, number]), side=side) if shown is None else shown
    return dataset_for(study(number), image, view="PA", number=number, inverted=inverted)


def part10(ds: Dataset) -> bytes:
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def bare(ds: Dataset) -> bytes:
    """As old archives kept it: no preamble, no meta information."""
    del ds.file_meta
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, implicit_vr=True, little_endian=True, enforce_file_format=False)
    return stream.getvalue()


def stored_values(ds: Dataset) -> Any:
    return np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns).copy()


def padded(number: int) -> bytes:
    ds = dataset(number)
    values = stored_values(ds)
    values[:, :10] = 4095
    ds.PixelData, ds.PixelPaddingValue = values.tobytes(), 4095
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 2, -1000, 3096, 6000
    return part10(ds)


def deep(number: int, *, allocated: int, bits: int, signed: int) -> bytes:
    ds = dataset(number)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = np.rint(stored_values(ds) / 4095 * (high - low) + low)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = allocated, bits, bits - 1, signed
    ds.PixelData = values.astype(f"<{'i' if signed else 'u'}{allocated // 8}").tobytes()
    ds["PixelData"].VR = "OB" if allocated == 8 else "OW"
    ds.WindowCenter, ds.WindowWidth = (high + low + 1) / 2, high - low + 1
    return part10(ds)


def with_luts(number: int) -> bytes:
    ds = dataset(number)
    del ds.WindowCenter, ds.WindowWidth
    ds.VOILUTSequence = [lut_item(np.rint(65535 * (np.arange(4096) / 4095) ** 1.5))]
    return part10(ds)


def presentation(number: int) -> bytes:
    ds = dataset(number, inverted=True)
    ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME2", "INVERSE"
    return part10(ds)


def compressed(number: int, syntax: Any) -> bytes:
    ds = dataset(number)
    ds.compress(syntax, generate_instance_uid=False)
    return part10(ds)


def turned(number: int, orientation: list[str], turn: Callable[[Any], Any]) -> bytes:
    ds = dataset(number)
    ds.PixelData = np.ascontiguousarray(turn(stored_values(ds))).tobytes()
    ds.PatientOrientation = orientation
    return part10(ds)


def syntax(number: int, uid: Any) -> bytes:
    ds = dataset(number)
    ds.file_meta.TransferSyntaxUID = uid
    return part10(ds)


def no_window(number: int) -> bytes:
    ds = dataset(number)
    del ds.WindowCenter, ds.WindowWidth
    return part10(ds)


def in_frame(number: int, *, side: int = 220) -> Any:
    """A chest within black borders and dim shutters, 0 to 1."""
    chest = base_image(np.random.default_rng([5, number]), side=side)[:, side // 14 : -side // 14]
    dim = np.pad(chest, ((0, 0), (24, 16)), mode="reflect") * 0.25
    dim[:, 24:-16] = chest
    return np.pad(dim, ((30, 44), (40, 20)))


KINDS: dict[str, Callable[[int], bytes]] = {
    "plain": lambda n: part10(dataset(n)),
    "monochrome1": lambda n: part10(dataset(n, inverted=True)),
    "rescale, window and padding": padded,
    "no window": no_window,
    "VOI LUT": with_luts,
    "presentation LUT shape": presentation,
    "RLE": lambda n: compressed(n, RLELossless),
    "JPEG 2000": lambda n: compressed(n, JPEG2000Lossless),
    "JPEG-LS": lambda n: compressed(n, JPEGLSLossless),
    "implicit": lambda n: syntax(n, ImplicitVRLittleEndian),
    "deflated": lambda n: syntax(n, DeflatedExplicitVRLittleEndian),
    "without preamble": lambda n: bare(dataset(n)),
    "mirrored": lambda n: turned(n, ["R", "F"], lambda a: a[:, ::-1]),
    "upside down": lambda n: turned(n, ["L", "H"], lambda a: a[::-1]),
    "lying": lambda n: turned(n, ["F", "L"], lambda a: a.T),
    "8 bits": lambda n: deep(n, allocated=8, bits=8, signed=0),
    "10 bits": lambda n: deep(n, allocated=16, bits=10, signed=0),
    "12 bits signed": lambda n: deep(n, allocated=16, bits=12, signed=1),
    "16 bits": lambda n: deep(n, allocated=16, bits=16, signed=0),
    "32 bits allocated": lambda n: deep(n, allocated=32, bits=20, signed=0),
    "borders and shutters": lambda n: part10(dataset(n, shown=in_frame(n))),
    "borders, monochrome1": lambda n: part10(dataset(n, shown=in_frame(n), inverted=True)),
    "large": lambda n: part10(dataset(n, side=700)),
}


def raster(number: int, kind: str) -> bytes:
    image = base_image(np.random.default_rng([6, number]), side=160)
    values = (image * 255).astype(np.uint8)
    stream = io.BytesIO()
    if kind == "deep.png":
        Image.fromarray((image * 65535).astype(np.uint16)).save(stream, "PNG")
    elif kind == "framed.png":
        Image.fromarray((in_frame(number) * 255).astype(np.uint8)).save(stream, "PNG")
    elif kind == "colour.jpg":
        tinted = np.stack([values, values, (values * 0.9).astype(np.uint8)], 2)
        Image.fromarray(tinted).save(stream, "JPEG", quality=92)
    elif kind == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.ascontiguousarray(np.rot90(values))).save(stream, "JPEG", exif=exif, quality=92)
    else:
        Image.fromarray(values).save(stream, "PNG" if kind.endswith("png") else "JPEG")
    return stream.getvalue()


RASTERS = ("plain.png", "plain.jpg", "deep.png", "framed.png", "colour.jpg", "turned.jpg")


def imported(folder: Path, files: dict[str, bytes], *options: str, first: int = 0) -> dict[str, Path]:
    """Import one study per file; returns the stored image of each."""
    source = folder / "export"
    source.mkdir(parents=True)
    as_table = any(Path(name).suffix for name in files)
    rows = []
    for number, (name, data) in enumerate(files.items(), start=first):
        file = name if as_table else f"{number}.dcm"
        (source / file).write_bytes(data)
        findings = f"The lungs are clear. Marker {number} mm."
        rows.append(
            {
                "patient": f"M{number}",
                "accession": f"XR{number}",
                "image": file,
                "view": "PA",
                "findings": findings,
            }
            if as_table
            else {"accession": f"XR{number}", "report": f"FINDINGS: {findings}"}
        )
    with (source / "reports.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    out = folder / "out"
    run_import(
        source, out, "--format", "table" if as_table else "dicom+table", "--no-check-writing",
        "--no-check-chest", *options,
    )  # fmt: skip
    key = load_key(folder / "test.key")
    names = {study_pseudonym(key, f"XR{number}"): name for number, name in enumerate(files, start=first)}
    return {names[pair.study]: out / pair.images[0] for pair in read_pairs(out)}


def verify_same(files: dict[str, bytes], stored: dict[str, Path], framing: Framing) -> None:
    assert set(stored) == set(files)
    for processor in (read_processor(tiny_base_directory()), CLIP):
        for name, data in files.items():
            trained = load_pixels(stored[name], processor)
            asked = prepared(read_picture(data, framing), processor)
            assert np.array_equal(asked, trained), name
            again = prepared(read_picture(stored[name].read_bytes(), AS_STORED), processor)
            assert np.array_equal(again, trained), name


@pytest.mark.parametrize("options", [(), ("--size", "120", "--bits", "16")])
def test_every_kind_of_dicom_is_asked_about_as_it_was_stored(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    files = {name: make(number) for number, (name, make) in enumerate(KINDS.items())}
    stored = imported(tmp_path, files, *options)
    framing = framing_of(tmp_path / "out")
    assert framing == (Framing(max_side=120, bits=16) if options else Framing())
    assert site_framing(None, stored["plain"]) == framing
    verify_same(files, stored, framing)
    other = Framing(max_side=96)
    assert (
        read_picture(files["large"], other).pixels.shape != read_picture(files["large"], framing).pixels.shape
    )


@pytest.mark.parametrize("options", [(), ("--size", "120", "--bits", "16")])
def test_every_kind_of_raster_is_asked_about_as_it_was_stored(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    files = {name: raster(number, name) for number, name in enumerate(RASTERS)}
    stored = imported(tmp_path, files, *options)
    verify_same(files, stored, framing_of(tmp_path / "out"))


def test_the_box_says_what_part_of_the_decoded_image_is_asked_about() -> None:
    from client.data.dicom import decode_dicom, read_dicom

    data = KINDS["borders and shutters"](3)
    whole = decode_dicom(read_dicom(data, pixels=True))
    picture = read_picture(data)
    left, top, right, bottom = picture.box
    height, width = whole.shape
    part = whole[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    assert np.array_equal(((part.astype(np.uint32) + 128) // 257).astype(np.uint8), picture.pixels)
    assert (left * width, top * height) == pytest.approx((64, 30), abs=6)
    assert ((1 - right) * width, (1 - bottom) * height) == pytest.approx((36, 44), abs=6)
    seen = placed(picture_box(CLIP, width=100, height=200), (0.2, 0.1, 0.6, 0.9))
    assert seen == pytest.approx((0.2, 0.3, 0.6, 0.7))


def test_framing_comes_from_the_card_of_the_prepared_folder(tmp_path: Path) -> None:
    assert site_framing(None, tmp_path) == Framing() and prepared_folder(tmp_path) is None
    (tmp_path / "pairs.jsonl").write_bytes(b"")
    (tmp_path / "card.json").write_text("{}")
    assert prepared_folder(tmp_path / "images" / "ab" / "x.png") == tmp_path
    assert site_framing(None, tmp_path / "images") == AS_STORED
    for card in (
        '{"import": {}}',
        '{"import": {"max_side": 0, "bits": 8}}',
        '{"import": {"max_side": 9, "bits": 7}}',
    ):
        (tmp_path / "card.json").write_text(card)
        with pytest.raises(DatasetInvalid, match="expected"):
            framing_of(tmp_path)


def test_pictures_that_the_import_would_not_read_are_refused() -> None:
    blank = dataset(1)
    blank.PixelData = bytes(len(blank.PixelData))
    colour = dataset(2)
    colour.SamplesPerPixel, colour.PhotometricInterpretation = 3, "RGB"
    for ds in (blank, colour):
        with pytest.raises(ImageUnreadable):
            read_picture(part10(ds))


def test_one_file_in_two_framings_has_two_names_in_caches() -> None:
    data = raster(1, "framed.png")
    framed, stored = read_picture(data), read_picture(data, AS_STORED)
    assert framed.sha256 == stored.sha256 and framed.key != stored.key
    assert framed.key == read_picture(data).key


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/iu-xray")
def test_real_radiographs_are_asked_about_as_they_were_stored(tmp_path: Path) -> None:
    shutil.copytree(REAL / "west", tmp_path / "export")
    run_import(tmp_path / "export", tmp_path / "out", "--format", "table", "--no-check-writing")
    key, framing = load_key(tmp_path / "test.key"), framing_of(tmp_path / "out")
    with (REAL / "west" / "reports.csv").open() as handle:
        sent = {study_pseudonym(key, row["accession"]): row["image"] for row in csv.DictReader(handle)}
    cut = 0
    for pair in read_pairs(tmp_path / "out"):
        picture = read_picture((REAL / "west" / sent[pair.study]).read_bytes(), framing)
        assert np.array_equal(prepared(picture, CLIP), load_pixels(tmp_path / "out" / pair.images[0], CLIP))
        cut += picture.box != WHOLE
    assert cut > 0

"""One DICOM file: LUTs and polarity, what the header refuses, and hostile dimensions."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.data.dicom import (
    coded_dimensions,
    decode_dicom,
    is_dicom,
    known_identifiers,
    read_dicom,
    verify_chest_radiograph,
    view_of,
)
from client.data.study import Reason
from common.errors import StudyRejected
from tests.client.data.synthetic_dicom import Planted, base_image, dataset_for

STUDY = Planted("XR1", "445566", "Brandt", "Zofia", "19500102", "20200304", "Moreau^Kenji", (), (), False, "")
IMAGE = base_image(np.random.default_rng(0), side=128)


def dataset(*, inverted: bool = False, view: str = "PA") -> Dataset:
    return dataset_for(STUDY, IMAGE, view=view, number=1, inverted=inverted)


def saved(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def reason_of(path: Path) -> str:
    with pytest.raises(StudyRejected) as caught:
        found = read_dicom(path, pixels=True)
        verify_chest_radiograph(found)
        decode_dicom(found)
    return caught.value.reason


def test_monochrome1_is_inverted_once(tmp_path: Path) -> None:
    plain = decode_dicom(read_dicom(saved(dataset(), tmp_path / "a"), pixels=True)).astype(int)
    inverted = decode_dicom(read_dicom(saved(dataset(inverted=True), tmp_path / "b"), pixels=True)).astype(
        int
    )
    assert np.abs(plain - inverted).max() < 65535 / 1000
    expected = np.rint(IMAGE * 65535)
    assert np.corrcoef(plain.ravel(), expected.ravel())[0, 1] > 0.999


def test_rescale_window_and_padding_are_applied(tmp_path: Path) -> None:
    ds = dataset()
    ds.RescaleSlope, ds.RescaleIntercept = 2, -1000
    ds.WindowCenter, ds.WindowWidth = 2 * 2048 - 1000, 2 * 1024
    stored = np.frombuffer(ds.PixelData, "<u2").reshape(128, 128).copy()
    stored[:8] = 4095
    ds.PixelData, ds.PixelPaddingValue = stored.tobytes(), 4095
    pixels = decode_dicom(read_dicom(saved(ds, tmp_path / "a"), pixels=True))
    assert (pixels[:8] == 0).all()
    inside = stored[8:]
    assert (pixels[8:][inside > 2048 + 520] == 65535).all()
    assert (pixels[8:][inside < 2048 - 520] == 0).all()


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_pixels_equal_raw_ones(tmp_path: Path, syntax: Any) -> None:
    raw = decode_dicom(read_dicom(saved(dataset(), tmp_path / "raw"), pixels=True))
    ds = dataset()
    try:
        ds.compress(syntax, generate_instance_uid=False)
    except (RuntimeError, NotImplementedError):
        pytest.skip("no encoder for this syntax here")
    assert np.array_equal(decode_dicom(read_dicom(saved(ds, tmp_path / "c"), pixels=True)), raw)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (["L", "F"], lambda a: a),
        (["R", "F"], lambda a: a[:, ::-1]),
        (["L", "H"], lambda a: a[::-1]),
        (["F", "L"], lambda a: a.T),
    ],
)
def test_image_is_turned_upright(tmp_path: Path, orientation: list[str], turn: Any) -> None:
    upright = decode_dicom(read_dicom(saved(dataset(), tmp_path / "a"), pixels=True))
    ds = dataset()
    stored = np.ascontiguousarray(turn(np.frombuffer(ds.PixelData, "<u2").reshape(128, 128)))
    ds.PixelData, ds.PatientOrientation = stored.tobytes(), orientation
    assert np.array_equal(decode_dicom(read_dicom(saved(ds, tmp_path / "b"), pixels=True)), upright)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Modality": "CT"}, Reason.NOT_CHEST),
        ({"BodyPartExamined": "HAND", "StudyDescription": "HAND"}, Reason.NOT_CHEST),
        ({"PresentationIntentType": "FOR PROCESSING"}, Reason.NOT_ORIGINAL),
        ({"BurnedInAnnotation": "YES"}, Reason.BURNED_IN_TEXT),
        ({"NumberOfFrames": "3"}, Reason.MULTI_FRAME),
        ({"Rows": 60000, "Columns": 60000}, Reason.IMAGE_TOO_LARGE),
        ({"Rows": 20}, Reason.IMAGE_TOO_SMALL),
        ({"Rows": 500}, Reason.IMAGE_UNREADABLE),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, Reason.COLOUR),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, Reason.COLOUR),
        ({"BitsStored": 1, "HighBit": 0}, Reason.NOT_ORIGINAL),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, Reason.NOT_ORIGINAL),
    ],
)
def test_header_that_is_no_chest_radiograph_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    ds = dataset()
    for name, value in changes.items():
        setattr(ds, name, value)
    assert reason_of(saved(ds, tmp_path / "a")) == reason


def test_codestream_larger_than_its_header_is_refused(tmp_path: Path) -> None:
    ds = dataset()
    try:
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    except (RuntimeError, NotImplementedError):
        pytest.skip("no encoder here")
    data = bytes(ds.PixelData)
    at = data.index(b"\xff\x4f\xff\x51") + 8
    ds.PixelData = data[:at] + (60_000).to_bytes(4, "big") * 2 + data[at + 8 :]
    assert reason_of(saved(ds, tmp_path / "a")) == Reason.IMAGE_UNREADABLE


def test_coded_dimensions_are_read_from_jpeg() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (90, 70)).save(buffer, "JPEG")
    assert coded_dimensions(buffer.getvalue()) == (90, 70)
    assert coded_dimensions(b"RIFF....") is None
    assert coded_dimensions(b"\xff\xd8\xff") is None


def shown(path: Path) -> Any:
    found = read_dicom(path, pixels=True)
    verify_chest_radiograph(found)
    return decode_dicom(found)


def test_deflated_file_is_read(tmp_path: Path) -> None:
    plain = shown(saved(dataset(), tmp_path / "a"))
    ds = dataset()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert np.array_equal(shown(saved(ds, tmp_path / "b")), plain)
    assert view_of(read_dicom(tmp_path / "b", pixels=False)) == "pa"


def test_deflated_file_that_inflates_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = dataset()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.PixelData = bytes(5_000_000)
    path = saved(ds, tmp_path / "a")
    assert path.stat().st_size < 20_000
    monkeypatch.setattr("client.data.dicom.MAX_FILE_BYTES", 1_000_000)
    assert reason_of(path) == Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_file_without_preamble_is_read(tmp_path: Path, syntax: Any) -> None:
    plain = shown(saved(dataset(), tmp_path / "a"))
    ds = dataset()
    ds.BurnedInAnnotation = "NO"
    del ds.file_meta
    with (tmp_path / "b").open("wb") as handle:
        implicit = syntax == ImplicitVRLittleEndian
        pydicom.dcmwrite(handle, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert (tmp_path / "b").read_bytes()[128:132] != b"DICM"
    assert is_dicom(tmp_path / "b")
    assert np.array_equal(shown(tmp_path / "b"), plain)


@pytest.mark.parametrize(
    "content", [b"\x08\x00" + bytes(200), b"\x89PNG\r\n\x1a\n" + bytes(200), b"patient,study\n" * 20, b""]
)
def test_other_files_are_no_dicom(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert not is_dicom(tmp_path / "a")


@pytest.mark.parametrize(
    ("allocated", "bits", "signed"),
    [(8, 8, 0), (16, 10, 0), (16, 12, 1), (16, 14, 0), (16, 16, 0), (16, 16, 1), (32, 20, 0)],
)
def test_every_bit_depth_shows_the_same_image(tmp_path: Path, allocated: int, bits: int, signed: int) -> None:
    ds = dataset()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = np.rint(IMAGE * (high - low) + low)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = allocated, bits, bits - 1, signed
    ds.PixelData = values.astype(f"<{'i' if signed else 'u'}{allocated // 8}").tobytes()
    if allocated == 8:
        ds["PixelData"].VR = "OB"
    ds.WindowCenter, ds.WindowWidth = (high + low + 1) / 2, high - low + 1
    plain = shown(saved(dataset(), tmp_path / "plain")).astype(int)
    assert np.abs(shown(saved(ds, tmp_path / "a")) - plain).max() < 65535 / 2 ** (min(bits, 12) - 1)


def lut_item(values: Any, *, bits: int = 16) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(values), 0, bits], np.asarray(values, "<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return item


def test_luts_of_values_of_interest_and_presentation_are_applied(tmp_path: Path) -> None:
    curve = np.rint(65535 * (np.arange(4096) / 4095) ** 2)
    ds = dataset()
    del ds.WindowCenter, ds.WindowWidth
    ds.VOILUTSequence = [lut_item(curve)]
    low, high = IMAGE.min() ** 2, IMAGE.max() ** 2
    squared = shown(saved(ds, tmp_path / "a")) / 65535
    assert np.abs(squared - (IMAGE**2 - low) / (high - low)).max() < 0.01
    plain = shown(saved(dataset(), tmp_path / "b")).astype(int)
    ds = dataset()
    ds.PresentationLUTShape = "INVERSE"
    assert np.abs(65535 - plain - shown(saved(ds, tmp_path / "c"))).max() <= 20


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.100", "1.2.3.4.5"])
def test_unknown_compression_is_named(tmp_path: Path, syntax: str) -> None:
    ds = dataset()
    ds.PixelData = pydicom.encaps.encapsulate([bytes(64)])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    path = tmp_path / "a"
    pydicom.dcmwrite(path, ds, implicit_vr=False, little_endian=True, enforce_file_format=False)
    assert reason_of(path) == Reason.UNKNOWN_COMPRESSION


def nested(depth: int) -> bytes:
    """Encode that many sequences inside each other, of undefined length, explicit little endian."""
    opening = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return opening * depth


def test_endless_nesting_and_lying_lengths_are_refused(tmp_path: Path) -> None:
    path = saved(dataset(), tmp_path / "a")
    content = path.read_bytes()
    at = content.index(b"\x08\x00\x50\x00SH")
    path.write_bytes(content[:at] + nested(5000) + content[at:])
    assert reason_of(path) == Reason.IMAGE_UNREADABLE
    path.write_bytes(content[:at] + b"\x08\x00\x49\x00OB\x00\x00\xf0\xff\xff\xff" + content[at:])
    assert reason_of(path) in (Reason.IMAGE_UNREADABLE, Reason.NOT_CHEST)


@pytest.mark.parametrize("keep", [200, 1200, 20_000])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = saved(dataset(), tmp_path / "a")
    path.write_bytes(path.read_bytes()[:keep])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reason_of(path) in (Reason.IMAGE_UNREADABLE, Reason.NOT_CHEST)


@pytest.mark.parametrize(
    ("changes", "view"),
    [
        ({"ViewPosition": "PA"}, "pa"),
        ({"ViewPosition": "LL"}, "lateral"),
        ({"ViewPosition": "", "SeriesDescription": "W033 Chest lat."}, ""),
        ({"ViewPosition": "", "SeriesDescription": "CHEST LAT"}, "lateral"),
        ({"ViewPosition": "", "SeriesDescription": "Thorax AP"}, "ap"),
        ({"ViewPosition": "", "PatientOrientation": ["A", "F"]}, "lateral"),
        ({"ViewPosition": ""}, ""),
    ],
)
def test_view_comes_from_position_description_or_orientation(changes: dict[str, Any], view: str) -> None:
    ds = dataset()
    for name, value in changes.items():
        setattr(ds, name, value)
    assert view_of(ds) == view


def test_header_names_everyone_and_every_number() -> None:
    values = {value for _, value in known_identifiers(dataset())}
    assert {"Brandt^Zofia", "445566", "XR1", "19500102", "20200304", "Moreau^Kenji", "1 Elm Street"} <= values


def test_real_radiographs_agree_between_raw_and_jpeg2000() -> None:
    store = pytest.importorskip("data_store")
    folder = Path(store.__path__[0]) / "data"
    seen = {}
    for name in ("RG1_UNCR", "RG1_J2KR", "RG1_UNCI", "RG1_J2KI"):
        ds = read_dicom(folder / f"{name}.dcm", pixels=True)
        verify_chest_radiograph(ds)
        assert view_of(ds) == "pa"
        seen[name] = decode_dicom(ds).astype(np.int32)
    assert (
        np.array_equal(seen["RG1_UNCI"], seen["RG1_J2KI"])
        or np.abs(seen["RG1_UNCI"] - seen["RG1_J2KI"]).mean() < 500
    )
    assert np.abs(seen["RG1_UNCR"] - seen["RG1_J2KR"]).mean() < 500
    height, width = seen["RG1_UNCR"].shape
    lung = seen["RG1_UNCR"][height // 3 : height // 2, width // 5 : width // 3].mean()
    spine = seen["RG1_UNCR"][height // 3 : height // 2, 9 * width // 20 : 11 * width // 20].mean()
    assert lung < spine

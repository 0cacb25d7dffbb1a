"""Open-i (Indiana University): one XML report per patient, PNG files, and the table of projections.

Guarantees: XML with a document type, entities or external references is refused (defusedxml); files are
read in the order of their names. Views come from `indiana_projections.csv` (uid, filename, projection),
because the XML does not tell a frontal image from a lateral one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from client.data.sources.paths import walk_files
from client.data.sources.table import read_columns
from client.data.store import MAX_TEXT_CHARS
from client.data.study import Reason, SourceImage, SourceStudy
from common.errors import SourceInvalid

_PARTS = {"FINDINGS": "findings", "IMPRESSION": "impression", "INDICATION": "indication"}


def read_openi(folder: Path) -> Iterator[SourceStudy]:
    """Yield one study per XML file below the folder; raises SourceInvalid without projections."""
    table = folder / "indiana_projections.csv"
    if not table.is_file():
        raise SourceInvalid(f"expected {table} with the view of every image, found none")
    pictures = {
        path.name: path.relative_to(folder).as_posix() for path in walk_files(folder) if path.suffix == ".png"
    }
    images: defaultdict[str, list[SourceImage]] = defaultdict(list)
    for _, row in read_columns(table, ("uid", "filename", "projection")):
        name = row["filename"]
        images[row["uid"]].append(SourceImage(pictures.get(name, name), row["projection"]))
    number = 0
    for path in walk_files(folder):
        if path.suffix != ".xml":
            continue
        number += 1
        uid, text, reason = parse_openi(path)
        yield SourceStudy(
            where=f"report {number}",
            patient=uid,
            study=uid,
            images=tuple(images.get(uid, ())),
            text=text,
            reason=reason,
        )


def parse_openi(path: Path) -> tuple[str, dict[str, str], str]:
    """Return identifier, sections and reason of one XML report."""
    from xml.etree.ElementTree import ParseError

    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    if path.stat().st_size > 8 * MAX_TEXT_CHARS:
        return "", {}, Reason.REPORT_TOO_LONG
    try:
        root = fromstring(path.read_bytes(), forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError):
        return "", {}, Reason.REPORT_UNREADABLE
    identifier = root.find(".//uId")
    uid = (identifier.get("id", "") if identifier is not None else "").removeprefix("CXR")
    text = {
        _PARTS[part.get("Label", "")]: (part.text or "").strip()
        for part in root.iter("AbstractText")
        if part.get("Label", "") in _PARTS
    }
    return uid, {name: value for name, value in text.items() if value}, "" if uid else Reason.NO_IDENTIFIER

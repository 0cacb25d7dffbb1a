"""From a decoded radiograph to what a site stores of it: one function for the import and for serving.

The import stores an image in this form and a model is trained on it, so whatever a model is asked about
must take the same form. Guarantees: depends on the pixels and the `Framing` only; the box says where the
stored image lies in the decoded one. It judges nothing: blank images, writing and other body parts are
the import's to refuse, and the guard's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from client.data.collimation import field_box
from client.data.pixels import Gray, border_box, fit_within, in_depth
from client.data.store import read_card
from common.errors import DatasetInvalid


@dataclass(frozen=True, slots=True)
class Framing:
    """How images were stored: the longer side in pixels, the depth, and whether borders were cut.

    Without a side they were stored as large as they came.
    """

    max_side: int | None = 512
    bits: int = 8
    cut: bool = True


AS_IMPORTED = Framing()
AS_STORED = Framing(max_side=None, cut=False)


@dataclass(frozen=True, slots=True)
class Framed:
    """An image in stored form, 16 bits deep: its `field` at full size, `stored` as small as it is kept.

    `box` is left, top, right and bottom of the field as shares of the sides of the decoded image.
    """

    field: Gray
    stored: Gray
    box: tuple[float, float, float, float]
    bits: int

    @property
    def values(self) -> npt.NDArray[np.uint8] | Gray:
        """What the stored PNG holds."""
        return in_depth(self.stored, bits=self.bits)


def frame_radiograph(decoded: Gray, framing: Framing) -> Framed:
    """Cut borders and shutters, then shrink, as the framing says."""
    height, width = decoded.shape
    if framing.cut:
        outer = border_box(decoded)
        inner = field_box(outer.of(decoded))
        top, left = outer.top + inner.top, outer.left + inner.left
        field = inner.of(outer.of(decoded))
    else:
        top, left, field = 0, 0, decoded
    tall, wide = field.shape
    box = (left / width, top / height, (left + wide) / width, (top + tall) / height)
    small = field if framing.max_side is None else fit_within(field, max_side=framing.max_side)
    return Framed(field, small, box, framing.bits)


def framing_of(directory: Path) -> Framing:
    """Read from the card of a prepared folder how its images were made; those not imported are as they came.

    Raises DatasetInvalid.
    """
    card: Any = read_card(directory).get("import")
    if card is None:
        return AS_STORED
    try:
        side, bits = card["max_side"], card["bits"]
    except (KeyError, TypeError) as error:
        raise DatasetInvalid(f"{directory}/card.json: expected max_side and bits of the import") from error
    if not (isinstance(side, int) and side >= 1 and bits in (8, 16)):
        raise DatasetInvalid(
            f"{directory}/card.json: expected a size and 8 or 16 bits, got {side!r}, {bits!r}"
        )
    return Framing(max_side=side, bits=bits)


def site_framing(*places: Path | None) -> Framing:
    """Read the framing of the first place that is, or lies in, a prepared folder; else the default."""
    folders = (prepared_folder(place) for place in places if place is not None)
    found = next((folder for folder in folders if folder is not None), None)
    return AS_IMPORTED if found is None else framing_of(found)


def prepared_folder(path: Path) -> Path | None:
    """Return the prepared folder that a path is or lies in, if any."""
    places = (path, *path.resolve().parents)
    return next(
        (one for one in places if (one / "pairs.jsonl").is_file() and (one / "card.json").is_file()), None
    )

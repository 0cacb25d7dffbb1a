"""Every error that FedRad raises by name.

A message says what was expected and what was got, and names the file, field or site. It never holds
patient data, report text, keys or update values. Programs turn a `FedRadError` into one line on stderr
and exit code 1; any other exception is a defect.
"""

from __future__ import annotations


class FedRadError(Exception):
    """Base of all named errors; `code` is the class name, stable for logs, metrics and tests."""

    @property
    def code(self) -> str:
        return type(self).__name__


# --- values and files -------------------------------------------------------------------------------------


class NotCanonical(FedRadError):
    """Bytes are not the one canonical encoding of what they say."""


class BodyTooLarge(FedRadError):
    """A body, file or field is over its size cap."""


class ManifestInvalid(FedRadError):
    """A study manifest has an unknown or missing key, a wrong unit or an impossible combination."""


# --- prepared site data (client/data) ---------------------------------------------------------------------


class DatasetInvalid(FedRadError):
    """A prepared data folder breaks the contract of `pairs.jsonl`, `card.json` or `checksums.json`."""


class PairInvalid(DatasetInvalid):
    """A line of `pairs.jsonl` has an unknown, missing or mistyped field."""


class StudyDuplicated(DatasetInvalid):
    """A study occurs twice in one prepared data folder."""


class ImagePathEscapes(DatasetInvalid):
    """An image path is absolute, leaves its folder or passes through a symbolic link."""


class ImageMissing(DatasetInvalid):
    """An image that a pair names is not in the prepared data folder."""


class SplitLeaks(DatasetInvalid):
    """One patient occurs in two splits."""


class DatasetExists(DatasetInvalid):
    """The output folder already holds something that this command did not make or may not replace."""

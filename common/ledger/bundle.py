"""The audit bundle: everything that an auditor needs, in one file with exactly one encoding.

A ZIP archive, members stored uncompressed and sorted by name:
    bundle.json                  format, log key, time and software of the export
    entries.jsonl                every leaf of the log
    checkpoints/<size>.note      every signed checkpoint with its cosignatures
    releases/<version>/<file>    the files of releases (the adapter itself may be left out)
    records.jsonl                the signed round records that the sites chain (optional)
    retained/<round>-<attempt>/<site>.{bin,key}   masked contributions kept for audit (optional)
    sbom.json                    CycloneDX list of the running code (optional)

Guarantees: `pack(parse_bundle(x)) == x`, so any changed, added or missing byte of the archive is refused;
no member is ever written to disk, no path or compression is interpreted, sizes are capped before reading.
It does not decide whether the contents are true: see `audit.py`.
"""

from __future__ import annotations

import functools
import io
import re
import zipfile
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.canonical import canonical_json, parse_canonical
from common.errors import BodyTooLarge, BundleInvalid, FedRadError
from common.files import write_atomic
from common.ledger.note import VerifierKey, format_verifier_key, parse_verifier_key

FORMAT = 1
MAX_BUNDLE_BYTES = 2 << 30
MAX_MEMBERS = 200_000
MANIFEST_NAME = "bundle.json"
ENTRIES_NAME = "entries.jsonl"
RECORDS_NAME = "records.jsonl"
SBOM_NAME = "sbom.json"
_FILE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_MEMBER = re.compile(
    rf"(?:bundle\.json|entries\.jsonl|records\.jsonl|sbom\.json|checkpoints/\d{{12}}\.note"
    rf"|releases/[1-9]\d{{0,6}}/{_FILE}|retained/\d{{1,7}}-\d{{1,4}}/[a-z0-9-]{{1,64}}\.(?:bin|key))"
)
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Bundle:
    """A parsed bundle: its log key as stated by the exporter (trust it only if compared) and all members."""

    log: VerifierKey
    exported_s: int
    software: str
    members: Mapping[str, bytes]

    def folder(self, prefix: str) -> dict[str, bytes]:
        """Return the members under `prefix/` by the rest of their name."""
        names = self._names
        start, end = bisect_left(names, f"{prefix}/"), bisect_left(names, f"{prefix}0")  # "0" follows "/"
        return {name[len(prefix) + 1 :]: self.members[name] for name in names[start:end]}

    @functools.cached_property
    def _names(self) -> list[str]:
        return sorted(self.members)

    @property
    def leaves(self) -> list[bytes]:
        """The encoded entries in order; raises BundleInvalid for a last line without its newline."""
        data = self.members[ENTRIES_NAME]
        if data and not data.endswith(b"\n"):
            raise BundleInvalid("entries.jsonl: expected every line to end in a newline")
        return data.split(b"\n")[:-1]


def make_bundle(*, log: VerifierKey, exported_s: int, software: str, members: Mapping[str, bytes]) -> Bundle:
    """Build a bundle from its members (without bundle.json); raises BundleInvalid for an unknown name."""
    stated = {
        "exported_s": exported_s,
        "format": FORMAT,
        "log": format_verifier_key(log),
        "software": software,
    }
    return parse_bundle(_zip({**members, MANIFEST_NAME: canonical_json(stated)}))


def pack(bundle: Bundle) -> bytes:
    """Encode a bundle; the inverse of `parse_bundle`."""
    return _zip(bundle.members)


def write_bundle(path: Path, bundle: Bundle) -> None:
    write_atomic(path, pack(bundle))


def read_bundle(path: Path) -> Bundle:
    """Read and parse a bundle file; raises BundleInvalid or BodyTooLarge."""
    try:
        size = path.stat().st_size
        if size > MAX_BUNDLE_BYTES:
            raise BodyTooLarge(f"{path}: expected at most {MAX_BUNDLE_BYTES} bytes, got {size}")
        return parse_bundle(path.read_bytes())
    except OSError as error:
        raise BundleInvalid(f"{path}: expected a readable audit bundle, got {error.strerror}") from error


def parse_bundle(data: bytes) -> Bundle:
    """Parse a bundle; raises BundleInvalid unless it is the one encoding of its members."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise BodyTooLarge(f"expected a bundle of at most {MAX_BUNDLE_BYTES} bytes, got {len(data)}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            _check_members(infos, len(data))
            members = {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise BundleInvalid(
            f"expected an audit bundle (a ZIP archive), got a damaged one: {error}"
        ) from error
    if _zip(members) != data:
        raise BundleInvalid("expected the one encoding of a bundle, got other bytes around its members")
    for name in (MANIFEST_NAME, ENTRIES_NAME):
        if name not in members:
            raise BundleInvalid(f"expected {name} in the bundle, got none")
    return _stated(members)


def _check_members(infos: list[zipfile.ZipInfo], size: int) -> None:
    if len(infos) > MAX_MEMBERS:
        raise BundleInvalid(f"expected at most {MAX_MEMBERS} members, got {len(infos)}")
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise BundleInvalid("expected each member once")
    if sum(info.file_size for info in infos) > size:
        raise BundleInvalid("expected members no larger than the archive")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise BundleInvalid(f"{info.filename[:80]!r}: expected an uncompressed member")
        if not _MEMBER.fullmatch(info.filename):
            raise BundleInvalid(f"unexpected member {info.filename[:80]!r}")


def _stated(members: Mapping[str, bytes]) -> Bundle:
    try:
        value = parse_canonical(members[MANIFEST_NAME], max_bytes=16_384)
        if not isinstance(value, dict) or value.keys() != {"exported_s", "format", "log", "software"}:
            raise BundleInvalid("bundle.json: expected exported_s, format, log and software")
        if value["format"] != FORMAT:
            raise BundleInvalid(f"bundle.json: expected format {FORMAT}, got {value['format']!r}")
        if type(value["exported_s"]) is not int or value["exported_s"] < 0:
            raise BundleInvalid("bundle.json: expected exported_s in whole seconds")
        if not isinstance(value["software"], str) or not re.fullmatch(r"[ -~]{1,100}", value["software"]):
            raise BundleInvalid("bundle.json: expected software in one printable line")
        log = parse_verifier_key(str(value["log"]))
    except BundleInvalid:
        raise
    except FedRadError as error:
        raise BundleInvalid(f"bundle.json: {error}") from error
    return Bundle(log, value["exported_s"], value["software"], dict(members))


def _zip(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            if not _MEMBER.fullmatch(name):
                raise BundleInvalid(f"unexpected member {name[:80]!r}")
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, members[name])
    return buffer.getvalue()

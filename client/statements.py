"""What a site says of itself in the ledger when it joins a study: its keys, and its data in buckets.

Guarantees: signed with the site's message key; no count finer than a bucket; the commitment to the data is
keyed with a secret of the site, so that nobody can guess the data from it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import Any

from client.home import SiteHome
from common.config import Study
from common.ledger.entries import BUCKETS, NO_STUDY, DataUse, Enrolment, Entry, format_entry
from common.ledger.statements import bucket, sign_entry

_TOOL = re.compile(r"[0-9A-Za-z.+-]{1,40}")


def statements(home: SiteHome, study: Study, *, patients: int, studies: int, data_sha256: str) -> list[bytes]:
    """Return this site's signed entries, encoded, for the operator to date and log.

    patients, studies: of the training split; only their buckets leave.
    """
    key, witness = home.message_key(), home.witness_key()
    card = _card(home.data / "card.json")
    enrolment = Enrolment(
        site=home.site, message_key=key.public, witness_key=witness.public, tls_fingerprint="",
        node_fingerprint="",
    )  # fmt: skip
    secret = hashlib.sha256(b"fedrad data commitment\0" + witness.private.private_bytes_raw()).digest()
    data = DataUse(
        site=home.site,
        commitment=hmac.new(secret, data_sha256.encode(), hashlib.sha256).hexdigest(),
        patients=bucket(patients),
        studies=bucket(studies),
        dropped={str(k): v for k, v in _table(card, "dropped").items() if v in BUCKETS},
        tools={str(k): str(v) for k, v in _table(card, "tools").items() if _TOOL.fullmatch(str(v))},
    )
    entries = (Entry(0, NO_STUDY, enrolment), Entry(0, study.sha256, data))
    return [format_entry(sign_entry(entry, signer=home.site, key=key)) for entry in entries]


def _card(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _table(card: dict[str, Any], name: str) -> dict[str, Any]:
    value = card.get(name)
    return value if isinstance(value, dict) else {}

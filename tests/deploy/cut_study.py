"""The study of the tests that cut connections: one site, one exchange, a reply of 48 MB."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from common.config import Study, TensorSpec
from common.protocol import SERVER, Envelope, Stage, pack_body, seal_request
from tests.common.ledger.consortium import key_of, study

SITE = "north"
REPLY_BYTES = 48_000_000


def cut_study() -> Study:
    made = study(sites=(SITE, "south", "west"), quorum=0)
    tensor = replace(made.adapter.tensors[0], shape=(REPLY_BYTES // 4, 1))
    assert isinstance(tensor, TensorSpec)
    return replace(made, adapter=replace(made.adapter, tensors=(tensor,)))


def request() -> Envelope:
    return seal_request(
        key_of("operator"), study=cut_study().sha256, round=0, attempt=1, stage=Stage.CONTRIBUTE,
        sender=SERVER, recipient=SITE, nonce="0" * 32, previous="0" * 64, body=pack_body({}, b"the adapter"),
    )  # fmt: skip


def reply_body() -> bytes:
    """Bytes as a masked vector has them: nothing in them occurs twice."""
    return pack_body({}, hashlib.shake_256(b"masked").digest(REPLY_BYTES))

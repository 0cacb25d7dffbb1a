"""Small text parts of a message, deflated: ledger entries, records and proofs repeat their field names.

Guarantees: `inflate(deflate(x)) == x`; inflating stops at its limit, so that no short message becomes a long
one. The dictionary is part of the protocol (docs/PROTOCOL.md); contents are verified by who reads them.
"""

from __future__ import annotations

import zlib

from common.errors import BodyTooLarge, EnvelopeMalformed

DICTIONARY = (
    b'c2sp.org/tlog-proof@v1\nindex fedrad/old \n\n\xe2\x80\x94 "approve","signatures":[{"key":"","signer":"'
    b'operator","value":""}],"study":"","time_s":18,"v":1}"kind":"round",{"body":{"adapter_in":"",'
    b'"adapter_out":"","aggregate":"","attempt":1,"clip_norm":0.5,"code":"","cohort":["","delta":'
    b'"dropouts":[],"lockfile":"","number":,"outcome":"released","participations":[{"commitment":"",'
    b'"epsilon":,"sigma_units":,"signature":"","site":"","summed":true},"patients":,"record":"",'
    b'"release_epsilon":,"sampling_rate":,"server_sigma_units":,"state_out":""}{"parts":[],"records":[{'
    b'"record":{"adapter_in":"","adapter_out":"","attempt":1,"clip_norm":,"cohort":["","contributions":{"":"",'
    b'"contributors":["","groups":["lora_a","lora_b","projector"],"learning_rate":,"missing":{},"mode":'
    b'"consortium","patients":,"previous":"","round":,"sampling_rate":,"server_sigma_units":,'
    b'"site_share_sigma_units":,"study":"","time_unix_s":18},"signature":""}]}'
)


def deflate(data: bytes) -> bytes:
    """Compress with raw DEFLATE (RFC 1951) and the preset dictionary."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    return packer.compress(data) + packer.flush()


def inflate(data: bytes | memoryview, *, max_bytes: int) -> bytes:
    """Decompress at most `max_bytes`; raises BodyTooLarge for more, EnvelopeMalformed for anything else."""
    unpacker = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        out = unpacker.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise EnvelopeMalformed("expected a deflated part, got other bytes") from error
    if len(out) > max_bytes:
        raise BodyTooLarge(f"expected a part of at most {max_bytes} bytes once inflated, got more")
    if not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
        raise EnvelopeMalformed("expected one whole deflated part, got another length")
    return out

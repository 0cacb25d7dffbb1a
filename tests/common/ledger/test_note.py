"""Signed notes, checkpoints and ledger proofs, against notes that others published.

Published: the PeterNeumann note of golang.org/x/mod/sumdb/note and a checkpoint of sum.golang.org.
"""

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from common.errors import InclusionInvalid, NoteInvalid, NoteSignatureInvalid, QuorumNotReached
from common.ledger.checkpoint import (
    Checkpoint,
    LedgerProof,
    cosign,
    cosigned_at,
    format_checkpoint,
    format_ledger_proof,
    log_key,
    open_checkpoint,
    parse_checkpoint,
    parse_ledger_proof,
    sign_checkpoint,
    verify_cosignature,
    verify_ledger_proof,
    verify_quorum,
    witness_key,
)
from common.ledger.merkle import Tree, hash_leaf
from common.ledger.note import (
    MAX_NOTE_BYTES,
    Note,
    Signature,
    format_note,
    format_signature_line,
    format_verifier_key,
    merge_signatures,
    parse_note,
    parse_signature_line,
    parse_verifier_key,
    sign_note,
    verify_note,
)

PETER_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
PETER_TEXT = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
)
PETER_NOTE = (
    PETER_TEXT + "\n— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdng"
    "otpRZb6KE6RyyBwJnAM=\n"
).encode()
SUMDB_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
SUMDB_NOTE = (
    "go.sum database tree\n63096908\n8lHrQPRYe4KT4WQ9/Qk8/taKnD6IRHbFgfN7vQE2Y54=\n\n"
    "— sum.golang.org Az3gri/oVBN1jAhNZ/iS+W31psFAWRT20/GyrhpU6taFwulQGetBkH5S7wpGXdS935jiIGiUUAXBVHzT/P6f"
    "YhqAmAk=\n"
).encode()
ORIGIN = "fedrad.example/log"
LOG = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LOG_KEY = log_key(ORIGIN, LOG.public_key().public_bytes_raw())
WITNESSES = {n: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, n in enumerate("abcd")}
WITNESS_KEYS = [witness_key(n, k.public_key().public_bytes_raw()) for n, k in WITNESSES.items()]
HEAD = Checkpoint(ORIGIN, 7, bytes(range(32)))


def cosigned(names: str, note: Note | None = None) -> Note:
    note = note or sign_checkpoint(HEAD, private_key=LOG)
    return merge_signatures(
        note, [cosign(note, name=n, private_key=WITNESSES[n], time_s=1000) for n in names]
    )


# --- published notes --------------------------------------------------------------------------------------


def test_the_published_go_note_verifies_and_is_reproduced_byte_for_byte() -> None:
    note, key = parse_note(PETER_NOTE), parse_verifier_key(PETER_KEY)
    verify_note(note, key)
    assert note.text == PETER_TEXT
    private = Ed25519PrivateKey.from_private_bytes(PETER_SEED)
    assert format_note(sign_note(PETER_TEXT, name="PeterNeumann", private_key=private)) == PETER_NOTE


def test_a_published_checkpoint_of_the_go_checksum_database_verifies() -> None:
    note = parse_note(SUMDB_NOTE)
    verify_note(note, parse_verifier_key(SUMDB_KEY))
    head = parse_checkpoint(note.text)
    assert (head.origin, head.size) == ("go.sum database tree", 63096908)
    assert head.root.hex() == "f251eb40f4587b8293e1643dfd093cfed68a9c3e884476c581f37bbd0136639e"


def test_a_published_note_with_one_character_changed_is_refused() -> None:
    key = parse_verifier_key(PETER_KEY)
    with pytest.raises(NoteSignatureInvalid):
        verify_note(parse_note(PETER_NOTE.replace(b"cryptography", b"cryptographY")), key)


def test_no_substring_or_changed_byte_of_a_verifier_key_is_accepted() -> None:
    data = PETER_KEY.encode()
    for start in range(len(data)):
        for end in range(start + 1, len(data) + 1):
            if (start, end) != (0, len(data)):
                with pytest.raises(NoteInvalid):
                    parse_verifier_key(data[start:end].decode())
    for at in range(len(data)):
        with pytest.raises(NoteInvalid):
            parse_verifier_key((data[:at] + bytes([data[at] + 1]) + data[at + 1 :]).decode("latin-1"))
    assert format_verifier_key(parse_verifier_key(PETER_KEY)) == PETER_KEY


# --- strict parsing ---------------------------------------------------------------------------------------

SIGNATURE = PETER_NOTE.decode().rpartition("\n\n")[2]


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\n",
        b"text\n",
        PETER_NOTE[:-1],
        PETER_NOTE + b"\n",
        PETER_NOTE + b"trailing\n",
        PETER_NOTE.replace("— ".encode(), b"- "),
        PETER_NOTE.replace(b"\n\n", b"\n"),
        PETER_NOTE.replace(b"If", b"\tIf"),
        PETER_NOTE.replace(b"\n", b"\r\n"),
        PETER_NOTE.replace(b"If", b"\xff\xfe"),
        PETER_NOTE.replace(b"nAM=", b"nAN="),
        PETER_NOTE.replace(b"nAM=", b"nAM"),
        PETER_NOTE.replace(b"PeterNeumann x", b"Peter+Neumann x"),
        PETER_NOTE.replace(b"PeterNeumann x", "Peter\u2003Neumann x".encode()),
        PETER_NOTE + SIGNATURE.encode(),
        PETER_TEXT.encode() + b"\n" + "— a AAAA\n".encode(),
        PETER_TEXT.encode() + b"\n" + b"".join(f"— a{i} AAAAAAAA\n".encode() for i in range(101)),
        b"x" * (MAX_NOTE_BYTES + 1),
    ],
)
def test_a_malformed_note_is_refused(bad: bytes) -> None:
    with pytest.raises(NoteInvalid):
        parse_note(bad)


@pytest.mark.parametrize(
    "bad",
    [
        "o\n7\n",
        "o\n7\nAAAA\n",
        "o\n07\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "o\n-7\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "o\n7\n" + base64.b64encode(bytes(31)).decode() + "\n",
        "o\n7\n" + base64.b64encode(bytes(32)).decode()[:-2] + "B=\n",
        "\n7\n" + base64.b64encode(bytes(32)).decode() + "\n",
        "o\n7\n" + base64.b64encode(bytes(32)).decode() + "\nextension\n",
        "o\n99999999999999999999\n" + base64.b64encode(bytes(32)).decode() + "\n",
    ],
)
def test_a_malformed_checkpoint_is_refused(bad: str) -> None:
    with pytest.raises(NoteInvalid):
        parse_checkpoint(bad)


def test_checkpoints_and_notes_survive_the_round_trip() -> None:
    assert parse_checkpoint(format_checkpoint(HEAD)) == HEAD
    note = cosigned("abc")
    assert parse_note(format_note(note)) == note


# --- the log's own signature ------------------------------------------------------------------------------


def test_a_checkpoint_of_another_log_or_key_is_refused() -> None:
    note = sign_checkpoint(HEAD, private_key=LOG)
    assert open_checkpoint(note, LOG_KEY) == HEAD
    other = log_key("other.example/log", LOG_KEY.public)
    with pytest.raises(NoteSignatureInvalid):
        open_checkpoint(note, other)
    with pytest.raises(NoteSignatureInvalid):
        open_checkpoint(note, log_key(ORIGIN, WITNESS_KEYS[0].public))
    renamed = sign_note(format_checkpoint(HEAD), name="other.example/log", private_key=LOG)
    with pytest.raises(NoteInvalid, match="expected a checkpoint of"):
        open_checkpoint(renamed, other)


def test_a_cosignature_key_cannot_stand_in_for_the_logs_key() -> None:
    with pytest.raises(NoteSignatureInvalid, match="plain note key"):
        verify_note(cosigned("a"), WITNESS_KEYS[0])
    with pytest.raises(NoteSignatureInvalid, match="cosignature key"):
        verify_cosignature(cosigned("a"), LOG_KEY)


# --- cosignatures and quorum ------------------------------------------------------------------------------


def test_a_cosignature_binds_text_and_time() -> None:
    note = cosigned("a")
    verify_cosignature(note, WITNESS_KEYS[0])
    line = note.signatures[1]
    assert cosigned_at(line) == 1000
    assert len(line.value) == 8 + 64
    later = Signature(line.name, line.key_id, (1001).to_bytes(8, "big") + line.value[8:])
    with pytest.raises(NoteSignatureInvalid):
        verify_cosignature(Note(note.text, (note.signatures[0], later)), WITNESS_KEYS[0])
    other = Note(format_checkpoint(Checkpoint(ORIGIN, 8, HEAD.root)), note.signatures)
    with pytest.raises(NoteSignatureInvalid):
        verify_cosignature(other, WITNESS_KEYS[0])


def test_an_ed25519_cosignature_signs_the_bytes_of_the_specification() -> None:
    note = sign_checkpoint(HEAD, private_key=LOG)
    line = cosign(note, name="a", private_key=WITNESSES["a"], time_s=1679315147)
    message = b"cosignature/v1\ntime 1679315147\n" + format_checkpoint(HEAD).encode()
    WITNESSES["a"].public_key().verify(line.value[8:], message)


def test_an_mldsa44_cosignature_counts_and_binds_the_cosigners_name() -> None:
    private = MLDSA44PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    note = sign_checkpoint(HEAD, private_key=LOG)
    line = cosign(note, name="pq", private_key=private, time_s=5)
    key = witness_key("pq", public)
    verify_quorum(parse_note(format_note(merge_signatures(note, [line]))), [key], quorum=1)
    other = witness_key("qp", public)
    renamed = merge_signatures(note, [Signature("qp", other.key_id, line.value)])
    with pytest.raises(NoteSignatureInvalid):
        verify_cosignature(renamed, other)


def test_quorum_below_threshold_is_refused() -> None:
    verify_quorum(cosigned("abc"), WITNESS_KEYS, quorum=3)
    with pytest.raises(QuorumNotReached, match="expected cosignatures of 3 of 4 witnesses, got 2"):
        verify_quorum(cosigned("ab"), WITNESS_KEYS, quorum=3)


def test_one_witness_under_two_names_counts_once() -> None:
    note = sign_checkpoint(HEAD, private_key=LOG)
    lines = [cosign(note, name=n, private_key=WITNESSES["a"], time_s=1) for n in ("a", "alias")]
    keys = [witness_key(n, WITNESS_KEYS[0].public) for n in ("a", "alias")]
    with pytest.raises(QuorumNotReached):
        verify_quorum(merge_signatures(note, lines), keys, quorum=2)


def test_cosignatures_of_strangers_do_not_count_and_a_forged_known_one_condemns_the_note() -> None:
    with pytest.raises(QuorumNotReached):
        verify_quorum(cosigned("cd"), WITNESS_KEYS[:2], quorum=1)
    note = cosigned("ab")
    forged = Signature("b", WITNESS_KEYS[1].key_id, note.signatures[1].value)
    with pytest.raises(NoteSignatureInvalid):
        verify_quorum(Note(note.text, (*note.signatures[:2], forged)), WITNESS_KEYS, quorum=1)


def test_a_cosignature_travels_as_one_line() -> None:
    line = cosigned("a").signatures[1]
    data = format_signature_line(line)
    assert parse_signature_line(data) == line
    for bad in (data + data, data[:-1], b"x" + data, data + b"\n", b""):
        with pytest.raises(NoteInvalid):
            parse_signature_line(bad)


# --- offline ledger proofs --------------------------------------------------------------------------------


def proof_of(leaves: list[bytes], index: int, names: str = "abc") -> LedgerProof:
    tree = Tree()
    tree.extend([hash_leaf(leaf) for leaf in leaves])
    note = sign_checkpoint(Checkpoint(ORIGIN, tree.size, tree.root()), private_key=LOG)
    return LedgerProof(index, tree.prove_inclusion(index), cosigned(names, note))


def test_a_ledger_proof_verifies_offline_and_survives_the_round_trip(tmp_path: Path) -> None:
    leaves = [bytes([i]) for i in range(11)]
    proof = proof_of(leaves, 9)
    data = format_ledger_proof(proof)
    assert data.startswith(b"c2sp.org/tlog-proof@v1\nindex 9\n")
    assert parse_ledger_proof(data) == proof
    head = verify_ledger_proof(leaves[9], proof, log=LOG_KEY, witnesses=WITNESS_KEYS, quorum=3)
    assert head.size == 11


def test_a_ledger_proof_of_another_leaf_or_without_quorum_is_refused() -> None:
    leaves = [bytes([i]) for i in range(11)]
    with pytest.raises(InclusionInvalid):
        verify_ledger_proof(leaves[8], proof_of(leaves, 9), log=LOG_KEY, witnesses=WITNESS_KEYS, quorum=3)
    with pytest.raises(QuorumNotReached):
        verify_ledger_proof(
            leaves[9], proof_of(leaves, 9, "ab"), log=LOG_KEY, witnesses=WITNESS_KEYS, quorum=3
        )


def test_a_malformed_ledger_proof_is_refused() -> None:
    good = format_ledger_proof(proof_of([bytes([i]) for i in range(11)], 9))
    bad = [good.replace(b"@v1", b"@v2"), good.replace(b"index 9", b"index 09"),
           good.replace(b"index 9\n", b""), good.replace(b"\n\n", b"\n", 1), b"",
           good.replace(b"index 9\n", b"index 9\nAAAA\n"),
           good.replace(b"index 9\n", b"index 9\n" + b"A" * 43 + b"=\n" * 64)]  # fmt: skip
    for data in bad:
        with pytest.raises(NoteInvalid):
            parse_ledger_proof(data)

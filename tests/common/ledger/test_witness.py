"""What a hospital's witness refuses to sign, and that it remembers across restarts."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import (
    FedRadError,
    InclusionInvalid,
    LogForked,
    LogShrunk,
    NoteInvalid,
    NoteSignatureInvalid,
    QuorumNotReached,
    WitnessBehind,
)
from common.ledger.checkpoint import (
    Checkpoint,
    cosign,
    log_key,
    sign_checkpoint,
    verify_cosignature,
    witness_key,
)
from common.ledger.entries import Entry, Incident, format_entry
from common.ledger.merkle import Tree, hash_leaf
from common.ledger.note import Note, Signature, merge_signatures
from common.ledger.witness import (
    CosignRequest,
    WitnessState,
    format_cosign_request,
    parse_cosign_request,
    verify_extends,
    verify_logged,
)

ORIGIN = "fedrad.example/log"
OPERATOR = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
LOG = log_key(ORIGIN, OPERATOR.public_key().public_bytes_raw())
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in "abc"}
WITNESSES = [witness_key(n, k.public_key().public_bytes_raw()) for n, k in KEYS.items()]


def tree_of(*leaves: bytes) -> Tree:
    tree = Tree()
    tree.extend([hash_leaf(leaf) for leaf in leaves])
    return tree


HONEST = [bytes([i]) for i in range(20)]
FORKED = [*HONEST[:6], b"rewritten", *HONEST[7:]]


def note_of(leaves: list[bytes], size: int) -> Note:
    return sign_checkpoint(Checkpoint(ORIGIN, size, tree_of(*leaves).root(size)), private_key=OPERATOR)


def request(leaves: list[bytes], old: int, size: int) -> CosignRequest:
    return CosignRequest(old, tree_of(*leaves).prove_consistency(old, size), note_of(leaves, size))


def witness(state: WitnessState, asked: CosignRequest, name: str = "a") -> Signature:
    return state.cosign(asked, name=name, private_key=KEYS[name], time_s=100)


def test_a_witness_follows_a_growing_log_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "witness"
    for old, size in [(0, 3), (3, 3), (3, 8), (8, 20)]:
        state = WitnessState(path, log=LOG)
        assert (state.seen.size if state.seen else 0) == old
        asked = request(HONEST, old, size)
        line = witness(state, asked)
        verify_cosignature(merge_signatures(asked.note, [line]), WITNESSES[0])
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("size", [8, 12])
def test_forked_log_shown_to_a_site_is_named_and_kept_as_evidence(size: int, tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    witness(state, request(HONEST, 0, 8))
    with pytest.raises(LogForked, match=r"witness\.fork"):
        witness(state, request(FORKED, 8, size))
    evidence = (tmp_path / "witness.fork").read_text()
    assert evidence.count(ORIGIN) == 4
    assert state.seen == WitnessState(tmp_path / "witness", log=LOG).seen
    assert state.seen and state.seen.size == 8
    witness(state, request(HONEST, 8, 12))


def test_forked_log_shown_to_two_sites_cannot_gather_a_quorum(tmp_path: Path) -> None:
    states = {n: WitnessState(tmp_path / n, log=LOG) for n in "abc"}
    for name, leaves in zip("abc", (HONEST, HONEST, FORKED), strict=True):
        witness(states[name], request(leaves, 0, 8), name)
    ask = request(HONEST, 8, 12)
    lines = [witness(states[n], ask, n) for n in "ab"]
    with pytest.raises(LogForked):
        witness(states["c"], ask, "c")
    note = merge_signatures(ask.note, lines)
    with pytest.raises(QuorumNotReached):
        states["a"].accept(CosignRequest(12, (), note), witnesses=WITNESSES, quorum=3)
    states["a"].accept(CosignRequest(12, (), note), witnesses=WITNESSES, quorum=2)


def test_a_shrunk_log_is_named(tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    witness(state, request(HONEST, 0, 8))
    with pytest.raises(LogShrunk, match="saw a tree of 8 leaves, now shown one of 5"):
        witness(state, request(HONEST, 0, 5))
    assert (tmp_path / "witness.shrunk").exists() and not (tmp_path / "witness.fork").exists()


def test_a_dropped_entry_is_a_fork(tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    witness(state, request(HONEST, 0, 8))
    dropped = [*HONEST[:4], *HONEST[5:]]
    with pytest.raises(LogForked):
        witness(state, request(dropped, 8, 12))


def test_a_proof_from_the_wrong_size_is_asked_for_again_not_taken_for_a_fork(tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    witness(state, request(HONEST, 0, 8))
    with pytest.raises(WitnessBehind, match="from size 8, got 5"):
        witness(state, request(HONEST, 5, 12))
    assert not (tmp_path / "witness.fork").exists()


def test_a_checkpoint_not_signed_by_the_operator_is_refused_and_not_remembered(tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    forged = sign_checkpoint(Checkpoint(ORIGIN, 8, bytes(32)), private_key=KEYS["b"])
    with pytest.raises(NoteSignatureInvalid):
        witness(state, CosignRequest(0, (), forged))
    assert state.seen is None and not (tmp_path / "witness").exists()


def test_nothing_is_signed_when_the_state_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    (tmp_path / "witness").mkdir()  # the rename onto a directory fails
    with pytest.raises(OSError):
        witness(state, request(HONEST, 0, 8))


def test_a_damaged_state_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "witness").write_bytes(b"damaged")
    with pytest.raises(NoteInvalid):
        WitnessState(tmp_path / "witness", log=LOG)


def test_a_site_that_did_not_cosign_catches_up_with_what_others_witnessed(tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    witness(state, request(HONEST, 0, 8))
    ask = request(HONEST, 8, 12)
    lines = [cosign(ask.note, name=n, private_key=KEYS[n], time_s=5) for n in "bc"]
    full = CosignRequest(8, ask.proof, merge_signatures(ask.note, lines))
    head = state.accept(full, witnesses=WITNESSES, quorum=2)
    assert head.size == 12 and state.seen == head


def test_what_was_sent_stays_masked_until_a_quorum_has_seen_the_same_head(tmp_path: Path) -> None:
    states = {n: WitnessState(tmp_path / n, log=LOG) for n in "abc"}
    ask = request(HONEST, 0, 8)
    lines = [witness(states[n], ask, n) for n in "abc"]
    states["a"].verify_witnessed(lines, witnesses=WITNESSES, quorum=3)
    with pytest.raises(QuorumNotReached):
        states["a"].verify_witnessed(lines[:2], witnesses=WITNESSES, quorum=3)
    fork = cosign(note_of(FORKED, 8), name="b", private_key=KEYS["b"], time_s=5)
    with pytest.raises(NoteSignatureInvalid):
        states["a"].verify_witnessed([lines[0], fork, lines[2]], witnesses=WITNESSES, quorum=2)
    with pytest.raises(WitnessBehind):
        WitnessState(tmp_path / "fresh", log=LOG).verify_witnessed(lines, witnesses=WITNESSES, quorum=0)


def test_the_same_request_again_is_cosigned_again_not_taken_for_a_fork(tmp_path: Path) -> None:
    state = WitnessState(tmp_path / "witness", log=LOG)
    witness(state, request(HONEST, 0, 3))
    asked = request(HONEST, 3, 8)
    assert witness(state, asked) == witness(state, asked)
    assert witness(WitnessState(tmp_path / "witness", log=LOG), asked)
    assert not (tmp_path / "witness.fork").exists()


def test_an_entry_is_believed_only_with_its_proof() -> None:
    entry = Entry(100, "ab" * 32, Incident(code="site-dropped", site="cedar", number=1, detail=""))
    leaves = [*HONEST[:5], format_entry(entry), *HONEST[5:9]]
    tree = tree_of(*leaves)
    head = Checkpoint(ORIGIN, tree.size, tree.root())
    assert verify_logged(leaves[5], index=5, proof=tree.prove_inclusion(5), head=head) == entry
    with pytest.raises(InclusionInvalid):
        verify_logged(leaves[5], index=4, proof=tree.prove_inclusion(5), head=head)
    with pytest.raises(FedRadError):
        verify_logged(leaves[4], index=4, proof=tree.prove_inclusion(4), head=head)


def test_extension_is_a_pure_decision() -> None:
    old = Checkpoint(ORIGIN, 3, tree_of(*HONEST).root(3))
    new = Checkpoint(ORIGIN, 8, tree_of(*HONEST).root(8))
    verify_extends(None, new, ())
    verify_extends(old, new, tree_of(*HONEST).prove_consistency(3, 8))
    with pytest.raises(LogForked):
        verify_extends(None, new, (bytes(32),))
    with pytest.raises(NoteInvalid):
        verify_extends(Checkpoint("other", 3, old.root), new, ())


def test_cosign_requests_survive_the_round_trip_and_malformed_ones_are_refused() -> None:
    asked = request(HONEST, 3, 8)
    data = format_cosign_request(asked)
    assert parse_cosign_request(data) == asked
    for bad in (b"", data.replace(b"old 3", b"old 03"), data.replace(b"old 3", b"new 3"), data[:-1],
                data.replace(b"old 3\n", b"old 3\nAAAA\n"), data.replace(b"\n\n", b"\n", 1)):  # fmt: skip
        with pytest.raises(NoteInvalid):
            parse_cosign_request(bad)

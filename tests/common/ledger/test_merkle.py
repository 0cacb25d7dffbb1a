"""RFC 6962/9162 trees against published numbers, a recursive reference, and every corrupted proof.

Numbers: the eight-leaf tree of certificate-transparency and transparency-dev/merkle (roots, nodes, audit
paths, consistency proofs) and the accumulated vectors of draft-ietf-plants-merkle-tree-certs.
"""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InclusionInvalid, LedgerInvalid, LogForked, LogShrunk
from common.ledger.merkle import EMPTY_ROOT, Tree, hash_leaf, hash_node, verify_consistency, verify_inclusion

LEAVES = [
    bytes.fromhex(x)
    for x in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAF_HASHES = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "0298d122906dcfc10892cb53a73992fc5b9f493ea4c9badb27b791b4127a7fe7",
    "07506a85fd9dd2f120eb694f86011e5bb4662e5c415a62917033d4a9624487e7",
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    "4271a26be0d8a84f0bd54c8c302e7cb3a3b5d1fa6780a40bcce2873477dab658",
    "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
    "46f6ffadd3d06a09ff3c5860d2755c8b9819db7df44251788c7d8e3180de8eb1",
]
INCLUSION = {  # (leaf index, size): audit path
    (0, 1): [],
    (0, 8): [LEAF_HASHES[1], "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (5, 8): [LEAF_HASHES[4], "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0", ROOTS[3]],
    (2, 3): [ROOTS[1]],
    (1, 5): [LEAF_HASHES[0],
             "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e", LEAF_HASHES[4]],
}  # fmt: skip
CONSISTENCY = {  # (old size, new size): proof
    (1, 1): [],
    (1, 8): [LEAF_HASHES[1], "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (6, 8): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
             "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0", ROOTS[3]],
    (2, 5): ["5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e", LEAF_HASHES[4]],
    (6, 7): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a", LEAF_HASHES[6], ROOTS[3]],
}  # fmt: skip
GARBAGE = bytes.fromhex("abacaba000000000000000000000000000000000000000000060061e00123456")


def tree_of(leaves: list[bytes]) -> Tree:
    tree = Tree()
    tree.extend([hash_leaf(leaf) for leaf in leaves])
    return tree


def unhex(values: list[str]) -> list[bytes]:
    return [bytes.fromhex(value) for value in values]


def reference_root(hashes: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word for word."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while 2 * k < len(hashes):
        k *= 2
    return hash_node(reference_root(hashes[:k]), reference_root(hashes[k:]))


def test_the_eight_leaf_tree_has_the_published_leaves_and_roots() -> None:
    tree = tree_of(LEAVES)
    assert [tree.leaf(i).hex() for i in range(8)] == LEAF_HASHES
    assert [tree.root(n).hex() for n in range(1, 9)] == ROOTS
    assert tree.root(0).hex() == EMPTY == EMPTY_ROOT.hex()


@pytest.mark.parametrize("index,size", INCLUSION)
def test_published_inclusion_proofs_are_made_and_verified(index: int, size: int) -> None:
    proof = tree_of(LEAVES).prove_inclusion(index, size)
    assert [h.hex() for h in proof] == INCLUSION[index, size]
    verify_inclusion(
        hash_leaf(LEAVES[index]), index=index, size=size, proof=proof, root=bytes.fromhex(ROOTS[size - 1])
    )


@pytest.mark.parametrize("old,new", CONSISTENCY)
def test_published_consistency_proofs_are_made_and_verified(old: int, new: int) -> None:
    proof = tree_of(LEAVES).prove_consistency(old, new)
    assert [h.hex() for h in proof] == CONSISTENCY[old, new]
    roots = unhex([ROOTS[old - 1], ROOTS[new - 1]])
    verify_consistency(old_size=old, old_root=roots[0], new_size=new, new_root=roots[1], proof=proof)


def test_accumulated_subtree_vectors_of_the_ietf_draft_are_reproduced() -> None:
    roots, paths = hashlib.sha256(), hashlib.sha256()
    leaves = [bytes([i]) for i in range(130)]
    for end in range(1, 131):
        for start in range(end):
            width = 1 << (end - start - 1).bit_length()
            if start % width:
                continue
            tree = tree_of(leaves[start:end])
            roots.update(f"[{start}, {end}) {tree.root().hex()}\n".encode())
            for index in range(start, end):
                proof = "".join(f" {h.hex()}" for h in tree.prove_inclusion(index - start))
                paths.update(f"{index} [{start}, {end}){proof}\n".encode())
    assert roots.hexdigest() == "94a95384a8c69acea9b50d035a58285b3a777cb7a724005faa5e1f1e1190007f"
    assert paths.hexdigest() == "ac2a8f989e44d99e399db448050ff5f19757df53cfb716aa81015d3955d8163f"


def test_every_proof_of_every_tree_below_256_verifies() -> None:
    leaves = [i.to_bytes(2, "big") for i in range(255)]
    hashes = [hash_leaf(leaf) for leaf in leaves]
    tree = tree_of(leaves)
    roots = [tree.root(n) for n in range(256)]
    assert roots == [reference_root(hashes[:n]) for n in range(256)]
    for size in range(1, 256):
        for index in range(size):
            proof = tree.prove_inclusion(index, size)
            verify_inclusion(hashes[index], index=index, size=size, proof=proof, root=roots[size])
        for old in range(size + 1):
            proof = tree.prove_consistency(old, size)
            verify_consistency(
                old_size=old, old_root=roots[old], new_size=size, new_root=roots[size], proof=proof
            )


def test_growing_one_by_one_or_in_batches_gives_the_same_tree() -> None:
    hashes = [hash_leaf(i.to_bytes(2, "big")) for i in range(300)]
    slow, fast = Tree(), Tree()
    for value in hashes:
        slow.extend([value])
    for start in range(0, 300, 37):
        fast.extend(hashes[start : start + 37])
    assert [slow.root(n) for n in range(301)] == [fast.root(n) for n in range(301)]


def corruptions(proof: tuple[bytes, ...], root: bytes) -> list[list[bytes]]:
    bad: list[list[bytes]] = [[*proof, b""], [*proof, root], [b"", *proof], [root, *proof], [*proof, GARBAGE]]
    if proof:
        bad += [list(proof[:-1]), list(proof[1:]), [proof[0], *proof]]
    for at in range(len(proof)):
        changed = list(proof)
        changed[at] = bytes([changed[at][0] ^ 8]) + changed[at][1:]
        bad.append(changed)
    return bad


@pytest.mark.parametrize("index,size", [k for k in INCLUSION if k[1] > 1])
def test_every_corrupted_inclusion_proof_is_refused(index: int, size: int) -> None:
    leaf, root = hash_leaf(LEAVES[index]), bytes.fromhex(ROOTS[size - 1])
    proof = tree_of(LEAVES).prove_inclusion(index, size)
    for bad in corruptions(proof, root):
        with pytest.raises(InclusionInvalid):
            verify_inclusion(leaf, index=index, size=size, proof=bad, root=root)
    places = [(index - 1, size), (index + 1, size), (index ^ 2, size), (index, size * 2), (index, size // 2)]
    for other_index, other_size in [*places, (-1, size), (size, size)]:
        with pytest.raises(InclusionInvalid):
            verify_inclusion(leaf, index=other_index, size=other_size, proof=proof, root=root)
    for bad_leaf, bad_root in [(b"leaf", root), (leaf, bytes.fromhex(EMPTY)), (leaf, GARBAGE), (leaf, b"")]:
        with pytest.raises(InclusionInvalid):
            verify_inclusion(bad_leaf, index=index, size=size, proof=proof, root=bad_root)


@pytest.mark.parametrize("old,new", [k for k in CONSISTENCY if k[0] != k[1]])
def test_every_corrupted_consistency_proof_is_refused(old: int, new: int) -> None:
    first, second = unhex([ROOTS[old - 1], ROOTS[new - 1]])
    proof = tree_of(LEAVES).prove_consistency(old, new)
    bad_proofs: list[list[bytes]] = [[], *corruptions(proof, first), *corruptions(proof, second)]
    for bad in bad_proofs:
        with pytest.raises(LogForked):
            verify_consistency(old_size=old, old_root=first, new_size=new, new_root=second, proof=bad)
    for sizes in [(old - 1, new), (old + 1, new), (old ^ 2, new), (old, new * 2), (old, new // 2)]:
        with pytest.raises(LedgerInvalid):
            verify_consistency(
                old_size=sizes[0], old_root=first, new_size=sizes[1], new_root=second, proof=proof
            )
    for roots in [(b"root", second), (first, b"root"), (second, first), (GARBAGE, second), (first, GARBAGE)]:
        with pytest.raises(LogForked):
            verify_consistency(old_size=old, old_root=roots[0], new_size=new, new_root=roots[1], proof=proof)


def test_trivial_consistency_is_strict() -> None:
    root = bytes.fromhex(ROOTS[0])
    verify_consistency(old_size=0, old_root=EMPTY_ROOT, new_size=1, new_root=root, proof=[])
    verify_consistency(old_size=1, old_root=root, new_size=1, new_root=root, proof=[])
    with pytest.raises(LogForked, match="two roots"):
        verify_consistency(old_size=1, old_root=root, new_size=1, new_root=GARBAGE, proof=[])
    with pytest.raises(LogForked, match="empty proof"):
        verify_consistency(old_size=1, old_root=root, new_size=1, new_root=root, proof=[GARBAGE])
    with pytest.raises(LogForked, match="empty tree"):
        verify_consistency(old_size=0, old_root=GARBAGE, new_size=1, new_root=root, proof=[])
    with pytest.raises(LogShrunk):
        verify_consistency(old_size=2, old_root=root, new_size=1, new_root=root, proof=[])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_a_tree_with_one_leaf_changed_is_never_consistent(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size))
    changed = data.draw(st.integers(0, old - 1))
    hashes = [hash_leaf(i.to_bytes(2, "big")) for i in range(size)]
    honest, forged = Tree(), Tree()
    honest.extend(hashes)
    forged.extend([*hashes[:changed], hash_leaf(b"changed"), *hashes[changed + 1 :]])
    for new_root, proof in [
        (forged.root(), forged.prove_consistency(old)),
        (forged.root(), honest.prove_consistency(old)),
    ]:
        with pytest.raises(LogForked):
            verify_consistency(
                old_size=old, old_root=honest.root(old), new_size=size, new_root=new_root, proof=proof
            )


def test_leaf_or_size_outside_the_tree_is_refused() -> None:
    tree = tree_of(LEAVES)
    for call in (lambda: tree.leaf(8), lambda: tree.prove_inclusion(8), lambda: tree.prove_inclusion(0, 9),
                 lambda: tree.prove_inclusion(-1), lambda: tree.root(9), lambda: tree.root(-1)):  # fmt: skip
        with pytest.raises(InclusionInvalid):
            call()
    with pytest.raises(LogShrunk):
        tree.prove_consistency(5, 4)

"""Masks: NIST keystream, cancelling pairs, in-place work on any length, refusal of other arrays."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import VectorInvalid
from common.secagg.masking import (
    CHUNK_VALUES,
    Mask,
    apply_masks,
    chunk_count,
    chunk_digest,
    chunks,
    pair_mask,
    self_mask,
    upload_digest,
    verify_vector,
)

CONTEXT = bytes(range(32))


def test_keystream_is_aes_ctr_of_nist_sp_800_38a() -> None:
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c" + "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    sealed = bytes.fromhex("874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff")
    vector = np.zeros(8, np.uint32)
    apply_masks(vector, [Mask(key, negative=False)])
    assert vector.astype("<u4").tobytes() == bytes(a ^ b for a, b in zip(plain, sealed, strict=True))


@given(st.integers(1, 200_000), st.integers(0, 2**32 - 1))
def test_adding_and_subtracting_a_mask_restores_the_vector(length: int, value: int) -> None:
    vector = np.full(length, value, np.uint32)
    mask = self_mask(b"seed", CONTEXT, site="a")
    apply_masks(vector, [mask])
    assert length < 4 or (vector != value).any()
    apply_masks(vector, [mask.opposite()])
    assert (vector == value).all()


def test_masks_of_a_pair_cancel_in_the_sum() -> None:
    one, two = np.zeros(70_000, np.uint32), np.zeros(70_000, np.uint32)
    apply_masks(one, [pair_mask(b"shared", CONTEXT, site="a", peer="b")])
    apply_masks(two, [pair_mask(b"shared", CONTEXT, site="b", peer="a")])
    assert one.any() and two.any() and not (one + two).any()


def test_masks_of_a_pair_in_different_contexts_do_not_cancel() -> None:
    one, two = np.zeros(1000, np.uint32), np.zeros(1000, np.uint32)
    apply_masks(one, [pair_mask(b"shared", CONTEXT, site="a", peer="b")])
    apply_masks(two, [pair_mask(b"shared", CONTEXT[::-1], site="b", peer="a")])
    assert np.count_nonzero(one + two) > 990


def test_masks_applied_together_are_those_applied_one_by_one() -> None:
    masks = [pair_mask(b"shared", CONTEXT, site="m", peer=peer) for peer in ("a", "b", "y", "z")]
    together, single = np.arange(150_001, dtype=np.uint32), np.arange(150_001, dtype=np.uint32)
    apply_masks(together, masks)
    for mask in reversed(masks):
        apply_masks(single, [mask])
    np.testing.assert_array_equal(together, single)


def test_masking_takes_less_than_two_megabytes_beside_the_vector() -> None:
    vector = np.zeros(5_000_000, np.uint32)
    masks = [pair_mask(b"shared", CONTEXT, site="m", peer=f"p{i}") for i in range(20)]
    tracemalloc.start()
    apply_masks(vector, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_chunks_cover_the_vector_and_their_digests_bind_order_and_length() -> None:
    vector = np.arange(2 * CHUNK_VALUES + 3, dtype=np.uint32)
    pieces = list(chunks(vector))
    assert [p.size for p in pieces] == [CHUNK_VALUES, CHUNK_VALUES, 3]
    assert len(pieces) == chunk_count(vector.size)
    np.testing.assert_array_equal(np.concatenate(pieces), vector)
    digests = [chunk_digest(p) for p in pieces]
    whole = upload_digest(vector.size, digests)
    assert whole != upload_digest(vector.size, digests[::-1])
    assert whole != upload_digest(vector.size - 1, digests)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, np.int32),
        np.zeros(4, np.dtype(">u4")),
        np.zeros(5, np.uint32),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
        np.frombuffer(bytes(16), np.uint32),
    ],
)
def test_other_arrays_are_refused(vector: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
    with pytest.raises(VectorInvalid):
        verify_vector(vector, length=4)

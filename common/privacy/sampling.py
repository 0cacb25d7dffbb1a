"""One secret seed per round, its labelled keystreams, and Poisson sampling of patients.

Guarantees: each purpose (patients, studies, noise, ...) draws from its own AES-256-CTR keystream, whose key
is BLAKE2b of the seed and the purpose; asking for a purpose twice is refused, so no random bit is used twice.
The same seed gives the same bytes on every machine. A patient is drawn with probability
floor(rate * 2^64) / 2^64, independently of all others, hence never more often than accounted.

It does not hide which patients were drawn from who reads this process's memory or its seed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.errors import GeneratorReused, SamplingInvalid, TestRandomness

SEED_BYTES = 32


class Keystream:
    """Endless uniform bits for one purpose."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` uniform 64-bit words, little-endian."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound), exact by rejection; 1 <= bound <= 2^64."""
        limit = (1 << 64) // bound * bound
        while True:
            word = int.from_bytes(self._cipher.update(bytes(8)), "little")
            if word < limit:
                return word % bound


class Csprng:
    """The randomness of one round (or one local step) at one party; see the module's guarantees."""

    def __init__(self, seed: bytes, *, seeded_for_test: bool = False) -> None:
        if len(seed) != SEED_BYTES:
            raise SamplingInvalid(f"expected a seed of {SEED_BYTES} bytes, got {len(seed)}")
        self._seed = seed
        self._taken: set[str] = set()
        self.seeded_for_test = seeded_for_test

    @classmethod
    def from_os(cls) -> Csprng:
        """A generator seeded by the operating system."""
        return cls(os.urandom(SEED_BYTES))

    @classmethod
    def for_test(cls, number: int) -> Csprng:
        """A reproducible generator; `verify_releasable` refuses what came from it."""
        return cls(hashlib.sha256(b"fedrad test seed %d" % number).digest(), seeded_for_test=True)

    def verify_releasable(self) -> None:
        """Raise TestRandomness when this generator was seeded for a test."""
        if self.seeded_for_test:
            raise TestRandomness("randomness was seeded for a test; its results must not be released")

    def stream(self, purpose: str) -> Keystream:
        """The keystream of one purpose; raises GeneratorReused the second time."""
        return Keystream(self._key("stream", purpose))

    def child(self, purpose: str) -> Csprng:
        """An independent generator for a part, such as one local step; raises GeneratorReused."""
        return Csprng(self._key("child", purpose), seeded_for_test=self.seeded_for_test)

    def _key(self, kind: str, purpose: str) -> bytes:
        label = f"{kind}:{purpose}"
        if label in self._taken:
            raise GeneratorReused(f"randomness for {label} was already drawn from this generator")
        self._taken.add(label)
        return hashlib.blake2b(
            label.encode(), key=self._seed, digest_size=SEED_BYTES, person=b"fedrad csprng"
        ).digest()

    def __reduce__(self) -> Any:
        raise GeneratorReused("a generator cannot be copied or pickled")


def poisson_sample(csprng: Csprng, patients: Sequence[str], rate: float) -> list[str]:
    """Draw each patient independently with probability `rate`; the order of `patients` is kept.

    patients: sorted and without repeats, so that the same seed draws the same patients. Raises
    SamplingInvalid for another order or a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise SamplingInvalid(f"sampling rate must be in (0, 1], got {rate}")
    if any(a >= b for a, b in pairwise(patients)):
        raise SamplingInvalid("patients must be sorted and without repeats")
    words = csprng.stream("patients").words(len(patients))
    threshold = int(Fraction(rate) * (1 << 64))
    if threshold > np.iinfo(np.uint64).max:
        return list(patients)
    return [patients[i] for i in np.flatnonzero(words < np.uint64(threshold)).tolist()]


def studies_of(csprng: Csprng, studies: Sequence[str], k: int) -> list[str]:
    """A uniform choice of at most `k` of one patient's studies, in their given order.

    The keystream is labelled by the studies themselves, so one round's generator serves every patient once.
    """
    if k < 1:
        raise SamplingInvalid(f"studies per patient must be at least 1, got {k}")
    if len(set(studies)) != len(studies):
        raise SamplingInvalid("a patient's studies must be without repeats")
    if len(studies) <= k:
        return list(studies)
    digest = hashlib.sha256("\0".join(studies).encode()).hexdigest()
    stream = csprng.stream(f"studies:{digest}")
    left = list(range(len(studies)))
    chosen = [left.pop(stream.below(len(left))) for _ in range(k)]
    return [studies[i] for i in sorted(chosen)]

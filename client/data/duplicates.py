"""Duplicates within a site: images by difference hash, reports by MinHash; groups that must share a split.

Guarantees: two images within `IMAGE_BITS` of 240 difference bits and thumbnails correlated above
`IMAGE_CORRELATION` are always found, whatever their order, and patients that share them get one group, so
no near-duplicate lies in two splits. Reports are near-duplicates when long and rare; normal template text
that many patients share is not. It sees one site only: a patient who is at two sites counts as two, and
ε holds per site.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from client.data.pixels import Gray

WIDTH, HEIGHT = 17, 16
# On 1,158 real chest radiographs no two different ones correlated above 0.968 or differed in under 20 bits.
IMAGE_BITS = 32
IMAGE_CORRELATION = 0.98
BLOCK = 1024
BANDS, ROWS = 16, 4
TEXT_SIMILARITY = 0.85
MIN_TEXT_WORDS = 25
BOILERPLATE_PATIENTS = 5


def thumbnail(pixels: Gray) -> str:
    """Return 17 × 16 bytes of mean brightness as hex: enough for the difference hash and a correlation."""
    image = Image.fromarray(pixels.astype(np.float32)).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    scaled = np.rint((values - low) / max(high - low, 1.0) * 255).astype(np.uint8)
    return scaled.tobytes().hex()


def image_pairs(thumbnails: Sequence[str]) -> list[tuple[int, int]]:
    """Return index pairs (i < j) of near-duplicate images: every pair is compared, in blocks."""
    if not thumbnails:
        return []
    values = np.frombuffer(bytes.fromhex("".join(thumbnails)), dtype=np.uint8).reshape(-1, HEIGHT, WIDTH)
    bits = (values[:, :, 1:] > values[:, :, :-1]).reshape(len(values), -1)
    centred = values.reshape(len(values), -1).astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True) + 1e-9
    found: list[tuple[int, int]] = []
    for top in range(0, len(values), BLOCK):
        for left in range(top, len(values), BLOCK):
            alike = centred[top : top + BLOCK] @ centred[left : left + BLOCK].T >= IMAGE_CORRELATION
            for row, column in np.argwhere(alike):
                one, other = top + int(row), left + int(column)
                if one < other and (bits[one] != bits[other]).sum() <= IMAGE_BITS:
                    found.append((one, other))
    return sorted(found)


def minhash(text: str) -> npt.NDArray[np.uint64]:
    """Return 64 minima over hashed word triples (Broder 1997); deterministic, same for same words."""
    words = re.findall(r"[^\W_]+", text.lower())
    if any(ord(char) > 0x2E7F for char in text):
        words = [char for char in text if char.isalnum()]
    triples = {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))}
    seeds = [
        int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "big") for t in sorted(triples)
    ]
    base = np.array(seeds, dtype=np.uint64)[:, None]
    odd, offset = _minhash_parameters()
    minima: npt.NDArray[np.uint64] = (base * odd[None, :] + offset[None, :]).min(axis=0)
    return minima


def text_pairs(texts: Sequence[str], patients: Sequence[str]) -> list[tuple[int, int]]:
    """Return index pairs (i < j) of near-duplicate reports that are long and not shared by many patients."""
    long = [index for index, text in enumerate(texts) if _length(text) >= MIN_TEXT_WORDS]
    if not long:
        return []
    signatures = np.stack([minhash(texts[index]) for index in long])
    found: set[tuple[int, int]] = set()
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS]).view(np.uint8)
        for members in _same_rows(rows.reshape(len(long), -1)):
            if len({patients[long[at]] for at in members}) > BOILERPLATE_PATIENTS:
                continue
            for position, first in enumerate(members):
                rest = members[position + 1 :]
                alike = (signatures[rest] == signatures[first]).mean(axis=1) >= TEXT_SIMILARITY
                found.update((long[first], long[other]) for other in rest[alike])
    return sorted(found)


def boilerplate(texts: Iterable[tuple[str, str]], *, patients: int = BOILERPLATE_PATIENTS) -> frozenset[str]:
    """Return hashes of texts that over `patients` patients share word for word; input (patient, text)."""
    seen: Mapping[str, set[str]] = defaultdict(set)
    for patient, text in texts:
        holders = seen[text_hash(text)]
        if len(holders) <= patients:
            holders.add(patient)
    return frozenset(key for key, holders in seen.items() if len(holders) > patients)


def text_hash(text: str) -> str:
    """Hash of the words of a text, ignoring case and punctuation."""
    return hashlib.sha256(" ".join(re.findall(r"[^\W_]+", text.lower())).encode()).hexdigest()[:16]


def groups(members: Iterable[str], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Map each member to the smallest member it is linked with, directly or through others."""
    parent = {member: member for member in members}

    def root(member: str) -> str:
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for one, other in links:
        first, second = sorted((root(one), root(other)))
        parent[second] = first
    return {member: root(member) for member in parent}


def _same_rows(rows: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.int64]]:
    """Return index arrays (ascending, two or more) of equal rows."""
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1]))).ravel()
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    return [np.sort(part) for part in np.split(order, edges) if len(part) > 1]


def _length(text: str) -> int:
    return len(text.split()) + sum(ord(char) > 0x2E7F for char in text) // 2


def _minhash_parameters() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    generator = np.random.Generator(np.random.PCG64(20_260_101))
    limit = np.iinfo(np.uint64).max
    odd = generator.integers(0, limit, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    return odd, generator.integers(0, limit, BANDS * ROWS, dtype=np.uint64)

"""The made-up hospitals' data is valid, repeatable, split by patient, and different at each hospital."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.store import Pair, read_card, read_checksums, read_pairs
from common.labeller import present_findings
from deploy.local.synthetic import HOSPITALS, write_synthetic_sites

MANY = 120


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sites")
    write_synthetic_sites(out, patients=dict.fromkeys(HOSPITALS, MANY), seed=5)
    return out


def pairs(sites: Path) -> dict[str, tuple[Pair, ...]]:
    return {site: read_pairs(sites / site) for site in HOSPITALS}


def test_every_site_gets_its_patients(sites: Path) -> None:
    for site, held in pairs(sites).items():
        assert len({pair.patient for pair in held}) == MANY < len(held)
        assert {pair.split for pair in held} == {"train", "validation", "test"}
        assert read_card(sites / site)["source"] == "synthetic phantoms"


def test_same_seed_same_bytes_other_seed_other_patients(sites: Path, tmp_path: Path) -> None:
    few = {"north": MANY}
    write_synthetic_sites(tmp_path / "again", sites=["north"], patients=few, seed=5)
    write_synthetic_sites(tmp_path / "other", sites=["north"], patients=few, seed=6)
    first = read_checksums(sites / "north")
    assert read_checksums(tmp_path / "again" / "north") == first
    other = read_checksums(tmp_path / "other" / "north")
    assert not set(first.values()) & {value for name, value in other.items() if name.endswith(".png")}


def test_hospitals_differ_in_pictures_findings_and_words(sites: Path) -> None:
    held = pairs(sites)
    seen = {
        site: Counter(f for p in some for f in present_findings(p.findings)) for site, some in held.items()
    }
    assert seen["north"]["Cardiomegaly"] > 3 * seen["east"]["Cardiomegaly"]
    assert seen["south"]["Lung Lesion"] > 3 * seen["west"]["Lung Lesion"]
    shared = set.intersection(
        *({p.findings for p in some if p.impression != "No acute disease."} for some in held.values())
    )
    assert not shared
    corner = {
        site: np.mean(
            [np.asarray(Image.open(sites / site / p.images[0]))[30:50, 30:40].mean() for p in some[:30]]
        )
        for site, some in held.items()
    }
    assert corner["north"] > corner["west"] > corner["east"]


def test_an_unknown_site_borrows_a_character(tmp_path: Path) -> None:
    write_synthetic_sites(tmp_path, sites=["a", "b"], patients={"a": 6, "b": 6}, seed=5)
    assert {p.patient[0] for p in read_pairs(tmp_path / "b")} == {"b"}


def test_progress_counts_patients(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    write_synthetic_sites(
        tmp_path, sites=["north"], patients={"north": 6}, seed=5, progress=lambda *call: calls.append(call)
    )
    assert calls == [("north", number, 6) for number in range(1, 7)]

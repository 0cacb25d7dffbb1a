"""Similar cases: the nearest come first, the cache holds, and on phantoms they share findings."""

import asyncio
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import client.serving.retrieval as retrieval
from client.data.store import Pair, read_pairs, write_dataset
from client.serving.retrieval import CaseIndex, build_index
from common.errors import DatasetInvalid, ImageUnreadable
from common.labeller import present_findings
from common.model.images import load_pixels
from common.model.llava import vision_features
from common.model.loading import load_base
from common.model.tiny import tiny_base_directory
from deploy.local.synthetic import write_synthetic_sites

FINDINGS = ("Small left pleural effusion.", "No pneumothorax.", "There is cardiomegaly.")


def png(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((64, 64), grey, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    records = [
        (
            Pair(f"p{n}", f"s{n}", (f"images/s{n}.png",), "PA", "Cough.", FINDINGS[n % 3], "", "train"),
            [png(20 * n + 10)],
        )
        for n in range(6)
    ]
    write_dataset(tmp_path / "data", iter(records), card={"source": "test"})
    return tmp_path / "data"


class Counted:
    """Features [2, 2] from a picture's grey, counting how often they were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, data: bytes) -> np.ndarray:
        self.asked += 1
        grey = float(np.asarray(Image.open(io.BytesIO(data))).mean())
        angle = grey / 255 * np.pi
        return np.tile(np.array([np.cos(angle), np.sin(angle)], np.float32), (2, 1))


def index(site: Path, vector_of: Counted, cache: Path, base: str = "tiny") -> CaseIndex:
    return asyncio.run(build_index(site, read_pairs(site), vector_of=vector_of, base=base, cache=cache))


def test_nearest_picture_comes_first_and_the_asked_one_is_left_out(site: Path, tmp_path: Path) -> None:
    vector_of = Counted()
    made = index(site, vector_of, tmp_path / "cache")
    asked = asyncio.run(vector_of(png(31)))
    assert [case.pair.study for case in made.nearest(asked, count=3)] == ["s1", "s0", "s2"]
    without = made.nearest(asked, count=3, except_image=hashlib.sha256(png(30)).hexdigest())
    assert [case.pair.study for case in without] == ["s0", "s2", "s3"]
    cosines = [case.cosine for case in made.nearest(asked, count=6)]
    assert all(-1.0001 <= value <= 1.0001 for value in cosines) and cosines == sorted(cosines, reverse=True)


def test_draft_raises_cases_with_the_same_findings(site: Path, tmp_path: Path) -> None:
    vector_of = Counted()
    made = index(site, vector_of, tmp_path / "cache")
    asked = asyncio.run(vector_of(png(60)))
    plain = made.nearest(asked, count=6)
    helped = made.nearest(asked, draft="There is cardiomegaly.", count=6)
    assert plain[0].shared == () and helped[0].shared == ("Cardiomegaly",)
    assert [c.pair.study for c in helped] != [c.pair.study for c in plain]


def test_second_start_computes_nothing_and_another_base_everything(site: Path, tmp_path: Path) -> None:
    first, second, other = Counted(), Counted(), Counted()
    one = index(site, first, tmp_path / "cache")
    two = index(site, second, tmp_path / "cache")
    index(site, other, tmp_path / "cache", base="another")
    assert (first.asked, second.asked, other.asked) == (6, 0, 6)
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "cache").iterdir())


def test_damaged_cache_is_made_again(site: Path, tmp_path: Path) -> None:
    index(site, Counted(), tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again = Counted()
    index(site, again, tmp_path / "cache")
    assert again.asked == 6


def test_unreadable_picture_is_left_out(site: Path, tmp_path: Path) -> None:
    counted = Counted()

    async def vector_of(data: bytes) -> np.ndarray:
        if data == png(10):
            raise ImageUnreadable("expected a whole image")
        return await counted(data)

    made = asyncio.run(
        build_index(site, read_pairs(site), vector_of=vector_of, base="tiny", cache=tmp_path / "cache")
    )
    assert [pair.study for pair in made.pairs] == ["s1", "s2", "s3", "s4", "s5"]


def test_site_without_cases_finds_none(tmp_path: Path) -> None:
    made = asyncio.run(build_index(tmp_path, (), vector_of=Counted(), base="tiny", cache=tmp_path / "cache"))
    assert made.nearest(np.ones((2, 2), np.float32)) == ()


def test_too_many_cases_are_refused(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_CASES", 5)
    with pytest.raises(DatasetInvalid):
        index(site, Counted(), tmp_path / "cache")


@pytest.mark.slow
def test_cases_found_share_findings_far_above_chance(tmp_path: Path) -> None:
    model, _ = load_base(tiny_base_directory())
    write_synthetic_sites(tmp_path, sites=["north"], patients={"north": 400}, seed=3)
    pairs = read_pairs(tmp_path / "north")

    import torch

    async def vector_of(data: bytes) -> np.ndarray:
        (tmp_path / "one.png").write_bytes(data)
        pixels = torch.from_numpy(load_pixels(tmp_path / "one.png", tiny_base_directory()))[None]
        return vision_features(model, pixels)[0].numpy()

    known = [pair for pair in pairs if pair.split != "test"]
    made = asyncio.run(
        build_index(tmp_path / "north", known, vector_of=vector_of, base="tiny", cache=tmp_path / "cache")
    )
    hits, chance = [], []
    for pair in (pair for pair in pairs if pair.split == "test"):
        had = present_findings(pair.findings) - {"No Finding"}
        if not had:
            continue
        features = asyncio.run(vector_of((tmp_path / "north" / pair.images[0]).read_bytes()))
        hits += [bool(had & made.findings[case.number]) for case in made.nearest(features)]
        chance += [bool(had & other) for other in made.findings]
    assert np.mean(hits) > 0.85
    assert np.mean(hits) > 1.6 * np.mean(chance)

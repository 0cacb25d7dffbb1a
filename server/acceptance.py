"""The acceptance test of a new adapter: its loss on a public set that the operator holds.

The only defence against a poisoned sum that needs no look at a site's update: secure aggregation hides those.
Guarantees: base and public set are the ones that the manifest pins; the decision is a pure function of three
numbers, and what the set is made of is public, so that it costs no privacy. It does not see a backdoor that
leaves the public loss alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.canonical import canonical_json, sha256_hex
from common.config import AcceptanceSection, Study
from common.errors import PublicSetInvalid
from common.files import write_atomic
from common.model.lora import Vector

if TYPE_CHECKING:
    import torch

Judge = Callable[[Vector], float]
SETTINGS_NAME = "acceptance.json"
MAX_STUDIES = 256
_BATCH = 32


@dataclass(frozen=True)
class Verdict:
    """What the test said: the loss in nats per report token, and what was accepted before."""

    loss: float
    accepted_loss: float
    passed: bool


def due(study: Study, round: int) -> bool:
    """Tell whether a round's adapter is tested; the last one always is."""
    acceptance = study.acceptance
    if acceptance is None:
        return False
    return (round + 1) % acceptance.every_rounds == 0 or round + 1 == study.rounds


def decide(acceptance: AcceptanceSection, *, loss: float, accepted_loss: float) -> Verdict:
    """Accept a finite loss that is at most `max_increase` above the last accepted adapter's."""
    passed = math.isfinite(loss) and loss <= accepted_loss + acceptance.max_increase
    return Verdict(loss, accepted_loss, passed)


def public_set_sha256(data: Path) -> str:
    """Name a public set: the hash over its pairs and the hash of each of its images.

    Raises PublicSetInvalid naming the file.
    """
    lines = []
    for pair in _pairs(data):
        lines.append([pair["study"], sha256_hex(canonical_json(pair))])
        lines += [[image, sha256_hex(_read(data / image))] for image in pair["images"]]
    return sha256_hex(canonical_json(lines))


def write_settings(directory: Path, *, base: Path, data: Path) -> None:
    """Note in a study directory where this machine holds the base and the public set."""
    value = {"base": str(base.absolute()), "data": str(data.absolute())}
    write_atomic(directory / SETTINGS_NAME, canonical_json(value))


def open_judge(directory: Path, study: Study) -> Judge:
    """Load what the test needs, verified against the manifest; returns the loss of an adapter.

    Raises PublicSetInvalid, BaseHashMismatch or BaseInvalid.
    """
    acceptance = study.acceptance
    if acceptance is None:
        raise PublicSetInvalid("acceptance: expected this section in the manifest, got none")
    path = directory / SETTINGS_NAME
    try:
        value = json.loads(path.read_text())
        base, data = Path(value["base"]), Path(value["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublicSetInvalid(
            f"{path}: expected where base and public set are; run `fedrad-server study sign --public DIR`"
        ) from error
    found = public_set_sha256(data)
    if found != acceptance.public_sha256:
        raise PublicSetInvalid(
            f"{data}: expected the public set {acceptance.public_sha256[:16]}… of the manifest, "
            f"got {found[:16]}…"
        )
    return _judge(study, base, data)


def _judge(study: Study, base: Path, data: Path) -> Judge:
    try:
        import torch
    except ImportError as error:
        raise PublicSetInvalid(
            "acceptance: expected torch on the server: pip install 'fedrad[model]'"
        ) from error
    from common.model.images import load_pixels
    from common.model.llava import forward_features, vision_features
    from common.model.loading import load_adapted
    from common.model.manifest import verify_base
    from common.model.prompts import collate, encode_pair, prompt_template

    verify_base(base, study.base.files)
    adapted = load_adapted(base, study.adapter)
    config = adapted.model.config
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    examples, features = [], []
    for pair in _pairs(data):
        examples.append(
            encode_pair(
                adapted.tokenizer, image_tokens=tokens, image_token_id=config.image_token_id,
                indication=pair["indication"], report=pair["findings"], images=len(pair["images"]),
                max_tokens=study.training.max_tokens, template=prompt_template(adapted.directory),
            )
        )  # fmt: skip
        pixels = torch.stack([torch.from_numpy(load_pixels(data / image, base)) for image in pair["images"]])
        features.append(vision_features(adapted.model, pixels).float())

    def loss(vector: Vector) -> float:
        adapted.write_vector(vector)
        total, count = 0.0, 0
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH], pad_token_id=adapted.tokenizer.pad_token_id)
            with torch.no_grad():
                logits = forward_features(
                    adapted.model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                    features=torch.cat(features[start : start + _BATCH]),
                )  # fmt: skip
                part, tokens_seen = _token_loss(logits, batch["labels"])
            total, count = total + part, count + tokens_seen
        return total / max(1, count)

    return loss


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Summed next-token cross-entropy over the labelled tokens, and their number."""
    from torch.nn import functional

    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    total = functional.cross_entropy(
        logits.float().flatten(0, 1), shifted, reduction="sum", ignore_index=-100
    )
    return float(total), int((shifted != -100).sum())


def _pairs(data: Path) -> list[dict[str, Any]]:
    """Read the public set's first studies by name; raises PublicSetInvalid naming file and line."""
    path, pairs = data / "pairs.jsonl", []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            value = json.loads(line)
            pair = {name: value[name] for name in ("study", "images", "indication", "findings")}
            inside = all(Path(image).suffix == ".png" and ".." not in Path(image).parts and image[:1] != "/"
                         for image in pair["images"])  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise PublicSetInvalid(
                f"{path} line {number}: expected a prepared pair, got something else"
            ) from error
        if not inside or not pair["images"]:
            raise PublicSetInvalid(f"{path} line {number}: images: expected relative .png paths")
        pairs.append(pair)
    if not pairs:
        raise PublicSetInvalid(f"{path}: expected at least one pair, got none")
    return sorted(pairs, key=lambda pair: str(pair["study"]))[:MAX_STUDIES]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PublicSetInvalid(f"{path}: expected a file of the public set, got none") from error

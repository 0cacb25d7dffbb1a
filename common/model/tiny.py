"""The tiny base: a real small `LlavaForConditionalGeneration` that the project builds and pretrains itself.

Pretraining has two stages, as in the large systems. The vision tower learns what the findings look like on
pictures from many public scanners; then projector and language model learn to write public reports from the
frozen tower's features on two public scanners. Both see phantoms only (`common.model.phantoms`).

Guarantees: one seed, one thread and one machine give the same bytes; the shipped weights are remade by
`make_tiny`. On another processor or torch version the path starts equal to rounding and may part later.
It is no medical model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import BaseInvalid
from common.model import phantom_reports, phantoms
from common.model.images import processor_config

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

Progress = Callable[[str, int, int], None]

SHIPPED = Path(__file__).parent / "tiny_base"
WORDS = Path(__file__).parent / "tiny_words.txt"
IMAGE_SIZE = 64
IMAGE_TOKENS = 16
PROMPT = "<image>\nindication: {indication}. findings:"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
PUBLIC_SCANNERS = (
    phantoms.Scanner(),
    phantoms.Scanner(gamma=1.25, noise=0.03, contrast=0.9, blur=0.4),
)
PUBLIC_PREVALENCE = dict.fromkeys(phantoms.LABELS, 0.2)
PUBLIC_STYLE = phantom_reports.Style()


@dataclass(frozen=True, slots=True)
class Pretraining:
    """How long and how fast the two stages learn; steps are optimizer steps of `batch` phantoms."""

    seed: int = 2026
    pool: int = 12_288
    batch: int = 64
    tower_steps: int = 2_000
    tower_lr: float = 2e-3
    align_steps: int = 1_000
    align_lr: float = 2.5e-3


def tiny_base_directory(cache: Path | None = None) -> Path:
    """Return the tiny base's checkpoint directory, the shipped one unless `cache` names a remade one.

    `cache` is a directory that `make_tiny` writes to when it is absent.
    """
    if cache is None:
        if not (SHIPPED / "model.safetensors").is_file():
            raise BaseInvalid(f"expected the tiny base in {SHIPPED}, got no model.safetensors")
        return SHIPPED
    if not (cache / "model.safetensors").is_file():
        make_tiny(cache, plan=Pretraining())
    return cache


def known_base(name: str, given: Path | None) -> Path | None:
    """Return where a base lies: as given, or the shipped one for `tiny`; None where nobody knows."""
    if given is None and name == "tiny":
        return tiny_base_directory()
    return given


def make_tiny(
    out: Path, *, plan: Pretraining | None = None, steps: int | None = None, progress: Progress | None = None
) -> dict[str, list[float]]:
    """Pretrain the tiny base from nothing into `out`; returns each stage's loss at every step.

    `steps` ends each stage early, on the same path; `progress` gets (stage, step, steps).
    """
    import torch

    plan = plan or Pretraining()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            model = build_model()
            losses = {
                "tower": train_tower(model, plan, steps=steps, progress=progress),
                "language": train_language(model, plan, steps=steps, progress=progress),
            }
    finally:
        torch.set_num_threads(threads)
    write_base(out, model, losses=losses)
    return losses


def write_base(out: Path, model: LlavaForConditionalGeneration, *, losses: Mapping[str, list[float]]) -> None:
    """Write a complete checkpoint directory: fp16 weights, configs, tokenizer, preprocessing, prompt, path.

    The config says float32, so that the weights load as float32 where nothing else is asked for.
    """
    import torch
    from transformers.utils import logging

    out.mkdir(parents=True, exist_ok=True)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.to(torch.float16).save_pretrained(out)
    if bars:
        logging.enable_progress_bar()
    model.to(torch.float32)
    config = json.loads((out / "config.json").read_text())
    tokenizer().save_pretrained(out)
    write = {
        "config.json": config | {"dtype": "float32"},
        "preprocessor_config.json": processor_config(IMAGE_SIZE, mean=[0.5] * 3, std=[0.25] * 3),
        "fedrad.json": {"prompt": PROMPT},
        "pretraining.json": {stage: [round(loss, 5) for loss in some] for stage, some in losses.items()},
    }
    for name, value in write.items():
        (out / name).write_text(json.dumps(value, indent=None if name == "pretraining.json" else 1) + "\n")


def vocabulary() -> dict[str, int]:
    """Words to ids: special tokens, punctuation, every word of our reports, then radiology English."""
    spoken = [sentence for group in phantom_reports.POSITIVE.values() for sentence in group]
    spoken += list(phantom_reports.BOTH_SIDES.values())
    spoken += [sentence for _, group in phantom_reports.NEGATIVE for sentence in group]
    spoken += [*phantom_reports.DEVICES.values(), *phantom_reports.INDICATIONS, PROMPT, WORDS.read_text()]
    spoken += ["small moderate large mild severe upper mid lower right left bilateral"]
    text = " ".join(spoken).lower()
    for mark in ".,:;-/()<>{}":
        text = text.replace(mark, " ")
    words = sorted(set(text.split()) - {"v", "d", "s"})
    every = [*SPECIAL, *".,:;-/()", *"0123456789", *words]
    return {word: index for index, word in enumerate(dict.fromkeys(every))}


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: lower case, unknown words become `<unk>`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))  # noqa: S106
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    fast.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        extra_special_tokens=["<image>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlavaForConditionalGeneration:
    """Build the untrained model from the torch generator's state."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=16,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def phantom(
    seed: int, index: int, prevalence: dict[str, float]
) -> tuple[tuple[phantoms.Finding, ...], Any, Any]:
    """Draw phantom number `index` of a seed: its findings, its clean picture and its generator."""
    rng = np.random.default_rng([seed, index])
    findings = phantoms.draw_findings(rng, prevalence)
    return findings, phantoms.render(findings, rng), rng


def to_input(image: NDArray[Any]) -> NDArray[np.float32]:
    """Shrink one grey picture (0-255 or 0-1) to the model's size, same scale, float32 [S, S]."""
    from PIL import Image

    shrunk = Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(shrunk, dtype=np.float32)


def answers(findings: tuple[phantoms.Finding, ...]) -> NDArray[np.float32]:
    """The 32 yes/no answers the tower is taught: degree, side, zone and device of each finding."""
    have: set[tuple[str, str, str]] = set()
    for finding in findings:
        sides = phantoms.SIDES if finding.side == "bilateral" else (finding.side,)
        have |= {(finding.label, side, detail) for side in sides for detail in _at_most(finding)}
    return np.array([question in have for question in QUESTIONS], dtype=np.float32)


_DEGREES = {
    "Cardiomegaly": ("mild", "moderate", "severe"),
    "Edema": ("mild", "moderate"),
    "Pleural Effusion": ("small", "moderate", "large"),
    "Pneumothorax": ("small", "large"),
}
_SIDED = ("Pleural Effusion", "Pneumothorax", "Lung Opacity", "Lung Lesion", "Atelectasis")
_DETAILS = _DEGREES | {
    "Lung Opacity": tuple(phantoms.ZONES),
    "Lung Lesion": tuple(phantoms.ZONES),
    "Atelectasis": ("",),
    "Support Devices": tuple(phantom_reports.DEVICES),
}
QUESTIONS = tuple(
    (label, side, detail)
    for label in phantoms.LABELS
    for side in (phantoms.SIDES if label in _SIDED else ("",))
    for detail in _DETAILS[label]
)


def _at_most(finding: phantoms.Finding) -> tuple[str, ...]:
    """A large effusion is also at least moderate and at least small."""
    degrees = _DEGREES.get(finding.label)
    return degrees[: degrees.index(finding.detail) + 1] if degrees else (finding.detail,)


def train_tower(
    model: LlavaForConditionalGeneration,
    plan: Pretraining,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Teach the vision tower to answer `QUESTIONS` on phantoms from varied scanners."""
    import torch
    from torch.nn import functional

    tower = model.model.vision_tower
    head = torch.nn.Sequential(torch.nn.LayerNorm(128), torch.nn.Linear(128, len(QUESTIONS)))
    local = torch.nn.Sequential(torch.nn.LayerNorm(128), torch.nn.Linear(128, len(phantoms.LABELS)))
    parameters = [*tower.parameters(), *head.parameters(), *local.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.tower_lr, weight_decay=0.02)
    pictures = np.zeros((plan.pool, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    truth = np.zeros((plan.pool, len(QUESTIONS)), np.float32)
    where = np.zeros((plan.pool, len(phantoms.LABELS), 16, 16), np.uint8)
    drawn = 0
    order = np.random.default_rng([plan.seed, 1])
    losses = []
    for step, rows in enumerate(_batches(plan.pool, plan.batch, plan.tower_steps, order)):
        if steps is not None and step >= steps:
            break
        while drawn <= rows.max():
            rng = np.random.default_rng([plan.seed, 10, drawn])
            findings = phantoms.draw_findings(rng, PUBLIC_PREVALENCE)
            picture, where[drawn] = phantoms.render_places(findings, rng)
            pictures[drawn], truth[drawn] = to_input(picture), answers(findings)
            drawn += 1
        pixels, places = vary(torch.from_numpy(pictures[rows]), torch.from_numpy(where[rows]).float())
        for group in optimizer.param_groups:
            group["lr"] = plan.tower_lr * _schedule(step, plan.tower_steps)
        tokens = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        answered = head(tokens.mean(1))
        loss = functional.binary_cross_entropy_with_logits(answered, torch.from_numpy(truth[rows]))
        patches = functional.adaptive_max_pool2d(places, 4).flatten(2).transpose(1, 2)
        loss = loss + functional.binary_cross_entropy_with_logits(local(tokens), patches)
        losses.append(_descend(loss, optimizer, parameters))
        if progress:
            progress("tower", step + 1, plan.tower_steps)
    return losses


def vary(pictures: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Photograph clean pictures [B, S, S] with random public scanners: pixel values [B, 3, S, S].

    `places` [B, L, 16, 16] move with the pictures.
    """
    import torch
    from torch.nn import functional

    many = len(pictures)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(many, 1, 1) * (high - low) + low

    move = torch.zeros(many, 2, 3)
    move[:, 0, 0] = move[:, 1, 1] = uniform(0.8, 1.05)[:, 0, 0]
    move[:, :, 2] = torch.rand(many, 2) * 0.2 - 0.1

    def moved(values: torch.Tensor) -> torch.Tensor:
        grid = functional.affine_grid(move, list(values.shape), align_corners=False)
        return functional.grid_sample(values, grid, padding_mode="border", align_corners=False)

    shown = moved(pictures[:, None])[:, 0].clamp(0, 1) ** torch.exp2(uniform(-0.8, 0.9))
    shown = (shown - 0.5) * uniform(0.6, 1.15) + 0.5 + uniform(-0.06, 0.06)
    shown = torch.where(torch.rand(many, 1, 1) < 0.25, 1 - shown, shown)
    shown = shown + uniform(0.0, 0.04) * torch.randn_like(shown)
    pixels = ((shown.clamp(0, 1) - 0.5) / 0.25)[:, None].expand(-1, 3, -1, -1)
    return pixels, (moved(places) > 0.5).float()


def train_language(
    model: LlavaForConditionalGeneration,
    plan: Pretraining,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Teach projector and language model to write public reports from the frozen tower's features."""
    import torch
    from torch.nn import functional

    from common.model.llava import forward_features, vision_features
    from common.model.prompts import collate, encode_pair

    words = tokenizer()
    wanted = plan.pool if steps is None else min(plan.pool, plan.batch * steps)
    features, examples = [], []
    for start in range(0, wanted, 256):
        pixels = []
        for index in range(start, min(start + 256, wanted)):
            rng = np.random.default_rng([plan.seed, 20, index])
            findings = phantoms.draw_findings(rng, PUBLIC_PREVALENCE)
            scanner = PUBLIC_SCANNERS[index % len(PUBLIC_SCANNERS)]
            shown = phantoms.expose(phantoms.render(findings, rng), scanner, rng)
            pixels.append(to_input(shown))
            report = phantom_reports.write_report(findings, PUBLIC_STYLE, rng)
            examples.append(
                encode_pair(
                    words,
                    image_tokens=IMAGE_TOKENS,
                    image_token_id=IMAGE,
                    indication=report.indication,
                    report=report.findings,
                    max_tokens=160,
                    template=PROMPT,
                )
            )
        values = (torch.from_numpy(np.stack(pixels)) / 255 - 0.5) / 0.25
        features.append(vision_features(model, values[:, None].expand(-1, 3, -1, -1)))
    every = torch.cat(features)
    parameters = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    parameters += list(model.lm_head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=plan.align_lr, weight_decay=0.02)
    order = np.random.default_rng([plan.seed, 2])
    losses = []
    for step, rows in enumerate(_batches(plan.pool, plan.batch, plan.align_steps, order)):
        if steps is not None and step >= steps:
            break
        batch = collate([examples[row] for row in rows], pad_token_id=PAD)
        for group in optimizer.param_groups:
            group["lr"] = plan.align_lr * _schedule(step, plan.align_steps)
        logits = forward_features(
            model,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            features=every[torch.from_numpy(rows)],
        )
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        losses.append(_descend(loss, optimizer, parameters))
        if progress:
            progress("language", step + 1, plan.align_steps)
    return losses


def _batches(pool: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield row numbers: the pool in order first, then reshuffled for every pass."""
    order, at = np.arange(pool), 0
    for _ in range(steps):
        if at + batch > pool:
            order, at = rng.permutation(pool), 0
        yield order[at : at + batch]
        at += batch


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 3 %, then cosine to a fiftieth."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[Any]) -> float:
    import torch

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(loss.detach())

"""Synthetic chest radiographs whose findings are known exactly: the pictures of our tests and demonstrations.

A phantom is drawn from a seeded generator: anatomy (lungs, heart, ribs, spine, clavicles), up to eight kinds
of finding, and a scanner that photographs it. The picture is only as real as a demonstration needs; nothing
here says anything about performance on patients.

Guarantees: the same generator state gives the same pixels and words; the findings a phantom carries are the
ones it was asked for. It holds no data of any person.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]

SIZE = 96
LABELS = (
    "Cardiomegaly",
    "Edema",
    "Pleural Effusion",
    "Pneumothorax",
    "Lung Opacity",
    "Lung Lesion",
    "Atelectasis",
    "Support Devices",
)
ZONES = {"upper": -0.38, "mid": -0.05, "lower": 0.28}
SIDES = ("right", "left")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to see: `label` is CheXpert's word; `detail` is a size, degree, zone or device."""

    label: str
    side: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Scanner:
    """How a hospital's machine and software show the same chest.

    `gamma` > 1 darkens; `contrast` scales around mid-grey; `zoom` > 1 crops; `shift` moves the patient
    (fraction of the field, right and down); `noise` is a standard deviation on the 0-1 scale; `vignette` is
    the darkening of the corners; `mask` is the width of the black collimator border.
    """

    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    inverted: bool = False
    blur: float = 0.0
    noise: float = 0.02
    zoom: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    vignette: float = 0.0
    mask: float = 0.0


_axis = np.linspace(-1.0, 1.0, SIZE, dtype=np.float32)
_X, _Y = np.meshgrid(_axis, _axis)


def draw_findings(rng: np.random.Generator, prevalence: Mapping[str, float]) -> tuple[Finding, ...]:
    """Draw the findings of one patient; `prevalence` maps a label to its probability."""
    found: list[Finding] = []
    for label in LABELS:
        if rng.random() >= prevalence.get(label, 0.0):
            continue
        side = SIDES[int(rng.integers(2))]
        match label:
            case "Cardiomegaly":
                found.append(Finding(label, "", _pick(rng, ("mild", "moderate", "severe"))))
            case "Edema":
                found.append(Finding(label, "", _pick(rng, ("mild", "moderate"))))
            case "Pleural Effusion":
                side = _pick(rng, ("right", "left", "right", "left", "bilateral"))
                found.append(Finding(label, side, _pick(rng, ("small", "moderate", "large"))))
            case "Pneumothorax":
                found.append(Finding(label, side, _pick(rng, ("small", "large"))))
            case "Lung Opacity" | "Lung Lesion":
                found.append(Finding(label, side, _pick(rng, tuple(ZONES))))
            case "Atelectasis":
                found.append(Finding(label, side))
            case _:
                found.append(Finding(label, "", _pick(rng, ("pacemaker", "tube", "line"))))
    return tuple(found)


def render(findings: tuple[Finding, ...], rng: np.random.Generator) -> Pixels:
    """Draw one chest as float32 [SIZE, SIZE] in 0-1, bone white; the patient's right is on the left."""
    return render_places(findings, rng)[0]


def render_places(findings: tuple[Finding, ...], rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Draw one chest and say where each label is: picture, and float32 [len(LABELS), 16, 16] of 0 and 1."""
    tilt, shift_x, shift_y = rng.normal(0, 0.03), rng.normal(0, 0.03), rng.normal(0, 0.03)
    scale = rng.uniform(0.92, 1.06)
    x = ((_X + tilt * _Y - shift_x) / scale).astype(np.float32)
    y = ((_Y - shift_y) / scale).astype(np.float32)
    shoulders = 0.62 + 0.42 * _step(y + 0.72, 0.10)
    body = _step(shoulders - np.abs(x), 0.05)
    image = 0.04 + 0.56 * body

    dome = rng.uniform(0.52, 0.64)
    bases = {"right": dome - 0.05, "left": dome}
    lungs: dict[str, Pixels] = {}
    floors: dict[str, Pixels] = {}
    for side, sign in (("right", -1.0), ("left", 1.0)):
        centre = sign * rng.uniform(0.41, 0.45)
        wide = 0.33 - 0.10 * np.clip(-y - 0.1, 0, 1)
        radius = np.sqrt(
            ((x - centre * (1 - 0.12 * np.clip(-y, 0, 1))) / wide) ** 2 + ((y + 0.06) / 0.80) ** 4
        )
        floor = bases[side] + 0.9 * (x - centre) ** 2 - 0.04
        floors[side] = floor
        lungs[side] = (_step(1.0 - radius, 0.08) * _step(floor - y, 0.025)).astype(np.float32)
    air = lungs["right"] + lungs["left"]
    image = image - 0.40 * air

    degree = {f.detail for f in findings if f.label == "Cardiomegaly"}
    width = (
        {"mild": 0.40, "moderate": 0.46, "severe": 0.53}[degree.pop()] if degree else rng.uniform(0.25, 0.31)
    )
    heart = _step(
        1.0 - np.sqrt(((x - 0.11 - 0.25 * (width - 0.28)) / width) ** 2 + ((y - 0.33) / 0.32) ** 2), 0.09
    )
    image = image + 0.30 * heart * (0.25 + air)
    image = image + 0.16 * np.exp(-((x / 0.12) ** 2)) * (1 + 0.25 * np.cos(y * 34))
    image = image + 0.20 * _spot(x - 0.14, y + 0.32, 0.09, 0.09)
    for sign in (-1.0, 1.0):
        image = image + 0.13 * _spot(x - sign * 0.19, y + 0.02, 0.08, 0.14)
    phase = rng.uniform(0, 2 * math.pi)
    ribs = np.clip(np.cos(19 * (y + 0.45 * np.abs(x) - 0.5 * x * x) + phase), 0.2, 1) - 0.2
    image = image + rng.uniform(0.07, 0.12) * ribs * (0.35 + air) * body
    image = image + 0.13 * np.exp(-(((y + 0.68 - 0.16 * np.abs(x)) / 0.045) ** 2)) * body
    image = image + 0.05 * air * _texture(rng, 12)

    places = np.zeros((len(LABELS), 16, 16), np.float32)
    for finding in findings:
        drawn = _add(image, finding, x, y, lungs, floors, rng)
        changed = heart if finding.label == "Cardiomegaly" else np.abs(drawn - image) / 0.12
        patches = changed.reshape(16, SIZE // 16, 16, SIZE // 16).mean((1, 3))
        places[LABELS.index(finding.label)] = patches > 0.5
        image = drawn
    return np.clip(image, 0.0, 1.0).astype(np.float32), places


def _add(
    image: Pixels,
    finding: Finding,
    x: Pixels,
    y: Pixels,
    lungs: Mapping[str, Pixels],
    floors: Mapping[str, Pixels],
    rng: np.random.Generator,
) -> Any:
    """Paint one finding over the chest (the heart's size is already drawn)."""
    sign = -1.0 if finding.side == "right" else 1.0
    match finding.label:
        case "Edema":
            strength = 0.15 if finding.detail == "mild" else 0.25
            hilar = np.exp(-(((np.abs(x) - 0.30) / 0.24) ** 2) - ((y - 0.02) / 0.42) ** 2)
            air = lungs["right"] + lungs["left"]
            return image + strength * hilar * air * (1 + 0.5 * _texture(rng, 24))
        case "Pleural Effusion":
            depth = {"small": 0.20, "moderate": 0.36, "large": 0.58}[finding.detail]
            for side in SIDES if finding.side == "bilateral" else (finding.side,):
                flank = 1.0 if side == "left" else -1.0
                level = 0.60 - depth * rng.uniform(0.9, 1.1) - 0.22 * np.clip(flank * x - 0.42, -0.3, 0.4)
                fluid = lungs[side] * _step(y - level, 0.035)
                image = image + fluid * np.clip(0.57 - image, 0, 1)
            return image
        case "Pneumothorax":
            large = finding.detail == "large"
            edge = (0.56 if large else 0.63) + rng.normal(0, 0.01)
            top = 0.48 if large else 0.60
            inner = np.sqrt(((x - sign * 0.28) / (edge - 0.28)) ** 2 + ((y - 0.12) / top) ** 2)
            free = lungs[finding.side] * _step(inner - 1.0, 0.04) * _step(0.35 - y, 0.1)
            rim = lungs[finding.side] * np.exp(-(((inner - 1.0) / 0.05) ** 2)) * _step(0.35 - y, 0.1)
            return image * (1 - 0.85 * free) + 0.20 * rim
        case "Lung Opacity":
            at_x, at_y = sign * rng.uniform(0.36, 0.48), ZONES[finding.detail] + rng.normal(0, 0.03)
            cloud = _spot(x - at_x, y - at_y, rng.uniform(0.13, 0.17), rng.uniform(0.14, 0.19))
            return image + 0.36 * cloud * lungs[finding.side] * (1 + 0.3 * _texture(rng, 16))
        case "Lung Lesion":
            at_x, at_y = sign * rng.uniform(0.36, 0.54), ZONES[finding.detail] + rng.normal(0, 0.04)
            size = rng.uniform(0.055, 0.075)
            return image + 0.48 * _step(1.0 - np.sqrt((x - at_x) ** 2 + (y - at_y) ** 2) / size, 0.25)
        case "Atelectasis":
            rise = rng.uniform(0.10, 0.15)
            band = np.exp(
                -(((floors[finding.side] - rise - y - 0.12 * sign * (x - sign * 0.42)) / 0.032) ** 2)
            )
            return image + 0.40 * band * lungs[finding.side]
        case "Support Devices":
            return _add_device(image, finding.detail, x, y, rng)
    return image


def _add_device(image: Pixels, device: str, x: Pixels, y: Pixels, rng: np.random.Generator) -> Any:
    if device == "tube":
        length = rng.uniform(-0.40, -0.25)
        return image + 0.5 * np.exp(-(((x - 0.01) / 0.032) ** 2)) * _step(length - y, 0.02)
    if device == "pacemaker":
        box = _step(0.12 - np.abs(x - 0.50), 0.012) * _step(0.09 - np.abs(y + 0.50), 0.012)
        lead = np.exp(-(((x - 0.50 * np.clip(0.25 - y, 0, 0.75) / 0.75 - 0.08) / 0.022) ** 2))
        return image + 0.75 * box + 0.35 * lead * _step(0.3 - y, 0.02) * _step(y + 0.5, 0.02)
    curve = -0.10 - 0.45 * np.clip(-0.30 - y, 0, 1) ** 1.3
    return image + 0.45 * np.exp(-(((x - curve) / 0.026) ** 2)) * _step(0.10 - y, 0.02) * _step(
        y + 0.85, 0.02
    )


def expose(image: Pixels, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Photograph a chest with a scanner: 8-bit grey [SIZE, SIZE]."""
    shown = image
    if scanner.zoom != 1.0 or scanner.shift != (0.0, 0.0):
        shown = _resample(shown, scanner.zoom, scanner.shift)
    shown = np.clip(shown, 0.0, 1.0) ** scanner.gamma
    shown = (shown - 0.5) * scanner.contrast + 0.5 + scanner.brightness
    if scanner.blur:
        shown = _blur(shown, scanner.blur)
    if scanner.inverted:
        shown = 1.0 - shown
    if scanner.vignette:
        shown = shown * (1.0 - scanner.vignette * np.clip(_X**2 + _Y**2, 0, 1.5))
    shown = shown + scanner.noise * rng.standard_normal(shown.shape, dtype=np.float32)
    if scanner.mask:
        shown = shown * ((np.abs(_X) < 1 - scanner.mask) & (np.abs(_Y) < 1 - scanner.mask))
    return np.asarray(np.clip(shown * 255.0 + 0.5, 0, 255), dtype=np.uint8)


def _resample(image: Pixels, zoom: float, shift: tuple[float, float]) -> Pixels:
    """Bilinear zoom about the centre, edges repeated."""

    def taps(offset: float) -> tuple[NDArray[np.int64], NDArray[np.int64], Pixels]:
        at = np.clip(((_axis / zoom - 2 * offset) + 1) * (SIZE - 1) / 2, 0, SIZE - 1)
        low = np.minimum(at.astype(np.int64), SIZE - 2)
        return low, low + 1, (at - low).astype(np.float32)

    low, high, part = taps(shift[1])
    rows = image[low] * (1 - part)[:, None] + image[high] * part[:, None]
    low, high, part = taps(shift[0])
    return np.asarray(rows[:, low] * (1 - part) + rows[:, high] * part, dtype=np.float32)


def _blur(image: Pixels, sigma: float) -> Pixels:
    """Separable Gaussian blur, `sigma` in pixels."""
    reach = max(1, int(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        parts = [np.take(padded, range(i, i + SIZE), axis) * k for i, k in enumerate(kernel)]
        image = np.sum(parts, axis=0)
    return image


def _step(distance: NDArray[np.floating], softness: float) -> Pixels:
    """Smooth 0-1 step, 0.5 where `distance` is 0."""
    return np.asarray(0.5 + 0.5 * np.tanh(distance / softness), dtype=np.float32)


def _spot(dx: Pixels, dy: Pixels, rx: float, ry: float) -> Pixels:
    return np.asarray(np.exp(-((dx / rx) ** 2) - (dy / ry) ** 2), dtype=np.float32)


def _texture(rng: np.random.Generator, cells: int) -> Pixels:
    """Smooth random field of about unit range, `cells` blobs across."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    at = np.linspace(0, cells - 1.001, SIZE, dtype=np.float32)
    low, part = at.astype(np.int64), (at - at.astype(np.int64))
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    return np.asarray(rows[:, low] * (1 - part) + rows[:, low + 1] * part, dtype=np.float32)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]

"""A local recogniser of names in text, plugged in: `--ner module:function` or `--ner FOLDER`.

A recogniser is a function from text to (start, end, label) spans. `module:function` names one on the Python
path; a folder holds a token-classification model of transformers (`config.json`) or a spaCy pipeline
(`meta.json`). Guarantees: nothing is fetched and no pickle is read; a recogniser that fails, or names a place
outside the text, is an error and never silence; every label counts as identifying but those of `HARMLESS`;
the identity of a recogniser is the hash of its files. The quality is the model's: the leak gate measures it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import RecogniserInvalid

Span = tuple[int, int, str]
Recogniser = Callable[[str], Iterable[Span]]
# Labels of general models that name no person, place, date or number of a person.
_HARMLESS = "O MISC CARDINAL ORDINAL QUANTITY PERCENT MONEY PRODUCT LANGUAGE LAW EVENT WORK_OF_ART NORP"
HARMLESS = frozenset(_HARMLESS.split())
_WINDOW, _STRIDE = 256, 64
_MODULE = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def identifying_spans(recognise: Recogniser, text: str) -> list[tuple[int, int]]:
    """Return where identifiers stand: sorted, merged, widened to whole words; raises RecogniserInvalid."""
    spans: list[tuple[int, int]] = []
    try:
        found = [(int(start), int(end), str(label)) for start, end, label in recognise(text)]
    except Exception as error:  # a plug-in raises what it likes; any failure means that nothing was checked
        raise RecogniserInvalid(f"the recogniser failed with {type(error).__name__}") from error
    for start, end, label in sorted(found):
        if not 0 <= start < end <= len(text):
            raise RecogniserInvalid("expected spans inside the text")
        if label.upper().removeprefix("B-").removeprefix("I-") in HARMLESS:
            continue
        while start > 0 and _within_word(text, start):
            start -= 1
        while end < len(text) and _within_word(text, end):
            end += 1
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


@lru_cache(maxsize=2)
def load_recogniser(spec: str) -> Recogniser:
    """Load a recogniser by `module:function` or folder; raises RecogniserInvalid."""
    match = _MODULE.fullmatch(spec)
    if match is None:
        folder = _folder(spec)
        return transformers_folder(folder) if (folder / "config.json").is_file() else spacy_folder(folder)
    try:
        function: Any = getattr(importlib.import_module(match["module"]), match["name"])
    except (ImportError, AttributeError) as error:
        raise RecogniserInvalid(f"expected a function at {spec}, found none") from error
    if not callable(function):
        raise RecogniserInvalid(f"expected a function at {spec}")
    recogniser: Recogniser = function
    return recogniser


def recogniser_identity(spec: str) -> dict[str, str]:
    """Return name and SHA-256 of the files of a recogniser; the name of a folder is its last part."""
    match = _MODULE.fullmatch(spec)
    if match is None:
        folder = _folder(spec)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {"name": folder.name, "sha256": _hash_of(folder, files)}
    try:
        found = importlib.util.find_spec(match["module"])
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise RecogniserInvalid(f"expected a module for {spec}, found none")
    path = Path(found.origin)
    return {"name": spec, "sha256": _hash_of(path.parent, [path])}


def transformers_folder(folder: Path) -> Recogniser:
    """Load a token-classification model of transformers from a folder; raises RecogniserInvalid."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForTokenClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise RecogniserInvalid(
            f"expected a token-classification model in safetensors at {folder}"
        ) from error
    if not tokenizer.is_fast:
        raise RecogniserInvalid(f"expected a tokenizer that knows character positions at {folder}")
    names: dict[int, str] = model.config.id2label
    torch.set_num_threads(1)

    def recognise(text: str) -> list[Span]:
        if not text.strip():
            return []
        parts = tokenizer(
            text,
            return_offsets_mapping=True,
            return_overflowing_tokens=True,
            truncation=True,
            max_length=min(_WINDOW, tokenizer.model_max_length),
            stride=_STRIDE,
        )
        found: list[Span] = []
        for number, offsets in enumerate(parts["offset_mapping"]):
            tokens = torch.tensor([parts["input_ids"][number]])
            mask = torch.tensor([parts["attention_mask"][number]])
            with torch.inference_mode():
                best = model(input_ids=tokens, attention_mask=mask).logits[0].argmax(dim=-1).tolist()
            found.extend(
                (start, end, names[label])
                for (start, end), label in zip(offsets, best, strict=True)
                if end > start and names[label] != "O"
            )
        return found

    return recognise


def spacy_folder(folder: Path) -> Recogniser:
    """Load a spaCy pipeline from a folder; raises RecogniserInvalid where it or spaCy is missing."""
    if not (folder / "meta.json").is_file():
        raise RecogniserInvalid(f"expected config.json or meta.json in {folder}, found neither")
    try:
        spacy: Any = importlib.import_module("spacy")
        pipeline = spacy.load(folder)
    except (ImportError, OSError, ValueError) as error:
        raise RecogniserInvalid(
            f"cannot load a spaCy pipeline from {folder}: {type(error).__name__}"
        ) from error

    def recognise(text: str) -> list[Span]:
        return [(entity.start_char, entity.end_char, entity.label_) for entity in pipeline(text).ents]

    return recognise


def _folder(spec: str) -> Path:
    folder = Path(spec)
    if not folder.is_dir():
        raise RecogniserInvalid(f"expected module:function or a folder, got {spec!r}")
    return folder


def _hash_of(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _within_word(text: str, at: int) -> bool:
    """Tell whether position `at` lies between two letters or digits of a word that is not Han."""
    return all(part.isalnum() and ord(part) < 0x2E80 for part in text[at - 1 : at + 1])

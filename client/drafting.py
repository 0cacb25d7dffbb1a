"""The findings of one image, written by a verified release on its verified base."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common.errors import BaseInvalid, ImageUnreadable
from common.model.manifest import verify_base
from common.model.release import open_release


def draft_findings(
    image: Path,
    *,
    release: Path,
    indication: str = "",
    base: Path | None = None,
    operator_key: str | None = None,
    allow_unprotected: bool = False,
    data: Path | None = None,
) -> dict[str, Any]:
    """Verify release and base, read the image and write its findings.

    Without `operator_key` (64 hex digits) the release is checked against the key that it names itself, which
    shows damage, not forgery: `operator_checked` is then False.

    An image of a prepared folder is taken as it is; any other (PNG, JPEG, DICOM) is brought into the form in
    which the images of `data`, this site's prepared folder, were stored.

    Returns findings, model (round and adapter hash), release ε and seconds. Raises ReleaseInvalid,
    SignatureInvalid, BaseHashMismatch, ImageUnreadable.
    """
    started = time.monotonic()
    opened = open_release(release, operator_key=operator_key, allow_unprotected=allow_unprotected)
    directory = _base(opened.study.base.name, base)
    verify_base(directory, opened.study.base.files)

    import torch

    from client.data.framing import AS_STORED, prepared_folder, site_framing
    from client.evaluation import generate_reports
    from client.serving.picture import prepared, read_picture
    from common.model.images import read_processor
    from common.model.llava import vision_features
    from common.model.loading import load_adapted
    from common.model.prompts import sentence_case

    framing = site_framing(data) if prepared_folder(image) is None else AS_STORED
    picture = read_picture(_bytes_of(image), framing)
    pixels = torch.from_numpy(prepared(picture, read_processor(directory)))[None]
    adapted = load_adapted(directory, opened.study.adapter)
    adapted.write_vector(opened.adapter)
    (text,) = generate_reports(
        adapted.model,
        adapted.tokenizer,
        features=vision_features(adapted.model, pixels).float(),
        indications=[indication],
        max_new_tokens=opened.study.training.max_new_tokens,
    )
    note = opened.note
    return {
        "findings": sentence_case(text),
        "study": note.study,
        "round": note.round,
        "adapter": note.adapter_sha256,
        "mode": note.mode,
        "operator_checked": operator_key is not None,
        "release_epsilon": note.release_epsilon or None,
        "seconds": round(time.monotonic() - started, 3),
    }


def _bytes_of(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise ImageUnreadable(f"{image}: expected an image, got {type(error).__name__}") from error


def _base(name: str, given: Path | None) -> Path:
    from common.model.tiny import known_base

    directory = known_base(name, given)
    if directory is None:
        raise BaseInvalid(f"--base: expected the directory of base {name!r}, got none")
    return directory

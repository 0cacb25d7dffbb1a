"""Paths that a table or archive names, kept inside the source folder.

Guarantees: a returned path is a plain file below the root, reached through plain folders only. It does not
hold against someone who swaps files while the import runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from client.data.study import Reason
from common.errors import SourceInvalid, StudyRejected


def resolve_inside(root: Path, relative: str) -> Path:
    """Return the file at `relative` below `root`.

    Raises StudyRejected: IMAGE_OUTSIDE for absolute paths, '..', control characters and links,
    IMAGE_MISSING for anything that is no plain file.
    """
    pure = PurePosixPath(relative.replace("\\", "/"))
    if (
        not relative
        or pure.is_absolute()
        or ".." in pure.parts
        or not relative.isprintable()
        or ":" in pure.parts[0]
    ):
        raise StudyRejected(Reason.IMAGE_OUTSIDE if relative else Reason.NO_IMAGE)
    path = root
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise StudyRejected(Reason.IMAGE_OUTSIDE)
    if not path.is_file():
        raise StudyRejected(Reason.IMAGE_MISSING)
    return path


def walk_files(root: Path) -> Iterator[Path]:
    """Yield plain files below `root` in sorted order, never following a link."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise SourceInvalid(f"cannot read folder {root}: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)

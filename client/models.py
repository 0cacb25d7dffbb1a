"""Base models in memory, loaded once per process and shared by the studies (and local sites) that use them.

Guarantees: a base is verified against the manifest's hashes before it is loaded; one caller at a time uses
a model, because the adapter's values live in it.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.canonical import sha256_hex
from common.config import AdapterSection, Study
from common.errors import BaseWritable
from common.model.manifest import verify_base

if TYPE_CHECKING:
    from common.model.loading import AdaptedModel


def verify_unwritable(bases: Iterable[Path], *, relay_group: int | None = None) -> None:
    """Raise BaseWritable unless only the own user, its own group and root can write each base directory.

    What is loaded must be what was verified against the manifest's hashes a moment before. `relay_group` may
    not write, even where it is the own group.
    """
    for base in bases:
        above = base.resolve().parents
        for path in (*above, *([base, *sorted(base.rglob("*"))] if base.is_dir() else [])):
            found = path.stat()
            sticky = path in above and found.st_mode & stat.S_ISVTX
            bad = found.st_mode & stat.S_IWOTH and not sticky
            if path not in above:
                shared = found.st_gid != os.getegid() or found.st_gid == relay_group
                bad = bad or (found.st_mode & stat.S_IWGRP and shared)
                bad = bad or found.st_uid not in (0, os.geteuid())
            if bad:
                raise BaseWritable(
                    f"{path}: expected that only this user can write base models, got user {found.st_uid}, "
                    f"group {found.st_gid}, mode {stat.S_IMODE(found.st_mode):o}; use chown and chmod go-w"
                )


class ModelPool:
    """Loaded models by base files and adapter settings."""

    def __init__(self, *, dtype: str = "float32") -> None:
        self._dtype = dtype
        self._lock = threading.RLock()
        self._models: dict[tuple[str, AdapterSection], AdaptedModel] = {}
        self._verified: set[tuple[Path, str]] = set()

    @contextmanager
    def use(self, study: Study, base: Path) -> Iterator[AdaptedModel]:
        """Hold the study's model; raises BaseHashMismatch, BaseInvalid or AdapterInvalid."""
        with self._lock:
            pinned = sha256_hex(repr(study.base.files).encode())
            adapter = replace(study.adapter, init_seed=0, initial_sha256="")
            model = self._models.get((pinned, adapter))
            if model is None or (base, pinned) not in self._verified:
                verify_base(base, study.base.files)
                self._verified.add((base, pinned))
            if model is None:
                from common.model.loading import load_adapted

                model = self._models[(pinned, adapter)] = load_adapted(base, study.adapter, dtype=self._dtype)
            yield model

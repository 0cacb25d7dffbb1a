"""Base models in memory, loaded once per process and shared by the studies (and local sites) that use them.

Guarantees: a base is verified against the manifest's hashes before it is loaded; one caller at a time uses
a model, because the adapter's values live in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.canonical import sha256_hex
from common.config import AdapterSection, Study
from common.model.manifest import verify_base

if TYPE_CHECKING:
    from common.model.loading import AdaptedModel


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
            if (base, pinned) not in self._verified:
                verify_base(base, study.base.files)
                self._verified.add((base, pinned))
            adapter = replace(study.adapter, init_seed=0, initial_sha256="")
            model = self._models.get((pinned, adapter))
            if model is None:
                from common.model.loading import load_adapted

                model = self._models[(pinned, adapter)] = load_adapted(base, study.adapter, dtype=self._dtype)
            yield model

"""What the guard decides about one request, before a word is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from client.serving.picture import Picture


@dataclass(frozen=True, slots=True)
class Decision:
    """Answer or refuse, and why, in two languages; `code` is '' where nothing is refused.

    `ood_score` says how far the image is from this site's own; above `ood_threshold` it is refused. Both are
    None where the guard is off.
    """

    refused: bool
    code: str
    reason: str
    reason_zh: str
    ood_score: float | None
    ood_threshold: float | None


ALLOWED_UNGUARDED = Decision(False, "", "", "", None, None)


class Guard(Protocol):
    """Decides on a request from its image's features [N, D] and its words."""

    def decide(
        self, picture: Picture, features: NDArray[np.float32], *, indication: str, question: str
    ) -> Decision: ...

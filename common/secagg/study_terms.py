"""The terms of a study's round of secure aggregation, as both sides derive them from the manifest."""

from __future__ import annotations

from common.config import Study
from common.model.lora import vector_size
from common.secagg.context import Terms


def round_terms(study: Study, *, round: int, attempt: int) -> Terms:
    """Say what both sides know about a round before its keys; the one after the last adds up counts."""
    length = vector_size(study.adapter.tensors)
    if round == study.rounds and study.federated_evaluation is not None:
        from common.evaluation_counts import DIMENSION

        length = DIMENSION
    return Terms(
        study=study.sha256,
        configuration=study.sha256,
        round=round,
        attempt=attempt,
        length=length,
        floor=max(2, study.cohort.min_sites),
    )

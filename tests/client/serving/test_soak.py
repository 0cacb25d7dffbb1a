"""A shortened soak: no request lost, no answer from another study, a killed worker costs nothing."""

from __future__ import annotations

import pytest

from tests.client.serving.soak import PICTURES, soak


@pytest.mark.slow
def test_no_request_is_lost_and_no_answer_is_another_studys() -> None:
    figures = soak(requests=400, clients=8, kills=1)
    assert figures["answered"] == figures["requests"] == figures["logged"] == 400
    assert figures["wrong"] == 0 and figures["failed"] == {} and figures["restarts"] == 1
    assert figures["distinct_answers"] > PICTURES * 0.8
    assert figures["front_mb_end"] < figures["front_mb_settled"] + 40

"""Generated reports do not depend on batching; shuffling leaves no image in place."""

import pytest
import torch

from client.evaluation import generate_reports, shuffled
from common.errors import ScoresInvalid
from common.model.tiny import PROMPT, build_model, tokenizer


def test_reports_do_not_depend_on_batch_size_or_order() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model, words = build_model(), tokenizer()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    features = torch.randn(5, 16, 128)
    indications = ["cough", "shortness of breath", "", "chest pain", "fever and cough"]

    def write(rows: list[int], batch_size: int) -> list[str]:
        return generate_reports(
            model,
            words,
            features=features[rows],
            indications=[indications[row] for row in rows],
            max_new_tokens=10,
            batch_size=batch_size,
            template=PROMPT,
        )

    forward = write([0, 1, 2, 3, 4], 64)
    assert forward == write([0, 1, 2, 3, 4], 2) == write([4, 3, 2, 1, 0], 3)[::-1]
    assert len(set(forward)) > 1
    assert model.training


def test_unpaired_indications_are_refused() -> None:
    with pytest.raises(ScoresInvalid, match="expected 2 indications, got 1"):
        generate_reports(None, None, features=torch.zeros(2, 16, 128), indications=["a"], max_new_tokens=1)


@pytest.mark.parametrize("many", [2, 3, 50])
def test_shuffling_leaves_no_image_in_place(many: int) -> None:
    features = torch.arange(many).float().reshape(many, 1, 1)
    for seed in range(20):
        mixed = shuffled(features, seed=seed)
        assert not (mixed == features).any()
        assert sorted(mixed.flatten().tolist()) == features.flatten().tolist()
    assert torch.equal(shuffled(features, seed=3), shuffled(features, seed=3))


def test_one_study_cannot_be_shuffled() -> None:
    with pytest.raises(ScoresInvalid, match="at least 2"):
        shuffled(torch.zeros(1, 1, 1), seed=0)

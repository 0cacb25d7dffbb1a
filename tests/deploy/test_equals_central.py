"""Federated training equals central training: the whole protocol against plain torch on the union.

The oracle shares no code with the sites' gradient engine, the sums or the server's optimizer: it loads the
base and a PEFT adapter itself, feeds pixels through the whole model with Hugging Face's own loss, lets
autograd differentiate the sum over patients and takes `torch.optim.Adam` steps. Only the draws are given.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.data.store import Pair, read_pairs
from common.config import Study, TensorGroup
from common.model.images import load_pixels
from common.model.lora import Vector, initial_vector, split_vector
from common.model.prompts import encode_pair, prompt_template
from common.model.tiny import IMAGE, IMAGE_TOKENS, tiny_base_directory
from common.privacy.sampling import Csprng, poisson_sample, studies_of
from common.schedule import active_groups, learning_rate
from tests.simulator import SITES, build, data_folder

ROUNDS = 20


def central_training(study: Study, draws: list[list[list[Pair]]]) -> Vector:
    """Train on the union: `draws[round]` lists every drawn patient's drawn studies."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    base = tiny_base_directory()
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    llava = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers 5 retires
        model: Any = get_peft_model(
            llava,
            LoraConfig(
                r=study.adapter.rank, lora_alpha=int(study.adapter.alpha), lora_dropout=0.0,
                target_modules=study.adapter.targets, modules_to_save=["multi_modal_projector"],
            ),
        ).eval()  # fmt: skip
    parameters = {
        name.replace(".modules_to_save.default.", ".").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, values in split_vector(initial_vector(base, study.adapter), study.adapter.tensors).items():
            parameters[name].copy_(torch.from_numpy(values.copy()))

    def study_loss(pair: Pair) -> torch.Tensor:
        example = encode_pair(
            tokenizer, image_tokens=IMAGE_TOKENS, image_token_id=IMAGE, indication=pair.indication,
            report=pair.findings, max_tokens=study.training.max_tokens, template=prompt_template(base),
        )  # fmt: skip
        site = pair.patient.split("-")[0]
        pixels = torch.from_numpy(load_pixels(data_folder() / site / pair.images[0], base))[None]
        output = model(
            input_ids=torch.tensor([example.input_ids]),
            attention_mask=torch.ones(1, len(example.input_ids), dtype=torch.long),
            pixel_values=pixels,
            labels=torch.tensor([example.labels]),
        )
        loss: torch.Tensor = output.loss
        return loss

    groups = {spec.name: spec.group for spec in study.adapter.tensors}
    optimizers = {
        group: torch.optim.Adam(
            [parameter for name, parameter in parameters.items() if groups[name] is group],
            betas=(study.optimizer.beta1, study.optimizer.beta2), eps=study.optimizer.epsilon,
        )
        for group in TensorGroup
    }  # fmt: skip
    for round, drawn in enumerate(draws):
        for parameter in parameters.values():
            parameter.grad = None
        for studies in drawn:
            patient = torch.stack([study_loss(pair) for pair in studies]).mean()
            (patient / (study.training.sampling_rate * study.training.patients)).backward()
        for group in active_groups(study, round):
            for settings in optimizers[group].param_groups:
                settings["lr"] = learning_rate(study, round)
            optimizers[group].step()
    return np.concatenate([parameters[s.name].detach().numpy().reshape(-1) for s in study.adapter.tensors])


def draws_of(study: Study, site: str, round: int) -> list[list[Pair]]:
    """The patients that a site draws in a round of a seeded study, as documented for `[testing]`."""
    import hashlib

    assert study.testing is not None
    text = f"fedrad test draw|{study.testing.seed}|{site}|{round}"
    csprng = Csprng(hashlib.sha256(text.encode()).digest(), seeded_for_test=True)
    held = [pair for pair in read_pairs(data_folder() / site) if pair.split == "train"]
    pairs = sorted(held, key=lambda pair: (pair.patient, pair.study))
    drawn = []
    for patient in poisson_sample(csprng, sorted({p.patient for p in pairs}), study.training.sampling_rate):
        rows = [str(row) for row, pair in enumerate(pairs) if pair.patient == patient]
        chosen = studies_of(csprng, rows, study.training.studies_per_patient)
        drawn.append([pairs[int(row)] for row in chosen])
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["alternating", "joint", "frozen-a"])
def test_twenty_federated_rounds_equal_central_training(tmp_path: Path, strategy: str) -> None:
    world = build(tmp_path, mode="plain", rounds=ROUNDS, strategy=strategy)
    federated = world.run().adapter
    study = world.study
    draws = [
        [patient for site in sorted(SITES) for patient in draws_of(study, site, round)]
        for round in range(ROUNDS)
    ]
    assert sum(len(drawn) for drawn in draws) > 10 * ROUNDS
    central = central_training(study, draws)
    initial = initial_vector(tiny_base_directory(), study.adapter)
    assert np.linalg.norm(federated - initial) > 0.2  # it went somewhere
    np.testing.assert_allclose(federated, central, rtol=0, atol=1e-5)


def test_three_federated_rounds_equal_central_training(tmp_path: Path) -> None:
    world = build(tmp_path, mode="plain", rounds=3)
    federated = world.run().adapter
    draws = [
        [patient for site in sorted(SITES) for patient in draws_of(world.study, site, round)]
        for round in range(3)
    ]
    np.testing.assert_allclose(federated, central_training(world.study, draws), rtol=0, atol=1e-5)

"""Making a study: a commented manifest to start from, resolving it against a base and the sites, signing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.config import Study, format_study, verify_resolved
from common.errors import ManifestInvalid
from common.files import write_atomic
from common.identity import Purpose, SigningKey
from common.model.lora import adapter_tensors, initial_vector, vector_sha256, write_adapter
from common.model.manifest import hash_base
from server.checkpoint import write_signed_study

_TEMPLATE = '''\
# A FedRad study: everything that this training run is allowed to do. The operator and every site sign the
# hash of it; a site's agent refuses whatever it does not allow. Check it with: fedrad-server study check
schema = 1

[study]
id = "{id}"
purpose = "Draft the findings section of frontal chest radiographs"

[base]
name = "{base}"                  # "tiny", or the name under which every site holds the base; never downloaded

[adapter]                        # what is trained and travels; the base stays frozen
rank = {rank}
alpha = {alpha}
targets = '{targets}'
strategy = "joint"               # "alternating" (RoLoRA), "frozen-a" (FFA-LoRA) or "joint"; exact here in all
init_seed = 7

# Stages run in order. "align" trains the projector only, "tune" the projector and LoRA.
{stages}
[training]
sampling_rate = {sampling_rate}             # probability that a patient is drawn in a round (Poisson)
patients = {patients}                  # public, nominal training patients of all sites; no site's true count
studies_per_patient = 2          # at most this many of a drawn patient's studies
max_tokens = {max_tokens}                 # prompt, image and report
max_new_tokens = {max_new_tokens}
microbatch_patients = 32         # memory only; the result does not depend on it

[optimizer]                      # the server's
name = "adam"                    # or "sgd" with momentum
beta1 = 0.9
beta2 = 0.99
epsilon = 1e-8

{privacy}
[cohort]
min_sites = {min_sites}                    # below this many contributions a round fails
deadline_s = 600                 # of one attempt at a round
max_attempts = 3                 # of each round
on_failed_round = "repeat"       # or "end"
{sites}
[evaluation]
every_rounds = {every_rounds}                # adapters kept for the curves of the report
max_studies = 400                # held-out studies per site
resamples = 1000                 # bootstrap
'''

_PLAIN = """\
[privacy]
mode = "plain"                   # no privacy: public or synthetic data only; sites refuse the release
clip_norm = 1.0
"""


def study_template(
    *, id: str, base: str, sites: Sequence[str], privacy: str = _PLAIN, rounds: int = 60, patients: int = 0
) -> str:
    """Write a complete, commented manifest that runs as it is; raises ManifestInvalid for no sites."""
    if not sites:
        raise ManifestInvalid("sites: expected at least one site id, got none")
    tiny = base == "tiny"
    align = "" if tiny else _stage("align", 10, 1e-3)
    return _TEMPLATE.format(
        id=id,
        base=base,
        rank=8,
        alpha=16,
        targets=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        stages=align + _stage("tune", rounds, 4e-3 if tiny else 1e-3),
        sampling_rate=0.05,
        patients=patients or 2000 * len(sites),
        max_tokens=96 if tiny else 512,
        max_new_tokens=48 if tiny else 160,
        privacy=privacy,
        min_sites=max(1, len(sites) - 1),
        sites="".join(f'\n[[cohort.site]]\nid = "{site}"\n' for site in sites),
        every_rounds=max(1, rounds // 6),
    )


def resolve_study(
    study: Study, *, base: Path, operator_key: str, site_keys: Mapping[str, str]
) -> Study:
    """Pin base files, adapter tensors, first adapter and public keys; raises BaseInvalid or ManifestInvalid.

    What the manifest already pins must agree.
    """
    files = hash_base(base)
    tensors = adapter_tensors(base, study.adapter)
    adapter = replace(study.adapter, tensors=tensors)
    adapter = replace(adapter, initial_sha256=vector_sha256(initial_vector(base, adapter)))
    sites = []
    for site in study.cohort.site:
        key = site_keys.get(site.id, site.message_key)
        if site.message_key and key != site.message_key:
            raise ManifestInvalid(
                f"cohort.site {site.id}: message_key: expected {key[:16]}… (the enrolled key), "
                f"got {site.message_key[:16]}…"
            )
        sites.append(replace(site, message_key=key))
    resolved = replace(
        study,
        base=replace(study.base, files=files),
        adapter=adapter,
        cohort=replace(study.cohort, operator_key=operator_key, site=tuple(sites)),
    )
    for name, before, after in (
        ("base.files", study.base.files, files),
        ("adapter.tensors", study.adapter.tensors, tensors),
        ("cohort.operator_key", study.cohort.operator_key, operator_key),
    ):
        if before and before != after:
            raise ManifestInvalid(f"{name}: expected what this base and operator give, got another value")
    verify_resolved(resolved)
    return resolved


def write_study(directory: Path, study: Study, key: SigningKey, *, base: Path) -> None:
    """Sign a resolved study and write its directory: manifest, signature and first adapter."""
    verify_resolved(study)
    manifest = format_study(study)
    write_signed_study(directory, manifest, key.sign(Purpose.STUDY, manifest))
    initial = directory / "initial"
    if not (initial / "adapter_model.safetensors").is_file():
        write_adapter(initial, initial_vector(base, study.adapter), study.adapter.tensors, study.adapter)


def write_manifest(path: Path, text: str) -> None:
    """Write a new manifest; an existing file is never replaced."""
    if path.exists():
        raise ManifestInvalid(f"{path}: expected no file here yet, got one; choose another name")
    write_atomic(path, text.encode())


def _stage(name: str, rounds: int, learning_rate: float) -> str:
    return (
        f'[[stage]]\nname = "{name}"\nrounds = {rounds}\nlearning_rate = {learning_rate}\n'
        f'schedule = "cosine"\nwarmup_rounds = {min(5, rounds)}\n\n'
    )

"""Making a study: a commented manifest to start from, resolving it against base and sites, signing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import Mode, Study, format_study, verify_resolved
from common.errors import ManifestInvalid
from common.files import write_atomic
from common.identity import Purpose, SigningKey
from common.model.lora import adapter_tensors, initial_vector, vector_sha256, write_adapter
from common.model.manifest import hash_base
from common.privacy.study_plan import calibrated
from common.secagg.context import threshold
from server.acceptance import public_set_sha256, write_settings
from server.checkpoint import write_signed_study

_TEMPLATE = """\
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
strategy = "{strategy}"         # "alternating" (RoLoRA), "frozen-a" (FFA-LoRA) or "joint"
init_seed = 7

# Stages run in order. "align" trains the projector only, "tune" the projector and LoRA.
{stages}
[training]
sampling_rate = {sampling_rate}             # probability that a patient is drawn in a round (Poisson)
patients = {patients}                  # public, nominal training patients of all sites; no site's true count
studies_per_patient = 2          # at most this many of a drawn patient's studies
max_tokens = {max_tokens}                 # prompt, image and report
max_new_tokens = {max_new_tokens}
microbatch_patients = {microbatch}         # memory and speed only

[optimizer]                      # the server's
name = "adam"                    # or "sgd" with momentum
beta1 = 0.9
beta2 = 0.99
epsilon = 1e-8
max_step_norm = {max_step_norm:g}               # no round moves the adapter further; sites check it

{privacy}
[cohort]
min_sites = {min_sites}                    # below this many contributions a round fails
witness_quorum = {min_sites}               # so many sites must cosign the ledger before a round is unmasked
deadline_s = 600                 # of one attempt at a round
# grace_s = 600                  # more for sites still at work then; left out: as long again
max_attempts = 3                 # of each round
on_failed_round = "repeat"       # or "end"
{sites}
[evaluation]
every_rounds = {every_rounds}                # adapters kept for the curves of the report
max_studies = 400                # held-out studies per site
resamples = 1000                 # bootstrap

[audit]                          # masked contributions of these rounds are kept for the audit bundle
retain_every_rounds = {every_retained}
{acceptance}"""

_PLAIN = """\
[privacy]
mode = "plain"                   # no privacy: public or synthetic data only; sites refuse the release
"""

_CONSORTIUM = """\
[privacy]                        # for one patient at one site; signing fills in the noise that meets it
mode = "consortium"              # "consortium", "local" (a site's own noise only) or "plain" (none)
site_epsilon = {site_epsilon}               # what the server with `colluders` sites could learn, all rounds
release_epsilon = {release_epsilon}            # what anyone with the released model could learn
clip_norm = {clip_norm}                  # the most that one patient moves the sum in a round
colluders = 0                    # sites that may work with the server
dropouts = {dropouts}                     # sites that may vanish in a round; the others carry their noise
spare_rounds = {spare}                 # failed attempts that the sites' budgets allow for
masking = true                   # secure aggregation

# [federated_evaluation]         # the final model on every site's test split; only noised counts leave
# site_epsilon = 2               # on top of training's
# release_epsilon = 1
"""

_LOCAL = """\
[privacy]                        # for one patient at one site; signing fills in the noise that meets it
mode = "local"                   # every site noises its own update fully (ISRL-DP); no secure aggregation
site_epsilon = {site_epsilon}
clip_norm = {clip_norm}
spare_rounds = {spare}
"""


_ACCEPTANCE = """
[acceptance]                     # the operator's public set: an adapter that fails on it is rolled back
every_rounds = {every}
max_increase = 0.1               # nats per report token over the last accepted adapter
"""


@dataclass(frozen=True)
class Recipe:
    """The numbers of a manifest that depend on the base's size; learned on public data."""

    rank: int = 8
    alpha: float = 16.0
    targets: str = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    strategy: str = "alternating"
    align_rounds: int = 10
    rounds: int = 60
    learning_rate: float = 1e-3
    sampling_rate: float = 0.05
    clip_norm: float = 1.0
    max_tokens: int = 512
    max_new_tokens: int = 160
    microbatch_patients: int = 4
    max_step_norm: float = 20.0


TINY = Recipe(
    align_rounds=0,
    rounds=20,
    learning_rate=8e-3,
    sampling_rate=0.12,
    clip_norm=0.5,
    max_tokens=128,
    max_new_tokens=60,
    microbatch_patients=64,
    max_step_norm=4.0,
)


def study_template(
    *,
    id: str,
    base: str,
    sites: Sequence[str],
    mode: str = "consortium",
    rounds: int | None = None,
    patients: int | None = None,
    release_epsilon: float = 8.0,
    recipe: Recipe | None = None,
    accept_every_rounds: int = 0,
) -> str:
    """Write a complete, commented manifest that runs as it is; raises ManifestInvalid."""
    if not sites:
        raise ManifestInvalid("sites: expected at least one site id, got none")
    if mode not in [member.value for member in Mode]:
        raise ManifestInvalid(f"mode: expected consortium, local or plain, got {mode!r}")
    if mode == "consortium" and len(sites) < 2:
        raise ManifestInvalid("sites: expected at least 2 for secure aggregation, got 1; use --mode local")
    recipe = recipe or (TINY if base == "tiny" else Recipe())
    rounds = rounds or recipe.rounds
    dropouts = len(sites) - threshold(len(sites)) if mode == "consortium" else 0
    privacy = {"consortium": _CONSORTIUM, "local": _LOCAL, "plain": _PLAIN}[mode].format(
        site_epsilon=2 * release_epsilon if mode == "consortium" else release_epsilon,
        release_epsilon=release_epsilon,
        clip_norm=recipe.clip_norm,
        dropouts=dropouts,
        spare=max(2, rounds // 10),
    )
    align = _stage("align", recipe.align_rounds, recipe.learning_rate) if recipe.align_rounds else ""
    return _TEMPLATE.format(
        id=id,
        base=base,
        rank=recipe.rank,
        alpha=recipe.alpha,
        targets=recipe.targets,
        strategy=recipe.strategy,
        stages=align + _stage("tune", rounds, recipe.learning_rate),
        sampling_rate=recipe.sampling_rate,
        patients=patients or 700 * len(sites),
        max_step_norm=recipe.max_step_norm,
        max_tokens=recipe.max_tokens,
        max_new_tokens=recipe.max_new_tokens,
        microbatch=recipe.microbatch_patients,
        privacy=privacy,
        min_sites=len(sites) - dropouts if mode == "consortium" else max(1, len(sites) - 1),
        sites="".join(f'\n[[cohort.site]]\nid = "{site}"\n' for site in sites),
        every_rounds=max(1, rounds // 5),
        every_retained=max(1, rounds // 2),
        acceptance=_ACCEPTANCE.format(every=accept_every_rounds) if accept_every_rounds else "",
    )


@dataclass(frozen=True)
class SiteKeys:
    """A site's enrolled public keys, 64 hex digits each."""

    message: str
    witness: str


def resolve_study(
    study: Study,
    *,
    base: Path,
    operator_key: str,
    site_keys: Mapping[str, SiteKeys],
    public: Path | None = None,
) -> Study:
    """Pin base files, adapter tensors, first adapter, public keys, noise and the public set.

    public: folder of prepared public pairs, where the manifest has an acceptance test. What the manifest
    already pins must agree. Raises BaseInvalid, ManifestInvalid, PublicSetInvalid, AccountantsDisagree.
    """
    files = hash_base(base)
    tensors = adapter_tensors(base, study.adapter)
    adapter = replace(study.adapter, tensors=tensors)
    adapter = replace(adapter, initial_sha256=vector_sha256(initial_vector(base, adapter)))
    sites = []
    for site in study.cohort.site:
        keys = site_keys.get(site.id, SiteKeys(site.message_key, site.witness_key))
        for name, given, enrolled in (
            ("message_key", site.message_key, keys.message),
            ("witness_key", site.witness_key, keys.witness),
        ):
            if given and given != enrolled:
                raise ManifestInvalid(
                    f"cohort.site {site.id}: {name}: expected {enrolled[:16]}… (the enrolled key), "
                    f"got {given[:16]}…"
                )
        sites.append(replace(site, message_key=keys.message, witness_key=keys.witness))
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
    if resolved.acceptance is not None and public is not None:
        found = public_set_sha256(public)
        if resolved.acceptance.public_sha256 not in ("", found):
            raise ManifestInvalid(f"acceptance.public_sha256: expected that of {public}, got another")
        resolved = replace(resolved, acceptance=replace(resolved.acceptance, public_sha256=found))
    resolved = calibrated(resolved)
    verify_resolved(resolved)
    return resolved


def write_study(
    directory: Path, study: Study, key: SigningKey, *, base: Path, public: Path | None = None
) -> None:
    """Sign a resolved study and write its directory: manifest, signature, first adapter, acceptance test."""
    verify_resolved(study)
    manifest = format_study(study)
    write_signed_study(directory, manifest, key.sign(Purpose.STUDY, manifest))
    if study.acceptance is not None and public is not None:
        write_settings(directory, base=base, data=public)
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
        f'schedule = "cosine"\nwarmup_rounds = {min(5, max(1, rounds // 20))}\n\n'
    )

"""A whole consortium on one machine: keys, site homes, the signed study, everything approved.

    OUT/server/            study directory of the ServerApp (server/checkpoint.py)
    OUT/sites/<id>/        one site's home (client/home.py); the data stays where it is
    OUT/result.json  report.html  release/

Guarantees: made again over an existing OUT it keeps keys and state, so that a run can be resumed; another
study in the same OUT is refused. On one machine the same person approves for every site: that is a rehearsal
of the protocol, not a consortium.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.home import SiteHome, approve_study, create_home, receive_study
from common.config import Mode, Study, format_study, parse_study_toml
from common.errors import DataInsufficient, ManifestInvalid
from common.identity import Purpose, load_or_create_key
from server.studies import SiteKeys, resolve_study, write_study

PUBLIC = "public"  # the operator's public set beside the sites' folders, for a study with an acceptance test


@dataclass(frozen=True)
class LocalConsortium:
    """Everything a local run needs."""

    out: Path
    study: Study
    base: Path
    homes: dict[str, SiteHome]

    @property
    def server(self) -> Path:
        return self.out / "server"


def base_directory(name: str, given: Path | None) -> Path:
    """Find the base that a manifest names; raises ManifestInvalid saying what to pass."""
    from common.model.tiny import known_base

    directory = known_base(name, given)
    if directory is None:
        raise ManifestInvalid(f"base.name: expected --base DIR for base {name!r}, got none")
    return directory


def set_up(manifest: Path, *, data: Path, out: Path, base: Path | None) -> LocalConsortium:
    """Make or reopen a local consortium for a `study.toml`.

    Raises ManifestInvalid, DataInsufficient naming the site, BaseInvalid, RunDirectoryBusy.
    """
    try:
        text = manifest.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestInvalid(f"{manifest}: expected a study manifest, got none") from error
    draft = parse_study_toml(text, source=str(manifest))
    directory = base_directory(draft.base.name, base).absolute()
    for site in draft.site_ids:
        if not (data / site / "pairs.jsonl").is_file():
            raise DataInsufficient(
                f"{data / site}: expected prepared data of site {site!r} (pairs.jsonl), got none; "
                "import it with `fedrad-site data import`"
            )
    operator = load_or_create_key(out / "server" / "keys" / "message.key")
    homes = {
        site: create_home(
            out / "sites" / site,
            site=site,
            operator_key=operator.public,
            data=data / site,
            bases={draft.base.name: directory},
        )
        for site in draft.site_ids
    }
    keys = {
        site: SiteKeys(home.message_key().public, home.witness_key().public) for site, home in homes.items()
    }
    public = data / PUBLIC if (data / PUBLIC).is_dir() else None
    study = resolve_study(draft, base=directory, operator_key=operator.public, site_keys=keys, public=public)
    write_study(out / "server", study, operator, base=directory, public=public)
    encoded = format_study(study)
    if study.privacy.mode is not Mode.PLAIN:  # each rehearsing site allows just this study
        homes = {
            site: create_home(
                home.directory, site=site, operator_key=home.operator_key, data=home.data, bases=home.bases,
                epsilon=_allowed_epsilon(study), delta=study.privacy.delta,
            )
            for site, home in homes.items()
        }  # fmt: skip
    for home in homes.values():
        receive_study(home, encoded, operator.sign(Purpose.STUDY, encoded))
        approve_study(home, study.sha256)
    return LocalConsortium(out, study, directory, homes)


def _allowed_epsilon(study: Study) -> float:
    """Allow training and evaluation, with room for the accountant's rounding; ε add up at most."""
    evaluation = study.federated_evaluation
    return (study.privacy.site_epsilon + (evaluation.site_epsilon if evaluation else 0.0)) * 1.001

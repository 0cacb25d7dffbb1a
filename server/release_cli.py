"""`fedrad-server release …` and `fedrad-server audit …`: publish with TUF, export audit bundles.

Root and targets keys belong on a stick in a safe: `root propose` and `root sign` work on files that travel.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.terminal import answer

if TYPE_CHECKING:
    from common.ledger.release_proof import LedgerTrust
    from server.releases import OnlineKeys

release_app = typer.Typer(help="Publish releases as a TUF repository.", no_args_is_help=True)
root_app = typer.Typer(help="The repository's root: operator and hospitals sign it.", no_args_is_help=True)
audit_app = typer.Typer(help="Audit bundles.", no_args_is_help=True)
release_app.add_typer(root_app, name="root")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Repository = Annotated[Path, typer.Option("--repository", help="The repository's folder.")]
Key = Annotated[Path, typer.Option("--key", help="A private key file (0600).")]
TargetsKey = Annotated[Path, typer.Option("--targets-key", help="The offline targets key.")]
SnapshotKey = Annotated[Path, typer.Option("--snapshot-key", help="The online snapshot key.")]
TimestampKey = Annotated[Path, typer.Option("--timestamp-key", help="The online timestamp key.")]
StudyDirectory = Annotated[Path, typer.Option("--study", help="The study directory (study.json).")]


@root_app.command("propose")
def root_propose(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The root file to write.")],
    root_keys: Annotated[str, typer.Option("--root-keys", help="Public keys, 64 hex each, by commas.")],
    threshold: Annotated[int, typer.Option("--threshold", min=1, help="How many must sign a root.")],
    targets: Annotated[str, typer.Option("--targets", help="Public targets key, 64 hex.")],
    snapshot: Annotated[str, typer.Option("--snapshot", help="Public snapshot key, 64 hex.")],
    timestamp: Annotated[str, typer.Option("--timestamp", help="Public timestamp key, 64 hex.")],
    version: Annotated[int, typer.Option("--version", min=1, help="1, or the one before plus 1.")] = 1,
    as_json: Json = False,
) -> None:
    """Write an unsigned root for everybody to sign."""
    from common.files import write_atomic
    from server.releases import RoleKeys, propose_root

    names = tuple(key.strip() for key in root_keys.split(",") if key.strip())
    keys = RoleKeys(names, threshold, targets, snapshot, timestamp)
    write_atomic(out, propose_root(keys, version=version, now=_now()))
    value = {"root": str(out), "version": version, "threshold": threshold, "keys": len(names)}
    answer(value, as_json=as_json, text=lambda: f"{out}: {threshold} of {len(names)} must sign it now")


@root_app.command("sign")
def root_sign(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="A proposed root.")],
    key: Key,
    as_json: Json = False,
) -> None:
    """Add one signature to a proposed root, in place."""
    from common.files import write_atomic
    from common.identity import load_key
    from server.releases import sign_root

    signer = load_key(key)
    write_atomic(root, sign_root(root.read_bytes(), signer))
    answer({"root": str(root), "signed_by": signer.public}, as_json=as_json, text=lambda: f"{root}: signed")


@root_app.command("install")
def root_install(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="A root with enough signatures.")],
    repository: Repository,
    targets_key: TargetsKey,
    snapshot_key: SnapshotKey,
    timestamp_key: TimestampKey,
    as_json: Json = False,
) -> None:
    """Place a root in the repository; the first one also makes the repository's empty metadata."""
    from common.identity import load_key
    from server.releases import initialise, install_root

    first = not list((repository / "metadata").glob("*.root.json"))
    install_root(repository, root.read_bytes())
    if first:
        online = _online(snapshot_key, timestamp_key)
        initialise(repository, targets=load_key(targets_key), online=online, now=_now())
    answer({"repository": str(repository)}, as_json=as_json, text=lambda: f"{repository}: root installed")


@release_app.command("make")
def make(
    study: StudyDirectory,
    out: Annotated[Path, typer.Option("--out", help="The release folder to write.")],
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="JSON with metrics and by_group, for the model card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write and log a finished study's adapter, manifest and model card, for the sites to witness."""
    import json

    from common.errors import ReleaseInvalid
    from server.release_log import log_release, make_release, stated_site_epsilon

    try:
        given = json.loads(evaluation.read_text()) if evaluation else None
    except (OSError, ValueError) as error:
        raise ReleaseInvalid(f"{evaluation}: expected JSON with metrics, got none") from error
    adapter = make_release(study, out, evaluation=given)
    version = log_release(study, out, site_epsilon=stated_site_epsilon(study))
    value = {"release": str(out), "version": version, "adapter": adapter}
    text = (
        f"{out}: version {version}, adapter {adapter[:16]}…\nrun the study once more: the sites cosign it; "
        f"then: fedrad-server release prove {out} --study {study}"
    )
    answer(value, as_json=as_json, text=lambda: text)


@release_app.command("prove")
def prove(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="A release folder made by `make`.")],
    study: StudyDirectory,
    as_json: Json = False,
) -> None:
    """Write the offline ledger proof into a release folder; refused before a quorum has cosigned it."""
    from server.release_log import log_release, prove_release, stated_site_epsilon

    version = log_release(study, release, site_epsilon=stated_site_epsilon(study))
    prove_release(study, release, version=version)
    answer(
        {"release": str(release), "version": version}, as_json=as_json,
        text=lambda: f"{release}: version {version} is proven; publish it, or hand it over on a stick",
    )  # fmt: skip


@release_app.command("publish")
def publish(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="Release folder with its ledger proof.")],
    study: StudyDirectory,
    repository: Repository,
    targets_key: TargetsKey,
    snapshot_key: SnapshotKey,
    timestamp_key: TimestampKey,
    allow_unprotected: Annotated[bool, typer.Option(help="Publish a release without privacy.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a release; refused without ledger proof, or with a version that is not the newest."""
    from common.identity import load_key
    from server.releases import publish_release

    version = publish_release(
        repository,
        release,
        trusts=[_trust(study)],
        targets=load_key(targets_key),
        online=_online(snapshot_key, timestamp_key),
        now=_now(),
        allow_unprotected=allow_unprotected,
    )
    value = {"repository": str(repository), "version": version}
    answer(value, as_json=as_json, text=lambda: f"{repository}: version {version} published")


@release_app.command("refresh")
def refresh(
    repository: Repository, snapshot_key: SnapshotKey, timestamp_key: TimestampKey, as_json: Json = False
) -> None:
    """Sign a fresh snapshot and timestamp; run it daily."""
    from server.releases import published_versions
    from server.releases import refresh as sign_again

    sign_again(repository, online=_online(snapshot_key, timestamp_key), now=_now())
    versions = published_versions(repository)
    value = {"repository": str(repository), "versions": versions}
    answer(value, as_json=as_json, text=lambda: f"{repository}: fresh, versions {versions}")


@audit_app.callback()
def audit() -> None:
    """Audit bundles: one file that anyone verifies offline with `fedrad-audit`."""


@audit_app.command("export")
def export(
    run: Annotated[Path, typer.Option("--run", help="Study directory, or the folder of a local run.")],
    out: Annotated[Path, typer.Option("--out", help="The bundle to write.")],
    with_adapters: Annotated[bool, typer.Option(help="Put the adapter files of releases in.")] = True,
    as_json: Json = False,
) -> None:
    """Make an audit bundle; `fedrad-audit verify` checks it anywhere."""
    from common.ledger.bundle import pack, write_bundle
    from common.ledger.sbom import software
    from server.bundles import export_run

    bundle = export_run(run, exported_s=int(time.time()), software=software(), with_adapters=with_adapters)
    write_bundle(out, bundle)
    value: dict[str, Any] = {"bundle": str(out), "bytes": len(pack(bundle)), "entries": len(bundle.leaves)}
    answer(value, as_json=as_json, text=lambda: f"{out}: {value['entries']} entries, {value['bytes']} bytes")


def _trust(study: Path) -> LedgerTrust:
    from common.ledger.release_proof import trust_of
    from server.checkpoint import read_signed_study

    return trust_of(read_signed_study(study))


def _online(snapshot_key: Path, timestamp_key: Path) -> OnlineKeys:
    from common.identity import load_key
    from server.releases import OnlineKeys

    return OnlineKeys(snapshot=load_key(snapshot_key), timestamp=load_key(timestamp_key))


def _now() -> datetime:
    return datetime.now(UTC)

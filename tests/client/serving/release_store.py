"""A site with real releases in its model store: published by an operator, proven by a ledger, pulled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from client.cli import app
from client.home import approve_study, create_home, receive_study
from common.config import SiteSection, Study, format_study
from common.files import write_atomic
from common.identity import Purpose, load_key, save_key
from common.ledger.checkpoint import LedgerProof, format_ledger_proof
from common.ledger.entries import OPERATOR, Release
from common.ledger.output_checks import ENTRY_NAME, PROOF_NAME
from common.ledger.release_proof import list_files, origin_of, trust_of
from common.model.lora import vector_sha256, vector_size
from common.model.release import open_release, write_release
from server.releases import initialise, install_root, propose_root, publish_release, sign_root
from tests.client.serving.models import talkative_base, talkative_study
from tests.common.ledger.consortium import Ledger, key_of, open_study
from tests.server_releases import KEYS, ONLINE, ROOT_SIGNERS

SITES = ("amber", "birch", "cedar")


class PublishedSite:
    """Versions 1, 2, … of one study, each with a random adapter of its own, pulled to `home` by commands.

    `scales` are the adapters' sizes: 0.2 answers well, 1e30 gives numbers that are not finite.
    """

    def __init__(self, directory: Path, *, scales: Sequence[float]) -> None:
        self.home, self.repository = directory / "home", directory / "repository"
        self.study = _study()
        self.ledger = Ledger(self.study, origin=origin_of(self.study))
        open_study(self.ledger)
        now = datetime.now(UTC)
        root = propose_root(KEYS, version=1, now=now)
        for name in ROOT_SIGNERS[:2]:
            root = sign_root(root, key_of(name))
        install_root(self.repository, root)
        initialise(self.repository, targets=key_of("targets"), online=ONLINE, now=now)
        for version, scale in enumerate(scales, start=1):
            folder = self._release(directory / f"release-{version}", version, scale)
            publish_release(
                self.repository, folder, trusts=[trust_of(self.study)], targets=key_of("targets"),
                online=ONLINE, now=now,
            )  # fmt: skip
        self._enrol(directory, root)
        for version in range(1, len(scales) + 1):
            assert self.run("model", "pull", self.repository, "--version", version) == {"version": version}

    def run(self, *arguments: object) -> Any:
        """Run `fedrad-site … --json` in this process; a refusal is raised."""
        given = [*map(str, arguments), "--home", str(self.home), "--json"]
        result = CliRunner().invoke(app, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def _release(self, folder: Path, version: int, scale: float) -> Path:
        rng = np.random.default_rng(version)
        size = vector_size(self.study.adapter.tensors)
        vector = (rng.standard_normal(size) * scale).astype(np.float32)
        write_release(
            folder, self.study, vector, key_of(OPERATOR), round=version, release_epsilon=7.5,
            card="# A model\n",
        )  # fmt: skip
        body = Release(
            version=version, adapter=vector_sha256(vector), number=version, base=self.study.base.name,
            site_epsilon=8.0, release_epsilon=7.5, delta=self.study.privacy.delta, files=list_files(folder),
        )  # fmt: skip
        index = self.ledger.add(body, OPERATOR)
        note = self.ledger.checkpoint()
        proof = LedgerProof(index, self.ledger.tree.prove_inclusion(index), note)
        write_atomic(folder / ENTRY_NAME, self.ledger.leaves[index])
        write_atomic(folder / PROOF_NAME, format_ledger_proof(proof))
        open_release(folder, operator_key=key_of(OPERATOR).public)
        return folder

    def _enrol(self, directory: Path, root: bytes) -> None:
        home = create_home(
            self.home, site="amber", operator_key=key_of(OPERATOR).public, data=directory / "data",
            bases={self.study.base.name: talkative_base()},
        )  # fmt: skip
        home.key_path.unlink()
        save_key(key_of("amber"), home.key_path)
        assert load_key(home.key_path).public == key_of("amber").public
        manifest = format_study(self.study)
        receive_study(home, manifest, key_of(OPERATOR).sign(Purpose.STUDY, manifest))
        approve_study(home, self.study.sha256)
        (directory / "1.root.json").write_bytes(root)
        self.run("model", "trust", directory / "1.root.json", "--study", self.study.study.id)


def _study() -> Study:
    study = talkative_study()
    sites = tuple(
        SiteSection(id=site, message_key=key_of(site).public, witness_key=key_of(f"{site} witness").public)
        for site in SITES
    )
    cohort = replace(
        study.cohort, operator_key=key_of(OPERATOR).public, site=sites, witness_quorum=2, min_sites=2
    )
    adapter = replace(study.adapter, initial_sha256="0" * 64)
    return replace(study, cohort=cohort, adapter=adapter)

"""A local run from study and data to result: set up, train, compare, measure, release, report.

Every step leaves its product in OUT and is skipped when it is there already, so the same command after a
kill goes on where it was. The comparisons train in a second process beside the federated rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from client.models import ModelPool
from common.config import Mode, Study
from common.errors import FedRadError, RunDirectoryBusy
from common.files import write_atomic
from common.identity import load_key
from common.ledger.audit import verify_bundle
from common.ledger.findings import Status
from common.ledger.release_proof import trust_of, verify_release_folder
from common.ledger.sbom import software
from common.model.lora import Vector, read_adapter, vector_sha256, vector_size
from common.model.manifest import verify_base
from common.model.release import write_release
from deploy.local.compare import read_comparison, training_parts
from deploy.local.consortium import LocalConsortium, set_up
from deploy.local.engines import Engine, run_engine
from deploy.local.measure import HeldOut, Scored, by_site, load_held_out, score
from deploy.local.report import write_report
from server.bundles import export_run
from server.checkpoint import read_records
from server.release_log import ledger_head, log_release, logged_evaluations, prove_release, stated_data


class Display(Protocol):
    """Where progress goes: a step's name, how far it is, and lines worth reading."""

    def step(self, name: str, done: int, total: int) -> None: ...

    def say(self, line: str) -> None: ...


class ComparisonFailed(FedRadError):
    """The process that trains the pooled and local models ended with an error."""


def run_study_locally(
    manifest: Path,
    *,
    data: Path,
    out: Path,
    engine: Engine,
    base: Path | None,
    compare: bool,
    display: Display,
) -> dict[str, Any]:
    """Run a study end to end and return what `OUT/result.json` holds.

    Raises the named errors of set-up, rounds and comparison; everything done so far stays resumable.
    """
    started = time.time()
    consortium = set_up(manifest, data=data, out=out, base=base)
    study = consortium.study
    finished = _finished_result(out, study, engine, compare=compare)
    if finished is not None:
        display.say(f"{out / 'result.json'}: this study has run to its end already")
        return finished
    seconds_before = _seconds_so_far(out)
    pool = ModelPool()
    with pool.use(study, consortium.base) as adapted:
        display.say(f"study {study.study.id} {study.sha256[:12]}, {len(study.site_ids)} sites")
        for number, (site, home) in enumerate(sorted(consortium.homes.items()), start=1):
            display.step("images to features", number - 1, len(consortium.homes))
            training_parts(adapted, study, {site: home})
            display.step("images to features", number, len(consortium.homes))
        held = {
            split: load_held_out(
                adapted, study, consortium.homes, split=split, limit=study.evaluation.max_studies,
                progress=lambda what, done, total: None,
            )
            for split in ("test", "validation")
        }  # fmt: skip
    comparison = _start_comparison(out) if compare else None
    try:
        _run_rounds(consortium, engine, display)
        verify_base(consortium.base, study.base.files)
        if comparison is not None:
            _await_comparison(comparison, study, display)
    finally:
        if comparison is not None and comparison.poll() is None:
            comparison.terminate()
            comparison.wait()
        _save_seconds(out, seconds_before + time.time() - started)
    with pool.use(study, consortium.base) as adapted:
        vectors = _vectors(out, study, compare)
        scored = {}
        for number, (name, (vector, shuffle)) in enumerate(vectors.items()):
            display.step("scoring", number, len(vectors))
            scored[name] = score(adapted, study, vector, held["test"], shuffle=shuffle)
        display.step("scoring", len(vectors), len(vectors))
        curve = _curve(out, study, adapted, held["validation"])
    result = _result(consortium, engine, scored, held["test"], seconds_before + time.time() - started)
    _release(consortium, vectors["federated"][0], result)
    result["ledger"] = _witness_release(consortium, result)
    result["seconds"] = round(seconds_before + time.time() - started, 2)
    write_report(
        out / "report.html", study=study, result=result, held=held["test"], scored=scored, curve=curve,
        log=_log(out),
    )  # fmt: skip
    write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def _run_rounds(consortium: LocalConsortium, engine: Engine, display: Display) -> None:
    """Run the engine while a second thread shows the rounds from the server's log."""
    stop = threading.Event()
    path = consortium.server / "log.jsonl"

    def watch() -> None:
        shown = 0
        while not stop.is_set():
            lines = path.read_text().splitlines() if path.is_file() else []
            for line in lines[shown:]:
                _show(line, consortium.study, display)
            shown = len(lines)
            stop.wait(0.3)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run_engine(consortium, engine, say=display.say)
    finally:
        stop.set()
        watcher.join()


def _show(line: str, study: Study, display: Display) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        return
    if event["event"] == "round":
        display.step("federated rounds", event["round"] + 1, study.rounds)
    elif event["event"] in ("round-failed", "site-not-ready"):
        display.say(json.dumps(event))


def _start_comparison(out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (out / "compare.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.local.compare", str(out.absolute())],
        stdout=log, stderr=subprocess.STDOUT, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def _await_comparison(comparison: subprocess.Popen[str], study: Study, display: Display) -> None:
    names = ["pooled", *(f"local-{site}" for site in sorted(study.site_ids))]
    total = len(names) * study.rounds
    log = Path(comparison.args[-1]) / "compare.log"  # type: ignore[index,arg-type]
    while True:
        code = comparison.poll()
        lines = [line for line in log.read_text().splitlines() if line.startswith('{"name"')]
        if lines:
            last = json.loads(lines[-1])
            display.step(
                "pooled and local training", names.index(last["name"]) * study.rounds + last["done"], total
            )
        if code is not None:
            break
        time.sleep(0.3)
    if code != 0:
        tail = " | ".join(log.read_text().splitlines()[-3:])
        raise ComparisonFailed(
            f"{log}: expected pooled and local training to end well, got exit {code}: {tail}"
        )


def _vectors(out: Path, study: Study, compare: bool) -> dict[str, tuple[Vector, bool]]:
    """Name the adapters to score, each with whether images are shuffled."""
    tensors = study.adapter.tensors
    federated = read_adapter(out / "server" / "rounds" / f"{study.rounds - 1:06d}", tensors)
    vectors = {
        "base": (read_adapter(out / "server" / "initial", tensors), False),
        "federated": (federated, False),
        "federated_shuffled_images": (federated, True),
    }
    if compare:
        for name in ("pooled", *(f"local-{site}" for site in study.site_ids)):
            vectors[name] = (read_comparison(out, name, study), False)
    return vectors


def _curve(out: Path, study: Study, adapted: Any, held: HeldOut) -> list[tuple[int, float]]:
    """Score the adapters that the server kept on the way: (rounds done, finding-F1 on validation)."""
    points = []
    if not held.pairs:
        return []
    kept = sorted(p for p in (out / "server" / "rounds").iterdir() if p.name.isdigit())
    start = read_adapter(out / "server" / "initial", study.adapter.tensors)
    for done, vector in [
        (0, start),
        *((int(path.name) + 1, read_adapter(path, study.adapter.tensors)) for path in kept),
    ]:
        points.append((done, float(score(adapted, study, vector, held).metrics["finding_f1"])))
    return points


def _result(
    consortium: LocalConsortium, engine: Engine, scored: dict[str, Scored], held: HeldOut, seconds: float
) -> dict[str, Any]:
    study, out = consortium.study, consortium.out
    metrics: dict[str, Any] = {
        name: one.metrics for name, one in scored.items() if not name.startswith("local-")
    }
    local = {name.removeprefix("local-"): one.metrics for name, one in scored.items() if "local-" in name}
    metrics["local"] = local
    metrics["federated_by_site"] = by_site(
        held, scored["federated"].reports, resamples=study.evaluation.resamples
    )
    traffic = json.loads((out / "server" / "traffic.json").read_text())
    return {
        "study": study.sha256,
        "engine": engine.value,
        "sites": list(study.site_ids),
        "rounds": study.rounds,
        "seconds": round(seconds, 2),
        "metrics": metrics,
        "privacy": privacy_claim(consortium),
        "traffic": {
            "bytes_up_per_site_round": _per_message(study, traffic, "up"),
            "bytes_down_per_site_round": _per_message(study, traffic, "down"),
            "adapter_bytes": 4 * vector_size(study.adapter.tensors),
        },
        "ledger": {"size": 0, "root": "", "verified": False},
        "release": str(out / "release"),
        "report": str(out / "report.html"),
    }


def privacy_claim(consortium: LocalConsortium) -> dict[str, Any]:
    """Say what was spent, from the sites' ledgers and the server's records; null where nothing is claimed."""
    study = consortium.study
    claim: dict[str, Any] = {
        "unit": "patient",
        "site_epsilon": dict.fromkeys(study.site_ids),
        "release_epsilon": None,
        "delta": None,
        "mechanism": {"mode": study.privacy.mode.value},
    }
    if study.privacy.mode is Mode.PLAIN:
        return claim
    from client.budget import BudgetLimits, read_summary
    from common.privacy.mechanism import ServedRound, View
    from common.privacy.study_plan import plan_of

    plan = plan_of(study)
    for site, home in consortium.homes.items():
        limits = BudgetLimits(epsilon=home.epsilon, delta=home.delta)
        summary = read_summary(home.budget_path, limits)
        claim["site_epsilon"][site] = next(
            (account.epsilon_spent for account in summary.studies if account.study == study.sha256), 0.0
        )
    if study.privacy.mode is Mode.CONSORTIUM:
        records = [signed.record for signed in read_records(consortium.server)]
        served = [ServedRound(len(r.contributors), r.server_sigma_units) for r in records]
        claim["release_epsilon"] = plan.epsilon(View.RELEASE, served)
    else:
        claim["release_epsilon"] = max(claim["site_epsilon"].values())
    claim["delta"] = plan.delta
    claim["mechanism"] = plan.to_json() | {"seeded_for_test": study.testing is not None}
    return claim


def _per_message(study: Study, traffic: dict[str, Any], direction: str) -> float:
    """Bytes of one site and round, without those of the exchanges before the first and after the last."""
    outside = ("hello", "witness") if study.masked else ("hello",)
    names = [n for n in traffic["bytes"] if n.endswith(direction) and not n.startswith(outside)]
    total: int = sum(int(traffic["bytes"][name]) for name in names)
    exchanges = int(traffic["messages"].get(f"contribute-{direction}", 0))
    return round(total / max(1, exchanges), 1)


def _release(consortium: LocalConsortium, vector: Vector, result: dict[str, Any]) -> None:
    from server.model_card import Facts, model_card

    study, privacy, metrics = consortium.study, result["privacy"], result["metrics"]
    facts = Facts(
        adapter_sha256=vector_sha256(vector),
        rounds=study.rounds,
        site_epsilon=max((e for e in privacy["site_epsilon"].values() if e is not None), default=0.0),
        release_epsilon=privacy["release_epsilon"] or 0.0,
        data=stated_data(consortium.server),
        evaluations=logged_evaluations(consortium.server),
        metrics={name: one for name, one in metrics.items() if "finding_f1" in one},
        by_group=metrics["federated_by_site"],
    )
    write_release(
        consortium.out / "release", study, vector, load_key(consortium.server / "keys" / "message.key"),
        round=study.rounds - 1, release_epsilon=facts.release_epsilon, card=model_card(study, facts),
    )  # fmt: skip


def _witness_release(consortium: LocalConsortium, result: dict[str, Any]) -> dict[str, Any]:
    """Log the release, have the sites witness it, prove it, audit the whole run; returns the ledger's state.

    Raises QuorumNotReached or ReleaseUnproven.
    """
    study, release = consortium.study, consortium.out / "release"
    spent = [value for value in result["privacy"]["site_epsilon"].values() if value is not None]
    version = log_release(consortium.server, release, site_epsilon=max(spent, default=0.0))
    run_engine(consortium, Engine.INPROCESS, say=lambda line: None)
    prove_release(consortium.server, release, version=version)
    unprotected = study.privacy.mode is Mode.PLAIN or study.testing is not None
    verify_release_folder(release, [trust_of(study)], allow_unprotected=unprotected)
    bundle = export_run(consortium.out, exported_s=int(time.time()), software=software())
    report = verify_bundle(bundle, trusted=trust_of(study).log)
    head = ledger_head(consortium.server)
    verified = all(finding.status is not Status.FAIL for finding in report.findings)
    return {"size": head.size, "root": head.root, "verified": verified}


def _finished_result(out: Path, study: Study, engine: Engine, *, compare: bool) -> dict[str, Any] | None:
    path = out / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("study") != study.sha256:
        raise RunDirectoryBusy(f"{path}: expected a result of this study, got one of another")
    if result.get("engine") != engine.value:
        raise RunDirectoryBusy(
            f"{path}: expected a result of engine {engine.value}, got one of {result.get('engine')}; "
            "choose another --out"
        )
    if compare and "pooled" not in result["metrics"]:
        raise RunDirectoryBusy(
            f"{path}: expected a result with comparisons, got one without; choose another --out"
        )
    return result


def _seconds_so_far(out: Path) -> float:
    path = out / "seconds.json"
    return float(json.loads(path.read_text())) if path.is_file() else 0.0


def _save_seconds(out: Path, seconds: float) -> None:
    write_atomic(out / "seconds.json", json.dumps(seconds).encode())


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "server" / "log.jsonl").read_text().splitlines()]

"""What is installed: our four packages and nothing else of anybody's, each role without the other's."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (
    "common/model/tiny_base/model.safetensors",
    "common/model/tiny_base/tokenizer.json",
    "common/model/tiny_words.txt",
    "common/ledger/controls.json",
    "client/agent.proto",
    "client/evaluate/report.html.j2",
    "deploy/local/report.html.j2",
    "deploy/local/fab/pyproject.toml",
    "deploy/server/fab/pyproject.toml",
    "deploy/proxy/nginx.conf.template",
    "deploy/proxy/Caddyfile.template",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_our_packages_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"client", "common", "deploy", "server"}
    assert not set(NEEDED) - set(names)
    assert wheel.stat().st_size < 6 << 20


def test_no_other_distribution_owns_our_package_names() -> None:
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    for name in ("client", "common", "deploy", "server"):
        assert set(owners.get(name, [])) <= {"fedrad"}


@pytest.mark.parametrize(
    ("missing", "modules"),
    [
        (("client", "deploy"), ("server.app", "server.cli", "server.collect", "server.studies")),
        (("server", "deploy"), ("client.app", "client.cli", "client.agent", "client.service")),
        (
            ("client", "server", "deploy", "torch", "numpy", "flwr"),
            ("common.ledger.cli", "common.ledger.audit"),
        ),
    ],
)
def test_each_role_imports_without_the_others(missing: tuple[str, ...], modules: tuple[str, ...]) -> None:
    program = (
        "import sys, importlib\n"
        f"for name in {missing!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=dict(os.environ), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

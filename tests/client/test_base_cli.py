"""`fedrad-site base`: import, verify and list, as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.home import create_home
from common.model.tiny import tiny_base_directory
from tests.common.model.convert.foreign import Size, write_llava_med


def run(*arguments: str, home: Path) -> tuple[int, Any, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "client.cli", "base", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"FEDRAD_SITE_HOME": str(home), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    return ran.returncode, json.loads(ran.stdout) if ran.stdout else None, ran.stderr


@pytest.mark.slow
def test_a_base_is_imported_named_verified_and_listed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    tiny = tiny_base_directory()
    create_home(home, site="north", operator_key="0" * 64, data=tmp_path / "data", bases={"tiny": tiny})
    write_llava_med(tmp_path / "source", Size())
    out = tmp_path / "base"
    code, made, _ = run("import", str(tmp_path / "source"), "--out", str(out), "--name", "med", home=home)
    assert (code, made["kind"], made["name"]) == (0, "llava-med", "med")
    code, verified, _ = run("verify", "med", home=home)
    assert (code, verified["sha256"], verified["import_verified"]) == (0, made["sha256"], True)
    code, listed, _ = run("list", home=home)
    assert [(base["name"], base["kind"], base["present"]) for base in listed] == [
        ("med", "llava-med", True),
        ("tiny", None, True),
    ]
    assert run("verify", str(tiny), home=home)[1]["import_verified"] is False
    (out / "config.json").write_text("{}")
    code, value, error = run("verify", "med", home=home)
    assert (code, value) == (1, None) and "error: " in error
    code, _, error = run("import", "--out", str(tmp_path / "other"), home=home)
    assert code == 1 and "expected the folder with the published files" in error
    code, _, error = run("import", str(tmp_path / "source"), "--out", str(out), home=home)
    assert code == 1 and "no directory here yet" in error

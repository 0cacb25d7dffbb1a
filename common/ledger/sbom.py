"""What code is running: a CycloneDX 1.6 list, and the two hashes that study and round entries carry.

Guarantees: sorted and without a time or serial number, so the same environment gives the same bytes. It lists
what is installed, not what was imported, and does not look inside a distribution.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.canonical import canonical_json, sha256_hex


def make_sbom() -> bytes:
    """Encode the environment's distributions as CycloneDX JSON."""
    found: dict[str, dict[str, Any]] = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
        if not name:
            continue
        component: dict[str, Any] = {
            "bom-ref": f"pkg:pypi/{name}@{distribution.version}",
            "name": name,
            "purl": f"pkg:pypi/{name}@{distribution.version}",
            "type": "library",
            "version": distribution.version,
        }
        licence = distribution.metadata.json.get("license_expression")
        if licence:
            component["licenses"] = [{"expression": licence}]
        found[component["purl"]] = component
    return canonical_json(
        {
            "bomFormat": "CycloneDX",
            "components": [found[purl] for purl in sorted(found)],
            "metadata": {"component": {"name": "fedrad", "type": "application"}},
            "specVersion": "1.6",
            "version": 1,
        }
    )


@functools.cache
def code_sha256(packages: tuple[str, ...] = ("client", "common", "deploy", "server")) -> str:
    """Hash the source of the packages that are installed: SHA-256 over sorted (path, file hash) lines."""
    lines = []
    for package in sorted(packages):
        spec = find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                name = f"{package}/{path.relative_to(root).as_posix()}"
                lines.append(f"{name} {sha256_hex(path.read_bytes())}\n")
    return sha256_hex("".join(sorted(lines)).encode())


@functools.cache
def dependencies_sha256() -> str:
    """Hash the installed distributions: SHA-256 of the SBOM, which names each with its version."""
    return sha256_hex(make_sbom())


def software() -> str:
    """Name the running distribution and its version."""
    try:
        return f"fedrad {version('fedrad')}"
    except PackageNotFoundError:
        return "fedrad 0-source"

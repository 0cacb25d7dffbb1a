"""A CycloneDX 1.6 list of the running code: every installed distribution with version and licence.

Guarantees: sorted and without a time or serial number, so the same environment gives the same bytes. It lists
what is installed, not what was imported, and does not look inside a distribution.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from typing import Any

from common.canonical import canonical_json


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

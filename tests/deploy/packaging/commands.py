"""The commands that images, compose files, charts and units start, taken from those files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
SITE_VALUES: dict[str, Any] = {
    "site": "north",
    "server": {"cidrs": ["192.0.2.7/32"], "port": 8443},
    "data": {"existingClaim": "prepared"},
    "base": {"existingClaim": "base", "subPath": "llava-rad"},
    "metrics": {"enabled": True},
    "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
    "proxy": {"url": "http://proxy.hospital:3128"},
}
ENVIRONMENT = {"FEDRAD_SITE": "north", "FEDRAD_DATA": "/srv/prepared", "FEDRAD_BASE": "/srv/base"}


def dockerfiles() -> list[Path]:
    return sorted((DEPLOY / "docker").glob("*.Dockerfile"))


def composed(name: str) -> dict[str, Any]:
    """Read a compose file, variables replaced as compose does it."""

    def value(found: re.Match[str]) -> str:
        key, rest = found[1], found[2] or ""
        return ENVIRONMENT.get(key, rest[2:] if rest.startswith(":-") else "")

    text = re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", value, (DEPLOY / "compose" / f"{name}.yaml").read_text())
    read: dict[str, Any] = yaml.safe_load(text)
    return read


def rendered(chart: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Render a chart with Helm's own library and return its documents."""
    with Chart.load(DEPLOY / "helm" / chart) as loaded:
        files = loaded.render(values=values, name="demo", namespace="fedrad")
    return [
        document
        for name, text in sorted(files.items())
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def charts() -> dict[str, list[dict[str, Any]]]:
    return {"fedrad-server": rendered("fedrad-server"), "fedrad-site": rendered("fedrad-site", SITE_VALUES)}


def units() -> list[Path]:
    return sorted((DEPLOY / "systemd").glob("*.service"))


def started() -> Iterator[tuple[str, list[str]]]:
    """Yield (where, argument list) of every command that anything here starts."""
    entry = {"server": ["fedrad-server"], "site": ["fedrad-site"]}
    for path in dockerfiles():
        found = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", path.read_text(), re.M))
        yield path.name, [*yaml.safe_load(found["ENTRYPOINT"]), *yaml.safe_load(found["CMD"])]
        for health in re.findall(r"^\s+CMD (\[.*\])$", path.read_text(), re.M):
            yield f"{path.name} healthcheck", yaml.safe_load(health)
    for role in ("server", "site"):
        for name, service in composed(role)["services"].items():
            yield f"{role}.yaml {name}", [*service.get("entrypoint", entry[role]), *service["command"]]
            if "test" in service["healthcheck"]:
                yield f"{role}.yaml {name} healthcheck", service["healthcheck"]["test"][1:]
    for chart, documents in charts().items():
        for document in documents:
            if document["kind"] != "Deployment":
                continue
            for container in document["spec"]["template"]["spec"]["containers"]:
                before = container.get("command") or entry[chart.removeprefix("fedrad-")]
                yield f"{chart} {container['name']}", [*before, *container.get("args", [])]
                for probe in ("startupProbe", "livenessProbe"):
                    if "exec" in container.get(probe, {}):
                        yield f"{chart} {container['name']} {probe}", container[probe]["exec"]["command"]
    for path in units():
        for line in re.findall(r"^ExecStart(?:Pre)?=\+?(.*)$", path.read_text(), re.M):
            words = shlex.split(line)
            if words[0] != "/bin/sh":
                yield path.name, [Path(words[0]).name, *words[1:]]

"""Linters of others over all that is shipped: hadolint, Helm, the Kubernetes API's schema, systemd."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, HelmError, lint

from tests.deploy.packaging.commands import (
    DEPLOY,
    ROOT,
    SITE_VALUES,
    charts,
    composed,
    dockerfiles,
    rendered,
    units,
)

HADOLINT = Path(sys.executable).with_name("hadolint")
SYSTEMD = shutil.which("systemd-analyze")
KUBERNETES = ("1.29", "1.37")
WORST = {"fedrad-agent.service": 1.0}  # exposure levels that systemd gives, 0 safe … 10 unsafe; else 1.5


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_an_image_runs_as_a_user_without_rights_and_has_a_healthcheck(path: Path) -> None:
    final = path.read_text().rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", final, re.M) == ["10001:10001"]
    assert "HEALTHCHECK" in final
    assert re.findall(r"^COPY (.*)$", final, re.M) == ["--from=build /opt/fedrad /opt/fedrad"]
    assert not re.search(r"sudo|chmod [^\n]*[2467][0-7]{3} |ADD |curl|wget", final)


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_a_build_context_holds_no_keys_and_nothing_that_is_not_copied(path: Path) -> None:
    lines = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.M)
        for source in sources.split()
    }
    assert "*" in lines
    assert allowed == copied
    assert {"**/keys", "**/*.key", "**/*.secret"} <= set(lines)


def test_torch_comes_from_one_index_only_and_volta_is_a_build_argument() -> None:
    text = (DEPLOY / "docker" / "site.Dockerfile").read_text()
    assert re.search(r"ARG TORCH_INDEX=https://download\.pytorch\.org/whl/cpu", text)
    assert '--index-url "${TORCH_INDEX}" "torch==2.13.0"' in text
    assert "--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126" in text
    assert "extra-index-url" not in text


# --- compose ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["server", "site", "gpu"])
def test_a_compose_file_is_of_the_compose_specification(name: str) -> None:
    schema = json.loads((ROOT / "tests" / "vectors" / "packaging" / "compose_spec.json").read_text())
    document = composed(name)
    document.pop("name", None)  # younger than this copy of the schema
    validator = jsonschema.Draft201909Validator(schema)
    assert [error.message for error in validator.iter_errors(document)] == []


@pytest.mark.parametrize("name", ["server", "site"])
def test_every_service_is_hardened(name: str) -> None:
    for service, value in composed(name)["services"].items():
        assert value["read_only"] is True, service
        assert value["cap_drop"] == ["ALL"], service
        assert "cap_add" not in value
        assert "privileged" not in value
        assert value["security_opt"] == ["no-new-privileges:true"], service
        assert value["user"] in ("10001:10001", "10002:10002"), service
        assert value["healthcheck"], service
        assert value["pids_limit"], service


def test_agent_and_supernode_are_two_users_that_share_a_socket_and_nothing_else() -> None:
    site = composed("site")
    agent, relay = site["services"]["agent"], site["services"]["relay"]
    assert agent["user"].split(":")[0] != relay["user"].split(":")[0]
    shared = {volume.split(":")[0] for volume in agent["volumes"]} & {
        volume.split(":")[0] for volume in relay["volumes"]
    }
    assert shared == {"socket"}
    assert agent["network_mode"] == "none"
    assert {volume.split(":")[0] for volume in relay["volumes"]} == {"relay", "socket"}


def test_the_supernode_has_no_way_but_to_the_gateway() -> None:
    site = composed("site")
    services, networks = site["services"], site["networks"]
    assert services["relay"]["network_mode"] == "service:gate"
    assert services["gate"]["networks"] == ["way"]
    assert networks["way"] == {"internal": True}
    assert [name for name, one in services.items() if "out" in one.get("networks", [])] == ["link"]
    assert services["gate"]["command"] == ["--listen", "127.0.0.1:9410", "--to", "link:9410"]


def test_nothing_but_the_door_is_published_beyond_this_machine() -> None:
    ports = [
        (name, port)
        for role in ("server", "site")
        for name, service in composed(role)["services"].items()
        for port in service.get("ports", [])
    ]
    assert [name for name, port in ports if not port.startswith("127.0.0.1:")] == ["server"]


def test_data_and_base_are_mounted_read_only() -> None:
    mounts = [v for v in composed("site")["services"]["agent"]["volumes"] if v.startswith("/")]
    assert len(mounts) == 2
    assert all(mount.endswith(":ro") for mount in mounts)


# --- charts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chart", "values"), [("fedrad-server", None), ("fedrad-site", SITE_VALUES)])
def test_helm_lint_finds_neither_error_nor_warning(chart: str, values: dict[str, Any] | None) -> None:
    report = lint(DEPLOY / "helm" / chart, values, strict=True, kube_version="v1.30.0")
    assert report["errors"] == []
    assert [one for one in report["messages"] if one["severity"] >= 2] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("chart", ["fedrad-server", "fedrad-site"])
def test_every_object_is_of_the_kubernetes_api(chart: str, version: str) -> None:
    documents = charts()[chart]
    assert {"Deployment", "NetworkPolicy", "PersistentVolumeClaim", "ServiceAccount"} <= {
        document["kind"] for document in documents
    }
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("chart", ["fedrad-server", "fedrad-site"])
def test_pods_meet_pod_security_restricted(chart: str) -> None:
    """The restricted profile, control by control, as the Kubernetes documentation lists them."""
    for document in charts()[chart]:
        if document["kind"] != "Deployment":
            continue
        pod = document["spec"]["template"]["spec"]
        assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        allowed = {"name", "persistentVolumeClaim", "emptyDir", "configMap", "secret", "projected"}
        assert all(set(volume) <= allowed for volume in pod["volumes"])
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["initContainers"], *pod["containers"]]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["runAsNonRoot"] is True
            assert security.get("runAsUser", pod["securityContext"]["runAsUser"]) > 0
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert container["resources"]["limits"]["memory"]


def test_in_the_pod_the_relay_is_another_user_without_home_data_or_base() -> None:
    (pod,) = [d["spec"]["template"]["spec"] for d in charts()["fedrad-site"] if d["kind"] == "Deployment"]
    mounts = {
        container["name"]: {(m["name"], m.get("subPath", "")) for m in container["volumeMounts"]}
        for container in pod["containers"]
    }
    users = {c["name"]: c["securityContext"].get("runAsUser", 10001) for c in pod["containers"]}
    assert mounts["relay"] == {("state", "relay"), ("state", "run"), ("relay-tmp", "")}
    assert mounts["agent"] & mounts["relay"] == {("state", "run")}
    assert (users["agent"], users["relay"]) == (10001, 10002)
    data = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] in ("data", "base")]
    assert [mount["readOnly"] for mount in data] == [True, True]


@pytest.mark.parametrize(
    ("proxy", "port"),
    [({}, 8443), ({"url": "http://proxy:3128"}, 3128), ({"existingSecret": "proxy", "port": 8080}, 8080)],
)
def test_the_sites_pod_may_reach_the_server_or_the_proxy_and_dns_only_and_nobody_may_reach_it(
    proxy: dict[str, Any], port: int
) -> None:
    values = {**SITE_VALUES, "metrics": {"enabled": False}, "proxy": proxy}
    (policy,) = [d["spec"] for d in rendered("fedrad-site", values) if d["kind"] == "NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == []
    out, dns = policy["egress"]
    assert out == {
        "ports": [{"protocol": "TCP", "port": port}], "to": [{"ipBlock": {"cidr": "192.0.2.7/32"}}]
    }  # fmt: skip
    assert {port["port"] for port in dns["ports"]} == {53}


def test_a_proxy_in_a_secret_needs_its_port() -> None:
    with pytest.raises(HelmError, match="expected the proxy's port"):
        rendered("fedrad-site", {**SITE_VALUES, "proxy": {"existingSecret": "proxy"}})


def test_the_servers_pod_reaches_nothing() -> None:
    (policy,) = [d["spec"] for d in charts()["fedrad-server"] if d["kind"] == "NetworkPolicy"]
    assert policy["egress"] == []
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [8443, 9464]


def test_the_volume_with_the_keys_outlives_the_release() -> None:
    for documents in charts().values():
        (claim,) = [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@pytest.mark.parametrize(
    "wrong",
    [
        {"site": "North Clinic"}, {"site": ""}, {"server": {"cidrs": [], "port": 8443}},
        {"server": {"cidrs": ["fedrad.example.org"], "port": 8443}}, {"data": {"existingClaim": ""}},
        {"proxy": {"url": "http://user:password@proxy:3128"}},
        {"image": {"repository": "x", "tag": "latest"}},
        {"unknown": 1}, {"storage": {"size": "50", "accessMode": "ReadWriteOnce"}},
    ],
)  # fmt: skip
def test_values_outside_the_schema_are_refused(wrong: dict[str, Any]) -> None:
    with Chart.load(DEPLOY / "helm" / "fedrad-site") as chart, pytest.raises(HelmError):
        chart.validate_schema({**SITE_VALUES, **wrong})


def test_values_as_the_documentation_gives_them_pass_the_schema() -> None:
    with Chart.load(DEPLOY / "helm" / "fedrad-site") as chart:
        chart.validate_schema(SITE_VALUES)


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("helm/*/values.yaml")), ids=lambda path: path.parent.name)
def test_every_value_is_in_the_schema(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    schema = json.loads(path.with_name("values.schema.json").read_text())
    assert set(values) <= set(schema["properties"])


# --- units ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(SYSTEMD is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", units(), ids=lambda path: path.name)
def test_systemd_verifies_a_unit_and_finds_it_little_exposed(path: Path, tmp_path: Path) -> None:
    here = str(Path(sys.executable).parent)
    for unit in units():  # verify wants the programs to be there, and the units that one names
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/fedrad/bin", here))
    assert SYSTEMD is not None
    done = subprocess.run(
        [SYSTEMD, "verify", "--no-pager", "--man=no", tmp_path / path.name], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "fedrad" in line]
    assert (done.returncode, said) == (0, []), done.stderr
    done = subprocess.run(
        [SYSTEMD, "security", "--offline=true", "--no-pager", path], capture_output=True, text=True
    )
    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= WORST.get(path.name, 1.5)


def test_the_relays_unit_can_see_neither_home_nor_data_and_reach_loopback_only() -> None:
    text = (DEPLOY / "systemd" / "fedrad-relay.service").read_text()
    for line in (
        "User=fedrad-relay", "InaccessiblePaths=-/var/lib/fedrad -/srv", "IPAddressDeny=any",
        "IPAddressAllow=localhost", "BindsTo=fedrad-link.service",
    ):  # fmt: skip
        assert f"\n{line}\n" in text


def test_the_agents_unit_has_no_network_and_sees_who_connects() -> None:
    text = (DEPLOY / "systemd" / "fedrad-agent.service").read_text()
    for line in ("PrivateNetwork=yes", "RestrictAddressFamilies=AF_UNIX", "PrivateUsers=no", "User=fedrad"):
        assert f"\n{line}\n" in text


def test_every_account_of_a_unit_is_made() -> None:
    made = set(re.findall(r"^u (\S+)", (DEPLOY / "systemd" / "fedrad.sysusers").read_text(), re.M))
    for path in units():
        unit = configparser.RawConfigParser(strict=False)
        unit.read_string(path.read_text())
        assert unit["Service"]["User"] in made
        assert unit["Service"]["NoNewPrivileges"] == "yes"

"""The files of configs/deploy: their structure, that they fit each other, and that they name what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from prometheus_client import CollectorRegistry
from ruamel.yaml import YAML

from cluster.config.deployment import Config, load_config
from cluster.server.head import _END_WITHIN_S
from cluster.server.metrics import MetricsServer
from cluster.stages.local_ray import DAEMON_ENVIRONMENT
from tests.support.rigs.service import Bench

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "configs" / "deploy"
RAY_CLUSTER = DEPLOY / "kubernetes" / "raycluster.yaml"
DOCUMENT = (ROOT / "docs" / "deploy.md").read_text()
METRIC = re.compile(r"\blongreach_\w+")


def documents(path: Path) -> list[Any]:
    return list(YAML(typ="safe").load_all(path.read_text()))


def check(schema: str, content: Any) -> None:
    validator = Draft202012Validator(
        json.loads((ROOT / "tests" / "support" / "schemas" / f"{schema}.json").read_text())
    )
    errors = [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(content)]
    assert errors == []


def of_kind(kind: str) -> Any:
    (found,) = [each for each in documents(RAY_CLUSTER) if each["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def cluster() -> Any:
    return of_kind("RayCluster")["spec"]


@pytest.fixture
def config_of_the_cluster(tmp_path: Path) -> Config:
    path = tmp_path / "longreach.yaml"
    path.write_text(of_kind("ConfigMap")["data"]["longreach.yaml"])
    return load_config(path)


def pods(cluster: Any) -> list[Any]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=lambda path: path.name)
def test_manifests_have_the_structure_of_their_kind(path: Path) -> None:
    for document in documents(path):
        check("kubernetes", document)


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [(["rayVersion"], 2.6), (["authOptions", "mode"], "none"), (["headGroupSpec", "template", "spec", "volumez"], []),
     (["headGroupSpec", "template", "spec", "securityContext", "runAsUser"], 0)],
    ids=["type", "value", "unknown-key", "root"],
)  # fmt: skip
def test_the_schema_refuses(keys: list[str], wrong: object) -> None:
    manifest = json.loads(json.dumps(of_kind("RayCluster")))  # anchors no longer share
    place = manifest["spec"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = wrong
    with pytest.raises(AssertionError, match=re.escape(keys[-1])):
        check("kubernetes", manifest)


def test_the_cluster_has_room_for_the_stages(cluster: Any, config_of_the_cluster: Config) -> None:
    section = config_of_the_cluster.cluster
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == section.pipeline_parallel_size
    cpus = int(workers["rayStartParams"]["num-cpus"])
    assert cpus == section.cpus_per_actor * section.expert_parallel_size
    assert cpus == int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert section.address == "auto"
    assert section.inter_node_tls


def test_what_pods_mount_is_declared(cluster: Any) -> None:
    for pod in pods(cluster):
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == volumes
    claims = {volume["persistentVolumeClaim"]["claimName"] for pod in pods(cluster) for volume in pod["volumes"]
              if "persistentVolumeClaim" in volume}  # fmt: skip
    secrets = {
        volume["secret"]["secretName"] for pod in pods(cluster) for volume in pod["volumes"] if "secret" in volume
    }
    made = {of_kind("PersistentVolumeClaim")["metadata"]["name"]}
    assert [name for name in (claims - made) | secrets if name not in DOCUMENT] == [], "docs/deploy.md makes them"


def test_files_of_the_configuration_are_mounted(cluster: Any, config_of_the_cluster: Config) -> None:
    head = pods(cluster)[0]["containers"][1]
    folders = [Path(mount["mountPath"]) for mount in head["volumeMounts"]]
    security = config_of_the_cluster.security
    for path in (
        security.api_keys_file, security.tls_cert_file, security.tls_key_file, config_of_the_cluster.data_dir,
        config_of_the_cluster.model.path,
    ):  # fmt: skip
        assert any(Path(str(path)).is_relative_to(folder) for folder in folders), path
    stage = pods(cluster)[1]["containers"][0]
    on_stages = {Path(mount["mountPath"]) for mount in stage["volumeMounts"]}
    assert {config_of_the_cluster.data_dir, config_of_the_cluster.model.path.parent} <= on_stages


def test_rays_token_reaches_the_head(cluster: Any) -> None:
    """The operator gives it to Ray's containers; the head's is not one of them."""
    assert cluster["authOptions"] == {"mode": "token"}
    environment = {each["name"]: each for each in pods(cluster)[0]["containers"][1]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    name = of_kind("RayCluster")["metadata"]["name"]
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}


def test_ray_has_the_same_settings_everywhere(cluster: Any) -> None:
    script = dict(re.findall(r"\b(RAY_\w+)=(\d+)", (DEPLOY / "ray-node.sh").read_text()))
    assert script.items() >= {name: value for name, value in DAEMON_ENVIRONMENT.items() if value == "0"}.items() - {
        ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # keeps a local Ray on loopback
    }
    for pod in pods(cluster):
        assert {each["name"]: each["value"] for each in pod["containers"][0]["env"]} == script


def test_there_is_time_to_drain(cluster: Any, config_of_the_cluster: Config) -> None:
    needed = config_of_the_cluster.server.drain_timeout_s + _END_WITHIN_S
    assert pods(cluster)[0]["terminationGracePeriodSeconds"] >= needed
    ray, _ = pods(cluster)[0]["containers"]
    assert float(ray["lifecycle"]["preStop"]["exec"]["command"][1]) > config_of_the_cluster.server.drain_timeout_s
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["longreach"]
    drain = load_config(DEPLOY / "longreach.yaml").server.drain_timeout_s
    assert float(compose["stop_grace_period"].removesuffix("s")) >= drain + _END_WITHIN_S


def test_ports_are_named_alike(cluster: Any, config_of_the_cluster: Config) -> None:
    ports = {port["name"]: port["containerPort"] for port in pods(cluster)[0]["containers"][1]["ports"]}
    server = config_of_the_cluster.server
    assert ports == {"lr-grpc": server.port, "lr-https": server.http_port}
    assert {port["targetPort"] for port in of_kind("Service")["spec"]["ports"]} == set(ports)
    allowed = {port["port"] for rule in of_kind("NetworkPolicy")["spec"]["ingress"] for port in rule.get("ports", ())}
    assert allowed == set(ports)
    (endpoint,) = documents(DEPLOY / "kubernetes" / "podmonitor.yaml")[0]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in ports
    assert endpoint["authorization"]["credentials"]["name"] in DOCUMENT


def test_the_version_of_ray_is_one_that_longreach_takes(cluster: Any) -> None:
    (least,) = re.findall(r'"ray>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= tuple(map(int, least.split(".")))


def test_compose() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    check("compose", compose)
    service, config = compose["services"]["longreach"], load_config(DEPLOY / "longreach.yaml")
    published = {port.rpartition(":")[2] for port in service["ports"]}
    assert published == {str(config.server.port), str(config.server.http_port)}
    assert f":{config.server.http_port}/ready" in " ".join(service["healthcheck"]["test"])
    mounted = {volume.removesuffix(":ro").rpartition(":")[2] for volume in service["volumes"]}
    assert {str(config.data_dir), str(config.model.path.parent)} <= mounted
    named = {volume.partition(":")[0] for volume in service["volumes"] if re.match(r"[a-z]+:", volume)}
    assert named == set(compose["volumes"])


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_dockerfile() -> None:
    found = instructions()
    known = [
        "ARG",
        "FROM",
        "ENV",
        "RUN",
        "COPY",
        "WORKDIR",
        "USER",
        "VOLUME",
        "EXPOSE",
        "STOPSIGNAL",
        "ENTRYPOINT",
        "CMD",
    ]
    assert {name for name, _ in found} <= set(known)
    stages = dict.fromkeys(re.findall(r"FROM \S+ AS (\S+)", (DEPLOY / "Dockerfile").read_text()))
    assert {"accelerator-cpu", "accelerator-cuda"} <= set(stages)
    assert ("ARG", "ACCELERATOR=cpu") in found
    assert any(text.startswith("accelerator-${ACCELERATOR} ") for name, text in found if name == "FROM")
    user = found.index(("USER", "1000:1000"))
    assert all(found.index(each) > user for each in found if each[0] in ("ENTRYPOINT", "CMD", "STOPSIGNAL"))
    assert ("STOPSIGNAL", "SIGTERM") in found
    assert json.loads(dict(found)["ENTRYPOINT"]) == ["longreach"], "in exec form, so that it is the process 1"
    assert json.loads(dict(found)["CMD"])[0] == "serve"
    (torch,) = re.findall(r'"(torch>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert [text.count(torch) for name, text in found if name == "RUN" and "pip install" in text] == [1, 1, 0]


def test_the_image_gets_what_the_package_needs() -> None:
    copied = [word for name, text in instructions() if name == "COPY" for word in text.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    allowed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    assert sorted(copied) == sorted(allowed)
    project = (ROOT / "pyproject.toml").read_text()
    packages = json.loads(re.findall(r"^packages = (\[.*\])", project, flags=re.M)[0])
    assert set(packages) <= set(copied)
    extras = re.findall(r"ARG EXTRAS=(\S+)", (DEPLOY / "Dockerfile").read_text())[0].split(",")
    assert [extra for extra in extras if not re.search(rf"^{extra} = \[", project, flags=re.M)] == []


def exported(bench: Bench) -> set[str]:
    """Every name of a series that a head may export, with the suffixes of counters and histograms."""
    server = MetricsServer(bench.service, bench.runtime, "", 0)
    assert isinstance(server.registry, CollectorRegistry)
    names = set()
    for family in server.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_the_dashboard_shows_metrics_that_exist(tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    check("grafana", dashboard)
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = {name for panel in panels for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    bench = Bench(tmp_path)
    try:
        known = exported(bench)
    finally:
        bench.close()
    assert shown - known == set()


def test_panels_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for at in (panel["gridPos"] for panel in panels):
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_document_names_every_file() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".dockerignore"]
    assert [path.name for path in files if path.name not in DOCUMENT] == []

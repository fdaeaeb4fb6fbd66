"""The chart, rendered by Helm's own library: valid objects, working probes, closed by default."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from docker.entrypoint.__main__ import parse
from export.architecture import Architecture
from tests.docker.harness import CHART, DOCKER, run

helm = pytest.importorskip("helm_python", reason="no helm-python-sdk: pip install '.[ops]'")
TOKEN = "t" * 32
EVERYTHING = {
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True},
    "otlp": {"url": "http://collector.tracing:4318/v1/traces"},
    "image": {"digest": "sha256:" + "0" * 64},
    "podLabels": {"team": "vision"},
    "nodeSelector": {"gpu": "h200"},
    "imagePullSecrets": [{"name": "registry"}],
    "tritonArgs": ["--log-info=false"],
    "networkPolicy": {
        "dns": [{"namespaceSelector": {"matchLabels": {"a": "dns"}}}],
        "collector": [{"namespaceSelector": {"matchLabels": {"a": "tracing"}}}],
    },
    "strategy": {"maxSurge": 0, "maxUnavailable": 1},
    "podDisruptionBudget": {"maxUnavailable": 2},
    "env": [{"name": "OMP_NUM_THREADS", "value": "4"}],
    "runtimeClassName": "nvidia",
    "priorityClassName": "production",
    "proxy": {
        "tokens": [TOKEN],
        "service": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "annotations": {"a": "b"},
        },
        "nodeSelector": {"edge": "yes"},
        "tolerations": [{"key": "edge", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    },
}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
CUSTOM = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
"""Kinds whose schema is not Kubernetes' own."""


def render(values: Mapping[str, Any] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """The chart's objects by kind and name."""
    given = {"proxy": {"tokens": [TOKEN]}} if values is None else values
    with helm.Chart.load(str(CHART)) as chart:
        return by_name(chart.render(given, name="r", namespace="n"))


def by_name(files: Mapping[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    return {(found["kind"], found["metadata"]["name"]): found for found in objects}


def server(objects: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The server's pod."""
    pod: dict[str, Any] = objects["Deployment", "r-triton-sam3"]["spec"]["template"]["spec"]
    return pod


def commands(container: Mapping[str, Any]) -> dict[str, list[str]]:
    """The commands that Kubernetes runs in the server's container, besides its main process."""
    found = {probe: container[probe]["exec"]["command"] for probe in PROBES}
    return found | {"preStop": container["lifecycle"]["preStop"]["exec"]["command"]}


@pytest.mark.parametrize("values", [None, EVERYTHING, {"proxy": {"enabled": False}}])
def test_every_object_is_valid(values: dict[str, Any] | None) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install '.[ops]'")
    objects = render(values)
    for (kind, _), found in objects.items():
        if kind not in CUSTOM:
            for version in ("1.31", "1.37"):
                kubernetes.validate(found, version, strict=True)
    assert {kind for kind, _ in objects} >= {"Deployment", "Service", "NetworkPolicy"}


def test_lint_finds_nothing_but_the_missing_icon() -> None:
    found = helm.lint(str(CHART), values=EVERYTHING)
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize(
    "values",
    [
        {},  # a proxy without a token would admit nobody, or everybody
        {"proxy": {"tokens": ["short"]}},
        {"proxy": {"tokens": [TOKEN]}, "replcas": 3},
        {"proxy": {"tokens": [TOKEN]}, "image": {"tag": "latest"}},
        {"proxy": {"tokens": [TOKEN]}, "resources": {"limits": {"memory": None}}},
    ],
)
def test_invalid_values_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        render(values)


def test_the_models_can_be_on_a_volume_of_another_kind() -> None:
    """Helm merges the given source into the default one, and a volume cannot have both."""
    folder = {"hostPath": {"path": "/srv/models"}}
    given = {"proxy": {"tokens": [TOKEN]}, "models": {"volume": folder}}
    with pytest.raises(helm.HelmError, match="/models/volume"):
        render(given)
    taken_out = {"volume": {**folder, "persistentVolumeClaim": None}}
    (models,) = [
        v
        for v in server(render({**given, "models": taken_out}))["volumes"]
        if v["name"] == "models"
    ]
    assert models == {"name": "models", **folder}


def test_the_image_understands_what_the_pod_runs() -> None:
    for values in (None, EVERYTHING):
        (container,) = server(render(values))["containers"]
        args = parse(container["args"])
        assert str(args.repository) in {m["mountPath"] for m in container["volumeMounts"]}
        assert args.watch_seconds == 0  # the kubelet watches
        questions = []
        for name, command in commands(container).items():
            assert command[:3] == ["python3", "-m", "docker.entrypoint"]
            probe = parse(command[3:])
            if name == "preStop":
                assert probe.drain_seconds == args.drain_seconds
            else:
                questions.append(probe.question)
                assert probe.timeout < container[name]["timeoutSeconds"]
        assert questions == ["startup", "live", "ready"]
        grace = server(render(values))["terminationGracePeriodSeconds"]
        assert grace > args.drain_seconds + args.exit_seconds


def test_the_startup_probe_allows_slow_starts() -> None:
    (container,) = server(render())["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_on_a_cpu_canaries_are_rare_but_the_start_is_still_noticed() -> None:
    """A canary encodes an image, which takes 14 to 60 s at full size on two cores."""
    values = {"proxy": {"tokens": [TOKEN]}, "probes": {"periodSeconds": 120}}
    (container,) = server(render(values))["containers"]
    periods = [container[probe]["periodSeconds"] for probe in PROBES]
    assert periods == [15, 120, 120]


def test_a_dead_server_is_not_drained() -> None:
    """Otherwise the restart waits for the hook and the requests in flight: a minute more."""
    pods = [o["spec"]["template"]["spec"] for (k, _), o in render().items() if k == "Deployment"]
    for pod in pods:
        (container,) = pod["containers"]
        assert "preStop" in container["lifecycle"]
        assert container["livenessProbe"]["terminationGracePeriodSeconds"] <= 10
    assert len(pods) == 2


def test_pods_meet_the_restricted_standard() -> None:
    for (kind, _), found in render(EVERYTHING).items():
        if kind != "Deployment":
            continue
        pod = found["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_user_ids_can_be_left_to_the_namespace() -> None:
    """OpenShift's restricted-v2 refuses others."""
    for values, expected in (({}, {1000, 101}), ({"fixedUserIds": False}, {None})):
        objects = render({"proxy": {"tokens": [TOKEN]}, **values})
        pods = [o["spec"]["template"]["spec"] for (k, _), o in objects.items() if k == "Deployment"]
        for name in ("runAsUser", "runAsGroup", "fsGroup"):
            assert {pod["securityContext"].get(name) for pod in pods} == expected


def test_a_rollout_may_take_as_long_as_a_start() -> None:
    """By default a rollout counts as failed after ten minutes."""
    spec = render()["Deployment", "r-triton-sam3"]["spec"]
    probe = spec["template"]["spec"]["containers"][0]["startupProbe"]
    assert spec["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]


def test_new_pods_are_spread_over_nodes_and_zones() -> None:
    """Pods of the previous rollout do not count: they are going away."""
    for (kind, _), found in render().items():
        if kind != "Deployment":
            continue
        template = found["spec"]["template"]
        spread = template["spec"]["topologySpreadConstraints"]
        keys = [one["topologyKey"] for one in spread]
        assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        for one in spread:
            assert one["matchLabelKeys"] == ["pod-template-hash"]
            assert one["whenUnsatisfiable"] == "ScheduleAnyway"
            selected = one["labelSelector"]["matchLabels"].items()
            assert selected <= template["metadata"]["labels"].items()


def test_models_are_read_only_and_other_volumes_are_limited() -> None:
    pod = server(render())
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"]
    for volume in pod["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"], volume["name"]


def test_shared_memory_follows_the_formula_and_the_models_limits() -> None:
    """The chart's defaults match the architecture and the decoder; its formula counts bytes."""
    architecture = Architecture()
    values = yaml.safe_load((CHART / "values.yaml").read_text())["shm"]
    assert values["grid"] == architecture.grid
    e, m = architecture.grid, architecture.mask_size
    embeddings = 4 * (256 * e * e + 32 * m * m + 64 * (2 * e) ** 2)
    pixels = 3 * architecture.image_size**2
    masks = 2 * m * m * (1 + 3 + 3)
    expected = 2 * values["images"] * (embeddings + pixels + values["objects"] * masks) + 2**26
    (shm,) = (v["emptyDir"] for v in server(render())["volumes"] if v["name"] == "shm")
    assert shm == {"medium": "Memory", "sizeLimit": str(expected)}


@contextmanager
def cluster(*deployments: dict[str, Any]) -> Iterator[str]:
    """The kubeconfig of an API server that knows only these deployments."""
    kinds = {"name": "deployments", "kind": "Deployment", "namespaced": True, "verbs": ["get"]}
    known = {
        "/apis/apps/v1": {
            "kind": "APIResourceList",
            "groupVersion": "apps/v1",
            "resources": [kinds],
        }
    }
    for found in deployments:
        where = found["metadata"]
        path = f"/apis/apps/v1/namespaces/{where['namespace']}/deployments/{where['name']}"
        known[path] = found

    class API(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = known.get(urlsplit(self.path).path)
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            missing = {"kind": "Status", "apiVersion": "v1", "code": 404, "reason": "NotFound"}
            self.wfile.write(json.dumps(answer or missing).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: pytest shows what matters."""

    with ThreadingHTTPServer(("127.0.0.1", 0), API) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"server": f"http://127.0.0.1:{server.server_port}"}
        yield json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": here}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": ""}}],
                "current-context": "c",
            }
        )
        server.shutdown()


def test_replicas_are_left_to_the_autoscaler() -> None:
    """An upgrade keeps the running replicas: without a number it would leave one."""
    name = "r-triton-sam3"
    assert "replicas" not in render(EVERYTHING)["Deployment", name]["spec"]
    running = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "n"},
        "spec": {"replicas": 5},
    }
    for values, replicas in ((EVERYTHING, 5), ({"proxy": {"tokens": [TOKEN]}}, 2)):
        with (
            cluster(running) as kubeconfig,
            helm.Config(kubeconfig_content=kubeconfig, namespace="n") as config,
            helm.Chart.load(str(CHART)) as chart,
        ):
            files = config.render(chart, values, name="r", namespace="n")
        assert by_name(files)["Deployment", name]["spec"]["replicas"] == replicas
    (metric,) = render(EVERYTHING)["HorizontalPodAutoscaler", "r-triton-sam3"]["spec"]["metrics"]
    adapter = yaml.safe_load((DOCKER / "helm" / "prometheus-adapter.yaml").read_text())
    assert metric["pods"]["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"]


def test_only_the_proxy_and_the_monitoring_reach_a_server() -> None:
    policy = render()["NetworkPolicy", "r-triton-sam3"]["spec"]
    calls, metrics = policy["ingress"]
    assert calls["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "proxy"
    assert [port["port"] for port in calls["ports"]] == [8000, 8001]
    assert [port["port"] for port in metrics["ports"]] == [8002]
    assert policy["egress"] == []
    calls, metrics = render()["NetworkPolicy", "r-triton-sam3-proxy"]["spec"]["ingress"]
    assert [port["port"] for port in calls["ports"]] == [8443]
    assert [port["port"] for port in metrics["ports"]] == [9902]


def test_policies_name_ports_of_the_pods_by_number() -> None:
    """OVN-Kubernetes treats a port name as all ports."""
    objects = render(EVERYTHING)
    for component in ("r-triton-sam3", "r-triton-sam3-proxy"):
        (container,) = objects["Deployment", component]["spec"]["template"]["spec"]["containers"]
        listening = {port["containerPort"] for port in container["ports"]}
        rules = objects["NetworkPolicy", component]["spec"]["ingress"]
        assert {port["port"] for rule in rules for port in rule["ports"]} == listening


def test_pods_reach_dns_and_traces_and_nothing_else() -> None:
    (servers, dns) = render()["NetworkPolicy", "r-triton-sam3-proxy"]["spec"]["egress"]
    assert "to" in servers
    assert "to" not in dns
    assert {port["port"] for port in dns["ports"]} == {53, 5353}  # OpenShift's pods listen on 5353
    for name in ("r-triton-sam3", "r-triton-sam3-proxy"):
        for rule in render(EVERYTHING)["NetworkPolicy", name]["spec"]["egress"]:
            assert rule["to"]
    dns, traces = render(EVERYTHING)["NetworkPolicy", "r-triton-sam3"]["spec"]["egress"]
    peers = EVERYTHING["networkPolicy"]
    assert isinstance(peers, dict)
    assert (dns["to"], traces["to"]) == (peers["dns"], peers["collector"])
    assert [port["port"] for port in traces["ports"]] == [4318]


def test_the_charts_rules_are_the_tested_ones() -> None:
    written = yaml.safe_load((CHART / "files" / "rules.yml").read_text())
    assert render(EVERYTHING)["PrometheusRule", "r-triton-sam3"]["spec"] == written


def test_envoy_accepts_the_rendered_configuration(
    tmp_path: Path, certificate: Path, tool: Callable[[str, str], Path]
) -> None:
    envoy = tool("envoy", "pip install '.[ops]'")
    objects = render({"proxy": {"tokens": [TOKEN, "u" * 40]}})
    text = objects["Secret", "r-triton-sam3-proxy"]["stringData"]["envoy.yaml"]
    assert text.count("r-triton-sam3-servers") == 2
    assert f"Bearer {TOKEN}" in text
    assert "REPLACE" not in text
    config = tmp_path / "envoy.json"
    config.write_text(text.replace("/etc/envoy", str(certificate)))
    json.loads(text)
    result = run([envoy, "--mode", "validate", "--config-path", config])
    assert result.returncode == 0, result.stderr


def tenant(token: str) -> str:
    """The tenant's name in the proxy's log."""
    return f"tenant-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def test_every_tenant_has_a_policy_of_its_own_name() -> None:
    tokens = [TOKEN, "u" * 40]
    sam3 = envoy({"proxy": {"tokens": tokens}})["static_resources"]["listeners"][1]
    (manager,) = sam3["filter_chains"][0]["filters"]
    policies = manager["typed_config"]["http_filters"][0]["typed_config"]["rules"]["policies"]
    headers = {name: policy["principals"][0]["header"] for name, policy in policies.items()}
    assert {name: header["string_match"]["exact"] for name, header in headers.items()} == {
        tenant(token): f"Bearer {token}" for token in tokens
    }


def envoy(values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The proxy's configuration."""
    text = render(values)["Secret", "r-triton-sam3-proxy"]["stringData"]["envoy.yaml"]
    config: dict[str, Any] = json.loads(text)
    return config


@pytest.mark.parametrize(
    ("values", "proxies", "images", "clicks"),
    [
        ({"replicas": 2}, 2, 2, 128),
        ({"replicas": 6}, 2, 6, 384),
        ({"replicas": 1}, 4, 1, 32),
        # Fewer would keep the autoscaler from ever seeing the demand.
        ({"replicas": 2, "autoscaling": {"enabled": True, "maxReplicas": 6}}, 2, 6, 384),
    ],
)
def test_every_proxy_has_its_share_of_the_requests_in_flight(
    values: dict[str, Any], proxies: int, images: int, clicks: int
) -> None:
    config = envoy({**values, "proxy": {"tokens": [TOKEN], "replicas": proxies}})
    admin, *clusters = config["static_resources"]["clusters"]
    assert "circuit_breakers" not in admin
    for cluster in clusters:
        thresholds = cluster["circuit_breakers"]["thresholds"]
        found = [(one["priority"], one["max_requests"]) for one in thresholds]
        assert found == [("DEFAULT", images), ("HIGH", clicks)]


@pytest.mark.parametrize(
    ("limit", "size"), [("4Gi", 2**32), ("900M", 900 * 10**6), ("1073741824", 2**30)]
)
def test_envoys_heap_is_within_the_pods_memory(limit: str, size: int) -> None:
    proxy = {"tokens": [TOKEN], "resources": {"limits": {"memory": limit}}}
    heap, _ = envoy({"proxy": proxy})["overload_manager"]["resource_monitors"]
    assert heap["typed_config"]["max_heap_size_bytes"] == size * 80 // 100


def test_the_envoy_file_is_for_one_server_and_one_proxy() -> None:
    written = json.dumps(yaml.safe_load((CHART / "files" / "envoy.yaml").read_text()))
    rendered = json.dumps(envoy({"replicas": 1, "proxy": {"tokens": [TOKEN], "replicas": 1}}))
    rendered = rendered.replace("r-triton-sam3-servers", "triton")
    rendered = rendered.replace(TOKEN, "REPLACE-BY-A-LONG-RANDOM-TOKEN")
    rendered = rendered.replace(tenant(TOKEN), "one-tenant")
    assert json.loads(rendered) == json.loads(written)


def test_a_new_server_is_found_before_the_old_one_ends() -> None:
    """Endpoints within 2 s; a TTL of 30 s, as CoreDNS uses in many clusters."""
    (container,) = server(render())["containers"]
    for cluster in envoy()["static_resources"]["clusters"][1:]:
        (check,) = cluster["health_checks"]
        dns = cluster["cluster_type"]["typed_config"]
        looks = (dns["dns_refresh_rate"], check["interval"], check["timeout"])
        seconds = sum(int(look.removesuffix("s")) for look in looks)
        assert parse(container["args"]).drain_seconds > 2 + 30 + seconds


def test_a_rollout_without_a_spare_gpu_can_be_configured() -> None:
    for values, expected in (
        (None, {"maxSurge": 1, "maxUnavailable": 0}),
        (EVERYTHING, {"maxSurge": 0, "maxUnavailable": 1}),
    ):
        strategy = render(values)["Deployment", "r-triton-sam3"]["spec"]["strategy"]
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": expected}


def test_proxies_are_scheduled_and_monitored_like_servers() -> None:
    objects = render(EVERYTHING)
    deployment = objects["Deployment", "r-triton-sam3-proxy"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    pod = deployment["template"]["spec"]
    given = EVERYTHING["proxy"]
    assert isinstance(given, dict)
    for name in ("nodeSelector", "tolerations", "affinity"):
        assert pod[name] == given[name]
    assert pod["imagePullSecrets"] == EVERYTHING["imagePullSecrets"]
    budget = objects["PodDisruptionBudget", "r-triton-sam3-proxy"]["spec"]
    assert budget["maxUnavailable"] == 1
    assert objects["PodDisruptionBudget", "r-triton-sam3"]["spec"]["maxUnavailable"] == 2
    assert objects["Service", "r-triton-sam3"]["spec"]["externalTrafficPolicy"] == "Local"
    monitor = objects["PodMonitor", "r-triton-sam3-proxy"]["spec"]
    for selector in (budget["selector"], monitor["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listening = {
        listener["name"]: listener["address"]["socket_address"]["port_value"]
        for listener in envoy(EVERYTHING)["static_resources"]["listeners"]
    }
    assert ports == {"https": listening["sam3"], "metrics": listening["metrics"]}
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "metrics"

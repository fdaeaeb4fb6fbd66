"""The chart, rendered by Helm's own library: valid objects, true probes, closed by default."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from docker.entrypoint.__main__ import parse
from export.architecture import Architecture
from tests.docker.harness import CHART, DOCKER, run

helm = pytest.importorskip("helm_python", reason="no helm-python-sdk: pip install '.[ops]'")
TOKEN = "t" * 32
EVERYTHING = {
    "ingress": {"enabled": True},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True},
    "otlp": {"url": "http://collector.tracing:4318/v1/traces"},
    "image": {"digest": "sha256:" + "0" * 64},
    "podLabels": {"team": "vision"},
    "nodeSelector": {"gpu": "h200"},
    "imagePullSecrets": [{"name": "registry"}],
    "tritonArgs": ["--log-info=false"],
    "proxy": {"tokens": [TOKEN], "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
}
CUSTOM = {"ServiceMonitor", "PrometheusRule"}
"""Kinds whose schema is not Kubernetes' own."""


def render(values: Mapping[str, Any] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """The chart's objects by kind and name."""
    given = {"proxy": {"tokens": [TOKEN]}} if values is None else values
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(given, name="r", namespace="n")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    return {(found["kind"], found["metadata"]["name"]): found for found in objects}


def server(objects: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The server's pod."""
    pod: dict[str, Any] = objects["Deployment", "r-triton-sam3"]["spec"]["template"]["spec"]
    return pod


def commands(container: Mapping[str, Any]) -> dict[str, list[str]]:
    """What Kubernetes runs in the server's container, but for its main process."""
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    found = {probe: container[probe]["exec"]["command"] for probe in probes}
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
        {},  # a proxy without a token would let nobody in, or everybody
        {"proxy": {"tokens": ["short"]}},
        {"proxy": {"tokens": [TOKEN]}, "replcas": 3},
        {"proxy": {"tokens": [TOKEN]}, "image": {"tag": "latest"}},
        {"proxy": {"tokens": [TOKEN]}, "resources": {"limits": {"memory": None}}},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        render(values)


def test_the_image_understands_what_the_pod_runs() -> None:
    for values in (None, EVERYTHING):
        (container,) = server(render(values))["containers"]
        args = parse(container["args"])
        assert str(args.repository) in {m["mountPath"] for m in container["volumeMounts"]}
        assert args.watch_seconds == 0  # the kubelet watches
        questions = []
        for name, command in commands(container).items():
            assert command[:3] == ["python3", "-m", "docker.entrypoint"]
            asked = parse(command[3:])
            if name == "preStop":
                assert asked.drain_seconds == args.drain_seconds
            else:
                questions.append(asked.question)
                assert asked.timeout < container[name]["timeoutSeconds"]
        assert questions == ["startup", "live", "ready"]
        grace = server(render(values))["terminationGracePeriodSeconds"]
        assert grace > args.drain_seconds + args.exit_seconds


def test_slow_starts_are_waited_for() -> None:
    (container,) = server(render())["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


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


def test_models_are_read_only_and_the_rest_is_bounded() -> None:
    pod = server(render())
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"]
    for volume in pod["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"], volume["name"]


def test_shared_memory_follows_the_formula_and_the_models_limits() -> None:
    """The chart's defaults are the architecture's and the decoder's; its formula counts bytes."""
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


def test_replicas_are_left_to_the_autoscaler() -> None:
    assert "replicas" not in render(EVERYTHING)["Deployment", "r-triton-sam3"]["spec"]
    (metric,) = render(EVERYTHING)["HorizontalPodAutoscaler", "r-triton-sam3"]["spec"]["metrics"]
    adapter = yaml.safe_load((DOCKER / "helm" / "prometheus-adapter.yaml").read_text())
    assert metric["pods"]["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"]


def test_only_the_proxy_and_the_monitoring_reach_a_server() -> None:
    policy = render()["NetworkPolicy", "r-triton-sam3"]["spec"]
    calls, metrics = policy["ingress"]
    assert calls["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "proxy"
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]
    assert policy["egress"] == []
    traced = render(EVERYTHING)["NetworkPolicy", "r-triton-sam3"]["spec"]
    assert 4318 in [port["port"] for port in traced["egress"][0]["ports"]]


def test_rules_are_those_that_are_tested() -> None:
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


@pytest.mark.parametrize(("servers", "proxies", "expected"), [(2, 2, 2), (6, 2, 6), (1, 4, 1)])
def test_every_proxy_has_its_share_of_new_images(servers: int, proxies: int, expected: int) -> None:
    values = {"replicas": servers, "proxy": {"tokens": [TOKEN], "replicas": proxies}}
    text = render(values)["Secret", "r-triton-sam3-proxy"]["stringData"]["envoy.yaml"]
    for cluster in json.loads(text)["static_resources"]["clusters"]:
        images, clicks = cluster["circuit_breakers"]["thresholds"]
        assert (images["priority"], images["max_requests"]) == ("DEFAULT", expected)
        assert (clicks["priority"], clicks["max_requests"]) == ("HIGH", 256)

"""Dashboard, rules and autoscaler use only metrics that a real server exposes."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.docker.harness import CHART, DOCKER, Container, free_ports, run
from tests.server import tiny
from triton_sam3 import Client

CONFIG = DOCKER / "prometheus" / "prometheus.yml"
RULES = CHART / "files" / "rules.yml"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "triton-sam3.json"
ADAPTER = DOCKER / "helm" / "prometheus-adapter.yaml"
OPERATIONS = DOCKER.parent / "docs" / "operations.md"

NOT_ON_A_CPU = {
    "nv_gpu_utilization": "DCGM reports it only with an NVIDIA GPU",
    "nv_gpu_memory_used_bytes": "DCGM reports it only with an NVIDIA GPU",
    "nv_gpu_memory_total_bytes": "DCGM reports it only with an NVIDIA GPU",
}
BUILT_IN = {"up", "ALERTS"}
PROVOKED = {"SAM3ImagesMissed"}
"""By the requests of `fail`."""
TOLERATED = {
    "SAM3NotAnswering": "only the tests send requests",
    "SAM3QueueLong": "the machine is busy",
    "SAM3Slow": "the machine is busy",
    "SAM3HostMemoryLow": "the machine is busy",
}


def groups() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return loaded


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


def alerts() -> list[str]:
    return [rule["alert"] for rule in rules() if "alert" in rule]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def panels() -> dict[str, list[str]]:
    """The dashboard's expressions by panel."""
    board = json.loads(DASHBOARD.read_text())
    return {
        panel["title"]: [target["expr"] for target in panel["targets"]]
        for panel in board["panels"]
        if panel["type"] != "row"
    }


def names(expression: str) -> set[str]:
    """The metrics in a PromQL expression."""
    bare = re.sub(r"\{[^{}]*\}", "", re.sub(r'"[^"]*"', "", expression))
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"\b(?:nv|sam3)_\w+|\bup\b|\bALERTS\b", bare))


def used() -> set[str]:
    board = [expression for expressions in panels().values() for expression in expressions]
    adapter = [
        rule["seriesQuery"] for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    ]
    return set().union(*map(names, [*board, *adapter, *(rule["expr"] for rule in rules())]))


def fail(container: Container) -> None:
    """Send a click on an evicted image, and a file that is no image."""
    click = {
        "points": {"datatype": "FP32", "shape": [1, 1, 1, 2], "data": [0.5, 0.5]},
        "point_labels": {"datatype": "INT32", "shape": [1, 1, 1], "data": [1]},
    }
    forgotten = {
        "image_id": {"datatype": "BYTES", "shape": [1, 1], "data": ["forgotten"]},
        "point_coords": click["points"],
        "point_labels": click["point_labels"],
    }
    picture = {"encoded_image": {"datatype": "BYTES", "shape": [1, 1], "data": ["bm9uZQ=="]}}
    for model, inputs, refusal in (
        ("sam3_prompt_decoder", forgotten, 404),
        ("sam3_interactive_file", {**picture, **click}, 400),
    ):
        body = {"inputs": [{"name": name, **tensor} for name, tensor in inputs.items()]}
        status, answer = container.call(f"/v2/models/{model}/infer", json.dumps(body).encode())
        assert status == refusal, answer


@pytest.fixture(scope="module")
def busy(container: Container) -> Container:
    """After a new image, a click on a kept one, and requests that were refused."""
    image = np.random.default_rng(2).integers(0, 256, (60, 60, 3), np.uint8)
    with Client(f"http://127.0.0.1:{container.http_port}") as client, client.open(image) as view:
        view.click(20, 20)
        view.click(30, 30)
    fail(container)
    return container


@pytest.fixture(scope="module")
def exposed(busy: Container) -> set[str]:
    """The names of the series that a real server exposes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{busy.metrics_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if line and not line.startswith("#")}


def test_every_metric_in_use_is_exposed(exposed: set[str]) -> None:
    unknown = used() - recorded() - BUILT_IN - set(NOT_ON_A_CPU) - exposed
    assert not unknown, f"not exposed: {sorted(unknown)}"


def test_metrics_listed_as_gpu_metrics_are_in_use_and_missing_on_a_cpu(exposed: set[str]) -> None:
    assert set(NOT_ON_A_CPU) <= used()
    if Path("/proc/driver/nvidia").exists():
        assert set(NOT_ON_A_CPU) <= exposed
    else:
        assert not set(NOT_ON_A_CPU) & exposed


def test_every_metric_of_ours_is_on_the_dashboard(exposed: set[str]) -> None:
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed if name.startswith("sam3_")
    }
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used()}
    assert ours <= shown, sorted(ours - shown)


def test_every_alert_has_a_runbook_and_an_action() -> None:
    sections = dict(re.findall(r"^### (SAM3\w+)\n(.*?)(?=^#)", OPERATIONS.read_text(), re.M | re.S))
    assert sorted(sections) == sorted(alerts())
    for rule in rules():
        if "alert" in rule:
            first_line = rule["annotations"]["action"].partition("; see ")[0].rstrip(".")
            assert " ".join(sections[rule["alert"]].split()).startswith(first_line)
            assert rule["labels"]["severity"] in ("critical", "warning")


@pytest.mark.proxy
def test_rules_and_configuration_are_valid(
    tool: Callable[[str, str], Path], tmp_path: Path
) -> None:
    promtool = tool("promtool", "apt-get install prometheus")
    for mounted in (CONFIG, RULES):
        shutil.copy(mounted, tmp_path)  # side by side, as compose mounts them
    commands: list[list[str | Path]] = [
        ["check", "rules", RULES],
        ["check", "config", tmp_path / CONFIG.name],
        # Every alert fires on its fault, and is silent on a healthy server.
        ["test", "rules", Path(__file__).with_name("rules_test.yml")],
    ]
    for command in commands:
        result = run([promtool, *command])
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def prometheus(
    busy: Container, tool: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A real Prometheus with the shipped configuration, scraping the real server."""
    program = tool("prometheus", "apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "300ms", "evaluation_interval": "300ms"}
    (job,) = config["scrape_configs"]
    job["static_configs"][0]["targets"] = [f"127.0.0.1:{busy.metrics_port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules.yml").write_text(RULES.read_text())
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not value(url, "count_over_time(nv_inference_count[1m]) > 5"):
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            fail(busy)  # a rate needs growth between two scrapes
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def value(url: str, expression: str) -> list[dict[str, Any]]:
    """The result of an instant query; empty while Prometheus starts."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}") as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except OSError:
        return []
    return result


def wait_for_value(url: str, expression: str) -> list[dict[str, Any]]:
    """Wait: after a scrape longer than its short interval there is a gap until the next."""
    return tiny.wait_for(lambda: value(url, expression), 10)


@pytest.mark.proxy
@pytest.mark.parametrize("panel", panels())
def test_a_real_prometheus_has_data_for_every_panel(
    prometheus: str, busy: Container, panel: str
) -> None:
    for expression in panels()[panel]:
        filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".+")
        if names(expression) & set(NOT_ON_A_CPU) or panel == "Alerts":
            continue
        assert wait_for_value(prometheus, filled), expression


@pytest.mark.proxy
def test_only_alerts_about_provoked_faults_are_pending(prometheus: str) -> None:
    """None fires so soon; those whose fault was provoked are pending."""
    for alert in PROVOKED:
        assert wait_for_value(prometheus, f'ALERTS{{alertname="{alert}"}}'), alert
    seen = {one["metric"]["alertname"] for one in value(prometheus, "ALERTS")}
    assert seen <= PROVOKED | set(TOLERATED)


@pytest.mark.proxy
def test_the_autoscalers_metric_is_recorded(prometheus: str) -> None:
    assert wait_for_value(prometheus, "sam3_queue_seconds_per_request")

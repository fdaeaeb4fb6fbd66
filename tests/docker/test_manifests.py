"""Dockerfile, compose file and KServe manifest: valid, closed, and understood by the image."""

import ast
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from docker.entrypoint.__main__ import parse
from tests.conftest import ROOT
from tests.docker.harness import CHART, DOCKER, run
from tests.docker.test_helm import render, server

OPS = "pip install '.[ops]'"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = DOCKER / "compose.yaml"


def instruction(name: str) -> list[str]:
    """The arguments of every instruction of that name, with continuation lines joined."""
    text = re.sub(r"\\\n", " ", DOCKERFILE)
    return re.findall(rf"^{name} +(.*)$", text, re.M)


def test_hadolint_finds_nothing(tool: Callable[[str, str], Path]) -> None:
    result = run([tool("hadolint", OPS), DOCKER / "Dockerfile"])
    assert result.returncode == 0, result.stdout


def test_the_image_is_pinned_and_does_not_run_as_root() -> None:
    assert re.fullmatch(r"TRITON=\S+/tritonserver:\d\d\.\d\d-py3", instruction("ARG")[0])
    assert instruction("USER")[-1] == "1000:1000"
    requirements = (DOCKER / "requirements.txt").read_text()
    packages = re.findall(r"^(\S+?)==(\S+)", requirements, re.M)
    assert len(packages) == requirements.count("==")
    assert requirements.count("--hash=sha256:") >= len(packages)


def test_the_bill_of_materials_names_every_package(
    tool: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """With the command of `make sbom`."""
    (line,) = re.findall(r"cyclonedx-py (.*)", (ROOT / "Makefile").read_text())
    words = line.replace("build/sbom.cdx.json", str(tmp_path / "sbom.json")).split()
    result = run([tool("cyclonedx-py", OPS), *words], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    components = json.loads((tmp_path / "sbom.json").read_text())["components"]
    requirements = (DOCKER / "requirements.txt").read_text()
    listed = {(one["name"], one["version"]) for one in components}
    assert listed == set(re.findall(r"^(\S+?)==(\S+)", requirements, re.M))
    assert all(one["externalReferences"][0]["hashes"] for one in components)


def test_the_decoders_torch_is_not_older_than_the_exporters() -> None:
    torch = pytest.importorskip("torch")
    pinned = re.search(r"^torch==(\S+)", (DOCKER / "requirements.in").read_text(), re.M)
    assert pinned is not None
    exporter = torch.__version__.split("+")[0]
    assert [int(n) for n in pinned[1].split(".")] >= [int(n) for n in exporter.split(".")]


def test_the_image_has_what_the_models_import(repository: Path) -> None:
    distribution = {"cv2": "opencv-python-headless", "PIL": "pillow"}
    given = {"triton_python_backend_utils"}  # by Triton
    installed = set(re.findall(r"^(\S+?)==", (DOCKER / "requirements.txt").read_text(), re.M))
    missing = set()
    for model in repository.iterdir():
        sources = list(model.rglob("*.py"))
        own = {source.stem for source in sources} | {source.parent.name for source in sources}
        for source in sources:
            for node in ast.walk(ast.parse(source.read_text())):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and node.level == 0
                    else []
                )
                missing |= {name.split(".")[0] for name in names} - own
    missing -= sys.stdlib_module_names | given
    assert {distribution.get(name, name) for name in missing} <= installed


def test_the_models_imports_are_found_without_environment_variables() -> None:
    """The stub of 2.51 embeds an isolated Python 3.12, which ignores PYTHONPATH."""
    assert not any("PYTHONPATH" in line for line in instruction("ENV"))
    (path,) = [line for line in instruction("RUN") if ".pth" in line]
    (packages,) = re.findall(r"--target (\S+)", DOCKERFILE)
    assert f'"{packages}"' in path
    (check,) = [line for line in instruction("RUN") if "import cv2" in line]
    assert check.startswith("python3 -I ")


def test_proxies_know_which_models_are_for_clients() -> None:
    """Each new model needs a decision: for clients, or only for the other models."""
    internal = {"sam3_image_encoder", "sam3_image_reader", "sam3_mask_writer"}
    models = {path.parent.name for path in (ROOT / "model_repository").glob("*/config.pbtxt")}
    nginx = re.search(r'location ~ "\^(\S+infer)\$"', (DOCKER / "proxy/nginx.conf").read_text())
    assert nginx is not None
    envoy = re.findall(r"regex: '(\S+infer)'", (CHART / "files" / "envoy.yaml").read_text())
    for found in (nginx[1], "|".join(envoy)):
        served = {name for name in models if re.fullmatch(found, f"/v2/models/{name}/infer")}
        assert served == models - internal


def test_the_image_understands_its_own_command() -> None:
    entrypoint, command = (json.loads(instruction(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert entrypoint == ["python3", "-m", "docker.entrypoint"]
    args = parse(command)
    assert args.watch_seconds > 0  # Docker restarts containers that exit, not unhealthy ones
    (check,) = instruction("HEALTHCHECK")
    options, _, asked_by = check.partition("CMD ")
    command = json.loads(asked_by)
    patience = re.search(r"--start-period=(\d+)m ", options)
    assert patience is not None
    assert int(patience[1]) * 60 >= values()["probes"]["startupSeconds"]
    assert command[:3] == entrypoint
    assert parse(command[3:]).question == "live"


def test_kernels_compiled_for_a_gpu_are_kept() -> None:
    """NVIDIA's images set CUDA_CACHE_DISABLE."""
    environment = dict(pair.split("=", 1) for pair in instruction("ENV")[0].split())
    assert environment["CUDA_CACHE_DISABLE"] == "0"
    triton = compose()["services"]["triton"]
    volumes = [volume for volume in triton["volumes"] if isinstance(volume, str)]
    assert any(
        environment["CUDA_CACHE_PATH"].startswith(volume.split(":")[1] + "/") for volume in volumes
    )


def test_only_what_is_copied_reaches_the_build() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    copied = [line for line in instruction("COPY") if not line.startswith("--from")]
    sources = [source for line in copied for source in line.split()[:-1]]
    allowed = [pattern[1:] for pattern in ignore if pattern.startswith("!")]
    for source in sources:
        assert (ROOT / source).exists()
        assert any(pattern.startswith(source) for pattern in allowed), source


def build_context() -> set[Path]:
    """What Dockerfile.dockerignore lets through; the last matching line decides."""
    context: set[Path] = set()
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        if line.startswith("!"):
            context |= set(ROOT.glob(line[1:]))
        else:
            context -= set(context if line == "*" else ROOT.glob(line))
    return context


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with the files that the build context lets through."""
    folder = tmp_path / "image"
    for source in build_context():
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    return folder


def test_everything_that_reaches_the_build_is_copied() -> None:
    sources = [ROOT / source for line in instruction("COPY") for source in line.split()[:-1]]
    for path in build_context():
        assert any(path.is_relative_to(source) for source in sources), path


def test_the_image_has_every_module_that_process_1_imports(image: Path) -> None:
    """Imports find only what the build context lets through, and the standard library."""
    script = f"import sys; sys.path.insert(0, {str(image)!r}); import docker.entrypoint.__main__"
    loaded = run([sys.executable, "-I", "-S", "-c", script], cwd=image)
    assert loaded.returncode == 0, loaded.stderr
    assert not (image / "server" / "__main__.py").exists()
    assert not (image / "server" / "backends").exists()


def test_the_entrypoint_is_importable_even_with_the_docker_sdk_installed(
    image: Path, tmp_path: Path
) -> None:
    """A namespace package would lose to the SDK's regular one, even one later on the path."""
    sdk = tmp_path / "site-packages" / "docker"
    sdk.mkdir(parents=True)
    (sdk / "__init__.py").touch()
    path = [str(image), str(sdk.parent)]
    script = f"import sys; sys.path[:0] = {path!r}; import docker.entrypoint.__main__"
    loaded = run([sys.executable, "-I", "-S", "-c", script], cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr


def test_compose_is_valid(tool: Callable[[str, str], Path]) -> None:
    check = tool("check-jsonschema", OPS)
    result = run([check, "--builtin-schema", "vendor.compose-spec", COMPOSE])
    assert result.returncode == 0, result.stdout + result.stderr


def values() -> dict[str, Any]:
    """The chart's defaults."""
    loaded: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def test_compose_opens_only_the_proxy() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"]
        for port in service.get("ports", []):
            assert name == "proxy" or port.startswith("127.0.0.1:")
    assert "ports" not in compose()["services"]["triton"]


class _Overrides(yaml.SafeLoader):
    """Reads Compose's tags as the values they leave."""


_Overrides.add_constructor("!reset", lambda _loader, _node: None)


def test_without_a_gpu_compose_requests_none_and_waits_longer() -> None:
    text = (DOCKER / "compose.cpu.yaml").read_text()
    (triton,) = yaml.load(text, _Overrides)["services"].values()
    assert triton["deploy"]["resources"] == {"reservations": None}
    args = parse(triton["command"])
    assert args.triton_args == []  # no CUDA pool
    check = triton["healthcheck"]
    probe = parse(check["test"][4:])
    assert probe.question == "live"
    assert probe.timeout == args.watch_timeout < int(check["timeout"].removesuffix("s"))
    # As in the image, except for the timeouts.
    assert check["start_period"] in instruction("HEALTHCHECK")[0]


def test_compose_mounts_files_that_exist() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./"):
                assert (DOCKER / source).exists(), source


def test_nginx_sees_replaced_files() -> None:
    """A bind mount of a single file keeps showing the file that existed at container creation."""
    targets = []
    for volume in compose()["services"]["proxy"]["volumes"]:
        if isinstance(volume, dict):
            assert "a folder with" in volume["source"]
            targets.append(volume["target"])
        else:
            source, target, _ = volume.split(":")
            assert (DOCKER / source).is_dir()
            targets.append(target)
    text = (DOCKER / "proxy" / "nginx.conf").read_text()
    named = re.findall(r"^ +(?:include|ssl_certificate\w*) (\S+);", text, re.M)
    folders = {str(Path("/etc/nginx", name).parent) for name in named}
    assert folders == set(targets)


def documented(start: str) -> str:
    """The commands of docs/operations.md that follow `start`, up to the first that runs Docker or
    kubectl."""
    text = (ROOT / "docs" / "operations.md").read_text().partition(f"**{start}**")[2]
    (block, *_) = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return str(re.split(r"^(?=docker |kubectl )", block, maxsplit=1, flags=re.M)[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
def test_documented_secrets_are_readable_only_by_their_container(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "ssl" / "sam3").mkdir(parents=True)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / "ssl" / "sam3" / name).touch()
    commands = documented("One host.").replace("/etc/", f"{tmp_path}/")
    for _ in range(2):  # for a second tenant
        assert run(["bash", "-euc", f"umask 022\n{commands}"], cwd=tmp_path).stderr == ""
    tokens = tmp_path / "sam3" / "tokens" / "tokens.conf"
    assert len(set(re.findall(r'^"Bearer [\w+/=]{40,}" TENANT;$', tokens.read_text(), re.M))) == 2
    owners = {"ssl/sam3/tls.crt": 101, "ssl/sam3/tls.key": 101, "sam3/grafana-password": 472}
    for name, owner in {**owners, "sam3/tokens/tokens.conf": 101}.items():
        status = (tmp_path / name).stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (owner, 0o400), name
        assert name.startswith("sam3/g") or (tmp_path / name).parent.stat().st_uid == owner


def test_the_documented_values_with_tokens_are_readable_only_by_their_owner(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    result = run(["bash", "-euc", f"umask 022\n{documented('Kubernetes')}"], cwd=tmp_path)
    assert result.stderr == ""
    written = tmp_path / "build" / "sam3.yaml"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    (token,) = yaml.safe_load(written.read_text())["proxy"]["tokens"]
    assert len(token) >= 40


def test_nginx_restarts_with_the_server() -> None:
    """It resolves an address only once."""
    needed = compose()["services"]["proxy"]["depends_on"]["triton"]
    assert needed == {"condition": "service_healthy", "restart": True}


def test_a_signal_is_never_lost() -> None:
    """Process 1 must have a handler for it from the start, and Python starts slowly."""
    assert compose()["services"]["triton"]["init"] is True


def test_compose_gives_time_to_drain_and_room_for_shared_memory() -> None:
    triton = compose()["services"]["triton"]
    args = parse(json.loads(instruction("CMD")[-1]))
    assert (
        int(triton["stop_grace_period"].removesuffix("s")) > args.drain_seconds + args.exit_seconds
    )
    volumes = server(render())["volumes"]
    (needed,) = (int(v["emptyDir"]["sizeLimit"]) for v in volumes if v["name"] == "shm")
    assert int(triton["shm_size"].removesuffix("gb")) * 2**30 >= needed


def test_kserves_commands_are_understood_by_the_image() -> None:
    documents = yaml.safe_load_all((DOCKER / "kserve" / "inferenceservice.yaml").read_text())
    runtime, service = documents
    (container,) = runtime["spec"]["containers"]
    args = parse(container["args"])
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = parse(container[name]["exec"]["command"][3:])
        assert (probe.http_port, probe.metrics_port) == (args.http_port, args.metrics_port)
        assert probe.timeout < container[name]["timeoutSeconds"]
    stop = parse(container["lifecycle"]["preStop"]["exec"]["command"][3:])
    assert stop.drain_seconds == args.drain_seconds
    grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > args.drain_seconds + args.exit_seconds
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    image = compose()["services"]["triton"]["image"]
    assert container["image"] == image
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": args.http_port, "grpc": args.grpc_port}
    assert container["ports"][0]["name"] == "http"  # KServe's service exposes it on port 80
    assert service["spec"]["predictor"]["maxReplicas"] == 1  # nothing here routes by image

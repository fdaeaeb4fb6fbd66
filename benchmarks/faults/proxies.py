"""The shipped nginx and Envoy configurations in front of real servers, on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environment import ROOT
from benchmarks.faults.container import Container, free_ports

TOKEN = "a-token-of-one-tenant-on-loopback/as-long-as-of-64-random-octets/in-base64+and-more=="
NGINX = ROOT / "docker" / "proxy"
ENVOY = ROOT / "docker" / "helm" / "triton-sam3" / "files" / "envoy.yaml"


def program(name: str) -> Path | None:
    """A tool next to this Python, where pip installs Envoy, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return Path(found) if found else None


def certify(openssl: Path, folder: Path) -> Path:
    """Create a self-signed tls.crt and tls.key for 127.0.0.1 in a folder."""
    command = [
        *(str(openssl), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder


class Proxy:
    """One running proxy; a context manager."""

    tenant: str
    """The name of the token's owner in its log."""

    def __init__(self, program: Path, folder: Path, certificate: Path) -> None:
        (self.port,) = free_ports(1)
        self.folder, self.log = folder, folder / "output"
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("tls.crt", "tls.key"):
            shutil.copy(certificate / name, folder)

    def configure(self, servers: Sequence[Container]) -> None:
        """Write the shipped configuration with this proxy's port, these servers, their limits."""
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def leave_out(self, server: Container) -> None:
        """Announce that a server is about to stop, if the proxy can be told."""

    def url(self, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{self.port}"

    def records(self) -> list[dict[str, Any]]:
        """The access log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def options(self) -> dict[str, Any]:
        """What a client needs in addition to the address."""
        token = {"authorization": f"Bearer {TOKEN}"}
        return {"headers": token, "root_certificates": self.folder / "tls.crt"}

    def servers_of_images(self) -> dict[str, set[str]]:
        """Which servers answered for each image."""
        found: dict[str, set[str]] = {}
        for record in self.records():
            if record["image"] and record["status"] == 200:
                found.setdefault(record["image"], set()).add(self.server_of(record))
        return found

    def server_of(self, record: dict[str, Any]) -> str:
        """Which server answered a request in the access log."""
        raise NotImplementedError

    def __enter__(self) -> Proxy:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it; safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)


class Nginx(Proxy):
    tenant = "one"

    def configure(self, servers: Sequence[Container]) -> None:
        text = (NGINX / "nginx.conf").read_text()
        text = text.replace("listen 8443 ", f"listen 127.0.0.1:{self.port} ")
        for folder in ("/tmp/", "/etc/sam3/tls/", "/etc/sam3/tokens/"):
            text = text.replace(folder, f"{self.folder}/")
        limit = re.search(r"limit_conn encodings (\d+);", text)
        assert limit is not None
        encodings = f"limit_conn encodings {int(limit[1]) * len(servers)};"
        (self.folder / "nginx.conf").write_text(text.replace(limit[0], encodings))
        (self.folder / "tokens.conf").write_text(f'"Bearer {TOKEN}" {self.tenant};\n')
        for protocol in ("http", "grpc"):
            shipped = (NGINX / f"{protocol}_servers.conf").read_text()
            line = next(line for line in shipped.splitlines() if line.startswith("server"))
            lines = [
                line.replace(line.split()[1], f"127.0.0.1:{getattr(server, f'{protocol}_port')}")
                for server in servers
            ]
            (self.folder / f"{protocol}_servers.conf").write_text("\n".join(lines))

    def leave_out(self, server: Container) -> None:
        for protocol in ("http", "grpc"):
            path = self.folder / f"{protocol}_servers.conf"
            address = f"127.0.0.1:{getattr(server, f'{protocol}_port')} "
            path.write_text(path.read_text().replace(address, f"{address}down "))
        self.reload()

    def reload(self) -> None:
        """Load the changes in its files."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)
        time.sleep(1)  # old workers finish the requests they have accepted

    def command(self) -> list[str]:
        user = "user root; " if os.geteuid() == 0 else ""
        config = ["-p", str(self.folder), "-c", str(self.folder / "nginx.conf")]
        return [str(self._program), *config, "-g", f"daemon off; {user}"]

    def server_of(self, record: dict[str, Any]) -> str:
        return str(record["servers"].split(", ")[-1])


class Envoy(Proxy):
    """ports: where it listens instead of each port of the shipped configuration."""

    tenant = "one-tenant"

    def __init__(self, program: Path, folder: Path, certificate: Path) -> None:
        super().__init__(program, folder, certificate)
        self.ports = dict(zip((8443, 9901, 9902), (self.port, *free_ports(2)), strict=True))

    def configure(self, servers: Sequence[Container]) -> None:
        text = ENVOY.read_text()
        text = text.replace("/etc/envoy", str(self.folder))
        text = text.replace("REPLACE-BY-A-LONG-RANDOM-TOKEN", TOKEN)
        # Copied through JSON: objects shared by YAML aliases would be changed twice.
        config = json.loads(json.dumps(yaml.safe_load(text)))
        for used in (config["admin"], *config["static_resources"]["listeners"]):
            fixed = used["address"]["socket_address"]
            fixed |= {"address": "127.0.0.1", "port_value": self.ports[fixed["port_value"]]}
        admin, *clusters = config["static_resources"]["clusters"]
        (endpoints,) = admin["load_assignment"]["endpoints"]
        endpoints["lb_endpoints"] = [{"endpoint": {"address": config["admin"]["address"]}}]
        for cluster in clusters:
            for threshold in cluster["circuit_breakers"]["thresholds"]:
                threshold["max_requests"] *= len(servers)
            protocol = cluster["name"].removeprefix("sam3_")
            ports = [getattr(server, f"{protocol}_port") for server in servers]
            addresses = [{"address": "127.0.0.1", "port_value": port} for port in ports]
            (endpoints,) = cluster["load_assignment"]["endpoints"]
            endpoints["lb_endpoints"] = [
                {"endpoint": {"address": {"socket_address": address}}} for address in addresses
            ]
        (self.folder / "envoy.yaml").write_text(yaml.safe_dump(config))

    def command(self) -> list[str]:
        config = str(self.folder / "envoy.yaml")
        alone = ["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"]
        soon = ["--file-flush-interval-msec", "50"]
        return [str(self._program), "--config-path", config, *alone, *soon]

    def server_of(self, record: dict[str, Any]) -> str:
        return str(record["server"])

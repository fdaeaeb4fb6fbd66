"""What was sent and what came of it, by kind and protocol."""

from __future__ import annotations

import base64
import threading
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from benchmarks.fuzz.judge import FINDING, SERVERS_OWN, Verdict

RECENT = 20
KEPT = 200


@dataclass(frozen=True)
class Finding:
    """An answer that no request may get, and the octets to get it again."""

    kind: str
    protocol: str
    reason: str
    octets: bytes

    def line(self) -> str:
        return f"{self.protocol}, {self.kind}: {self.reason}"

    def record(self) -> dict[str, str]:
        return {**self.__dict__, "octets": base64.b64encode(self.octets).decode()}


@dataclass
class Tally:
    """Safe to share among threads."""

    outcomes: dict[tuple[str, str], Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    servers_own: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: int = 0
    findings: list[Finding] = field(default_factory=list)
    recent: deque[Finding] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The last requests, for the case that something fails."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, protocol: str, verdict: Verdict, octets: bytes) -> int:
        """Add one that was answered; how many there are with it."""
        with self._lock:
            self.sent += 1
            self.outcomes[kind, protocol][verdict.outcome] += 1
            if verdict.outcome == SERVERS_OWN:
                self.servers_own[verdict.reason, protocol] += 1
            if verdict.outcome == FINDING and len(self.findings) < KEPT:
                self.findings.append(Finding(kind, protocol, verdict.reason, octets))
            return self.sent

    def sending(self, kind: str, protocol: str, octets: bytes) -> None:
        self.recent.append(Finding(kind, protocol, "sent before the failure", octets))

    @property
    def total(self) -> Counter[str]:
        with self._lock:
            return sum(self.outcomes.values(), Counter[str]())

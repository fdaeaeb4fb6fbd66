"""What was sent and how it was answered, by kind and protocol."""

from __future__ import annotations

import base64
import threading
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from benchmarks.fuzz.judge import FINDING, FRONTEND_ERROR, Verdict

RECENT = 20
KEPT = 200


@dataclass(frozen=True)
class Finding:
    """An answer that no request may get, and the octets that reproduce it."""

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
    """Counts outcomes; thread-safe."""

    outcomes: dict[tuple[str, str], Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    frontend_errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: int = 0
    findings: list[Finding] = field(default_factory=list)
    recent: deque[Finding] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The last requests sent, saved if something fails."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, protocol: str, verdict: Verdict, octets: bytes) -> int:
        """Count one answered request and return the new total."""
        with self._lock:
            self.sent += 1
            self.outcomes[kind, protocol][verdict.outcome] += 1
            if verdict.outcome == FRONTEND_ERROR:
                self.frontend_errors[verdict.reason, protocol] += 1
            if verdict.outcome == FINDING and len(self.findings) < KEPT:
                self.findings.append(Finding(kind, protocol, verdict.reason, octets))
            return self.sent

    def sending(self, kind: str, protocol: str, octets: bytes) -> None:
        self.recent.append(Finding(kind, protocol, "sent before the failure", octets))

    @property
    def total(self) -> Counter[str]:
        with self._lock:
            return sum(self.outcomes.values(), Counter[str]())

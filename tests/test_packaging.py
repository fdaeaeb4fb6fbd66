"""The distribution's own metadata: that everybody it promises to work for can install it."""

from __future__ import annotations

from importlib.metadata import metadata, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OURS = "triton-sam3"
OLDEST = SpecifierSet(metadata(OURS)["Requires-Python"])


def pins() -> list[Requirement]:
    """Requirements of which pip may take one version only, in whatever extra."""
    given = [Requirement(line) for line in requires(OURS) or []]
    return [one for one in given if any(each.operator == "==" for each in one.specifier)]


def test_every_pin_can_be_installed_by_the_oldest_python() -> None:
    (oldest,) = (each.version for each in OLDEST if each.operator == ">=")
    assert pins()
    said = {pin.name: metadata(pin.name).get_all("Requires-Python") for pin in pins()}
    needs = {name: ",".join(need or []) for name, need in said.items()}
    refused = {name: need for name, need in needs.items() if oldest not in SpecifierSet(need)}
    assert not refused, f"not to be had for Python {oldest}"

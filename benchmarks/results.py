"""`RESULTS.md`: one page of sections, each rewritten in place by whoever measured it.

<!-- encoder-accuracy -->
## How close the encoder is …          everything between the two markers is the section's
<!-- /encoder-accuracy -->
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def write_section(name: str, markdown: str, page: Path = RESULTS) -> None:
    """Put `markdown` between the markers of section `name`; a new section goes to the end.

    Raises ValueError for a name that is not lower-case words joined by hyphens, for markdown that
    holds a marker of this section, and for a page whose markers of it do not pair up.
    """
    start, end = _markers(name)
    if start in markdown or end in markdown:
        raise ValueError(f"section {name} must not contain its own markers")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    section = f"{start}\n{markdown.strip()}\n{end}"
    found = _find(text, name)
    if found:
        text = text[: found.start()] + section + text[found.end() :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    page.write_text(text, encoding="utf-8")


def read_section(name: str, page: Path = RESULTS) -> str | None:
    """What stands between the markers of section `name`, or None where the page has none."""
    found = _find(page.read_text(encoding="utf-8"), name) if page.exists() else None
    return found[1].strip() if found else None


def _markers(name: str) -> tuple[str, str]:
    if not NAME.fullmatch(name):
        raise ValueError(f"section name {name!r}: use lower-case words joined by hyphens")
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def _find(text: str, name: str) -> re.Match[str] | None:
    start, end = _markers(name)
    if (text.count(start), text.count(end)) not in ((0, 0), (1, 1)):
        raise ValueError(f"the page's markers {start} and {end} do not pair up; mend it by hand")
    found = re.search(re.escape(start) + r"\n(.*?)" + re.escape(end), text, re.DOTALL)
    if not found and start in text:
        raise ValueError(f"the page's markers {start} and {end} do not pair up; mend it by hand")
    return found

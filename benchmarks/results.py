"""`RESULTS.md`: one page of sections, each rewritten in place by the command that measures it.

<!-- encoder-accuracy -->
## How close the encoder is …          everything between the two markers is the section
<!-- /encoder-accuracy -->
"""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def write_section(name: str, markdown: str, page: Path = RESULTS) -> None:
    """Put `markdown` between the markers of section `name`; a new section goes to the end.

    Raises ValueError if the markdown contains a marker of this section, or the page's markers of it
    are not paired.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start in markdown or end in markdown:
        raise ValueError(f"section {name} must not contain its own markers")
    section = f"{start}\n{markdown.strip()}\n{end}"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, _, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not text.count(start) == text.count(end) == bool(closed):
        raise ValueError(f"the page's markers {start} and {end} are not paired; fix it by hand")
    text = before + section + after if closed else f"{text.rstrip()}\n\n{section}\n".lstrip()
    page.write_text(text, encoding="utf-8")

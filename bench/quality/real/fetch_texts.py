#!/usr/bin/env python3
"""Write the prose of the evaluation as FOLDER/NAME.txt.gz, from Debian's documentation packages.

Needs apt-get and dpkg; installs nothing.

    python bench/quality/real/fetch_texts.py FOLDER
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("cfi-en", "debian-handbook", "debian-reference-en", "developers-reference")


class _Text(HTMLParser):
    """The text of a page, a line per block; that of <pre> as it is."""

    SKIPPED = frozenset(("script", "style", "head", "title", "nav"))
    BLOCKS = frozenset(
        ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "br", "pre", "table")
        + ("ul", "ol")
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = self.verbatim = 0

    def _tag(self, tag: str, step: int) -> None:
        if tag in self.SKIPPED:
            self.skipped = max(self.skipped + step, 0)
        if tag == "pre":
            self.verbatim += step
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._tag(tag, -1)

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def page(path: Path) -> str:
    data = path.read_bytes()
    try:
        html = data.decode("utf-8")
    except UnicodeDecodeError:
        html = data.decode("cp1252", errors="replace")
    parser = _Text()
    parser.feed(html)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def texts(root: Path) -> dict[str, str]:
    """Text by name, from the unpacked packages."""
    essays = root.glob("usr/share/doc/cfi-en/html/ch*web.htm")
    handbook = root / "usr/share/doc/debian-handbook/html/en-US"
    index = (handbook / "index.html").read_text(encoding="utf-8")
    pages = dict.fromkeys(re.findall(r'href="([\w.-]+\.html)', index))
    plain = {
        "reference": "usr/share/debian-reference/debian-reference.en.txt.gz",
        "devref": "usr/share/developers-reference/developers-reference.txt.gz",
    }
    return {
        "cfi": "\n".join(map(page, sorted(essays, key=lambda p: int(re.sub(r"\D", "", p.name))))),
        "handbook": "\n".join(
            page(handbook / name)
            for name in pages
            if name != "index.html" and (handbook / name).exists()
        ),
        **{name: gzip.decompress((root / at).read_bytes()).decode() for name, at in plain.items()},
    }


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, folder], check=True)
        for name, text in texts(Path(folder)).items():
            (out / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
            print(f"{name}: {len(text):,} characters")


if __name__ == "__main__":
    main()

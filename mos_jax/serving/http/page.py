"""The page at "/": one file, which may run and fetch nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources


def read_page() -> str:
    """The page as it lies in the package."""
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def content_policy(page: str) -> str:
    """What the page may do (Content Security Policy 3): run its own script and style, by hash."""
    allowed = []
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = " ".join(f"'sha256-{_hash(text)}'" for text in found)
        allowed.append(f"{tag}-src {hashes}")
    return "; ".join(
        [
            "default-src 'none'",
            *allowed,
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


PAGE_HEADERS = {"Content-Security-Policy": content_policy(read_page()), "Cache-Control": "no-cache"}

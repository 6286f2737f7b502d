"""The web page at `/`: one HTML file with headers that allow only its own script and style. Imports no Ray.

The page needs no key. It sends API requests with the key that its user types in.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse

from cluster.config import ServingConfig

_FILE = Path(__file__).with_name("page.html")


def build_page(serving: ServingConfig) -> HTMLResponse:
    """Return the page; its slider has the server's number of candidates and their limit."""
    html = _FILE.read_text(encoding="utf-8")
    for name in ("candidates", "max_candidates"):
        html = html.replace(f"{{{{{name}}}}}", str(getattr(serving, name)))
    policy = (
        f"default-src 'none'; script-src {_csp_hash('script', html)}; style-src {_csp_hash('style', html)}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _csp_hash(tag: str, html: str) -> str:
    """Return the Content-Security-Policy hash of the text in the page's only `tag` element."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

"""An inspection record → one self-contained HTML file: no network, no build, no framework.

Its sources are in megacocomix/interpret/page: page.html, page.css, and four scripts that become one module. The record
holds untrusted text, so there are three protections. Its JSON is escaped: no character in it can end a script element.
The scripts insert it as text, never as markup. And the policy in the page's head allows no other script to run.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

SOURCES = Path(__file__).parent / "page"
SCRIPTS = ("page.js", "card.js", "text.js", "live.js")
MOST_CONCEPTS = 2_000  # about 2 kB each with their contexts

# Characters that can end a script or one of its lines, and surrogates, which UTF-8 cannot encode.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def render(record: dict, live: dict | None = None) -> str:
    """The page of an inspection record, as the text of one HTML file (UTF-8).

    `live` is None for a file. For a served page it has the limits of generation (context, max_new_tokens,
    num_concepts). If the record has more than MOST_CONCEPTS concepts, the page has first those in the shown windows,
    then the most frequent, and it shows how many are left out.
    """
    style = (SOURCES / "page.css").read_text(encoding="utf-8")
    script = "\n".join((SOURCES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "policy": _policy(style, script, served=live is not None),
        "style": style,
        "record": _data(_for_page(record)),
        "live": _data(live),
        "script": script,
    }
    # In one pass, so that a text of the record that looks like a placeholder is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], (SOURCES / "page.html").read_text(encoding="utf-8"))


def _policy(style: str, script: str, served: bool) -> str:
    """The Content-Security-Policy: the page may use only these sources, and call only its own server."""
    digest = lambda source: f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
    rules = {
        "default-src": "'none'",
        "script-src": digest(script),
        "style-src": digest(style),
        "img-src": "data:",
        "connect-src": "'self'" if served else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _data(value: dict | None) -> str:
    """JSON for a script element. The HTML parser finds no end of a script and no comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _for_page(record: dict) -> dict:
    """The record with at most MOST_CONCEPTS concepts, the number it had, and the names of the concepts that were
    removed but occur in the windows."""
    concepts = record["concepts"]
    shown: set[int] = set()  # concepts that are kept, labelled or active in the shown windows
    for window in record["windows"]:
        for pairs in [*window["kept"], *(window["active"] or [])]:
            shown.update(concept for concept, _ in pairs)
        shown.update(*filter(None, window["labels"] or []))
    first = sorted(concepts, key=lambda concept: concept["id"] not in shown)[:MOST_CONCEPTS]
    kept = {concept["id"] for concept in first}
    return {
        **record,
        "concepts": [concept for concept in concepts if concept["id"] in kept],
        "num_described": len(concepts),
        "names": {c["id"]: c["name"] for c in concepts if c["id"] in shown - kept},
    }

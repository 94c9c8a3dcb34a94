"""An inspection record → one HTML file that needs nothing else: no network, no build, no framework.

The sources are read in megacocomix/interpret/page: page.html, page.css, and four scripts that become one module. The
record is a stranger's text. It travels as JSON in which no character can end a script, the scripts write it into the
page as text and never as markup, and the policy in the page's head lets nothing run but those scripts.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

SOURCES = Path(__file__).parent / "page"
SCRIPTS = ("page.js", "card.js", "text.js", "live.js")
MOST_CONCEPTS = 2_000  # with their contexts about 2 kB each

# What ends a script or a line of one, and halves of a character, which are no UTF-8.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def render(record: dict, live: dict | None = None) -> str:
    """The page that shows an inspection record, as the text of one HTML file (UTF-8).

    `live`: None for a file; for a page that a server answers, what its generation allows (context, max_new_tokens,
    num_concepts). Of a record with more than 2,000 concepts the page describes those that occur in the shown windows
    first, then the most frequent, and says how many it left out.
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
    # In one pass: a text of the record that looks like a place of ours stays a text.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], (SOURCES / "page.html").read_text(encoding="utf-8"))


def _policy(style: str, script: str, served: bool) -> str:
    """What the browser lets the page do: run and style itself with these sources, and call its own server."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'" if served else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _data(value: dict | None) -> str:
    """JSON for a script element: the parser of HTML finds no end of a script and no comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _for_page(record: dict) -> dict:
    """The record with at most MOST_CONCEPTS concepts, how many it had, and the names of those that the windows still
    speak of."""
    concepts = record["concepts"]
    shown = _in_windows(record["windows"])
    first = sorted(concepts, key=lambda concept: concept["id"] not in shown)[:MOST_CONCEPTS]
    kept = {concept["id"] for concept in first}
    return {
        **record,
        "concepts": [concept for concept in concepts if concept["id"] in kept],
        "num_described": len(concepts),
        "names": {c["id"]: c["name"] for c in concepts if c["id"] in shown - kept},
    }


def _in_windows(windows: list[dict]) -> set[int]:
    """Concepts that are kept, labelled or active anywhere in the shown windows."""
    found: set[int] = set()
    for window in windows:
        for pairs in [*window["kept"], *(window["active"] or [])]:
            found.update(concept for concept, _ in pairs)
        for labels in window["labels"] or []:
            found.update(labels or [])
    return found

"""What the tests of the page show in it: a fake record, a fake server, and a reader who clicks and types."""

import json
import time
from http.server import BaseHTTPRequestHandler

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

SCRIPT = "</script><script>window.pwned=1</script>"
IMAGE = "<img src=x onerror=window.pwned=2>"
HOSTILE = [SCRIPT, IMAGE, "<!--<script>", "\u2028", "\u2029", "🦊", "", "{{script}}", "&amp;", "\n", "x" * 300]
STORY = [" Lily", " had", " a", " red", " ball", ".", "\n", " She", " ran", "."]
TOKENS = [STORY, [*HOSTILE, " Lily"], STORY]
LILY, BALL, RUN, SELDOM = 12, 7, 31, 40  # concepts of the fake record; RUN is labelled but never kept
LIVE = {"context": 256, "max_new_tokens": 128, "num_concepts": 64}


def kept_at(token: str, window: int) -> list:
    """What the fake student keeps: Lily at her name, weaker by the window, and a ball everywhere."""
    found = [[LILY, 9.0 - window]] if token in (" Lily", " She") else []
    return [*found, [BALL, 4.5], [SELDOM, 1.25]] if token != " a" else []  # no slot there


def concept(id, name, kept, **changes):
    shown = [(w, p) for w, tokens in enumerate(TOKENS) for p, t in enumerate(tokens) if (t == " Lily") and id == LILY]
    contexts = [
        {"window": w, "position": p, "before": "once <b>", "token": " Lily", "after": "\nhad", "logit": 9.0 - w}
        | {"labelled": w == 0}
        for w, p in shown
    ]
    measured = {"precision_1": 0.5, "recall_1": 0.25, "precision_4": 0.75, "recall_4": 1.0} if kept else {}
    entry = {"id": id, "name": name, "named_by": "auto", "kept": kept, "kept_share": kept / 31, "top_1": 3}
    entry |= {"mean_logit": 8.0, "max_logit": 9.0, "column_norm": 0.39, "labelled": 2, "active": 5}
    entry |= dict.fromkeys(["precision_1", "recall_1", "precision_4", "recall_4"]) | measured
    entry |= {
        "promotes": [[f" token of {name}", 1.23], [SCRIPT, 0.4]],
        "suppresses": [[" dog", -0.7]],
        "contexts": contexts,
    }
    return entry | {"histogram": {"low": 1.0, "high": 9.0, "counts": [*range(20)]} if kept else None} | changes


def record(**changes) -> dict:
    """A record that a test can reckon with: three windows, four concepts, every hostile text in the second window."""
    windows = []
    for index, tokens in enumerate(TOKENS):
        labels = [[LILY, RUN] if token == " Lily" else None for token in tokens]
        active = [[[LILY, 3.5], [BALL, 2.5]] if token == " Lily" else [] for token in tokens]
        kept = [kept_at(token, index) for token in tokens]
        windows.append({"text": 0, "tokens": tokens, "kept": kept, "labels": labels, "active": active})
    totals = {"kept": 3, "never_kept": 60, "small_columns": 0, "labelled": 2, "never_labelled": 62, "teacher_dead": 1}
    totals |= {"hit_1": 0.412, "hit_4": 0.63, "recall_4": 0.387}
    teacher = {"model": "assets/teacher", "sae": "sae.safetensors", "num_labels": 2, "label_source": "attribution"}
    made = {
        "format": "megacocomix-inspection",
        "version": 1,
        "model": f"runs/{'long' * 30}/{IMAGE}",
        "sha256": "ab" * 32,
    }
    made |= {"step": 240, "texts": [SCRIPT], "num_tokens": 31, "num_windows": 5, "context": 256, "num_concepts": 64}
    made |= {"num_kept": 4, "every": 1, "teacher": teacher | {"label_sign": "positive", "num_labelled": 3}}
    names = [concept(BALL, IMAGE, 29), concept(LILY, "‘the girl’", 5), concept(SELDOM, "‘seldom’", 29)]
    names += [concept(RUN, "‘running’", 0, mean_logit=None, max_logit=None)]
    never = sorted({*range(64)} - {LILY, BALL, RUN, SELDOM})
    made |= {"totals": totals, "concepts": names, "never_kept": [*never, RUN], "teacher_dead": [1]}
    return made | {"windows": windows} | changes


def event_lines(request: dict) -> list[dict]:
    """What the fake server answers. At a scale of 1 nothing changes."""
    steered = [int(edit.split("=")[0]) for edit in request.get("steer", [])]
    works = any(not edit.endswith("=1") for edit in request.get("steer", []))
    lines = [{"event": "queued", "ahead": 1}, {"event": "start", "prompt": ["Once", " 🦊"], "truncated": 12}]
    texts = {"plain": [" Lily", " 🦊", "\n", SCRIPT], "steered": [" Lily", " girl" if works else " 🦊", "\n", SCRIPT]}
    for name in ["plain", "steered"] if steered else ["plain"]:
        kl = 0.25 if works and name == "steered" else 0.0
        lines += [
            {"event": "token", "stream": name, "text": text, "kl": kl, "kept": kept_at(text, 0)} for text in texts[name]
        ]
        selected = {str(id): 3 if works else 0 for id in steered} if name == "steered" else {}
        lines += [
            {"event": "end", "stream": name, "tokens": 4, "mean_kl": kl, "reason": "length", "selected": selected}
        ]
    return [*lines, {"event": "done"}]


class Stub(BaseHTTPRequestHandler):
    """A server of the page whose answer depends on the prompt; it writes lines in chunks that end anywhere."""

    def do_GET(self):
        self._start(200, "text/html; charset=utf-8")
        self.wfile.write(self.server.page.encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), request))
        match request["prompt"]:
            case "too long":
                self._start(413, "application/json")
                self.wfile.write(b'{"error": "The request has 70000 bytes; at most 65536 are read."}')
            case "fails":
                self._start(200, "application/x-ndjson")
                self.wfile.write(b'{"event":"error","message":"concept <b>99</b> does not exist"}\n')
            case "waits":
                self._start(200, "application/x-ndjson")
                self.wfile.write(b'{"event":"queued","ahead":2}\n')
                self._write_until_left()
            case "breaks off":
                self._start(200, "application/x-ndjson")
                self.wfile.write(b'{"event":"start","prompt":["a"],"truncated":0}\n{"event":"tok')
            case _:
                self._start(200, "application/x-ndjson")
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in event_lines(request)).encode()
                for start in range(0, len(text), 11):  # a fox has four bytes: some chunks end inside one
                    self.wfile.write(text[start : start + 11])
                    time.sleep(0.001)

    def _write_until_left(self):
        try:
            while True:
                time.sleep(0.02)
                self.wfile.write(b"\n")
        except OSError:
            self.server.left.set()

    def _start(self, status, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_):
        pass


def text_tokens(page):
    return page.get_by_test_id("text").get_by_test_id("token")


def coloured(page) -> list[int]:
    """Positions of the coloured tokens, counted through the windows."""
    script = "all => all.flatMap((token, index) => token.dataset.heat === undefined ? [] : [index])"
    return text_tokens(page).evaluate_all(script)


def where(condition) -> list[int]:
    flat = [token for tokens in TOKENS for token in tokens]
    return [index for index, token in enumerate(flat) if condition(token)]


def choose(page, text):
    page.keyboard.press("/")
    page.keyboard.type(text)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")


def generate(page, prompt="Once", **fields):
    page.get_by_test_id("prompt").fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    page.get_by_test_id("generate").click()


def status_becomes(page, text):
    page.get_by_test_id("status").get_by_text(text).wait_for()

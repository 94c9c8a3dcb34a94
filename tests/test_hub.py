"""Names on Hugging Face's hub. A fake server speaks its protocol and breaks one download off in the middle."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megacocomix.errors import UserError
from megacocomix.hub import is_hub_name, local_folder

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": bytes(range(256)) * 2**17,  # 32 MiB: an interrupted client keeps multiples of 10 MiB
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"code",
    "layers.3/cfg.json": b"{}",
    "layers.3/sae.safetensors": b"weights",
    "layers.4/sae.safetensors": b"others",
}


@pytest.fixture
def hub():
    """The server's address, and the requests that it got: (method, file, start of the range)."""
    requests, broken = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(send=False)

        def do_GET(self):
            self.answer(send=True)

        def answer(self, send):
            path = self.path.partition("?")[0]
            if "/tree/" in path:
                tree = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": name} for name in FILES]
                return self.reply(json.dumps(tree).encode(), send)
            if path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in FILES]
                return self.reply(json.dumps({"id": "team/model", "sha": COMMIT, "siblings": siblings}).encode(), send)
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            if name not in FILES:
                return self.send_error(404)
            start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
            requests.append((self.command, name, start))
            self.reply(FILES[name], send, start, name)

        def reply(self, content, send, start=0, name=None):
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if send and name == "model.safetensors" and not broken:
                broken.append(name)
                self.wfile.write(content[: 3 * len(content) // 4])
                self.connection.close()
            elif send:
                self.wfile.write(content[start:])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def ask(address, home, expression):
    """Evaluate an expression about local_folder in a process that looks for the hub at `address`."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    code = (
        "from megacocomix.hub import local_folder\nfrom megacocomix.errors import UserError\n"
        f"try: print({expression})\nexcept UserError as error: print('refused:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_interrupted_download_resumes_and_brings_no_pickle_or_code(hub, tmp_path):
    address, requests = hub
    before = ask(address, tmp_path, "local_folder('team/model')")
    assert before.startswith("refused: team/model is not a folder on this machine")
    assert not requests  # without `download` the hub is never asked
    folder = ask(address, tmp_path, "local_folder('team/model', download=True)")
    found = {str(file.relative_to(folder)) for file in map(type(tmp_path), _walk(folder))}
    assert found == {name for name in FILES if name.endswith((".json", ".safetensors"))}
    assert (tmp_path / folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    starts = [start for method, name, start in requests if method == "GET" and name == "model.safetensors"]
    assert starts[0] == 0
    assert starts[-1] > 0
    assert folder.endswith(COMMIT)
    count = len(requests)
    assert ask(address, tmp_path, "local_folder('team/model')") == folder
    assert len(requests) == count


def test_one_folder_of_a_repository_is_enough(hub, tmp_path):
    address, requests = hub
    folder = ask(address, tmp_path, "local_folder('team/model', download=True, under='layers.3')")
    assert sorted(os.listdir(folder)) == ["cfg.json", "sae.safetensors"]
    assert {name.partition("/")[0] for _, name, _ in requests} == {"layers.3"}


def test_without_a_network_it_is_one_line(tmp_path):
    printed = ask("http://127.0.0.1:9", tmp_path, "local_folder('team/model', download=True)")
    assert printed.startswith("refused: team/model is not a folder on this machine, and cannot be read")
    assert len(printed.splitlines()) == 1


def test_what_is_here_is_never_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team/model").mkdir(parents=True)
    assert not is_hub_name("team/model")
    assert str(local_folder("team/model", download=True)) == "team/model"
    for name in ("model", "a/b/c", "/team/model", "./team", "../team", "team/"):
        assert not is_hub_name(name)
    assert not is_hub_name("team/other")  # a folder that was mistyped, or is not made yet
    assert is_hub_name("others/model")
    with pytest.raises(UserError, match="others/model is not a folder on this machine"):
        local_folder("others/model")


def _walk(folder):
    for root, _, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in names)

"""The server: nothing that a client sends harms it, and only those who may are answered."""

import gzip
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from serving import CONTEXT, JSON, PAGE, WAIT, Client, make_student, serving

import tiny
from megacocomix.errors import UserError
from megacocomix.hf.export import export_hf
from megacocomix.interpret.live import Limits, read_task
from megacocomix.interpret.server import address, choose_token, listen

TOKEN = "a-token-of-this-test"


def test_a_large_body_is_refused(client):
    large = b'{"prompt": "' + b"x" * Limits.max_bytes + b'"}'
    assert client.refusal(large) == (413, "the body is larger than 65,536 bytes.")
    chunks = (large[n : n + 1000] for n in range(0, len(large), 1000))  # sent chunked, without a length
    assert client.refusal(chunks)[0] == 413
    fitting = b'{"prompt": "' + b"x" * (Limits.max_bytes - 40) + b'", "max_new_tokens": 1}'
    assert client.ask("POST", "/api/generate", fitting, **JSON)[0].status == 200


def test_only_json_is_read(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert client.refusal(b'{"prompt": "a"}', **{"Content-Type": kind}) == (
            415,
            "Content-Type must be application/json.",
        )


def test_a_compressed_body_counts_as_what_it_unfolds_to(client):
    packed = {"Content-Encoding": "gzip"}
    assert client.refusal(gzip.compress(b" " * 10_000_000), **packed)[0] == 413
    assert client.refusal(b'{"prompt": "a"}', **packed) == (400, "the body does not match its Content-Encoding.")


MOST = CONTEXT - 1
INVALID = {
    b"{": "the body is not JSON",
    b"[" * 60_000: "the body is not JSON",
    b"\xff\xfe\xff": "the body is not JSON",
    b'{"prompt": "a", "temperature": NaN}': "NaN is no number",
    b'{"prompt": "a", "temperature": -Infinity}': "-Infinity is no number",
    b'{"prompt": "a", "temperature": 1e999}': "temperature must be a number",
    b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}": "temperature must be a number",
    b'{"prompt": "a", "temperature": -1}': "temperature -1 must be at least 0",
    b'{"prompt": "a", "temperature": true}': "temperature must be a number",
    b'{"prompt": "a", "top_p": 0}': "top_p 0 must be above 0 and at most 1",
    b'{"prompt": "a", "min_p": 1}': "min_p 1 must be at least 0 and below 1",
    b'{"prompt": "a", "top_p": "1"}': "top_p must be a number",
    b'{"prompt": "a", "top_k": -1}': "top_k -1 must be at least 1, or 0 for all",
    b'{"prompt": "a", "top_k": 1.5}': "top_k must be a whole number",
    b'{"prompt": "a", "seed": 9223372036854775808}': f"must be from 0 to {2**63 - 1}",
    b'{"prompt": "a", "seed": -1}': f"must be from 0 to {2**63 - 1}",
    b'{"prompt": "a", "seed": false}': "seed must be a whole number",
    b'{"prompt": "a", "max_new_tokens": 0}': f"max_new_tokens 0 must be from 1 to {MOST}",
    b'{"prompt": "a", "max_new_tokens": 48}': f"max_new_tokens 48 must be from 1 to {MOST}",
    b'{"prompt": "a", "max_new_tokens": null}': "max_new_tokens must be a whole number",
    b'{"prompt": "a", "max_tokens": 4}': "unknown key 'max_tokens'. Did you mean max_new_tokens?",
    b'["a"]': "not a JSON object",
    b"{}": "prompt is missing",
    b'{"prompt": ["a"]}': "prompt must be a string",
    b'{"prompt": "\\ud800"}': "half a character",
    b'{"prompt": "a", "place": "behind"}': "place 'behind' is none of before, after.",
    b'{"prompt": "a", "steer": "1=2"}': "steer must be a list of strings",
    b'{"prompt": "a", "steer": [1]}': "steer must be a list of strings",
    b'{"prompt": "a", "steer": ["62=1"]}': "the model has concepts 0 … 61",
    b'{"prompt": "a", "steer": ["1=11"]}': "a scale is from -10 to 10",
    b'{"prompt": "a", "steer": ["1=2", "1=3"]}': "concept 1 is steered twice",
    json.dumps({"prompt": "a", "steer": [f"{n}=2" for n in range(9)]}).encode(): "9 concepts: at most 8",
}


@pytest.mark.parametrize("body", INVALID, ids=lambda body: body.decode(errors="replace")[:60])
def test_what_cannot_be_is_refused_in_one_line(client, body):
    status, line = client.refusal(body)
    assert status == 400
    assert INVALID[body] in line


def test_the_option_limits_new_tokens_where_the_context_does_not(student):
    with pytest.raises(UserError, match="max_new_tokens 9 must be from 1 to 8"):
        read_task(b'{"prompt": "a", "max_new_tokens": 9}', student, Limits(max_new_tokens=8))
    assert read_task(b'{"prompt": "a"}', student, Limits(max_new_tokens=8)).sampling.max_new_tokens == 8


def test_a_model_that_mixes_no_concept_in_generates_but_is_not_steered():
    student = make_student(mix="nothing")
    with serving(student) as client:
        assert client.generate("Once", max_new_tokens=2)[-1] == {"event": "done"}
        status, line = client.refusal({"prompt": "Once", "steer": ["1=2"]})
        assert (status, line) == (
            400,
            "runs/bytes predicts concepts but mixes none in: steering them cannot change its text.",
        )


def test_the_page_and_every_refusal_carry_the_headers_of_a_private_page(client):
    page, body = client.ask("GET", "/")
    assert (page.status, page.headers["Content-Type"], body.decode()) == (200, "text/html; charset=utf-8", PAGE)
    answers = [page, client.ask("GET", "/favicon.ico")[0], client.ask("GET", "/none")[0]]
    answers += [client.ask("PUT", "/api/generate")[0], client.ask("GET", "/", Host="evil.example")[0]]
    answers += [client.open("POST", "/api/generate", b'{"prompt": "a", "max_new_tokens": 1}', **JSON)[1]]
    assert [answer.status for answer in answers] == [200, 204, 404, 405, 403, 200]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "10.0.0.1", ""])
def test_another_host_name_is_refused_without_a_token(client, host):
    response, body = client.ask("GET", "/", Host=host)
    assert (response.status, body) == (403, b"this server only answers requests to localhost and 127.0.0.1.\n")
    assert client.refusal({"prompt": "a"}, Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:8080", "[::1]:8080"])
def test_a_name_of_this_machine_is_answered(client, host):
    assert client.ask("GET", "/", Host=host)[0].status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "http://localhost", "null", ""])
def test_another_site_is_refused(client, origin):
    assert client.refusal({"prompt": "a"}, Origin=origin) == (
        403,
        "this server only answers its own page, not other sites.",
    )


def test_its_own_page_is_answered(client):
    headers = JSON | {"Origin": f"http://127.0.0.1:{client.port}"}
    assert client.ask("POST", "/api/generate", b'{"prompt": "a", "max_new_tokens": 1}', **headers)[0].status == 200


def test_a_token_is_asked_for_where_there_is_one(student, caplog):
    caplog.set_level(0)
    with serving(student, TOKEN) as client:
        assert client.generate("a secret", max_new_tokens=1)[-1] == {"event": "done"}
        assert client.ask("GET", f"/?token={TOKEN}", Host="gpu.example")[0].status == 200
        assert client.ask("GET", "/favicon.ico", Authorization="")[0].status == 204
        for path in ("/", "/?token=", "/?token=wrong", "/?token=%FF", "/none"):
            response, body = client.ask("GET", path, Authorization="")
            assert response.status == 401
            assert b"requires its token" in body
        assert client.ask("GET", "/")[0].status == 401  # the address carries it, nothing else
        for header in ("", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff", "Bearer"):
            assert client.refusal({"prompt": "a"}, Authorization=header)[0] == 401
        with socket.create_connection(("127.0.0.1", client.port), timeout=WAIT) as connection:
            connection.sendall(f"GET /?token={TOKEN} HTTP/none\r\n\r\n".encode())
            assert b" 400 " in connection.recv(1000)
    assert TOKEN not in caplog.text
    assert "secret" not in caplog.text


def test_a_place_to_listen_that_is_none_is_said():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use"):
            listen("127.0.0.1", port)
    for host, port, line in [
        ("127.0.0.1", 65536, "--port 65536 must be from 1 to 65535"),
        ("127.0.0.1", -1, "--port -1 must be"),
        ("192.0.2.1", 0, "--host 192.0.2.1 is no address of this machine"),
        ("no host", 0, "--host 'no host' is no known address"),
        ("a" * 70, 0, "is no known address"),
        ("", 0, "--host '' is no known address"),
    ]:
        with pytest.raises(UserError, match=re.escape(line)):
            listen(host, port)


def test_a_token_is_made_where_others_can_connect():
    with listen("127.0.0.1", 0) as here, listen("0.0.0.0", 0) as everywhere:
        assert choose_token(None, here) is None
        assert choose_token(TOKEN, here) == TOKEN
        assert address(here, None) == f"http://127.0.0.1:{here.getsockname()[1]}/"
        made = choose_token(None, everywhere)
        assert len(made) > 30
        assert made != choose_token(None, everywhere)
        assert address(everywhere, made) == (
            f"http://{socket.gethostname()}:{everywhere.getsockname()[1]}/?token={made}"
        )
        for token in ("", "short", "with spaces in it", "ümlaut-token"):
            with pytest.raises(UserError, match="--token must be 8 or more"):
                choose_token(token, everywhere)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """An exported model that writes GPT-2's tokens, and a text beside it."""
    folder = tmp_path_factory.mktemp("served")
    export_hf(tiny.loaded(vocab_size=50257, context=CONTEXT), folder / "model", "gpt2")
    (folder / "text.txt").write_text("Once upon a time there was </script> a model.\n")
    return folder


@pytest.fixture(scope="module")
def tool(root):
    """The module tools/serve.py."""
    spec = importlib.util.spec_from_file_location("serve", root / "tools/serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_inspection_of_other_weights_is_refused(tool, model_folder, monkeypatch):
    record = {"format": "megacocomix-inspection", "version": 1, "model": "runs/other", "sha256": "0123456789abcdef"}
    record |= {"texts": [], "teacher": None, "totals": {}, "concepts": [], "never_kept": [], "windows": []}
    (model_folder / "other.json").write_text(json.dumps(record))
    command = ["serve.py", model_folder / "model", "--inspection", model_folder / "other.json", "--port", 0]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(UserError, match=r"other.json is of runs/other \(SHA-256 0123456789ab…\), not of .*model"):
        tool.main()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--text", "x", "--max-new-tokens", "0"], "--max-new-tokens 0 must be 1 or more."),
        (["--inspection", "x", "--names", "y"], "--names is for --text"),
        (["--inspection", "x", "--tokens", "0"], "--tokens is for --text"),
        (["--inspection", "x", "--port", "70000"], "--port 70000 must be from 1 to 65535"),
        (["--inspection", "x", "--port", "0", "--token", "?"], "--token must be 8 or more"),
    ],
)
def test_a_mistake_is_said_before_the_model_is_opened(tool, monkeypatch, arguments, line):
    monkeypatch.setattr(sys, "argv", ["serve.py", "runs/none", *arguments])
    with pytest.raises(UserError, match=re.escape(line)):
        tool.main()


@pytest.mark.slow
def test_a_signal_ends_the_served_page_with_exit_0(root, model_folder):
    command = [sys.executable, root / "tools/serve.py", model_folder / "model", "--text", model_folder / "text.txt"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--port", "0", "--max-new-tokens", "30"], **pipes)
    try:
        line = next(line for line in process.stdout if line.startswith("serving "))
        url = rf"serving {re.escape(str(model_folder / 'model'))} at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C stops it\)\n"
        client = Client(int(re.fullmatch(url, line)[1]))
        page = client.ask("GET", "/")[1].decode()
        assert re.search(r'id="live"[^>]*>\{"context":48,"max_new_tokens":30,"num_concepts":62\}<', page)
        stream = iter(client.stream("Once upon", max_new_tokens=30, steer=["3=8"]))
        assert next(stream)["prompt"] == ["Once", " upon"]
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1]["event"] in ("error", "done")
        _, errors = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "error" not in errors.lower()

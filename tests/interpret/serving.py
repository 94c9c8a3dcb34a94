"""A served student for tests: it reads and writes bytes, the server runs in a thread, the client is plain."""

import asyncio
import http.client
import json
import queue
import threading
from contextlib import contextmanager
from pathlib import Path

import tiny
from megacocomix.data.tokenizer import Tokenizer
from megacocomix.data.tokenizer_identity import Hashes
from megacocomix.interpret.live import Limits
from megacocomix.interpret.server import listen, make_app, start

CONTEXT, EOT = 48, 256
PAGE = "<!doctype html><title>page</title>"
JSON = {"Content-Type": "application/json"}
WAIT = 10


def make_student(**method):
    """It reads and writes bytes."""
    tokenizer = Tokenizer(
        name="bytes",
        vocab_size=EOT + 1,
        eot_id=EOT,
        encode_batch=lambda texts: [list(text.encode()) for text in texts],
        decode=lambda ids: bytes(i for i in ids if i != EOT).decode(errors="replace"),
        compute_hashes=lambda: Hashes("bytes", "bytes"),
    )
    return tiny.opened(tiny.loaded(vocab_size=EOT + 1, context=CONTEXT, **method), tokenizer, Path("runs/bytes"))


class Client:
    """Requests to a server on a port of this machine; each on a connection of its own."""

    def __init__(self, port, token=None):
        self.port = port
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def open(self, method, path, body=None, **headers):
        """The connection and the response, whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        connection.request(method, path, body, self.headers | headers, encode_chunked=hasattr(body, "__next__"))
        return connection, connection.getresponse()

    def ask(self, method, path, body=None, **headers):
        """The response and its body."""
        connection, response = self.open(method, path, body, **headers)
        try:
            return response, response.read()
        finally:
            connection.close()

    def refusal(self, body, **headers):
        """Status and line of a generation that is refused."""
        body = body if isinstance(body, bytes) or hasattr(body, "__next__") else json.dumps(body).encode()
        response, answer = self.ask("POST", "/api/generate", body, **JSON | headers)
        assert list(json.loads(answer)) == ["error"]
        assert "\n" not in json.loads(answer)["error"]
        return response.status, json.loads(answer)["error"]

    def stream(self, prompt, **task):
        """A generation that has begun to answer."""
        return Stream(*self.open("POST", "/api/generate", json.dumps({"prompt": prompt} | task), **JSON))

    def generate(self, prompt, **task):
        """All its events."""
        return list(self.stream(prompt, **task))


class Stream:
    def __init__(self, connection, response):
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/x-ndjson"
        self.connection, self.response = connection, response

    def __iter__(self):
        """Its events; it has been read to its end then."""
        for line in self.response:
            yield json.loads(line)
        self.connection.close()

    def leave(self):
        self.response.close()
        self.connection.close()


@contextmanager
def serving(student, token=None, limits=None, page=PAGE):
    """A client of a server that runs in a thread until the end of the block."""
    started, loop = queue.Queue(), asyncio.new_event_loop()
    stopped = asyncio.Event()

    async def run():
        listener = listen("127.0.0.1", 0)
        runner = await start(make_app(student, page, token, limits or Limits()), listener)
        started.put(listener.getsockname()[1])
        await stopped.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=[run()])
    thread.start()
    client = Client(started.get(timeout=WAIT), token)
    client.stop = lambda: loop.call_soon_threadsafe(stopped.set)
    try:
        yield client
    finally:
        client.stop()
        thread.join(WAIT)
        assert not thread.is_alive()
        loop.close()

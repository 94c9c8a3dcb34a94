"""The server of the page: it generates texts, plain and steered side by side, and streams them while they grow.

One generation runs at a time, in its own thread, because one device runs two no faster. The others wait in line, first
come, first served, and their clients get their position. Events for a slow client are buffered, so it holds up no one.

On a loopback address, everyone on the machine may use the server, but other web sites may not use it through a browser
on the machine: requests with another host name (DNS rebinding) or from another site's page are refused. On any other
address a token is required. Neither tokens nor prompts are logged.
"""

import asyncio
import errno
import hmac
import ipaddress
import json
import logging
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from aiohttp import web

from megacocomix.errors import UserError
from megacocomix.hf.open import OpenModel
from megacocomix.interpret.live import Limits, generate, read_task

logger = logging.getLogger(__name__)
# aiohttp would log malformed requests, which may hold a token.
silent = logging.getLogger(f"{__name__}.http")
silent.disabled = True

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOOPBACK = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]+)?", re.IGNORECASE)
TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,}")
RETRY_SECONDS = 5
SHUTDOWN_SECONDS = 1
"""How long a stopped server waits for clients to receive their last events."""


class Job:
    """A generation in line. `outbox` has the lines to send to its client, then None."""

    def __init__(self, events: Callable[[], Iterator[dict]]):
        self.events = events
        self.outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_left = threading.Event()

    def post(self, event: dict) -> None:
        """Send an event. Call it on the event loop."""
        self.outbox.put_nowait(_line(event))

    def end(self, event: dict) -> None:
        """Send the last event. Call it on the event loop."""
        self.post(event)
        self.outbox.put_nowait(None)

    def run(self, send: Callable[[bytes], object]) -> dict:
        """Generate until done or until the client leaves, and pass lines to `send`. Returns the last event. Never
        raises."""
        try:
            with closing(self.events()) as events:
                for event in events:
                    if self.is_left.is_set():
                        break
                    send(_line(event))
        except UserError as error:
            return _error_event(" ".join(error.problems))
        except Exception as error:
            logger.exception("a generation failed")
            reason = next(iter(str(error).splitlines()), "")
            return _error_event(f"the generation failed: {type(error).__name__}: {reason}")
        return {"event": "done"}


def _line(event: dict) -> bytes:
    return json.dumps(event, allow_nan=False).encode() + b"\n"


def _error_event(message: str) -> dict:
    return {"event": "error", "message": message}


class Line:
    """Jobs, first come, first served: the first runs, the others wait. Call all methods on the event loop."""

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self.jobs: list[Job] = []
        self.is_open = True
        self.thread = ThreadPoolExecutor(1, "generation")

    @property
    def is_full(self) -> bool:
        """Whether it accepts no more jobs."""
        return not self.is_open or len(self.jobs) > self.max_waiting

    def join(self, job: Job) -> None:
        """Run a job, or append it to the line."""
        self.jobs.append(job)
        if len(self.jobs) == 1:
            self._start()
        else:
            self._tell_places(from_place=len(self.jobs) - 1)

    def leave(self, job: Job) -> None:
        """Drop a job, because its client is gone or has all events. A running job stops within one decoding step."""
        job.is_left.set()
        if job in self.jobs[1:]:
            self._remove(self.jobs.index(job))

    def close(self) -> None:
        """End all jobs, and send their clients an error event."""
        self.is_open = False
        for job in self.jobs:
            job.is_left.set()
            job.end(_error_event("the server is stopping."))
        del self.jobs[1:]

    def _start(self) -> None:
        loop, job = asyncio.get_running_loop(), self.jobs[0]
        send = lambda line: loop.call_soon_threadsafe(job.outbox.put_nowait, line)
        loop.run_in_executor(self.thread, job.run, send).add_done_callback(self._finish)

    def _finish(self, ran: asyncio.Future[dict]) -> None:
        job = self.jobs[0]
        self._remove(0)
        if self.jobs:
            self._start()
        job.end(ran.result())  # after making room in the line: the client may send its next request at once

    def _remove(self, place: int) -> None:
        del self.jobs[place]
        self._tell_places(max(place, 1))

    def _tell_places(self, from_place: int) -> None:
        for ahead, job in enumerate(self.jobs[from_place:], start=from_place):
            job.post({"event": "queued", "ahead": ahead})


class _Refusal(Exception):
    """A request that is refused with a status and one line."""

    def __init__(self, status: int, line: str, **headers: str):
        super().__init__(line)
        self.status, self.line, self.headers = status, line, headers


class _Site:
    """The handlers of the app."""

    def __init__(self, student: OpenModel, page: str, token: str | None, limits: Limits):
        self.student, self.page, self.token, self.limits = student, page.encode(), token, limits
        self.line = Line(limits.max_waiting)

    @web.middleware
    async def guard(self, request: web.Request, handler) -> web.StreamResponse:
        """Check the sender, and answer every error that occurs before a stream begins."""
        try:
            self.check_sender(request)
            return await handler(request)
        except _Refusal as error:
            refusal = error
        except UserError as error:
            refusal = _Refusal(400, " ".join(error.problems))
        except web.HTTPException as error:
            allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            refusal = _Refusal(error.status, f"{error.reason}.", **allowed)
        except ConnectionError:  # the client is gone
            raise
        except Exception:
            logger.exception("a request failed")
            refusal = _Refusal(500, "the server failed: see its log.")
        if request.path == "/":
            return web.Response(status=refusal.status, text=f"{refusal.line}\n", headers=refusal.headers)
        return web.json_response({"error": refusal.line}, status=refusal.status, headers=refusal.headers)

    def check_sender(self, request: web.Request) -> None:
        """Raises _Refusal for a request that this server must not answer."""
        if self.token:
            scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
            given = request.query.get("token", "") if request.path == "/" else bearer * (scheme.lower() == "bearer")
            is_known = hmac.compare_digest(given.encode(errors="surrogatepass"), self.token.encode())
            if not is_known and request.path != "/favicon.ico":
                line = "this server requires its token: open the address that it printed when it started."
                raise _Refusal(401, line, **{"WWW-Authenticate": "Bearer"})
            return
        host, origin = request.headers.get("Host", "").lower(), request.headers.get("Origin")
        if not LOOPBACK.fullmatch(host):
            raise _Refusal(403, "this server only answers requests to localhost and 127.0.0.1.")
        own = (None, f"http://{host}", f"https://{host}")
        if request.method == "POST" and origin not in own:
            raise _Refusal(403, "this server only answers its own page, not other sites.")

    async def get_page(self, _: web.Request) -> web.Response:
        """GET /"""
        return web.Response(body=self.page, content_type="text/html", charset="utf-8")

    async def get_icon(self, _: web.Request) -> web.Response:
        """GET /favicon.ico"""
        return web.Response(status=204)

    async def post_generate(self, request: web.Request) -> web.StreamResponse:
        """POST /api/generate"""
        if request.content_type != "application/json":
            raise _Refusal(415, "Content-Type must be application/json.")
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _Refusal(413, f"the body is larger than {self.limits.max_bytes:,} bytes.") from None
        except web.RequestPayloadError:
            raise _Refusal(400, "the body does not match its Content-Encoding.") from None
        task = read_task(body, self.student, self.limits)
        if self.line.is_full:
            why = f"{self.limits.max_waiting} generations are waiting already" if self.line.is_open else "stopping"
            raise _Refusal(503, f"{why}: try again later.", **{"Retry-After": str(RETRY_SECONDS)})
        job = Job(lambda: generate(self.student, task))
        self.line.join(job)
        try:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            while (line := await job.outbox.get()) is not None:
                await response.write(line)
            await response.write_eof()
            return response
        finally:
            self.line.leave(job)

    async def set_headers(self, _: web.Request, response: web.StreamResponse) -> None:
        """Add the headers of all responses."""
        response.headers.update(HEADERS)

    async def end_streams(self, _: web.Application) -> None:
        """Runs before the server waits for its clients."""
        self.line.close()

    async def end_thread(self, _: web.Application) -> None:
        """Runs while the event loop still exists: the thread may still call it."""
        await asyncio.to_thread(self.line.thread.shutdown)


def make_app(student: OpenModel, page: str, token: str | None, limits: Limits) -> web.Application:
    """GET / returns `page`. POST /api/generate streams events, one JSON object per line. With `token`, both require it;
    without, only requests to a loopback host name are answered."""
    site = _Site(student, page, token, limits)
    app = web.Application(middlewares=[site.guard], client_max_size=limits.max_bytes)
    app.router.add_get("/", site.get_page)
    app.router.add_get("/favicon.ico", site.get_icon)
    app.router.add_post("/api/generate", site.post_generate)
    app.on_response_prepare.append(site.set_headers)
    app.on_shutdown.append(site.end_streams)
    app.on_cleanup.append(site.end_thread)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address. Port 0 takes any free port. Raises UserError."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} must be from 1 to 65535, or 0 for any free port.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host!r} is no known address. Valid: 127.0.0.1, or 0.0.0.0 for all.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use: choose another one, or 0 for any free port.") from None
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port} is for the system: choose one from 1024 on, or 0 for any.") from None
        raise UserError(f"--host {host} is no address of this machine. Valid: 127.0.0.1, or 0.0.0.0 for all.") from None


def choose_token(given: str | None, listener: socket.socket) -> str | None:
    """The token: `given`, or None if only this machine can connect, or a new one. Raises UserError."""
    if given is not None and not TOKEN.fullmatch(given):
        raise UserError("--token must be 8 or more of the characters A-Z a-z 0-9 . _ ~ -, and no others.")
    return given or (None if _ip(listener).is_loopback else secrets.token_urlsafe())


def address(listener: socket.socket, token: str | None) -> str:
    """The URL of the page. It has this machine's name if the socket listens on all addresses."""
    ip, port = _ip(listener), listener.getsockname()[1]
    host = socket.gethostname() if ip.is_unspecified else f"[{ip}]" if ip.version == 6 else ip
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def _ip(listener: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(listener.getsockname()[0])


async def start(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Start answering on `listener`. The runner's cleanup() stops it."""
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, logger=silent, shutdown_timeout=SHUTDOWN_SECONDS
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner


async def serve(app: web.Application, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Answer on `listener` until SIGINT or SIGTERM. Calls `announce` once requests and signals are handled."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    runner = await start(app, listener)
    announce()
    await stopped.wait()
    await runner.cleanup()

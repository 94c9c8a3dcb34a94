"""A real browser for the tests of the page, and a served student."""

import os
import shutil
import threading
from http.server import ThreadingHTTPServer

import pytest
from fake_readings import LIVE, WIDE, Stub, record
from serving import make_student, serving

import tiny
from megacocomix.interpret.page import render

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        line = "no Chromium: apt-get install chromium, and pip install playwright"
        pytest.fail(line) if "CI" in os.environ else pytest.skip(line)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a record as a file, or an address; what the browser complained of and asked for are its attributes, and
    there must be no complaint at the end."""
    pages = []

    def open_(made=None, url=None, viewport=WIDE, **options):
        if url is None:
            (tmp_path / "page.html").write_text(render(made or record()), encoding="utf-8")
            url = (tmp_path / "page.html").as_uri()
        page = browser.new_context(viewport=viewport, **options).new_page()
        page.set_default_timeout(5000)
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        assert page.complaints == []
        page.context.close()


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.page, server.requests, server.left = render(record(), LIVE), [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/?token=secret"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def student():
    """It reads and writes bytes."""
    return make_student()


@pytest.fixture(scope="module")
def client(student):
    """Of a server of the student."""
    with serving(student) as client:
        yield client


@pytest.fixture(scope="module")
def with_header(folder):
    """The inputs of a tiny run, and told.safetensors, an autoencoder whose header records what it was trained for."""
    tiny.make_sae(folder / "told.safetensors", sae_layer=1, location="resid_post_mlp")
    return folder

"""A real browser on a page: what it complains of, whom it talks to, what axe finds, how it looks."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import servers
from playwright.sync_api import Browser, Page, Request, sync_playwright

DESKTOP, PHONE = (1280, 800), (390, 844)
HERE = {"127.0.0.1", "localhost", "::1"}
AXE = "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless. While it runs its thread has an event loop: no asyncio.run beside it."""
    program = servers.program("chromium", "chromium")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield started
        finally:
            started.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a file; import it into the file."""
    with chromium() as started:
        yield started


class Visit:
    """A page, and what went wrong on it: `faults` holds what its console and its scripts complained of, and every
    address elsewhere that it asked for.
    """

    def __init__(self, page: Page):
        self.page, self.faults = page, []
        page.on(
            "console",
            lambda message: self.faults.append(f"console: {message.text}") if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        page.context.on("request", self._asked)

    def _asked(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("file", "data", "blob", "about") and address.hostname not in HERE:
            self.faults.append(f"request: {request.url}")

    def expect_fault(self, part: str) -> None:
        """Takes the faults that contain `part` off the list; fails when there is none."""
        assert any(part in fault for fault in self.faults), f"no fault with {part!r} in {self.faults}"
        self.faults = [fault for fault in self.faults if part not in fault]

    def until(self, expression: str, seconds: float = 15) -> None:
        """Waits until the expression holds in the page, whose policy may forbid Playwright's own way of asking again
        and again.
        """
        end = time.monotonic() + servers.PATIENCE * seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"after {servers.PATIENCE * seconds:g} s it does not hold: {expression}"
            self.page.wait_for_timeout(50)

    def violations(self) -> list[str]:
        """What axe finds serious or critical in the page as it is now: rule, what it asks for, where."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(
                files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
            )  # as a debugger: the page's policy keeps scripts out
        return [
            f"{found['id']}: {found['help']}: {', '.join(str(node['target']) for node in found['nodes'][:5])}"
            for found in self.page.evaluate(AXE)
            if found["impact"] in ("serious", "critical")
        ]

    def screenshot(self, name: str, full: bool = False) -> None:
        """A picture in the folder that FRAUD_SCREENSHOTS names, when it is set; `full` takes the whole page."""
        if folder := os.environ.get("FRAUD_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=full)


@contextlib.contextmanager
def visit(browser: Browser, address: str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Visit]:
    """A fresh profile on `address` (http:// or file://) at `size` pixels; fails at the end when there are faults."""
    with browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    ) as context:
        made = Visit(context.new_page())
        made.page.goto(address)
        yield made
        assert not made.faults, "\n".join(made.faults)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@contextlib.contextmanager
def over_http(folder: Path) -> Iterator[str]:
    """Pages over HTTP: axe reads style sheets by request, which a page from disk may not make."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

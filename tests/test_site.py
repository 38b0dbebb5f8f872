"""The report's pages in a real browser: from disk and over HTTP, by day, by night and on a phone."""

import functools
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import DESKTOP, PHONE, browser, visit  # noqa: F401

from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.report.pages import PAGES

LOOKS = {"light": (DESKTOP, False), "dark": (DESKTOP, True), "phone": (PHONE, False)}
RICHEST = ("index", "champion")  # a phone shows axe nothing new on the others


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def served(finished) -> Iterator[str]:
    """The reports over HTTP: axe reads style sheets by request, which a page from disk may not make."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(finished.root / "reports")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("look", LOOKS)
def test_pages_are_accessible_and_fit(browser, served, look):  # noqa: F811
    """No serious fault that axe finds, also with every table opened; nothing scrolls sideways; the colours are those
    asked for.
    """
    size, dark = LOOKS[look]
    for page in PAGES:
        with visit(browser, f"{served}/{page}.html", size, dark) as seen:
            seen.screenshot(f"report_{page}_{look}", full=True)
            seen.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            assert (look == "phone" and page not in RICHEST) or seen.violations() == [], page
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0], page
            assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
                "rgb(18, 23, 28)" if dark else "rgb(249, 249, 246)"
            ), page


def test_every_page_opens_from_disk(browser, finished):  # noqa: F811
    """By the links that a reader follows; `visit` fails when a script complains or somebody is asked."""
    with visit(browser, (finished.root / "reports/index.html").as_uri()) as seen:
        for name, title in PAGES.items():
            seen.page.get_by_role("navigation").get_by_role("link", name=title).click()
            seen.page.wait_for_url(f"**/{name}.html")
            assert seen.page.get_by_role("heading", level=1).count() == 1
            assert seen.page.locator("nav [aria-current]").inner_text() == title


def test_charts_answer_pointer_and_keys(browser, finished):  # noqa: F811
    with visit(browser, (finished.root / "reports/champion.html").as_uri()) as seen:
        chart, tip = seen.page.locator(".plot > svg").first, seen.page.locator(".tip")
        assert tip.is_hidden()
        chart.scroll_into_view_if_needed()
        at = chart.locator("circle").nth(5).bounding_box()
        seen.page.mouse.move(at["x"] + 6, at["y"] + 6)
        assert re.search(r"alerts a day find \d+% of the frauds", tip.inner_text())
        seen.page.mouse.move(2, 2)
        assert tip.is_hidden()
        chart.locator("circle[tabindex='0']").focus()
        first = tip.inner_text()
        seen.page.keyboard.press("ArrowRight")
        assert tip.is_visible() and tip.inner_text() != first
        seen.page.keyboard.press("ArrowDown")  # to the next series: the policy
        assert tip.inner_text().startswith("the policy")
        assert chart.locator("circle[tabindex='0']").count() == 1  # one stop for Tab in each chart
        seen.page.keyboard.press("Escape")
        assert tip.is_hidden()


def test_a_reader_chooses_day_or_night(browser, served):  # noqa: F811
    with visit(browser, f"{served}/index.html") as seen:

        def paper() -> str:
            return seen.page.evaluate("getComputedStyle(document.body).backgroundColor")

        by_day = paper()
        seen.page.get_by_role("button", name="Dark").click()
        assert paper() != by_day
        seen.page.goto(f"{served}/drift.html")
        assert paper() != by_day  # remembered
        seen.page.get_by_role("button", name="Light").click()
        assert paper() == by_day


def test_pages_say_what_was_measured(finished):
    """The card beside the bundle's own metrics, and the first page beside the card."""
    card, metrics = (
        finished.json("reports/bakeoff/card.json"),
        load_bundle(finished.root / "models/champion").manifest.metrics,
    )
    used = {point["name"]: point for point in card["points"]}
    assert 1 - card["worth"]["cost"] / card["worth"]["at_risk"] == pytest.approx(metrics["money_saved_share"]["value"])
    assert used["policy"]["saved"] == pytest.approx(metrics["money_saved_share"]["value"])
    for name in ("recall", "precision"):
        assert used["policy"][name] == pytest.approx(metrics[f"stopped_{name}"]["value"])
    assert used["policy"]["reviews_per_day"] == pytest.approx(metrics["reviews_per_day"])
    assert {row["decision"]: row["honest"] + row["frauds"] for row in card["worth"]["decisions"]} == metrics[
        "decisions"
    ]
    kinds = {part["name"]: part["stopped"]["value"] for part in card["segments"] if part["by"] == "kind of fraud"}
    assert kinds == pytest.approx({name: found["stopped"] for name, found in metrics["scenarios"].items()})
    text = re.sub(
        r"\s+", " ", re.sub(r"<[^>]+>", " ", (finished.root / "reports/index.html").read_text(encoding="utf-8"))
    )
    assert (
        f"saves {metrics['money_saved_share']['value']:.0%} of what fraud costs" in text
        and f"frauds were after {card['worth']['at_risk']:,.0f}" in text
    )

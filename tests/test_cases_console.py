"""The queue in a real browser: two people work on the same cases."""

import contextlib
import csv
import time
from collections.abc import Iterator

import httpx
import pytest
import servers
from browser import DESKTOP, PHONE, Visit, browser, visit  # noqa: F401  browser is a fixture
from test_cases import ANNA, BEN, EVE, SHOP, cases_of, decide, payment, served

HOSTILE = "<img src=x onerror=alert(1)>\"'</script>"
LOOKS = {"light": (DESKTOP, False), "dark": (DESKTOP, True), "phone": (PHONE, False)}


@pytest.fixture(scope="module")
def queue(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """A service with a queue, and the address of its database."""
    folder = tmp_path_factory.mktemp("queue")
    url = f"sqlite:///{folder}/cases.db"
    with servers.redis(folder) as redis, served(folder, url, store__url=redis) as (address, _):
        yield address, url


def send(queue: tuple[str, str], *payments: dict) -> None:
    """Has these decided, and waits for their cases."""
    address, url = queue
    decide(address, *payments)
    names = {each["transaction_id"] for each in payments if each["amount"] > 3500}
    servers.until(lambda: names <= set(cases_of(url)), 15)


def unlock(made: Visit, key: str) -> None:
    made.page.locator("#key").wait_for()
    made.until("document.getElementById('state').textContent === 'Locked'")
    made.expect_fault("401 (Unauthorized)")
    made.page.fill("#key", key)
    made.page.keyboard.press("Enter")
    made.until("document.getElementById('state').textContent === 'Live'")


def to_queue(made: Visit) -> None:
    made.page.click("#view-cases")
    made.page.locator("#case-rows tr").first.wait_for()


@pytest.mark.parametrize("look", LOOKS)
def test_from_a_review_to_an_outcome(queue, browser, look):  # noqa: F811
    """A case is found, taken, noted and closed; what it is called is text; nothing is cut off or at fault."""
    size, dark = LOOKS[look]
    name = f"{look}{HOSTILE}"
    send(
        queue,
        payment(name, 4100.0, sender=f"C{look}{HOSTILE}", receiver=f"M{look}"),
        payment(f"{look}-other", 4000.0, sender=f"C{look}-other", receiver=f"M{look}"),
        payment(f"{look}-blocked", 9000.0, sender=f"C{look}-b", receiver=f"M{look}"),
    )
    with visit(browser, queue[0], size, dark) as made:
        page = made.page
        unlock(made, ANNA)
        to_queue(made)
        if look == "phone":
            page.click("#case-filters summary")
        page.fill("[name=entity] >> visible=true", f"M{look}")
        made.until("document.getElementById('case-count').textContent === '2 cases'")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        made.screenshot(f"cases-{look}")
        assert made.violations() == []
        page.locator("#case-rows tr", has_text=f"C{look}<img").first.locator(".k-why").click()
        page.locator("#case-title", has_text=name).wait_for()
        shown = page.locator("#case-detail").text_content()
        assert "AmountTime" not in shown and "4,100.00" in shown and "2 other cases" in shown
        assert page.locator("#case-detail img, #case-rows img").count() == 0
        page.locator("#case-histories .account").first.wait_for()
        assert made.violations() == []
        page.click("#case-take")
        page.locator("#case-work", has_text="Yours until").wait_for()
        page.fill("#case-note", "called, knows nothing of it")
        page.click("#case-noted")
        page.locator(".events", has_text="called, knows nothing of it").wait_for()
        made.screenshot(f"cases-{look}-opened", full=True)
        assert made.violations() == []
        page.click("#case-fraud")
        page.locator("#case-work", has_text="Closed as fraud by anna").wait_for()
        page.locator("#case-events", has_text="Label fraud: told").wait_for()
        assert f"entity=M{look}" in page.url and "case=" in page.url
        page.fill("#case-note", f"he called back{HOSTILE}")
        assert made.violations() == []
        made.screenshot(f"cases-{look}-closed")
        page.click("#case-reopen")
        page.locator("#case-work", has_text="Open. Opened again").wait_for()
        page.locator(".events", has_text="Opened again by anna").wait_for()
        page.locator(".events q", has_text=f"he called back{HOSTILE}").wait_for()
        page.locator("#case-rows", has_text="opened again").wait_for()
        page.click("#case-honest")
        page.locator("#case-work", has_text="Closed as honest by anna").wait_for()
        page.locator("#case-events", has_text="Label honest: told").wait_for()
        page.keyboard.press("Escape")
        page.click("#case-detail .close")
        assert page.locator("#case-detail").is_hidden()


def test_two_people(queue, browser):  # noqa: F811
    """What one takes the other sees taken, and cannot take, close or note; what one is writing stays."""
    send(queue, *(payment(f"both{i}", 4000.0 + i, sender=f"Cboth{i}", receiver="Mboth") for i in range(3)))
    with visit(browser, queue[0]) as first, visit(browser, queue[0]) as second:
        for made, key in ((first, ANNA), (second, BEN)):
            unlock(made, key)
            made.page.evaluate("location.hash = '#cases?state=all&entity=Mboth&order=amount'")
            made.until("document.getElementById('case-count').textContent === '3 cases'")
            made.page.locator("#case-rows tr").first.click()
            made.page.locator("#case-title", has_text="both2").wait_for()
        second.page.wait_for_timeout(200)
        first.page.click("#case-take")
        first.page.locator("#case-work", has_text="Yours until").wait_for()
        began = time.monotonic()
        second.page.locator("#case-work", has_text="Taken by anna").wait_for()
        assert time.monotonic() - began < 5
        assert second.page.locator("#case-rows tr", has_text="Taken by anna").count() == 1
        assert second.page.locator("#case-work button:enabled").count() == 0
        # The second one's page may be older than what happened: the service says who was faster.
        case = int(second.page.locator("#case-rows tr").first.get_attribute("data-id"))
        answer = httpx.post(
            f"{queue[0]}/cases", json={"action": "take", "cases": [case]}, headers={"X-API-Key": BEN}, timeout=10
        )
        assert (answer.status_code, answer.json()["problems"][0]["reason"]) == (409, f"{case} is taken by anna")
        first.page.fill("#case-note", "half a sentence")
        first.page.wait_for_timeout(3000)
        assert first.page.input_value("#case-note") == "half a sentence"
        first.page.click("#case-release")
        second.page.locator("#case-take:enabled").wait_for()
        second.screenshot("cases-two-people")


def test_keyboard_bulk_export_and_address(queue, browser, tmp_path):  # noqa: F811
    """Arrows and letters do what the mouse does; several cases are closed at once; the address brings the filter back;
    the table has no formula.
    """
    names = [f"=key{i}" for i in range(4)]
    send(queue, *(payment(name, 4000.0 + i, sender=f"Ckey{i}", receiver="Mkey") for i, name in enumerate(names)))
    with visit(browser, queue[0]) as made:
        page = made.page
        unlock(made, ANNA)
        page.evaluate("location.hash = '#cases?state=all&entity=Mkey&order=amount'")
        made.until("document.getElementById('case-count').textContent === '4 cases'")
        page.locator("#case-rows tr").first.focus()
        page.keyboard.press("t")
        page.locator("#case-rows tr").first.locator(".s-mine").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator("#case-title", has_text="=key2").wait_for()
        page.keyboard.press("h")
        page.locator("#case-work", has_text="Closed as honest by anna").wait_for()
        page.keyboard.press("Escape")
        for row in range(4):
            page.locator("#case-rows input").nth(row).check()
        page.fill("#bulk-note", "the same shop")
        page.click("[data-bulk=unclear]")
        page.locator("#bulk-said", has_text="3 done; not:").wait_for()
        page.locator("#case-rows .s-unclear").nth(2).wait_for()
        made.expect_fault("409") if any("409" in fault for fault in made.faults) else None
        with page.expect_download() as download:
            page.click("#case-export")
        download.value.save_as(tmp_path / "cases.csv")
        rows = list(csv.DictReader((tmp_path / "cases.csv").open(encoding="utf-8", newline="")))
        assert [row["transaction_id"] for row in rows] == [f"'{name}" for name in reversed(names)]
        assert {row["note"] for row in rows if row["outcome"] == "unclear"} == {"the same shop"}
        page.locator("#case-rows tr").nth(1).focus()
        page.keyboard.press("Enter")
        page.locator("#case-title", has_text="=key2").wait_for()
        page.keyboard.press("o")  # without a reason
        page.locator("#case-said", has_text="expected why the case is opened again").wait_for()
        made.expect_fault("422")
        page.fill("#case-note", "=one more look")
        page.click("#case-reopen")
        page.locator("#case-work", has_text="Open. Opened again").wait_for()
        with page.expect_download() as download:
            page.click("#case-export")
        download.value.save_as(tmp_path / "again.csv")
        rows = list(csv.DictReader((tmp_path / "again.csv").open(encoding="utf-8", newline="")))
        again = next(row for row in rows if row["transaction_id"] == "'=key2")
        assert [again[name] for name in ("state", "reopened_by", "reopened_why")] == ["open", "anna", "'=one more look"]
        page.keyboard.press("Escape")
        address = page.url
        page.reload()
        unlock(made, ANNA)
        made.until("document.getElementById('case-count').textContent === '4 cases'")
        assert page.url == address and page.input_value("[name=entity] >> visible=true") == "Mkey"


def test_read_only(queue, browser):  # noqa: F811
    """Who may only read sees the queue and is told why nothing can be pressed; a shop sees nothing."""
    send(queue, payment("reader", 4200.0))
    with visit(browser, queue[0]) as made:
        unlock(made, EVE)
        to_queue(made)
        made.page.locator("#case-rows tr").first.click()
        made.page.locator("#case-work", has_text="this key may not work on cases").wait_for()
        assert made.page.locator("#case-work button:enabled, #take-next:enabled").count() == 0
    assert httpx.get(f"{queue[0]}/cases", headers={"X-API-Key": SHOP}).status_code == 403


def test_the_live_view(browser, tmp_path):  # noqa: F811
    """One click shows one decision; accounts are links; filters keep in the address; nothing is cut off at 1280 px;
    a service that starts again is found again, and its queue is there.
    """
    url, port = f"sqlite:///{tmp_path}/cases.db", servers.free_port()
    with contextlib.ExitStack() as first, visit(browser, "about:blank") as made:
        address, process = first.enter_context(served(tmp_path, url, port))
        page = made.page
        page.goto(address)
        unlock(made, ANNA)
        long = "C1234567890123"
        decide(address, payment("l1", 10.0, sender=long), payment("l2"), payment("l3", 9000.0, receiver=long))
        page.locator("#rows .row").nth(2).wait_for()
        cut = page.evaluate(
            "[...document.querySelectorAll('.facts dd, #rows .c-from, #rows .c-to, #rows .c-amount, #rows .c-why')]"
            ".filter((e) => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 2)"
            ".map((e) => e.textContent)"
        )
        assert cut == []
        made.screenshot("live-1280")
        page.click("[data-only=review]")
        made.until("document.querySelectorAll('#rows .row').length === 1")
        assert "decision=review" in page.url
        page.click("[data-only=review]")
        made.until("document.querySelectorAll('#rows .row').length === 3")
        page.locator("#rows .c-from a", has_text=long).click()
        made.until("document.querySelectorAll('#rows .row').length === 2")
        assert page.input_value("[name=account]") == long and f"account={long}" in page.url
        assert made.violations() == []
        process.terminate()
        process.wait()
        with served(tmp_path, url, port):
            made.until("document.getElementById('state').textContent === 'Live'", 30)
            made.faults.clear()  # that nobody answered for a while
            assert page.locator("#rows .row").count() == 2  # what the page has seen stays
            decide(address, payment("l4", 20.0, sender=long))
            made.until("document.querySelectorAll('#rows .row').length === 3")
            page.click("#view-cases")
            page.locator("#case-rows tr").first.wait_for()

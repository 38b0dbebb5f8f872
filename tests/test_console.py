"""The console: a real service, a real browser, and what passes between them."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator

import httpx
import payments
import pytest
import servers
from browser import DESKTOP, PHONE, Visit, browser, visit  # noqa: F401  browser is a fixture
from conftest import PROJECT
from test_any_payment import said
from test_serve import transaction

from fraud_pkg.core.contract import HOUR
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.console import DOCS, DOCS_POLICY, PAGE, POLICY

READ, WRITE, SHOP = "anna-0123456789abcdef", "ben-0123456789abcdef", "shop-0123456789abcdef"
KEYS = {"FRAUD_API_KEYS": f"anna@read:{READ},ben@write:{WRITE},shop:{SHOP}"}
LOOKS = {"light": (DESKTOP, False), "dark": (DESKTOP, True), "phone": (PHONE, False)}
HOSTILE = "<img src=x onerror=alert(1)>\"'</script>"


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[str]:
    """A service with keys and its store in Redis, for all that may share one."""
    folder = tmp_path_factory.mktemp("console")
    example_bundle(folder / "champion", weight=0.002, bias=-7.0)
    with (
        servers.redis(folder) as redis,
        servers.service(folder, variables=KEYS, store__url=redis, console__keep=20_000) as (url, _),
    ):
        yield url


def send(url: str, *transactions: dict) -> None:
    answer = httpx.post(
        f"{url}/predict/batch", json={"transactions": list(transactions)}, headers={"X-API-Key": SHOP}, timeout=30
    )
    assert answer.status_code == 200, answer.text


def unlock(made: Visit, key: str) -> None:
    """Gives the page a key; that it was asked for one is no fault."""
    made.page.locator("#key").wait_for()
    made.until("document.getElementById('state').textContent === 'Locked'")
    made.expect_fault("401 (Unauthorized)")
    made.page.fill("#key", key)
    made.page.keyboard.press("Enter")
    made.until("document.getElementById('state').textContent === 'Live'")


def seconds_until_seen(made: Visit, url: str, sent: dict) -> float:
    """How long it takes from sending a transaction until the page shows one more."""
    began, before = time.monotonic(), made.page.locator("#n-all").text_content()
    send(url, sent)
    made.until(f"document.getElementById('n-all').textContent !== '{before}'")
    return time.monotonic() - began


@pytest.mark.parametrize("look", LOOKS)
def test_from_a_transaction_to_a_mark(service, browser, look):  # noqa: F811
    """What is sent appears within a second, as text whatever it is called; opened it has reasons and histories; marked
    it counts in the store. Nothing is at fault for whoever looks or listens.
    """
    size, dark = LOOKS[look]
    send(service, *(transaction(f"{look}-{i}", amount=round(10 * 1.6**i, 2)) for i in range(14)))
    with visit(browser, service, size, dark) as made:
        page = made.page
        unlock(made, WRITE)
        page.locator("#rows .row").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing to scroll sideways
        made.screenshot(f"console-{look}")
        assert made.violations() == []
        sent = transaction(f"{look}{HOSTILE}", amount=5000.0, sender=f"C{look}{HOSTILE}", receiver=f"C{look}-dest")
        assert any(
            seconds_until_seen(made, service, {**sent, "transaction_id": f"{sent['transaction_id']}{i}"}) < 1
            for i in range(3)
        )  # a busy machine may need another chance
        page.locator(".row", has_text=sent["sender"]).first.locator(".c-decision").click()  # accounts are links
        assert (
            page.locator("#detail-title").text_content().startswith(sent["transaction_id"])
            and page.locator("#detail img, #rows img").count() == 0
        )
        assert page.locator(".reasons").text_content().startswith("Amount5,000.00+") and page.locator(
            "#detail .verdict"
        ).text_content().startswith("95.3 %Block")
        page.locator(".account td.bad").wait_for(state="detached")
        page.locator(".account").nth(1).wait_for()
        assert made.violations() == []
        page.locator("#marking .fraud").click()
        page.locator(".account td.bad").first.wait_for()  # asked of the store again
        made.screenshot(f"console-{look}-opened", full=True)
        known = httpx.post(
            f"{service}/history",
            json={"values": {name: sent[name] for name in ("sender", "receiver")}, "time": sent["step"] * HOUR},
            headers={"X-API-Key": READ},
        ).json()
        frauds = [{row["window"]: row["frauds"] for row in entity["windows"]} for entity in known["entities"]]
        assert frauds == [{"1h": None, "24h": None, "7d": 1, "30d": 1}] * 2
        page.locator("#marking .honest").click()
        made.until("document.querySelectorAll('.account').length == 2 && !document.querySelector('.account td.bad')")
        page.keyboard.press("Escape")
        assert page.locator("#detail").is_hidden()


def test_many_decisions(service, browser):  # noqa: F811
    """Twelve thousand decisions: the page keeps ten thousand, draws a few dozen, and goes where it is scrolled to and
    filtered.
    """
    with visit(browser, service) as made:
        page = made.page
        unlock(made, READ)
        for start in range(0, 12_000, 1000):
            send(
                service,
                *(
                    transaction(f"many{start + i}", amount=float(1 + (start + i) % 4000), sender=f"C{i}")
                    for i in range(1000)
                ),
            )
        made.until("document.getElementById('shown').textContent.includes('of the newest 10,000')")
        made.until(
            "document.querySelector('.row .c-from') && "
            "document.getElementById('n-all').textContent.replace(/\\D/g, '') >= 12000"
        )
        made.screenshot("console-many")
        assert page.locator("*").count() < 1500
        page.evaluate("document.getElementById('grid').scrollTop = 5000 * 34")
        made.until(
            "[...document.querySelectorAll('#rows .row')].some((row) => row.ariaRowIndex === '5002')"
        )  # the list is drawn where it was scrolled to
        assert page.locator("*").count() < 1500
        page.fill("[name=account]", "c77")
        page.fill("[name=least]", "50")
        made.until("/^\\d+ of the newest/.test(document.getElementById('shown').textContent)")
        page.wait_for_timeout(400)
        names = page.locator("#rows .c-from").all_text_contents()
        assert names and all("c77" in name.lower() for name in names)
        made.screenshot("console-filtered")


def test_by_hand_and_by_keyboard(service, browser):  # noqa: F811
    """The chain of mules is sent, decided and opened; arrows and letters do what the mouse does; a pause holds the
    list.
    """
    with visit(browser, service) as made:
        page = made.page
        unlock(made, WRITE)
        page.click("#by-hand")
        page.click("#examples button:nth-child(3)")
        page.fill("[name=time] >> visible=true", str(2000 * HOUR))
        assert made.violations() == []
        page.click("#hand-send")
        page.locator("#hand-results li").nth(2).wait_for()
        made.screenshot("console-hand")
        page.click("#hand-results li:nth-child(1) button")
        page.locator("#detail-title", has_text="hand-").wait_for()
        assert page.locator("#detail .others li").count() >= 1  # the next of the chain
        page.locator(
            "#rows .row:first-child .c-to", has_text="C-hand-agent"
        ).wait_for()  # the list is drawn after the details
        page.focus("#grid")
        page.keyboard.press("Home")
        first = page.locator("#detail-title").text_content()
        assert first.endswith("-3")
        page.keyboard.press("ArrowDown")
        assert page.locator("#detail-title").text_content().endswith("-2")
        page.keyboard.press("f")
        page.locator("#marking", has_text="Marked as fraud").wait_for()
        page.click("#pause")
        send(service, transaction("while-paused"))
        page.locator("#shown", has_text="1 more since the pause").wait_for()
        assert page.locator(".row .c-why").first.is_visible() and "while-paused" not in page.content()
        page.click("#pause")
        made.until("!document.getElementById('shown').textContent.includes('pause')")
        page.click("#by-hand")
        page.fill("[name=amount] >> visible=true", "-4")
        page.click("#hand-send")
        page.locator("#hand-problem", has_text="amount: Input should be greater than or equal to 0").wait_for()
        made.expect_fault("422")


def test_attributes_and_entities(browser, tmp_path):  # noqa: F811
    """What a payment says beside the core is shown, filtered by and asked for; every entity has its history."""
    payments.bundle(tmp_path / "champion")
    with servers.service(tmp_path, variables=KEYS) as (url, _), visit(browser, url) as made:
        page = made.page
        unlock(made, WRITE)
        for number in range(4):
            send(url, said(f"shown{number}", device=f"device_{number % 2}{HOSTILE}"))
        page.locator("#rows .row").nth(3).wait_for()
        page.select_option("[name=attribute]", "device")
        page.fill("[name=value]", "DEVICE_1")
        page.locator("#rows .row").nth(1).wait_for()
        page.locator("#rows .row").nth(3).wait_for(state="detached")
        page.locator("#rows .row").first.click()
        assert page.locator("#detail-title").text_content() == "shown3"
        shown = page.locator("#detail").text_content()
        assert "Merchant categorymcc_1" in shown and "48.2000, 16.4000" in shown and f"device_1{HOSTILE}" in shown
        page.locator(".account").nth(len(payments.CONTRACT.entities) - 1).wait_for()
        assert page.locator("#entities").text_content().count("C1 + M1") == 1
        assert page.locator("#detail img, #rows img").count() == 0 and made.violations() == []
        made.screenshot("console-attributes", full=True)
        page.keyboard.press("Escape")
        page.click("#by-hand")
        page.fill("[name='attribute.mcc']", "mcc_2")
        page.fill("[name='attribute.shop_latitude']", "95")
        page.fill("[name='attribute.shop_longitude']", "16,5")
        page.click("#hand-send")
        page.locator("#hand-problem", has_text="shop_latitude: Input should be less than or equal to 90").wait_for()
        made.expect_fault("422")
        page.fill("[name='attribute.shop_latitude']", "48,1")
        page.click("#hand-send")
        page.locator("#hand-results li").first.wait_for()


def test_read_only(service, browser, tmp_path):  # noqa: F811
    """A key with read access cannot mark, and the page says so; nor may anybody without keys, on loopback. A key is
    gone when the page is loaded again.
    """
    with visit(browser, service) as made:
        unlock(made, READ)
        made.page.locator("#rows .row").first.click()
        made.page.locator("#marking", has_text="this key has no write access").wait_for()
        assert made.page.locator("#marking button:enabled").count() == 0
        assert made.page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        made.page.reload()
        made.page.locator("#key-dialog[open]").wait_for()
        made.expect_fault("401")
        made.page.fill("#key", SHOP)
        made.page.keyboard.press("Enter")
        made.page.locator("#key-why", has_text="shop may not read").wait_for()
        made.expect_fault("403")
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path) as (url, _), visit(browser, url) as made:
        made.until("document.getElementById('state').textContent === 'Live'")
        httpx.post(f"{url}/predict", json=transaction(1))
        made.page.locator("#rows .row").first.click()
        made.page.locator("#marking", has_text="no key for writing is configured").wait_for()
        assert made.page.locator("#marking button:enabled").count() == 0
        made.screenshot("console-read-only")
        assert [
            httpx.get(f"{url}/events", headers={"Host": host}).status_code
            for host in ("rebound.example", "127.0.0.1.example")
        ] == [403, 403]


# The stream, as a program reads it


def feed(url: str, **headers: str) -> contextlib.AbstractContextManager[httpx.Response]:
    return httpx.stream("GET", f"{url}/events", headers=headers, timeout=20)


def heard(lines: Iterator[str], event: str) -> tuple[str, list]:
    """The id and the content of the next event of this kind."""
    position = ""
    for line in lines:
        if line.startswith("id: "):
            position = line[4:]
        if line == f"event: {event}":
            return position, json.loads(next(lines).removeprefix("data: "))
    raise AssertionError(f"the stream ended before an event {event}")


def test_stream_goes_on_and_ends(tmp_path):
    """A connection that broke goes on after the last thing it heard; one that missed too much is told so; as many look
    as may; SIGTERM ends the stream, and the service with 0.
    """
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path, console__keep=5, console__clients=2) as (url, process):
        httpx.post(f"{url}/predict", json=transaction(0))
        with feed(url) as first:
            lines = first.iter_lines()
            assert heard(lines, "hello")[1]["may_write"] is False
            position, [seen] = heard(lines, "decisions")
            assert seen["transaction_id"] == "t0"
            httpx.post(f"{url}/feedback", json={"labels": [{"transaction_id": "t0", "is_fraud": True}]})
            assert heard(lines, "labels")[1] == [{"transaction_id": "t0", "is_fraud": True}]
        for number in range(1, 4):
            httpx.post(f"{url}/predict", json=transaction(number))
        with feed(url, **{"Last-Event-ID": position}) as again, feed(url, **{"Last-Event-ID": "another-9"}) as other:
            lines, others = again.iter_lines(), other.iter_lines()
            assert heard(lines, "labels")[1][0]["transaction_id"] == "t0"
            assert [row["transaction_id"] for row in heard(lines, "decisions")[1]] == ["t1", "t2", "t3"]
            assert (
                heard(others, "decisions")[1][0]["transaction_id"] == "t0"
            )  # an id of another process: from the beginning
            crowded = httpx.get(f"{url}/events")
            assert (crowded.status_code, crowded.json()["problems"][0]["field"]) == (503, "console")
            assert httpx.head(f"{url}/").status_code == 200
            assert "fraud_console_clients 2.0" in httpx.get(f"{url}/metrics").text
        while "fraud_console_clients 0.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.05)
        for number in range(4, 20):
            httpx.post(f"{url}/predict", json=transaction(number))
        with feed(url, **{"Last-Event-ID": position}) as late:
            lines = late.iter_lines()
            assert heard(lines, "gap")[1] == {"requests": 15}
            assert [row["transaction_id"] for row in heard(lines, "decisions")[1]] == [
                f"t{number}" for number in range(15, 20)
            ]
            process.send_signal(signal.SIGTERM)
            assert heard(lines, "bye")[1] == {}
        assert process.wait(10) == 0


def test_a_client_that_takes_nothing_is_dropped(tmp_path):
    """It keeps nobody's decision waiting, and its place becomes free."""
    example_bundle(tmp_path / "champion", bias=-30)
    with (
        servers.service(tmp_path, serve__timeout=1, console__clients=1, console__keep=50_000) as (url, _),
        socket.socket() as stuck,
    ):
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect((servers.HOST, int(url.rsplit(":", 1)[1])))
        stuck.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with httpx.Client(base_url=url, timeout=10) as client:
            for start in range(0, 12_000, 1000):
                assert (
                    client.post(
                        "/predict/batch", json={"transactions": [transaction(start + i) for i in range(1000)]}
                    ).status_code
                    == 200
                )
            while "fraud_console_clients 0.0" not in client.get("/metrics").text:
                time.sleep(0.1)
        with feed(url) as next_one:
            assert heard(next_one.iter_lines(), "hello")
    assert "a page of the console took nothing for 1 seconds: dropped" in (tmp_path / "api.log").read_text()


def test_the_page_and_its_policy(service):
    """The files are for everybody and may do little; a browser that has them is not sent them again."""
    for path, (_, kind) in (PAGE | DOCS).items():
        found = httpx.get(f"{service}{path}")
        assert (
            found.status_code,
            found.headers["content-type"].split(";")[0],
            found.headers["content-security-policy"],
        ) == (200, kind, POLICY if path in PAGE else DOCS_POLICY)
        assert (
            found.headers["x-content-type-options"] == "nosniff" and found.headers["referrer-policy"] == "no-referrer"
        )
        assert httpx.get(f"{service}{path}", headers={"If-None-Match": found.headers["etag"]}).status_code == 304
    assert "unsafe" not in POLICY and "*" not in POLICY
    assert [
        httpx.get(f"{service}/events", headers={"X-API-Key": key}).status_code for key in (SHOP, "unknown-0123456789")
    ] == [403, 401]
    assert (
        httpx.post(
            f"{service}/feedback",
            json={"labels": [{"transaction_id": "x", "is_fraud": True}]},
            headers={"X-API-Key": READ},
        ).status_code
        == 403
    )


def test_the_docs_work_without_the_internet(service, browser):  # noqa: F811
    """Swagger UI of our own files, within its policy: asks for a key, shows the document, sends a request with it."""
    with visit(browser, f"{service}/docs") as made:
        made.page.fill("#key", SHOP)
        made.expect_fault("401")
        made.page.keyboard.press("Enter")
        made.page.locator("#operations-default-model_model_get button").first.click()
        made.page.get_by_role("button", name="Try it out").click()
        made.page.get_by_role("button", name="Execute").click()
        made.page.locator(".live-responses-table .response-col_status", has_text="200").first.wait_for()


def test_the_wheel_has_the_page(tmp_path):
    """Whoever installs the package has its files too."""
    source = tmp_path / "source"  # a build leaves things behind
    shutil.copytree(PROJECT / "fraud_pkg", source / "fraud_pkg", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, source)
    subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    [wheel] = tmp_path.glob("*.whl")
    assert {f"fraud_pkg/serve/assets/{name}" for name, _ in (PAGE | DOCS).values()} <= set(
        zipfile.ZipFile(wheel).namelist()
    )

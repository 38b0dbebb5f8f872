"""The report's pages in a real browser: from disk and over HTTP, by day, by night and on a phone."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from browser import DESKTOP, PHONE, browser, over_http, visit  # noqa: F401

from fraud_pkg.core.cost import Payments, expected_cost, money_saved, solve_prices, with_budget
from fraud_pkg.core.policy import DECISIONS, Policy, decide
from fraud_pkg.core.sections import Decision
from fraud_pkg.core.settings import load_settings
from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.model.what_if import WhatIf, choices, outcome, payment_cells
from fraud_pkg.monitor.rule_report import write_test_rules
from fraud_pkg.report.charts import environment, write_assets
from fraud_pkg.report.pages import PAGES
from fraud_pkg.report.site import build_site
from fraud_pkg.report.what_if import what_if_page
from fraud_pkg.train.metrics import days_in
from fraud_pkg.train.samples import load_period

LOOKS = {"light": (DESKTOP, False), "dark": (DESKTOP, True), "phone": (PHONE, False)}
RICHEST = ("index", "champion", "what_if", "rules")  # a phone shows axe nothing new on the others


@pytest.fixture(scope="module")
def served(finished) -> Iterator[str]:
    with over_http(finished.root / "reports") as url:
        yield url


def check_page(browser, url: str, page: str, look: str) -> None:  # noqa: F811
    """No serious fault that axe finds, also with every table opened; nothing scrolls sideways; the colours are those
    asked for.
    """
    size, dark = LOOKS[look]
    with visit(browser, f"{url}/{page}.html", size, dark) as seen:
        seen.screenshot(f"report_{page}_{look}", full=True)
        seen.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert (look == "phone" and page not in RICHEST) or seen.violations() == [], page
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0], page
        assert seen.page.evaluate("(n => n.scrollWidth <= n.clientWidth)(document.querySelector('.top nav'))"), page
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(18, 23, 28)" if dark else "rgb(249, 249, 246)"
        ), page


@pytest.mark.parametrize("look", LOOKS)
def test_pages_are_accessible_and_fit(browser, served, look):  # noqa: F811
    for page in PAGES:
        check_page(browser, served, page, look)


def test_pages_of_jobs_and_of_evidently_belong_to_the_report(browser, finished):  # noqa: F811
    """A link back, the colours that are asked for, and no place of this machine."""
    reports = finished.root / "reports"
    pages = [*sorted((reports / "jobs").glob("*.html")), *sorted((reports / "monitor").glob("*.html"))]
    assert {"train_xgboost.html", "drift.html", "performance.html"} <= {page.name for page in pages}
    for page in [*pages, *reports.glob("*.html")]:
        text = page.read_text(encoding="utf-8")
        assert str(finished.root) not in text and str(Path.home()) + "/" not in text, page.name
        back = re.findall(r'href="(\.\./\w+\.html)', text)
        assert page.parent == reports or (back and all((page.parent / link).is_file() for link in back)), page.name
    for dark in (False, True):
        for page in (reports / "jobs/train_xgboost.html", reports / "monitor/drift.html"):
            with visit(browser, page.as_uri(), dark=dark) as seen:
                red = seen.page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
                assert (int(red) < 80) == dark, page.name
                assert seen.page.evaluate("document.documentElement.scrollWidth") <= DESKTOP[0], page.name


RULES = """
rules:
  - {name: emptied_at_once, action: review, if: empties_account == 1.0 && amount > 3000.0}
  - {name: likely, action: block, if: probability > 0.3}
  - {name: at_night, action: review, if: hour < 5 && amount > 5000.0, mode: shadow}
  - {name: large, action: tag, if: amount > 10000.0, mode: shadow}
"""


@pytest.fixture(scope="module")
def with_rules(finished, tmp_path_factory) -> Iterator[str]:
    """The same site with rules in force, measured on the test period."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules.yaml").write_text(RULES)
    shutil.copytree(finished.root / "reports", folder / "reports")
    given = {"FRAUD_ROOT": finished.root, "FRAUD_RULES_FILE": folder / "rules.yaml"}
    given |= {"FRAUD_PATHS_REPORTS": folder / "reports"}
    settings = load_settings(environ=finished.environment() | {name: str(value) for name, value in given.items()})
    assert {result.name for result in write_test_rules(settings).results} == {
        "emptied_at_once",
        "likely",
        "at_night",
        "large",
    }
    build_site(settings)
    with over_http(folder / "reports") as url:
        yield url


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_of_rules_too(browser, with_rules, look):  # noqa: F811
    """It stands where there are rules; on a phone its tables are the widest."""
    check_page(browser, with_rules, "rules", look)


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
        chart, tip = seen.page.locator("#curves .plot > svg").first, seen.page.locator(".tip")
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


CHOICES = (  # positions of the sliders from their own
    {},
    {"alert_budget": -3},
    {"alert_budget": 6, "review_cost": 4},
    {"recovered_share": -6, "block_cost": -8},
    {"alert_budget": -10},  # nobody reviews
    {"review_cost": -10, "block_cost": 11},
)


@pytest.fixture(scope="module")
def periods(finished) -> dict:
    """Validation and test period of the champion: sample and probabilities."""
    settings = load_settings(environ=finished.environment() | {"FRAUD_ROOT": str(finished.root)})
    manifest = (bundle := load_bundle(finished.root / "models/champion")).manifest
    samples = {name: load_period(settings, name) for name in ("validation", "test")}
    return {
        name: (sample, bundle.probability(sample.select(manifest.features, manifest.vocabulary)))
        for name, sample in samples.items()
    }


def counted(periods, decision: Decision) -> dict[str, float]:
    """What the page has to say of a budget and costs: prices from validation, decisions on the test period."""
    (known, known_p), (test, p) = periods["validation"], periods["test"]
    policy = solve_prices(Payments(known_p, known.amount, days_in(known.step), known.y), decision)
    taken, days = decide(p, test.amount, policy).decisions, days_in(test.step)
    fraud, stopped = test.y == 1, int((taken > 0).sum())
    saved = money_saved(test.y, test.amount, taken, decision)
    allowed = expected_cost(test.y, test.amount, taken * 0, decision)
    figures = {
        "saved": saved,
        "saved_share": saved / allowed,
        "reviews": (taken == 1).sum() / days,
        "blocks": (taken == 2).sum() / days,
        "honest_blocked": (taken[~fraud] == 2).mean(),
        "stopped_precision": fraud[taken > 0].mean() if stopped else None,
        "passed": (taken[fraud] == 0).sum(),
        "passed_amount": test.amount[fraud & (taken == 0)].sum(),
        "review_price": policy.review_price,
        "block_price": policy.block_price,
    }
    for i in range(len(DECISIONS)):
        figures |= {
            f"honest.{i}": ((taken == i) & ~fraud).sum(),
            f"frauds.{i}": ((taken == i) & fraud).sum(),
            f"amount.{i}": test.amount[(taken == i) & fraud].sum(),
        }
    return figures


def test_sliders_say_what_the_policy_would_do(browser, finished, periods):  # noqa: F811
    """The figures in the page, moved by keys, beside `core.cost` and `core.policy` on the same payments."""
    policy = load_bundle(finished.root / "models/champion").manifest.policy
    choices = {choice["name"]: choice for choice in finished.json("reports/bakeoff/what_if.json")["choices"]}
    own = {name: getattr(policy, name) for name in Decision.model_fields}
    with visit(browser, (finished.root / "reports/what_if.html").as_uri()) as seen:

        def shown() -> dict[str, float]:
            return seen.page.evaluate(
                "Object.fromEntries([...document.querySelectorAll('[data-figure]')].map("
                "(cell) => [cell.dataset.figure, cell.dataset.value === 'null' ? null : Number(cell.dataset.value)]))"
            )

        for moved in CHOICES:
            seen.page.get_by_role("button", name="As served").click()
            seen.until("document.getElementById('summary').textContent.startsWith('As served')")
            decision = dict(own)
            for name, steps in moved.items():
                seen.page.locator(f"#{name}").focus()
                for _ in range(abs(steps)):
                    seen.page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
                choice = choices[name]
                decision[name] = choice["values"][max(0, min(choice["own"] + steps, len(choice["values"]) - 1))]
            assert shown() == pytest.approx(counted(periods, Decision(**decision)), rel=1e-6), moved
        assert seen.page.evaluate("(policy) => whatIf.solve(policy)", own)["review_price"] == policy.review_price


def what_if_site(folder: Path, tried: WhatIf) -> str:
    """The page of sliders alone, of these payments; its address."""
    frame = environment().get_template("frame.html")
    text = frame.render(page="what_if", names=PAGES, champion=None, history=[], tried=what_if_page(tried))
    (folder / "what_if.html").write_text(text, encoding="utf-8")
    write_assets(folder / "assets")
    return (folder / "what_if.html").as_uri()


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
def test_the_script_finds_the_prices_that_python_finds(browser, tmp_path, segmented):  # noqa: F811
    """Of many budgets, limits and costs, on payments that all stay single; and counts the same."""
    rng = np.random.default_rng(19)
    p = 1 / (1 + np.exp(6 - 2.5 * rng.normal(size=3000)))
    y, amount = (rng.random(3000) < p).astype(np.int8), rng.lognormal(5, 1, 3000).round(2)
    shops = rng.choice(np.array(["5411", "online", "street", None], object), 3000) if segmented else None
    by_shop = {"segment": "shop", "segment_budgets": {"online": 2, "5411": 0.0008}} if segmented else {}
    own = Policy(**Decision(**by_shop).model_dump(), review_price=7, block_price=70)
    cells = payment_cells(p, amount, y, own, 10, shops)
    tried = WhatIf(
        version="v", policy=own, choices=choices(own), validation=cells, test=cells, served=outcome(cells, own)
    )
    with visit(browser, what_if_site(tmp_path, tried)) as seen:
        for _ in range(40):
            decision = Decision(
                review_cost=rng.choice([0, 1, 5, 12.5]),
                recovered_share=rng.choice([0, 0.3, 0.9, 1]),
                block_cost=rng.choice([0, 20, 150]),
                block_cost_share=rng.choice([0, 0.02]),
                alert_budget=rng.choice([0, 0.002, 0.01, 1, 6, 500]),
                max_false_block_rate=rng.choice([0, 0.001, 0.01, 1]),
                least_review=rng.choice([0, 0, 100]),
            ).model_copy(update=by_shop)  # settings would refuse a segment's budget beyond that of all, sliders cannot
            payments = Payments(p, amount, 10, y, shops)
            policy = solve_prices(payments, with_budget(decision, payments, decision.alert_budget))
            found = seen.page.evaluate("(policy) => whatIf.solve(policy)", {**asdict(own), **decision.model_dump()})
            assert (found["review_price"], found["block_price"]) == (policy.review_price, policy.block_price), decision
            assert found["segment_prices"] == policy.segment_prices, decision
            counted_there = seen.page.evaluate("(policy) => whatIf.outcome(policy)", found)
            taken = decide(p, amount, policy, shops).decisions
            assert counted_there["honest"] == [((taken == i) & (y == 0)).sum() for i in range(3)], decision
            assert counted_there["cost"] == pytest.approx(expected_cost(y, amount, taken, decision), rel=1e-9), decision


def test_what_the_page_of_sliders_says_without_a_script(finished):
    """The figures as served, in the text of the page."""
    text = (finished.root / "reports/what_if.html").read_text(encoding="utf-8")
    metrics = load_bundle(finished.root / "models/champion").manifest.metrics
    figures = dict(re.findall(r'data-figure="([\w.]+)" data-form="[^"]+">\s*([^<]+)<', text))
    assert figures["saved"] == f"{metrics['money_saved']['value']:,.0f}"
    assert figures["saved_share"] == f"{metrics['money_saved_share']['value']:.1%}"
    assert figures["reviews"] == f"{metrics['reviews_per_day']:,.1f}"
    assert len(text) < 700_000


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

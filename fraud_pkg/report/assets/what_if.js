"use strict";
// What another budget or another cost would do. The same procedure as model.what_if and core.cost: a browser test holds
// both together.
(() => {
  const MOST_LEVEL = 30000; // of a price

  // Means of each cell, which decide, and its sums, which are counted.
  function unpack(cells) {
    const payments = cells.honest.map((honest, i) => honest + cells.frauds[i]);
    const amounts = cells.honest_cents.map((cents, i) => (cents + cells.fraud_cents[i]) / 100);
    return {
      days: cells.days, payments, honest: cells.honest, frauds: cells.frauds,
      honestAmount: cells.honest_cents.map((cents) => cents / 100),
      fraudAmount: cells.fraud_cents.map((cents) => cents / 100),
      expectedHonest: cells.probability.map((sum, i) => payments[i] - sum),
      p: cells.probability.map((sum, i) => sum / payments[i]),
      loss: cells.loss.map((sum, i) => sum / payments[i]),
      amount: amounts.map((sum, i) => sum / payments[i]),
      segment: payments.map((_, i) => cells.segment[i] ?? null), // one with a budget of its own
    };
  }

  const sum = (values) => values.reduce((all, value) => all + value, 0);

  // The cheapest of allow (0), review (1) and block (2) for a cell; of equally cheap ones the first.
  function decide(cells, i, policy) {
    const allow = cells.loss[i], own = cells.segment[i] === null ? 0 : policy.segment_prices[cells.segment[i]] ?? 0;
    const review = policy.alert_budget === 0 || cells.amount[i] < policy.least_review ? Infinity
      : policy.review_cost + Math.max(policy.review_price, own) + (1 - policy.recovered_share) * cells.loss[i];
    const block = policy.max_false_block_rate === 0 ? Infinity
      : (1 - cells.p[i]) * (policy.block_cost + policy.block_price)
        + policy.block_cost_share * (cells.amount[i] - cells.loss[i]);
    if (allow <= review && allow <= block) return 0;
    return review <= block ? 1 : 2;
  }

  // Prices have levels of 0.23 %, with four significant digits.
  const priceLevel = (level) => (level ? Number((10 ** ((level - 1) / 1000 - 2)).toPrecision(4)) : 0);

  // The least level from `start` on that fits, of which all higher ones do; null when none does.
  function leastLevel(fits, start) {
    if (fits(start)) return start;
    let low = start, step = 1;
    while (!fits(Math.min(low + step, MOST_LEVEL))) {
      if (low + step >= MOST_LEVEL) return null;
      low += step; step *= 2;
    }
    let high = Math.min(low + step, MOST_LEVEL);
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (fits(middle)) high = middle; else low = middle;
    }
    return high;
  }

  // The policy with the smallest prices that keep all limits on a period; null when no price does. A segment that has no
  // payment, or more room than the whole budget, cannot bind.
  function solve(cells, given) {
    const unpriced = { ...given, review_price: 0, block_price: 0, segment_prices: {} };
    const all = [...cells.payments.keys()], stopped = all.filter((i) => decide(cells, i, unpriced) > 0);
    const honest = [sum(cells.expectedHonest), sum(cells.honest)];
    const roomFor = (budget) => Math.round(budget * (budget < 1 ? sum(cells.payments) : cells.days) * 1e9) / 1e9;
    const room = roomFor(unpriced.alert_budget);
    const segments = Object.entries(given.segment_budgets).map(([name, budget]) => ({ name, room: roomFor(budget) }))
      .filter((segment) => segment.room <= room && cells.segment.includes(segment.name));
    const priced = (levels) => ({
      ...unpriced, review_price: priceLevel(levels.review), block_price: priceLevel(levels.block),
      segment_prices: Object.fromEntries(segments.map((segment, k) => [segment.name, priceLevel(levels[k])])),
    });
    const decided = (levels, action) => {
      const policy = priced(levels);
      return stopped.filter((i) => decide(cells, i, policy) === action);
    };
    const payments = (some) => sum(some.map((i) => cells.payments[i]));
    const limits = segments.map((segment, k) => [k, (levels) =>
      payments(decided({ ...levels, review: 0 }, 1).filter((i) => cells.segment[i] === segment.name)) <= segment.room]);
    limits.push(["review", (levels) => payments(decided(levels, 1)) <= room]);
    limits.push(["block", (levels) => {
      const blocked = decided(levels, 2);
      const wrong = [sum(blocked.map((i) => cells.expectedHonest[i])), sum(blocked.map((i) => cells.honest[i]))];
      return wrong.every((n, k) => Math.min(n + Math.sqrt(n), honest[k]) <= unpriced.max_false_block_rate * honest[k]);
    }]);
    let levels = Object.fromEntries(limits.map(([key]) => [key, 0]));
    for (;;) {
      const higher = { ...levels };
      for (const [key, fits] of limits) {
        const level = leastLevel((tried) => fits({ ...higher, [key]: tried }), higher[key]);
        if (level === null) return null;
        higher[key] = level;
      }
      if (limits.every(([key]) => higher[key] === levels[key])) return priced(levels);
      levels = higher;
    }
  }

  // What a policy does with a period, by the outcomes of its payments.
  function outcome(cells, policy) {
    const honest = [0, 0, 0], frauds = [0, 0, 0], amount = [0, 0, 0];
    let cost = 0;
    cells.payments.forEach((n, i) => {
      const taken = decide(cells, i, policy);
      honest[taken] += cells.honest[i]; frauds[taken] += cells.frauds[i]; amount[taken] += cells.fraudAmount[i];
      cost += [cells.fraudAmount[i],
               policy.review_cost * n + (1 - policy.recovered_share) * cells.fraudAmount[i],
               policy.block_cost * cells.honest[i] + policy.block_cost_share * cells.honestAmount[i]][taken];
    });
    return { honest, frauds, amount, cost, saved: sum(amount) - cost };
  }

  // The figures of the page by their names; null for a share of nothing.
  function figures(seen, cells, policy) {
    const share = (part, whole) => (whole ? part / whole : null);
    const stopped = seen.frauds[1] + seen.frauds[2];
    const shown = {
      saved_share: share(seen.saved, sum(seen.amount)), saved: seen.saved,
      reviews: (seen.honest[1] + seen.frauds[1]) / cells.days, blocks: (seen.honest[2] + seen.frauds[2]) / cells.days,
      honest_blocked: share(seen.honest[2], sum(seen.honest)),
      stopped_precision: share(stopped, stopped + seen.honest[1] + seen.honest[2]),
      passed: seen.frauds[0], passed_amount: seen.amount[0],
      review_price: policy.review_price, block_price: policy.block_price,
    };
    for (const name of ["honest", "frauds", "amount"]) seen[name].forEach((n, i) => { shown[`${name}.${i}`] = n; });
    return shown;
  }

  // A number in a format of Python's, such as ,.1f or .2%.
  function written(value, form) {
    if (value === null || !Number.isFinite(value)) return "–";
    const digits = Number(/\.(\d)/.exec(form)[1]), percent = form.endsWith("%");
    return value.toLocaleString("en", { style: percent ? "percent" : "decimal", useGrouping: form.startsWith(","),
                                        minimumFractionDigits: digits, maximumFractionDigits: digits });
  }

  function page(data) {
    const validation = unpack(data.validation), test = unpack(data.test), form = document.getElementById("sliders");
    const inputs = data.choices.map((choice) => form.elements.namedItem(choice.name));
    const own = () => data.choices.every((choice, k) => Number(inputs[k].value) === choice.own);

    function chosen() {
      const policy = { ...data.policy };
      data.choices.forEach((choice, k) => { policy[choice.name] = choice.values[Number(inputs[k].value)]; });
      return own() ? data.policy : solve(validation, policy);
    }

    function say(policy, shown) {
      const summary = document.getElementById("summary");
      if (!policy) {
        summary.textContent = "No price keeps to the limits with these values.";
        return;
      }
      summary.textContent = `${own() ? "As served" : "So"} it saves ${written(shown.saved_share, ".1%")} of what fraud costs, `
        + `with ${written(shown.reviews, ",.1f")} reviews and ${written(shown.blocks, ",.1f")} blocks a day; `
        + `${written(shown.passed, ",.0f")} frauds pass, with ${written(shown.passed_amount, ",.0f")}.`;
    }

    function show() {
      data.choices.forEach((choice, k) => {
        const text = data.texts[choice.name][Number(inputs[k].value)];
        inputs[k].setAttribute("aria-valuetext", text);
        document.getElementById(`${choice.name}-text`).textContent = text;
      });
      const policy = chosen(), shown = policy ? figures(outcome(test, policy), test, policy) : {};
      document.querySelectorAll("[data-figure]").forEach((cell) => {
        const value = shown[cell.dataset.figure] ?? null;
        cell.textContent = written(value, cell.dataset.form);
        cell.dataset.value = value;
      });
      say(policy, shown);
    }

    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(show));
    form.reset();
    form.hidden = false;
    show();
    window.whatIf = { solve: (policy) => solve(validation, policy), outcome: (policy) => outcome(test, policy) };
  }

  document.addEventListener("DOMContentLoaded", () => {
    const payments = document.getElementById("payments");
    if (payments) page(JSON.parse(payments.textContent));
  });
})();

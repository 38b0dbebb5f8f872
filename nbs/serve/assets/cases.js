// The queue of cases. Two people see the same cases: what one takes, the other sees taken within seconds.
import {
  $,
  accountLink,
  address,
  ask,
  attributeText,
  costs,
  duration,
  el,
  hello,
  histories,
  linkTo,
  moment,
  money,
  pairs,
  percent,
  pill,
  post,
  pressed,
  reasons,
  remember,
  typeWord,
  when,
  whole,
} from "./console.js";

const POLL = 2000; // milliseconds between two looks at the queue while it is shown
const IDLE = 10_000; // ... and at how many wait while it is not
const OUTCOMES = ["fraud", "honest", "unclear"];
const form = $("case-filter"),
  body = $("case-rows"),
  detail = $("case-detail");

let rows = []; // as the service listed them
let next = null; // the cursor of what follows
let skew = 0; // the service's clock minus this one's
let chosen = new Set(); // ids
let current = 0; // the row that arrows move
let opened = null; // the whole case that is shown
let asked = 0; // the newest request of the list; an older answer is dropped
let timer = 0,
  shownPages = 1,
  busy = false;
const drafts = new Map(); // notes that are not sent yet, by case: nobody's words get lost

const now = () => Date.now() + skew;
const person = () => hello?.cases?.person ?? "";
const mayWork = () => Boolean(hello?.cases?.may_work);
const isMine = (row) => row.state === "taken" && row.taken_by === person();
const age = (row) => duration(Math.max(0, (now() - (row.reopened ?? row.arrived)) / 1000));
const inCurrency = (value, row) => `${money.format(value)}${row.currency ? ` ${row.currency}` : ""}`;
const shown = () => address().view === "cases";

// ---------------------------------------------------------------- words

function stateText(row) {
  if (row.state === "open") return "Open";
  if (row.state === "taken") return isMine(row) ? "Mine" : `Taken by ${row.taken_by}`;
  return row.outcome[0].toUpperCase() + row.outcome.slice(1);
}

function stateTag(row) {
  const kind = row.state === "closed" ? row.outcome : isMine(row) ? "mine" : row.state;
  return el("span", { class: `case-state s-${kind}` }, stateText(row));
}

function stateSentence(row) {
  if (row.state === "open") {
    const since = row.reopened ? `Opened again ${moment.format(row.reopened)}` : `Arrived ${moment.format(row.arrived)}`;
    return `Open. ${since}, waits ${age(row)}.`;
  }
  if (row.state === "taken")
    return `${isMine(row) ? "Yours" : `Taken by ${row.taken_by}`} until ${moment.format(row.lease_until)}.`;
  return `Closed as ${row.outcome} by ${row.closed_by ?? "the system"}, ${moment.format(row.closed)}.`;
}

const NO_RIGHT = "Read only: this key may not work on cases; a key named NAME@cases may.";

// ---------------------------------------------------------------- filter and address

const fields = () => [...new FormData(form)].map(([name, value]) => [name, value.trim()]);
const isDefault = ([name, value]) => (name === "state" && value === "waiting") || (name === "order" && value === "loss");

function query() {
  const number = (name, value) => (["least", "most"].includes(name) ? value.replace(",", ".") : value);
  return fields()
    .filter(([, value]) => value)
    .map(([name, value]) => [name, number(name, value)]);
}

function keep(push = false) {
  const entries = fields().filter((entry) => !isDefault(entry));
  remember("cases", [...entries, ["case", opened ? String(opened.id) : ""]], push);
}

function readAddress() {
  const { params } = address();
  for (const element of form.elements)
    if (element.name) element.value = params.get(element.name) ?? (element.tagName === "SELECT" ? element[0].value : "");
  const wanted = Number(params.get("case"));
  if (wanted && wanted !== opened?.id) open(wanted, false);
  if (!wanted && opened) close(false);
}

const linkToEntity = (value) =>
  el("a", { href: linkTo("cases", [["state", "all"], ["entity", value]]) }, value);

// ---------------------------------------------------------------- the list

async function load(quiet = false) {
  const mine = ++asked;
  const pages = [];
  try {
    let cursor = "";
    for (let page = 0; page < shownPages && cursor !== null; page++) {
      const text = new URLSearchParams([...query(), ...(cursor ? [["cursor", cursor]] : [])]);
      pages.push(await (await ask(`/cases?${text}`)).json());
      cursor = pages.at(-1).next;
    }
  } catch (error) {
    if (mine === asked) $("case-problem").textContent = error.message;
    return;
  }
  if (mine !== asked) return;
  $("case-problem").textContent = "";
  rows = pages.flatMap((page) => page.cases);
  next = pages.at(-1).next;
  skew = pages[0].now - Date.now();
  draw(pages[0]);
  if (opened && !busy) refreshOpened(quiet);
}

function draw({ count, counted }) {
  const here = new Set(rows.map((row) => row.id));
  chosen = new Set([...chosen].filter((id) => here.has(id)));
  const focused = body.contains(document.activeElement) ? document.activeElement.closest("tr").dataset.id : null;
  const box = document.activeElement?.type === "checkbox";
  body.replaceChildren(...rows.map(rowElement));
  $("case-count").textContent = `${whole.format(count)}${counted ? "" : " and more"} ${count === 1 ? "case" : "cases"}`;
  $("case-empty").hidden = rows.length > 0;
  $("case-empty").textContent = "No case passes the filter.";
  $("case-more").hidden = next === null;
  if (focused) {
    const row = body.querySelector(`tr[data-id="${focused}"]`);
    (box ? row?.querySelector("input") : row)?.focus({ preventScroll: true });
  }
  drawBulk();
}

function rowElement(row, index) {
  const box = el("input", {
    type: "checkbox",
    "aria-label": `Choose ${row.transaction_id}`,
    onchange: (event) => choose(row.id, event.target.checked),
  });
  box.checked = chosen.has(row.id);
  const marks = [row.origin === "check" ? "check of an allowed payment" : "", row.reopened ? "opened again" : ""];
  const origin = el("span", { class: "note" }, marks.filter(Boolean).join(", "));
  const why = el(
    "td",
    { class: "k-why" },
    pill(row.decision),
    el("span", {}, ` ${row.rule ? `rule ${row.rule}` : (row.reason ?? "no reason given")} `),
    origin,
  );
  const names = [linkToEntity(row.sender), ...(row.receiver ? [" → ", linkToEntity(row.receiver)] : [])];
  return el(
    "tr",
    {
      "data-id": row.id,
      tabindex: index === Math.min(current, rows.length - 1) ? "0" : "-1",
      "aria-selected": opened?.id === row.id ? "true" : "false",
      class: opened?.id === row.id ? "opened" : undefined,
      onclick: (event) => {
        if (!event.target.closest("a, input")) {
          current = index;
          open(row.id);
        }
      },
    },
    el("td", { class: "k-box" }, box),
    el("td", { class: "right k-loss" }, inCurrency(row.expected_loss, row)),
    el("td", { class: "right k-amount" }, el("span", { class: "unseen" }, "amount "), inCurrency(row.amount, row)),
    why,
    el("td", { class: "k-names" }, ...names),
    el("td", { class: "k-age", title: `arrived ${moment.format(row.arrived)}` }, age(row)),
    el("td", { class: "k-state" }, stateTag(row)),
  );
}

function move(by) {
  if (!rows.length) return;
  current = Math.max(0, Math.min(rows.length - 1, current + by));
  [...body.children].forEach((row, index) => row.setAttribute("tabindex", index === current ? "0" : "-1"));
  body.children[current].focus();
  if (opened) open(rows[current].id, false);
}

function choose(id, on) {
  if (on) chosen.add(id);
  else chosen.delete(id);
  drawBulk();
}

function drawBulk() {
  $("bulk").hidden = !chosen.size;
  $("bulk-count").textContent = `${whole.format(chosen.size)} chosen`;
  for (const button of document.querySelectorAll("[data-bulk]")) button.disabled = !mayWork();
  $("take-next").disabled = !mayWork();
  $("take-next").title = mayWork() ? "The open case with the largest expected loss" : NO_RIGHT;
}

// ---------------------------------------------------------------- steps

const step = (cases, action, more = {}) => post("/cases", { action, cases, ...more });

// What is closed is taken first, where it is open: one key less for the same right.
async function act(cases, action, outcome, note = "") {
  const known = new Map([...rows, ...(opened ? [opened] : [])].map((row) => [row.id, row]));
  if (action !== "close") return step(cases, action, action === "note" || action === "reopen" ? { note } : {});
  const free = cases.filter((id) => known.get(id)?.state === "open");
  const refused = free.length ? await step(free, "take").then((answer) => answer.refused) : [];
  const lost = new Set(refused.map(({ case: id }) => id));
  const rest = cases.filter((id) => !lost.has(id));
  const answer = await step(rest, "close", { outcome, note });
  return { done: answer.done, refused: [...refused, ...answer.refused] };
}

async function bulk(what) {
  const cases = [...chosen],
    outcome = OUTCOMES.includes(what) ? what : undefined;
  try {
    const { done, refused } = await act(cases, outcome ? "close" : what, outcome, $("bulk-note").value);
    const why = refused.map(({ reason }) => reason).join("; ");
    $("bulk-said").textContent = `${whole.format(done.length)} done${refused.length ? `; not: ${why}` : ""}`;
    if (outcome) $("bulk-note").value = "";
  } catch (error) {
    $("bulk-said").textContent = error.message;
  }
  await load();
}

for (const button of document.querySelectorAll("[data-bulk]"))
  button.addEventListener("click", () => bulk(button.dataset.bulk));
$("bulk-none").addEventListener("click", () => {
  chosen.clear();
  $("bulk-said").textContent = "";
  draw({ count: rows.length, counted: next === null });
  load();
});

async function takeNext() {
  if (!mayWork()) return;
  try {
    const text = new URLSearchParams([...query().filter(([name]) => name !== "state"), ["state", "open"], ["limit", "20"]]);
    for (const row of (await (await ask(`/cases?${text}`)).json()).cases) {
      try {
        await step([row.id], "take");
        await open(row.id);
        return void load();
      } catch (error) {
        if (!error.message.startsWith("case:")) throw error; // somebody was faster: the next one
      }
    }
    $("case-problem").textContent = "No open case passes the filter.";
  } catch (error) {
    $("case-problem").textContent = error.message;
  }
}
$("take-next").addEventListener("click", takeNext);

// ---------------------------------------------------------------- one case

async function open(id, push = true) {
  try {
    opened = await (await ask(`/cases/${id}`)).json();
  } catch (error) {
    $("case-problem").textContent = error.message;
    return;
  }
  detail.hidden = false;
  $("queue").classList.add("opened");
  keep(push);
  drawDetail();
  for (const row of body.children) {
    const isIt = row.dataset.id === String(id);
    row.classList.toggle("opened", isIt);
    row.setAttribute("aria-selected", isIt);
  }
  if (push && getComputedStyle(detail).position === "fixed") detail.focus();
}

function close(address = true) {
  opened = null;
  detail.hidden = true;
  detail.replaceChildren();
  $("queue").classList.remove("opened");
  for (const row of body.children) row.classList.remove("opened");
  if (address) keep();
  body.children[Math.min(current, rows.length - 1)]?.focus();
}

// What others did meanwhile; what is being written stays.
async function refreshOpened(quiet) {
  const before = opened;
  try {
    const fresh = await (await ask(`/cases/${before.id}`)).json();
    if (opened !== before) return;
    const told = fresh.label?.delivered !== before.label?.delivered;
    const changed = told || ["state", "taken_by", "outcome"].some((name) => fresh[name] !== before[name]);
    opened = fresh;
    if (changed || fresh.events.length !== before.events.length || !quiet) drawWork();
  } catch (error) {
    $("case-problem").textContent = error.message;
  }
}

function drawDetail() {
  const row = opened,
    record = opened.record;
  detail.replaceChildren(
    el(
      "header",
      {},
      el("h2", { id: "case-title" }, row.transaction_id),
      el("button", { type: "button", class: "close quiet", "aria-label": "Close the case", onclick: () => close() }, "✕"),
    ),
    el("p", { class: "note" }, `Case ${row.id} · ${row.origin} · model ${row.model}${row.rule ? ` · rule ${row.rule}` : ""}`),
    el(
      "div",
      { class: "verdict" },
      el("strong", {}, inCurrency(row.amount, row)),
      pill(row.decision),
      el("span", { class: "note" }, `${percent(row.probability)} fraud`),
    ),
    el("section", { id: "case-work" }),
    el("section", {}, el("h3", {}, "Reasons"), ...reasons(record)),
    costs(record),
    payment(row, record),
    el("section", { id: "case-links" }, el("h3", {}, "Who else"), ...row.links.map(link)),
    el("section", { id: "case-histories" }, el("h3", {}, "Histories"), el("p", { class: "note" }, "Asking the store…")),
    el("section", { id: "case-events" }),
  );
  drawWork();
  showHistories(row);
}

function payment(row, record) {
  const attributes = (hello?.model?.attributes ?? []).filter(({ name }) => name in record.attributes);
  const known = (value) => (value === null ? "unknown" : inCurrency(value, row));
  return el(
    "section",
    {},
    el("h3", {}, "Payment"),
    pairs(
      ["Amount", inCurrency(row.amount, row), "amount"],
      ["Time of the payment", when(row.time)],
      ["Arrived", moment.format(row.arrived)],
      ["Type", typeWord(record.type)],
      ["From", accountLink(record.sender)],
      ["Sender’s balance", known(record.sender_balance)],
      ["To", record.receiver ? accountLink(record.receiver) : "nobody"],
      ["Receiver’s balance", known(record.receiver_balance)],
      ...attributes.map((one) => [one.text, attributeText(record, one)]),
    ),
  );
}

function link({ label, value, others, cases }) {
  const line = (other) =>
    el(
      "li",
      {},
      el(
        "button",
        { type: "button", onclick: () => open(other.id) },
        el("span", { class: "note" }, moment.format(other.arrived)),
        stateTag(other),
        el("span", {}, inCurrency(other.amount, other)),
      ),
    );
  const count = others ? `${whole.format(others)} other ${others === 1 ? "case" : "cases"}` : "no other case";
  return el(
    "div",
    { class: "linked" },
    el("p", {}, `${label} `, linkToEntity(value), el("span", { class: "note" }, ` ${count}`)),
    ...(cases.length ? [el("ul", { class: "others" }, ...cases.map(line))] : []),
  );
}

async function showHistories(row) {
  let content;
  try {
    content = await histories(row.record);
  } catch (error) {
    content = [el("p", { class: "problem" }, `The store was not read: ${error.message}`)];
  }
  if (opened?.id === row.id)
    $("case-histories").replaceChildren(el("h3", {}, `Histories up to ${when(row.time)}`), ...content);
}

const ACTIONS = {
  opened: "Opened",
  recorded: "Recorded",
  taken: "Taken",
  released: "Released",
  "lease ended": "Released: its time was over",
  noted: "Noted",
  fraud: "Closed as fraud",
  honest: "Closed as honest",
  unclear: "Closed as unclear",
  expired: "Expired: nobody came",
  reopened: "Opened again",
};

function drawEvents() {
  const line = ({ at, person: who, action, note }) =>
    el(
      "li",
      {},
      el("span", { class: "note" }, moment.format(at)),
      el("span", {}, `${ACTIONS[action] ?? action}${who ? ` by ${who}` : ""}`),
      ...(note ? [el("q", {}, note)] : []),
    );
  const label = opened.label;
  const told = label
    ? `Label ${label.is_fraud ? "fraud" : "honest"}: ${label.delivered ? `told ${moment.format(label.delivered)}` : "on its way"}.`
    : "";
  $("case-events").replaceChildren(
    el("h3", {}, "What happened"),
    el("ol", { class: "events" }, ...opened.events.map(line)),
    el("p", { class: "note" }, told),
  );
}

function drawWork(said = "", wrong = false) {
  const row = opened,
    box = $("case-work");
  if (!row || !box) return;
  const mine = isMine(row),
    free = row.state === "open",
    off = !mayWork();
  const typed = $("case-note") ?? null;
  if (typed) drafts.set(Number(typed.dataset.case), typed.value);
  const focused = box.contains(document.activeElement) ? document.activeElement.id : "";
  const button = (id, text, letter, allowed, run, kind = "") =>
    el(
      "button",
      { type: "button", id, class: kind || undefined, disabled: off || !allowed, onclick: run },
      text,
      ...(off || !allowed ? [] : [el("kbd", { "aria-hidden": "true" }, letter)]),
    );
  const ended = row.state === "closed";
  const writable = { disabled: off || !(mine || ended), required: ended };
  const note = el("textarea", { id: "case-note", rows: "2", maxlength: "2000", "data-case": row.id, ...writable });
  note.value = drafts.get(row.id) ?? "";
  const parts = [
    el("p", { class: "case-line" }, stateTag(row), ` ${stateSentence(row)}`),
    el(
      "div",
      { class: "marking" },
      button("case-take", "Take", "T", free, () => work("take")),
      button("case-release", "Release", "R", mine, () => work("release")),
    ),
    el("label", { class: "note-field" }, el("span", {}, "Note"), ended ? "" : note),
    el(
      "div",
      { class: "marking" },
      button("case-noted", "Save note", "N", mine, () => work("note")),
      button("case-fraud", "Fraud", "F", mine || free, () => work("close", "fraud"), "fraud"),
      button("case-honest", "Honest", "H", mine || free, () => work("close", "honest"), "honest"),
      button("case-unclear", "Unclear", "U", mine || free, () => work("close", "unclear")),
    ),
    el("p", { class: wrong ? "problem" : "note", role: "status", id: "case-said" }, said || (off ? NO_RIGHT : "")),
  ];
  const again = () => [
    el("label", { class: "note-field" }, el("span", {}, "Why it is opened again"), note),
    el("div", { class: "marking" }, button("case-reopen", "Open again", "O", true, () => work("reopen"))),
  ];
  box.replaceChildren(...(ended ? [parts[0], ...again(), parts[4]] : parts));
  if (focused) $(focused)?.focus();
  drawEvents();
}

async function work(action, outcome) {
  const row = opened;
  if (!row || !mayWork() || busy || (row.state === "closed") !== (action === "reopen")) return;
  const note = $("case-note")?.value ?? "";
  busy = true;
  let said = "",
    wrong = false;
  try {
    const { refused } = await act([row.id], action, outcome, note);
    if (refused.length) [said, wrong] = [refused[0].reason, true];
    else if (action !== "take" && action !== "release") {
      drafts.delete(row.id);
      if ($("case-note")) $("case-note").value = "";
    }
  } catch (error) {
    [said, wrong] = [`Not done: ${error.message}`, true];
  }
  busy = false;
  try {
    const fresh = await (await ask(`/cases/${row.id}`)).json();
    if (opened?.id === row.id) opened = fresh;
  } catch (error) {
    [said, wrong] = [error.message, true];
  }
  if (opened?.id === row.id) drawWork(said, wrong);
  load(true);
}

// ---------------------------------------------------------------- keys

const steps = {
  t: () => (opened ? work("take") : onCurrent("take")),
  r: () => (opened ? work("release") : onCurrent("release")),
  f: () => work("close", "fraud"),
  h: () => work("close", "honest"),
  u: () => work("close", "unclear"),
  o: () => work("reopen"),
  n: () => $("case-note")?.focus(),
  Escape: () => close(),
};
const listSteps = {
  ...steps,
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  j: () => move(1),
  k: () => move(-1),
  Home: () => move(-rows.length),
  End: () => move(rows.length),
  Enter: () => rows[current] && open(rows[current].id),
  x: () => {
    if (!rows[current]) return;
    const box = body.children[current].querySelector("input");
    box.checked = !box.checked;
    choose(rows[current].id, box.checked);
  },
};

async function onCurrent(action) {
  const row = rows[current];
  if (!row || !mayWork()) return;
  try {
    await step([row.id], action);
    $("case-problem").textContent = "";
  } catch (error) {
    $("case-problem").textContent = error.message;
  }
  load();
}

const typing = (event) => event.target.closest("input:not([type=checkbox]), textarea, select, a, button");
body.addEventListener("keydown", (event) => {
  if (!event.target.closest("a")) pressed(event, listSteps);
});
detail.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target.id === "case-note") return void detail.focus();
  if (!typing(event) || event.key === "Escape") pressed(event, steps);
});

// ---------------------------------------------------------------- export

$("case-export").addEventListener("click", async () => {
  try {
    const blob = await (await ask(`/cases.csv?${new URLSearchParams(query())}`)).blob();
    const anchor = el("a", { href: URL.createObjectURL(blob), download: "cases.csv" });
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 10_000);
  } catch (error) {
    $("case-problem").textContent = error.message;
  }
});

// ---------------------------------------------------------------- life

form.addEventListener("input", () => {
  shownPages = 1;
  current = 0;
  keep();
  clearTimeout(timer);
  timer = setTimeout(() => load(), 200);
});
form.addEventListener("reset", () =>
  setTimeout(() => {
    shownPages = 1;
    keep();
    load();
  }),
);
form.addEventListener("submit", (event) => event.preventDefault());
$("case-more").addEventListener("click", () => {
  shownPages++;
  load();
});
if (matchMedia("(max-width: 760px)").matches) $("case-filters").open = false;

async function count() {
  if (!hello?.cases) return;
  try {
    const page = await (await ask("/cases?state=open&limit=1")).json();
    $("waiting-count").textContent = whole.format(page.count);
    $("waiting-count").hidden = page.count === 0;
  } catch {
    $("waiting-count").hidden = true; // the queue itself says what is wrong
  }
}

async function ruleNames() {
  try {
    const { hits } = await (await ask("/cases/figures")).json();
    $("rule-names").replaceChildren(...hits.map(({ rule }) => el("option", { value: rule ?? "model" })));
  } catch {
    $("rule-names").replaceChildren(); // suggestions only
  }
}

document.addEventListener("view", ({ detail: view }) => {
  if (view !== "cases") return;
  readAddress();
  load();
  ruleNames();
});
document.addEventListener("forgotten", () => {
  rows = [];
  chosen.clear();
  drafts.clear();
  if (opened) close(false);
  body.replaceChildren();
});
setInterval(() => {
  if (shown() && hello?.cases && !document.hidden && !busy) load(true);
}, POLL);
setInterval(count, IDLE);
document.addEventListener("view", count);

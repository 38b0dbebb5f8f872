// The console. Texts from outside go into the page as text only (textContent); the key lives in the variable `key`
// and nowhere else.
const LIMIT = 10_000; // decisions kept in this page
const REFRESH = 150; // milliseconds between two drawings
const SILENCE = 25_000; // milliseconds without a sign of life: connect again
const RETRY = [500, 1000, 2000, 5000];
const RANGE = 12; // the histogram goes from -RANGE to RANGE in log-odds
const KINDS = ["allow", "review", "block"];

const $ = (id) => document.getElementById(id);
const filterForm = $("filter"),
  grid = $("grid"),
  rowsBox = $("rows"),
  detail = $("detail"),
  handForm = $("hand-form");

let key = ""; // never stored
let hello = null; // what the service said of itself
let all = []; // decisions, oldest first, at most LIMIT
let shown = []; // those that pass the filter, newest first
let waiting = []; // arrived while paused
let paused = false,
  stale = true,
  next = 1,
  chosen = 0,
  opened = null,
  openWhenSeen = "";
let counts = { all: 0, allow: 0, review: 0, block: 0, money: 0, degraded: 0 };
let arrivals = []; // [moment, how many] of the last ten seconds
const marks = new Map(); // transaction id -> fraud or not, as far as this page knows

// ---------------------------------------------------------------- words and numbers

const money = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const brief = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const moment = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const KIND_WORD = { allow: "Allow", review: "Review", block: "Block" };

const typeWord = (type) => (type ? type.toLowerCase().replaceAll("_", " ") : "unknown");
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const logOdds = (p) => clamp(Math.log(p / (1 - p)), -RANGE, RANGE);
const HOUR = 3600;
// When a payment was: a date where the data has dates, else hours and minutes since its epoch.
function when(time) {
  const epoch = hello?.model?.epoch;
  if (typeof epoch === "number") return moment.format(epoch + time * 1000);
  const minutes = String(Math.floor((time % HOUR) / 60)).padStart(2, "0");
  return `hour ${whole.format(Math.floor(time / HOUR))}:${minutes}`;
}
function duration(seconds) {
  if (seconds < 120) return `${whole.format(seconds)} s`;
  if (seconds < 2 * HOUR) return `${whole.format(seconds / 60)} min`;
  return seconds < 48 * HOUR ? `${whole.format(seconds / HOUR)} h` : `${whole.format(seconds / (24 * HOUR))} days`;
}
const known = (value, text) => (value === null || value === undefined ? "unknown" : text(value));

function percent(p) {
  if (p > 0 && p < 0.0001) return "< 0.01 %";
  if (p < 1 && p > 0.9999) return "> 99.99 %";
  return `${(p * 100).toFixed(p < 0.001 ? 3 : p < 0.1 || p > 0.99 ? 2 : 1)} %`;
}

const LIMIT_TEXT = {
  review_budget: "Worth a review by its costs, but the team’s time is worth more elsewhere.",
  false_blocks: "To be blocked by its costs, but not certain enough: too many honest payments would be.",
  least_review: "Worth a review by its costs, but below the amount that people look at.",
};

const CONTROL_TEXT = { review: "sent for review", block: "blocked" };
const controlText = ({ decision, chance }) =>
  `Control group: would have been ${CONTROL_TEXT[decision]}, let through by a chance of ${percent(chance)}.`;

// A case keeps the words of its own time.
function labelOf(feature, row) {
  if (feature.startsWith("rule:")) return { text: `Rule: ${feature.slice(5).replaceAll("_", " ")}`, kind: "number" };
  const [text, kind] = row?.feature_labels?.[feature] ?? hello?.feature_labels?.[feature] ?? [feature, "number"];
  return { text, kind };
}

function amountOf(value, kind) {
  if (value === null) return kind === "seconds" ? "never" : kind === "number" ? "" : "unknown";
  if (typeof value === "string") return value;
  const formats = {
    money: (v) => money.format(v),
    share: (v) => `${(v * 100).toFixed(1)} %`,
    times: (v) => `${v.toFixed(v < 10 ? 2 : 0)} ×`,
    yes: (v) => (v ? "yes" : "no"),
    seconds: duration,
    days: (v) => `${v.toFixed(1)} days`,
    km: (v) => `${whole.format(v)} km`,
    "km/h": (v) => `${whole.format(v)} km/h`,
    hour: (v) => `${String(v).padStart(2, "0")}:00`,
    number: (v) => (Number.isInteger(v) ? whole.format(v) : v.toPrecision(3)),
  };
  return (formats[kind] ?? formats.number)(value);
}

const doubt = (row) =>
  !row.history ? "Decided without history" : row.known_entities ? "" : "Nobody knows any of its entities";
const strongest = (row) => (row.reasons.length ? labelOf(row.reasons[0].feature, row).text : doubt(row));
const verdict = (fraud) => (fraud ? "fraud" : "honest");

// ---------------------------------------------------------------- elements

function el(name, settings = {}, ...children) {
  const element = document.createElement(name);
  for (const [attribute, value] of Object.entries(settings)) {
    if (attribute.startsWith("on")) element.addEventListener(attribute.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(attribute, value === true ? "" : value);
  }
  element.append(...children); // strings become text
  return element;
}

function shape(name, settings = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(settings)) element.setAttribute(attribute, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const pill = (decision) => el("span", { class: `pill d-${decision}` }, KIND_WORD[decision]);

// ---------------------------------------------------------------- the stream

let aborter = null,
  lastId = "",
  attempt = 0,
  connection = 0;

function state(text, kind) {
  $("state").textContent = text;
  $("dot").className = `dot ${kind}`;
}

async function connect() {
  aborter?.abort();
  const mine = ++connection;
  aborter = new AbortController();
  let watchdog = 0;
  try {
    const headers = {
      Accept: "text/event-stream",
      ...(key && { "X-API-Key": key }),
      ...(lastId && { "Last-Event-ID": lastId }),
    };
    const answer = await fetch("/events", { headers, signal: aborter.signal, cache: "no-store" });
    if (mine !== connection) return;
    if (answer.status === 401 || answer.status === 403) return locked(answer.status, await reasonOf(answer));
    if (!answer.ok) throw new Error(await reasonOf(answer));
    attempt = 0;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      watchdog = setTimeout(() => aborter.abort(), SILENCE);
      const { value, done } = await reader.read();
      clearTimeout(watchdog);
      if (done || mine !== connection) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      parts.forEach(handle);
    }
    if (mine === connection) again("The service ended the stream");
  } catch (error) {
    clearTimeout(watchdog);
    if (mine === connection)
      again(error.name === "TypeError" || error.name === "AbortError" ? "No connection" : error.message);
  }
}

function again(why) {
  state(`${why}, connecting again`, "off");
  setTimeout(connect, RETRY[Math.min(attempt++, RETRY.length - 1)]);
}

function handle(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  try {
    if (fields.event) handlers[fields.event]?.(JSON.parse(fields.data));
  } catch (error) {
    reportError(error); // a defect of this page, and no reason to connect again
  }
  if (fields.id) lastId = fields.id;
}

const handlers = {
  hello(content) {
    if (hello && hello.boot !== content.boot) lastId = "";
    hello = content;
    introduce();
  },
  decisions(rows) {
    const newest = rows[rows.length - 1].decided;
    arrivals.push([Date.now(), rows.filter((row) => row.decided > newest - 10_000).length]);
    for (const row of rows) {
      row.uid = next++;
      row.odds = logOdds(row.fraud_probability);
      row.needle = [
        row.transaction_id,
        row.rule ?? "",
        ...row.reasons.map((reason) => labelOf(reason.feature).text),
        ...Object.values(row.attributes).map(String),
      ]
        .join("\n")
        .toLowerCase();
      counts.all++;
      counts[row.decision]++;
      if (row.decision === "block") counts.money += row.amount;
      if (!row.history) counts.degraded++;
      if (row.transaction_id === openWhenSeen) {
        openWhenSeen = "";
        queueMicrotask(() => open(row));
      }
    }
    keep(rows);
  },
  labels(labels) {
    for (const { transaction_id: id, is_fraud: fraud } of labels) {
      marks.delete(id);
      marks.set(id, fraud);
    }
    for (const id of marks.keys())
      if (marks.size > LIMIT) marks.delete(id);
      else break;
    stale = true;
    if (opened && labels.some((label) => label.transaction_id === opened.transaction_id)) drawMarking();
  },
  gap({ requests }) {
    state(`Live; ${whole.format(requests)} requests were missed`, "live");
  },
  bye() {},
};

function keep(rows) {
  const target = paused ? waiting : all;
  target.push(...rows);
  if (target.length > LIMIT) target.splice(0, target.length - LIMIT);
  stale = true;
}

// ---------------------------------------------------------------- the address

// Which view is shown and what it is filtered by stand behind the #, where no server and no log sees them.
function address() {
  const [view, query = ""] = location.hash.slice(1).split("?");
  return { view: view === "cases" && hello?.cases ? "cases" : "live", wanted: view, params: new URLSearchParams(query) };
}

function remember(view, entries, push = false) {
  const query = new URLSearchParams(entries.filter(([, value]) => value)).toString();
  const hash = `#${view}${query ? `?${query}` : ""}`;
  if (hash !== location.hash) window.history[push ? "pushState" : "replaceState"](null, "", hash);
}

const linkTo = (view, entries) => `#${view}?${new URLSearchParams(entries)}`;

function showView() {
  const { view } = address();
  $("live").hidden = view !== "live";
  $("queue").hidden = view !== "cases";
  $("views").hidden = !hello?.cases;
  for (const name of ["live", "cases"]) {
    if (name === view) $(`view-${name}`).setAttribute("aria-current", "page");
    else $(`view-${name}`).removeAttribute("aria-current");
  }
  if (view === "live") readFilter();
  document.dispatchEvent(new CustomEvent("view", { detail: view }));
  stale = true;
}

function readFilter() {
  const { wanted, params } = address();
  if (wanted !== "live") return;
  const kinds = params.getAll("decision");
  for (const box of filterForm.querySelectorAll("[name=decision]"))
    box.checked = !kinds.length || kinds.includes(box.value);
  for (const name of ["type", "account", "attribute", "value", "least", "text"])
    filterForm.elements[name].value = params.get(name) ?? "";
}

function keepFilter() {
  const form = new FormData(filterForm);
  const kinds = form.getAll("decision");
  const entries = [...form].filter(([name]) => name !== "decision" || kinds.length < KINDS.length);
  remember("live", entries);
}

function only(kind) {
  const boxes = [...filterForm.querySelectorAll("[name=decision]")];
  const alone = boxes.every((box) => box.checked === (box.value === kind));
  for (const box of boxes) box.checked = alone || box.value === kind;
  changed();
}

function changed() {
  keepFilter();
  for (const button of document.querySelectorAll("[data-only]")) {
    const kinds = new FormData(filterForm).getAll("decision");
    button.setAttribute("aria-pressed", kinds.length === 1 && kinds[0] === button.dataset.only);
  }
  grid.scrollTop = 0;
  stale = true;
}

for (const button of document.querySelectorAll("[data-only]"))
  button.addEventListener("click", () => only(button.dataset.only));
addEventListener("hashchange", showView);

// An account as a link to what the live view has of it.
function accountLink(name, settings = {}) {
  return el("a", { href: linkTo("live", [["account", name]]), title: name, ...settings }, name);
}

function introduce() {
  const { model, host, may_write: mayWrite } = hello;
  state(paused ? "Paused" : model ? "Live" : "Live; no model yet", "live");
  $("model").textContent = model ? `${model.name} ${model.version}` : "none yet";
  $("model").title = model
    ? `average precision on its test period: ${known(model.average_precision, (v) => (v.value ?? v).toFixed(3))}`
    : "";
  $("review-price").textContent = model ? money.format(model.policy.review_price) : "–";
  $("block-price").textContent = model ? money.format(model.policy.block_price) : "–";
  $("host").textContent = host;
  $("access").textContent = mayWrite ? "Key: may write" : hello.cases?.may_work ? "Key: cases" : "Read only";
  $("access").title = mayWrite ? "Change or forget the key" : readOnly();
  $("hand-send").disabled = !mayWrite;
  $("hand-problem").textContent = mayWrite ? "" : readOnly();
  options(
    filterForm.elements.type,
    (model?.types ?? []).map((type) => [type, typeWord(type)]),
  );
  options(
    filterForm.elements.attribute,
    (model?.attributes ?? []).map(({ name, text }) => [name, text]),
  );
  $("types").replaceChildren(...(model?.types ?? []).map((type) => el("option", { value: type })));
  attributeFields(model?.attributes ?? []);
  showView();
  stale = true;
  if (opened) drawMarking();
}

const NO_WRITING =
  "Read only: no key for writing is configured. " + "Start the service with FRAUD_API_KEYS=YOU@write:KEY.";
const readOnly = () => (!hello?.keys ? NO_WRITING : "Read only: this key has no write access.");

const reasonOf = async (answer) => {
  try {
    return (await answer.json()).problems.map(({ field, reason }) => `${field}: ${reason}`).join("; ");
  } catch {
    return `status ${answer.status}`;
  }
};

async function ask(path, settings = {}) {
  const headers = { ...settings.headers, ...(key && { "X-API-Key": key }) };
  const answer = await fetch(path, { ...settings, headers, cache: "no-store" });
  if (!answer.ok) throw new Error(await reasonOf(answer));
  return answer;
}

const post = async (path, body) =>
  (
    await ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    })
  ).json();

// ---------------------------------------------------------------- the key

function locked(status, why) {
  state(status === 401 ? "Locked" : "Not allowed", "off");
  askForKey(status === 401 && !key ? "This service wants a key with read access." : why);
}

function askForKey(why) {
  $("key-why").textContent = why;
  $("key-forget").hidden = !key;
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

function forget() {
  document.dispatchEvent(new CustomEvent("forgotten"));
  key = lastId = "";
  hello = opened = null;
  all = [];
  shown = [];
  waiting = [];
  arrivals = [];
  marks.clear();
  counts = { all: 0, allow: 0, review: 0, block: 0, money: 0, degraded: 0 };
  close();
  stale = true;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key").value;
  $("key").value = "";
  forget();
  key = given;
  $("key-dialog").close();
  connect();
});
$("key-forget").addEventListener("click", () => {
  forget();
  $("key").value = "";
  $("key-dialog").close();
  connect();
});
$("key-close").addEventListener("click", () => $("key-dialog").close());
$("access").addEventListener("click", () =>
  askForKey(
    hello
      ? hello.may_write
        ? "A key is in use; it may read, mark and score."
        : readOnly()
      : "This service wants a key with read access.",
  ),
);

// ---------------------------------------------------------------- filter and list

// What a payment says of an attribute, as text; empty where it says nothing.
function said(row, name) {
  const value = row.attributes[name];
  return value === undefined ? "" : typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}

function options(select, entries) {
  const before = select.value;
  select.replaceChildren(el("option", { value: "" }, "any"));
  for (const [value, text] of entries) select.append(el("option", { value }, text));
  select.value = entries.some(([value]) => value === before) ? before : "";
}

function filter() {
  const form = new FormData(filterForm),
    kinds = new Set(form.getAll("decision"));
  const account = form.get("account").trim().toLowerCase(),
    text = form.get("text").trim().toLowerCase(),
    type = form.get("type"),
    attribute = form.get("attribute"),
    value = form.get("value").trim().toLowerCase();
  const least = Number(form.get("least").replace(",", ".")) / 100;
  const wrong = !(least >= 0 && least <= 1);
  $("filter-problem").textContent = wrong ? "At least: expected a number from 0 to 100" : "";
  filterForm.elements.least.setAttribute("aria-invalid", wrong);
  return (row) =>
    kinds.has(row.decision) &&
    (!type || row.type === type) &&
    (wrong || row.fraud_probability >= least) &&
    (!account || [row.sender, row.receiver ?? ""].some((name) => name.toLowerCase().includes(account))) &&
    (!attribute || said(row, attribute).toLowerCase().includes(value)) &&
    (!text || row.needle.includes(text));
}

function refresh() {
  const passes = filter(),
    top = shown[0]?.uid ?? 0;
  shown = all.filter(passes).reverse();
  const added = top ? shown.findIndex((row) => row.uid <= top) : 0;
  // What is being read stays where it is.
  if (added > 0 && grid.scrollTop > rowHeight()) grid.scrollTop += added * rowHeight();
}

let height = 0;
const rowHeight = () => (height ||= parseInt(getComputedStyle(document.documentElement).getPropertyValue("--row"), 10));
addEventListener("resize", () => {
  height = 0;
  stale = true;
});

function rowElement() {
  const cell = (name, ...children) => el("span", { role: "gridcell", class: `c-${name}` }, ...children);
  const element = el(
    "div",
    { role: "row", class: "row" },
    cell("time"),
    cell("decision", el("span", { class: "pill" })),
    cell("p", el("b"), el("i")),
    cell("amount"),
    cell("type"),
    cell("from"),
    cell("to"),
    cell("why"),
  );
  element.addEventListener("click", (event) => {
    if (!event.target.closest("a")) open(element.shows);
  });
  return element;
}

function fill(element, row) {
  const [time, decision, p, amount, type, from, to, why] = element.children;
  element.shows = row;
  element.className = `row d-${row.decision}`;
  element.id = `row-${row.uid}`;
  time.textContent = clock.format(row.decided);
  decision.firstChild.textContent = KIND_WORD[row.decision];
  p.firstChild.textContent = percent(row.fraud_probability);
  p.lastChild.style.setProperty("--share", (row.odds + RANGE) / (2 * RANGE));
  amount.textContent = money.format(row.amount);
  type.textContent = typeWord(row.type);
  from.replaceChildren(accountLink(row.sender, { tabindex: "-1" }));
  to.replaceChildren(row.receiver ? accountLink(row.receiver, { tabindex: "-1" }) : "");
  why.textContent = strongest(row);
  why.title = strongest(row);
  if (marks.has(row.transaction_id))
    why.prepend(
      el("span", { class: `tag ${verdict(marks.get(row.transaction_id))}` }, verdict(marks.get(row.transaction_id))),
    );
}

function drawRows() {
  const size = rowHeight(),
    first = Math.max(0, Math.floor(grid.scrollTop / size) - 6),
    many = Math.ceil(grid.clientHeight / size) + 12;
  const part = shown.slice(first, first + many);
  while (rowsBox.children.length < part.length) rowsBox.append(rowElement());
  while (rowsBox.children.length > part.length) rowsBox.lastChild.remove();
  part.forEach((row, i) => {
    const element = rowsBox.children[i];
    fill(element, row);
    element.style.transform = `translateY(${(first + i) * size}px)`;
    element.setAttribute("aria-rowindex", first + i + 2);
    element.setAttribute("aria-selected", row.uid === chosen);
  });
  rowsBox.style.height = `${shown.length * size}px`;
  grid.setAttribute("aria-rowcount", shown.length + 1);
  if ($(`row-${chosen}`)) grid.setAttribute("aria-activedescendant", `row-${chosen}`);
  else grid.removeAttribute("aria-activedescendant");
}

function drawCounts() {
  const share = (n) => {
    if (!counts.all) return "–";
    const part = n / counts.all;
    return `${(part * 100).toFixed(n && part < 0.1 ? 2 : 1)} %`;
  };
  const short = (n) => (n < 100_000 ? whole.format(n) : brief.format(n));
  const now = Date.now();
  arrivals = arrivals.filter(([when]) => now - when < 10_000);
  const rate = sum(arrivals.map(([, n]) => n)) / 10;
  $("n-all").textContent = short(counts.all);
  $("n-rate").textContent = `${rate < 100 ? rate.toFixed(1) : whole.format(rate)} a second`;
  for (const kind of KINDS) {
    $(`n-${kind}`).textContent = short(counts[kind]);
    $(`s-${kind}`).textContent = share(counts[kind]);
  }
  $("n-money").textContent = counts.money < 100_000 ? money.format(counts.money) : brief.format(counts.money);
  $("n-degraded").textContent = short(counts.degraded);
  const held = waiting.length ? ` · ${whole.format(waiting.length)} more since the pause` : "";
  $("shown").textContent =
    all.length || held
      ? `${whole.format(shown.length)} of the newest ${whole.format(all.length)}${held}`
      : "No decisions yet";
  $("empty").hidden = shown.length > 0;
  $("empty").textContent = all.length
    ? "Nothing passes the filter."
    : "Waiting for the first decision: whatever is sent to /predict appears here.";
  $("newest").hidden = grid.scrollTop <= rowHeight();
}

function draw() {
  if (stale) {
    stale = false;
    refresh();
    drawHistogram();
    drawRows();
    drawCounts();
  }
}
setInterval(draw, REFRESH);
setInterval(drawCounts, 1000);
grid.addEventListener("scroll", () =>
  requestAnimationFrame(() => {
    drawRows();
    $("newest").hidden = grid.scrollTop <= rowHeight();
  }),
);
filterForm.addEventListener("input", changed);
filterForm.addEventListener("reset", () => setTimeout(changed));
filterForm.addEventListener("submit", (event) => event.preventDefault());
$("newest").addEventListener("click", () => {
  grid.scrollTop = 0;
});
if (matchMedia("(max-width: 760px)").matches) $("filters").open = false;

$("pause").addEventListener("click", () => {
  paused = !paused;
  if (!paused) {
    const held = waiting;
    waiting = [];
    keep(held);
  }
  $("pause").textContent = paused ? "Resume" : "Pause";
  $("pause").setAttribute("aria-pressed", paused);
  if (hello) state(paused ? "Paused" : "Live", "live");
  stale = true;
});

function move(by) {
  if (!shown.length) return;
  const at = shown.findIndex((row) => row.uid === chosen),
    to = at < 0 ? 0 : clamp(at + by, 0, shown.length - 1),
    size = rowHeight();
  chosen = shown[to].uid;
  const top = to * size,
    seen = grid.clientHeight - 31;
  if (top < grid.scrollTop) grid.scrollTop = top;
  else if (top + size > grid.scrollTop + seen) grid.scrollTop = top + size - seen;
  drawRows();
  if (opened) open(shown[to]);
}

// Keys of one letter work inside the list and the opened transaction only, so that nobody marks while typing.
const listKeys = {
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  PageDown: () => move(10),
  PageUp: () => move(-10),
  Home: () => move(-LIMIT),
  End: () => move(LIMIT),
  Enter: () => {
    const row = shown.find(({ uid }) => uid === chosen);
    if (row) open(row, true);
  },
};
const bothKeys = {
  f: () => mark(true),
  h: () => mark(false),
  Escape: () => {
    close();
    grid.focus();
  },
};
grid.addEventListener("keydown", (event) => pressed(event, { ...listKeys, ...bothKeys }));
detail.addEventListener("keydown", (event) => pressed(event, bothKeys));

function pressed(event, keys) {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
}

// ---------------------------------------------------------------- the histogram

const SCALE_MARKS = [
  [0.00001, "0.001 %"],
  [0.0001, "0.01 %"],
  [0.001, "0.1 %"],
  [0.01, "1 %"],
  [0.1, "10 %"],
  [0.5, "50 %"],
  [0.9, "90 %"],
  [0.99, "99 %"],
  [0.999, "99.9 %"],
  [0.9999, "99.99 %"],
];

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

function binned(rows, bins) {
  // how many of each kind in each bin
  const counted = Array.from({ length: bins }, () => [0, 0, 0]);
  for (const row of rows)
    counted[Math.min(bins - 1, Math.floor(((row.odds + RANGE) / (2 * RANGE)) * bins))][KINDS.indexOf(row.decision)]++;
  return counted;
}

function drawHistogram() {
  const svg = $("histogram"),
    width = svg.clientWidth || 600,
    tall = svg.clientHeight || 104;
  const left = 30,
    right = 8,
    top = 16,
    bottom = 18,
    bins = width > 500 ? 96 : 48,
    counted = binned(shown, bins);
  const most = Math.max(10, ...counted.map(sum)),
    x = (odds) => left + ((odds + RANGE) / (2 * RANGE)) * (width - left - right),
    y = (n) => tall - bottom - (Math.log1p(n) / Math.log1p(most)) * (tall - top - bottom);
  const parts = [];
  for (let n = 1; n <= most; n *= 10)
    parts.push(
      shape("line", { class: "grid", x1: left, x2: width - right, y1: y(n), y2: y(n) }),
      shape("text", { x: left - 5, y: y(n) + 4, "text-anchor": "end" }, n < 1000 ? String(n) : `${n / 1000}k`),
    );
  counted.forEach((each, i) => {
    const from = -RANGE + (i / bins) * 2 * RANGE,
      to = from + (2 * RANGE) / bins,
      n = sum(each);
    if (n)
      parts.push(
        shape("rect", {
          class: KINDS[each.indexOf(Math.max(...each))],
          x: x(from) + 0.5,
          width: Math.max(1, x(to) - x(from) - 1),
          y: y(n),
          height: tall - bottom - y(n),
          rx: 1,
        }),
      );
  });
  parts.push(shape("line", { class: "grid", x1: left, x2: width - right, y1: tall - bottom, y2: tall - bottom }));
  const every = width > 620 ? 1 : width > 380 ? 2 : 3;
  SCALE_MARKS.forEach(([p, text], i) => {
    if ((i - 5) % every === 0)
      parts.push(shape("text", { x: x(logOdds(p)), y: tall - 4, "text-anchor": "middle" }, text));
  });
  svg.setAttribute("viewBox", `0 0 ${width} ${tall}`);
  svg.setAttribute(
    "aria-label",
    `Histogram of the scores of ${whole.format(shown.length)} decisions`,
  );
  svg.replaceChildren(...parts);
}

// ---------------------------------------------------------------- one transaction

function open(row, focus = false) {
  opened = row;
  chosen = row.uid;
  detail.hidden = false;
  document.querySelector("main").classList.add("opened");
  drawDetail();
  stale = true;
  if (focus || getComputedStyle(detail).position === "fixed") detail.focus();
  history(row);
}

function close() {
  opened = null;
  detail.hidden = true;
  detail.replaceChildren();
  document.querySelector("main").classList.remove("opened");
  stale = true;
}

function pairs(...entries) {
  return el(
    "dl",
    { class: "pairs" },
    ...entries.flatMap(([name, value, kind]) => [el("dt", {}, name), el("dd", { class: kind }, value)]),
  );
}

function drawDetail() {
  const row = opened;
  const balance = (value) => known(value, (v) => money.format(v));
  detail.replaceChildren(
    el(
      "header",
      {},
      el("h2", { id: "detail-title" }, row.transaction_id),
      el(
        "button",
        {
          type: "button",
          class: "close quiet",
          "aria-label": "Close",
          onclick: () => {
            close();
            grid.focus();
          },
        },
        "✕",
      ),
    ),
    el("p", { class: "note" }, `${moment.format(row.decided)} · ${when(row.time)} · model ${row.model}`),
    el(
      "div",
      { class: "verdict" },
      el("strong", {}, percent(row.fraud_probability)),
      pill(row.decision),
      el("span", { class: "note" }, doubt(row)),
    ),
    costs(row),
    el("section", { class: "marking", id: "marking", role: "group", "aria-label": "What became known" }),
    el("section", {}, el("h3", {}, "Reasons"), ...reasons(row)),
    el(
      "section",
      {},
      el("h3", {}, "Transaction"),
      pairs(
        ["Amount", `${money.format(row.amount)} ${row.currency ?? ""}`, "amount"],
        ["Type", typeWord(row.type)],
        ["From", accountLink(row.sender)],
        ["Sender’s balance", balance(row.sender_balance)],
        ["To", row.receiver ? accountLink(row.receiver) : "nobody"],
        ["Receiver’s balance", balance(row.receiver_balance)],
        ...(hello?.model?.attributes ?? []).map((one) => [one.text, attributeText(row, one)]),
      ),
    ),
    el("section", { id: "entities" }, el("h3", {}, "Histories"), el("p", { class: "note" }, "Asking the store…")),
    ...others(row),
  );
  drawMarking();
}

function attributeText(row, { name, kind }) {
  const value = row.attributes[name];
  if (value === undefined) return "unknown";
  if (kind === "moment") return when(value);
  if (kind === "money") return money.format(value);
  return kind === "place" ? value.map((degrees) => degrees.toFixed(4)).join(", ") : said(row, name);
}

function costs(row) {
  // what each action is expected to cost, and its price; that of a block only counts as far as the payment is honest
  const prices = { allow: 0, review: row.prices.review, block: row.prices.block * (1 - row.fraud_probability) };
  const text = (kind) =>
    money.format(row.costs[kind]) + (prices[kind] ? ` + ${money.format(prices[kind])} at its price` : "");
  return el(
    "section",
    { id: "costs" },
    el("h3", {}, "Expected costs"),
    pairs(...KINDS.map((kind) => [KIND_WORD[kind], text(kind)])),
    ...(row.limit ? [el("p", { class: "note" }, LIMIT_TEXT[row.limit])] : []),
    ...(row.control ? [el("p", { class: "note" }, controlText(row.control))] : []),
  );
}

function reasons(row) {
  if (!row.reasons.length)
    return [
      el(
        "p",
        { class: "note" },
        hello?.explain === "alerts" && row.decision === "allow"
          ? "Allowed payments are not explained; [serve] explain = all explains them too."
          : "No feature moved this score.",
      ),
    ];
  const most = Math.max(...row.reasons.map((reason) => Math.abs(reason.contribution ?? 0)), 1e-9);
  const list = row.reasons.map(({ feature, value, contribution }) => {
    const { text, kind } = labelOf(feature, row);
    const item = el("li", {}, el("div", { class: "what" }, el("span", {}, text), el("b", {}, amountOf(value, kind))));
    if (contribution !== null) {
      const bar = el("i");
      bar.style.setProperty("--share", Math.abs(contribution) / most);
      item.append(
        el(
          "div",
          { class: "weight" },
          el("span", { class: contribution < 0 ? "beam away" : "beam", "aria-hidden": "true" }, bar),
          el(
            "span",
            { title: contribution < 0 ? "speaks against fraud" : "speaks for fraud" },
            `${contribution < 0 ? "−" : "+"}${Math.abs(contribution).toFixed(2)}`,
          ),
        ),
      );
    }
    return item;
  });
  return [
    el("ol", { class: "reasons" }, ...list),
    el(
      "p",
      { class: "note" },
      "Log-odds that each moved the score from an ordinary value; right (+) speaks for fraud.",
    ),
  ];
}

function others(row) {
  const mine = new Set([row.sender, row.receiver].filter((name) => name !== null));
  const related = [...all]
    .reverse()
    .filter((other) => other.uid !== row.uid && (mine.has(other.sender) || mine.has(other.receiver)))
    .slice(0, 8);
  if (!related.length) return [];
  return [
    el(
      "section",
      {},
      el("h3", {}, "Other decisions on these accounts"),
      el(
        "ul",
        { class: "others" },
        ...related.map((other) =>
          el(
            "li",
            {},
            el(
              "button",
              {
                type: "button",
                onclick: () => {
                  open(other, true);
                },
              },
              el("span", { class: "note" }, clock.format(other.decided)),
              pill(other.decision),
              el("span", {}, money.format(other.amount)),
            ),
          ),
        ),
      ),
    ),
  ];
}

// ---------------------------------------------------------------- marking

function drawMarking(said = "", wrong = false) {
  const box = $("marking");
  if (!box) return;
  const marked = marks.get(opened.transaction_id),
    off = !hello?.may_write;
  const button = (fraud, text, letter) =>
    el(
      "button",
      {
        type: "button",
        class: verdict(fraud),
        "aria-pressed": String(marked === fraud),
        disabled: off,
        onclick: () => mark(fraud),
      },
      text,
      ...(off ? [] : [el("kbd", { "aria-hidden": "true" }, letter)]),
    );
  const focused = box.contains(document.activeElement) ? document.activeElement.className : "";
  box.replaceChildren(
    button(true, "Fraud", "F"),
    button(false, "Honest", "H"),
    el(
      "p",
      { class: wrong ? "problem" : "note", role: "status" },
      said ||
        (off
          ? readOnly()
          : marked === undefined
            ? "What became known of it counts for all its entities."
            : `Marked as ${verdict(marked)}.`),
    ),
  );
  if (focused) box.querySelector(`.${focused}`)?.focus();
}

async function mark(fraud) {
  if (!opened || !hello?.may_write) return;
  const row = opened;
  try {
    const { unknown } = await post("/feedback", { labels: [{ transaction_id: row.transaction_id, is_fraud: fraud }] });
    if (!unknown.length) marks.set(row.transaction_id, fraud);
    stale = true;
    if (opened !== row) return;
    drawMarking(
      unknown.length ? "The store does not know this transaction; nothing was recorded." : "",
      unknown.length > 0,
    );
    history(row);
  } catch (error) {
    if (opened === row) drawMarking(`Not recorded: ${error.message}`, true);
  }
}

// ---------------------------------------------------------------- histories

async function histories(row) {
  const texts = Object.entries(row.attributes).filter(([, value]) => typeof value === "string");
  const core = { sender: row.sender, receiver: row.receiver, type: row.type, currency: row.currency };
  const answer = await post("/history", { values: { ...core, ...Object.fromEntries(texts) }, time: row.time });
  return answer.entities.map(entityView);
}

async function history(row) {
  let content;
  try {
    content = await histories(row);
  } catch (error) {
    content = [el("p", { class: "problem" }, `The store was not read: ${error.message}`)];
  }
  if (opened === row)
    $("entities").replaceChildren(
      el("h3", {}, `Histories up to ${when(row.time)}, this transaction included`),
      ...content,
    );
}

function entityView({ label, value, both, windows, days_out: sent, days_in: got }) {
  const counts = (sums) => [whole.format(sums.out_count), brief.format(sums.out_sum)];
  const arrived = (sums) => (both ? [whole.format(sums.in_count), brief.format(sums.in_sum)] : []);
  const line = (sums) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, sums.window),
      ...[...counts(sums), ...arrived(sums)].map((text) => el("td", {}, text)),
      el("td", { class: sums.frauds ? "bad" : undefined }, sums.frauds === null ? "–" : whole.format(sums.frauds)),
    );
  const names = both ? ["sent", "money", "received", "money"] : ["payments", "money"];
  const head = ["Last", ...names, "frauds"].map((text) => el("th", { scope: "col" }, text));
  return el(
    "div",
    { class: "account" },
    el("h3", {}, label, el("b", {}, value)),
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...windows.map(line))),
    dayBars(sent, got, both),
  );
}

function dayBars(sent, got, both) {
  const most = Math.max(...sent, ...got),
    width = 390,
    step = width / sent.length;
  if (!most) return "";
  const svg = shape("svg", {
    viewBox: `0 0 ${width} 44`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label":
      `Money of each of the last ${sent.length} days${both ? ", sent above and received below the line" : ""}; ` +
      `at most ${brief.format(most)}`,
  });
  sent.forEach((value, i) => {
    if (value)
      svg.append(
        shape("rect", {
          class: "out",
          x: i * step + 1,
          width: step - 2,
          y: 21 - Math.max(1, (value / most) * 20),
          height: Math.max(1, (value / most) * 20),
          rx: 1,
        }),
      );
  });
  got.forEach((value, i) => {
    if (value)
      svg.append(
        shape("rect", {
          class: "in",
          x: i * step + 1,
          width: step - 2,
          y: 23,
          height: Math.max(1, (value / most) * 20),
          rx: 1,
        }),
      );
  });
  svg.append(shape("line", { class: "grid", x1: 0, x2: width, y1: 22, y2: 22 }));
  return el(
    "figure",
    {},
    svg,
    el(
      "figcaption",
      { class: "note" },
      `${sent.length} days${both ? ": sent above the line, received below" : ""}; highest ${brief.format(most)}`,
    ),
  );
}

// ---------------------------------------------------------------- by hand

const EXAMPLES = [
  {
    name: "An ordinary payment",
    note: "groceries at a merchant",
    make: (n) => [
      {
        type: "PAYMENT",
        amount: 42.9,
        sender: `C-hand-${n}`,
        sender_balance: 1830.5,
        receiver: "M-hand-market",
        receiver_balance: null,
      },
    ],
  },
  {
    name: "An emptied account",
    note: "all of it, to somebody new",
    make: (n) => [
      {
        type: "TRANSFER",
        amount: 18420.75,
        sender: `C-hand-${n}`,
        sender_balance: 18420.75,
        receiver: `C-new-${n}`,
        receiver_balance: 0,
      },
    ],
  },
  {
    name: "A chain of mules",
    note: "passed on twice, then cash",
    make: (n) => [
      {
        type: "TRANSFER",
        amount: 9800,
        sender: `C-hand-${n}`,
        sender_balance: 9800,
        receiver: `C-mule-${n}a`,
        receiver_balance: 12.4,
      },
      {
        type: "TRANSFER",
        amount: 9500,
        sender: `C-mule-${n}a`,
        sender_balance: 9812.4,
        receiver: `C-mule-${n}b`,
        receiver_balance: 0,
      },
      {
        type: "CASH_OUT",
        amount: 9500,
        sender: `C-mule-${n}b`,
        sender_balance: 9500,
        receiver: "C-hand-agent",
        receiver_balance: 250000,
      },
    ],
  },
  {
    name: "A large salary",
    note: "much money, nothing wrong",
    make: (n) => [
      {
        type: "CASH_IN",
        amount: 6250,
        sender: `C-hand-${n}`,
        sender_balance: 310.2,
        receiver: "C-hand-bank",
        receiver_balance: 900000,
      },
    ],
  },
];
let rest = []; // what follows the transaction in the form

const random = () =>
  [...crypto.getRandomValues(new Uint8Array(3))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const timeNow = () => hello?.model?.time ?? all[all.length - 1]?.time ?? 2000 * HOUR;

// A field for each attribute of the contract; what is left empty is not sent.
function attributeFields(attributes) {
  const fields = attributes.flatMap(({ text, kind, fields: names }) =>
    names.map((name) => ({ name, kind, text: names.length > 1 ? `${text}: ${name.split("_").pop()}` : text })),
  );
  const inputs = fields.map(({ name, kind, text }) => {
    const input = el("input", { name: `attribute.${name}`, maxlength: "256", spellcheck: "false", "data-kind": kind });
    if (kind === "flag") input.placeholder = "yes or no";
    return el("label", {}, el("span", {}, text), input);
  });
  $("hand-attributes").replaceChildren(...inputs);
}

function attributeValue({ value, dataset: { kind } }) {
  const text = value.trim(),
    numeric = Number(text.replace(",", "."));
  if (kind === "category") return text;
  if (kind === "flag") return /^(yes|true|1)$/i.test(text) || (/^(no|false|0)$/i.test(text) ? false : text);
  return Number.isNaN(numeric) ? text : numeric; // a moment may be a date
}

function fillForm(example) {
  const n = random(),
    [first, ...others] = example.make(n);
  rest = others;
  for (const [name, value] of Object.entries({ transaction_id: `hand-${n}`, time: timeNow(), ...first }))
    handForm.elements[name].value = value ?? "";
  $("hand-more").textContent = rest
    .map(
      (next) =>
        `Then ${typeWord(next.type)} of ${money.format(next.amount)} from ${next.sender} to ${next.receiver}.`,
    )
    .join(" ");
  for (const button of $("examples").children) button.setAttribute("aria-pressed", button.example === example);
}

function formTransaction() {
  const form = new FormData(handForm),
    number = (name) => (form.get(name).trim() === "" ? null : Number(form.get(name).replace(",", ".")));
  const given = [...$("hand-attributes").querySelectorAll("input")].filter(({ value }) => value.trim());
  return {
    ...Object.fromEntries(given.map((input) => [input.name.slice("attribute.".length), attributeValue(input)])),
    transaction_id: form.get("transaction_id"),
    time: number("time"),
    type: form.get("type") || null,
    amount: number("amount"),
    sender: form.get("sender"),
    sender_balance: number("sender_balance"),
    receiver: form.get("receiver") || null,
    receiver_balance: number("receiver_balance"),
  };
}

function result(sent, answer) {
  return el(
    "li",
    {},
    pill(answer.decision),
    el(
      "span",
      {},
      `${percent(answer.fraud_probability)} · ${money.format(sent.amount)} · ` +
        `${sent.sender} → ${sent.receiver ?? "nobody"}`,
    ),
    el(
      "button",
      {
        type: "button",
        class: "link",
        onclick: () => {
          $("hand-dialog").close();
          show(sent.transaction_id);
        },
      },
      "Open",
    ),
  );
}

function show(id) {
  const row = [...all, ...waiting].reverse().find((one) => one.transaction_id === id);
  if (row) open(row, true);
  else openWhenSeen = id;
}

for (const example of EXAMPLES) {
  const button = el(
    "button",
    { type: "button", "aria-pressed": "false", onclick: () => fillForm(example) },
    example.name,
    el("span", {}, example.note),
  );
  button.example = example;
  $("examples").append(button);
}
$("by-hand").addEventListener("click", () => {
  if (!handForm.elements.transaction_id.value) fillForm(EXAMPLES[0]);
  $("hand-problem").textContent = hello?.may_write ? "" : readOnly();
  $("hand-send").disabled = !hello?.may_write;
  $("hand-dialog").showModal();
});
$("hand-close").addEventListener("click", () => $("hand-dialog").close());
handForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  const first = formTransaction(),
    results = $("hand-results");
  results.replaceChildren();
  $("hand-problem").textContent = "";
  try {
    for (const [i, next] of [first, ...rest].entries()) {
      const sent = i ? { ...next, transaction_id: `${first.transaction_id}-${i + 1}`, time: first.time } : first;
      results.append(result(sent, await post("/predict", sent)));
    }
    handForm.elements.transaction_id.value = `hand-${random()}`;
  } catch (error) {
    $("hand-problem").textContent = error.message;
  }
});

addEventListener("pagehide", () => aborter?.abort());
connect();

export {
  $,
  accountLink,
  address,
  amountOf,
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
};

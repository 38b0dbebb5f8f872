"""TEMPORARY DRAFT; replaced by the export of 02_simulate."""
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from fraud_pkg.schema import TYPES, arrow_schema
from fraud_pkg.settings import FraudError

CASH_IN, CASH_OUT, DEBIT, PAYMENT, TRANSFER = range(len(TYPES))
SCENARIOS = ("account_takeover", "mule", "structuring", "card_testing", "compromised_merchant")
MIX = (0.25, 0.25, 0.15, 0.20, 0.15)
HARD_RATE = 0.003
LOOKALIKE = 1

@dataclass(frozen=True)
class Events:
    time: np.ndarray
    kind: np.ndarray
    amount: np.ndarray
    orig: np.ndarray
    dest: np.ndarray
    share: np.ndarray
    scenario: np.ndarray

def _events(time, kind, amount, orig, dest, share=None):
    n = len(time)
    full = lambda v, t: np.broadcast_to(np.asarray(v, dtype=t), n)
    return Events(full(time, np.float64), full(kind, np.int8), full(amount, np.float64), full(orig, np.int32), full(dest, np.int32),
                  full(0 if share is None else share, np.float32), full(-1, np.int8))

def _join(parts):
    return Events(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Events)))

# ---------- clocks
HOURS = np.arange(24)
def _clock(peaks, base=0.03):
    w = base + sum(h * np.exp(-0.5 * (((HOURS - p + 12) % 24 - 12) / s) ** 2) for p, s, h in peaks)
    return w / w.sum()
CLOCKS = np.array([
    _clock([(8, 1.5, 1), (13, 2, 1), (18, 2, 1.2)]),
    _clock([(10, 2.5, 1.2), (15, 2.5, 1)]),
    _clock([(12, 1.5, 1.2), (20, 2, 1)]),
    _clock([(19, 2.5, 1.5)]),
    _clock([(14, 4, 1)]),
    _clock([(22, 3, 1.2), (16, 3, .6)]),
    _clock([(3, 3, 1.2), (23, 2.5, 1)]),
    _clock([(12, 6, 1)], .1),
])
CLOCK_SHARE = np.array([.2, .19, .17, .15, .12, .09, .03, .05])
CLOCK_CUM = (np.cumsum(CLOCKS, axis=1) / np.sum(CLOCKS, axis=1, keepdims=True) + np.arange(len(CLOCKS))[:, None]).ravel()

def _hour(rng, clock):
    "Random hour of the day, by clock"
    at = np.searchsorted(CLOCK_CUM, clock + rng.random(len(clock)), side="right")
    return np.minimum(at - 24 * clock, 23)

@dataclass(frozen=True)
class People:
    hours: int
    level: np.ndarray
    pace: np.ndarray
    opened: np.ndarray
    income: np.ndarray
    clock: np.ndarray
    cash: np.ndarray
    wire: np.ndarray
    shops: np.ndarray
    friends: np.ndarray
    agents: np.ndarray
    price: np.ndarray
    n_agents: int
    @property
    def customers(self): return len(self.level)
    @property
    def first_merchant(self): return self.customers + self.n_agents

POPULARITY = 2.5
def _merchants(rng, people_merchants, shape):
    return (people_merchants * rng.random(shape) ** POPULARITY).astype(np.int32)

def _people(rng, rows, hours):
    c = max(50, round(rows / (0.4 * hours / 24)))
    a, m = max(10, c // 50), max(40, c // 8)
    level = 30 * np.exp(rng.normal(0, 0.8, c))
    business = rng.random(c) < 0.06
    level[business] *= rng.uniform(4, 15, business.sum())
    pace = .05 + rng.gamma(1.5, 1 / 1.5, c) * np.where(business, 2.5, 1)
    opened = np.zeros(c)
    new = round(0.12 * c)
    opened[c - new:] = np.sort(rng.random(new)) * hours
    cash, wire = rng.beta(1.5, 1.5, c) * .32, rng.beta(1.5, 2, c) * .4 + business * .15
    spends = level * pace * (cash * 5 + wire * 8.5 + 1.5 * (.85 - cash - wire) + .1)
    gets = np.mean(level * pace * wire * 8.5)
    income = np.maximum(spends - gets, .2 * spends) / (.11 * pace)
    return People(hours, level, pace, opened, income, rng.choice(len(CLOCKS), c, p=CLOCK_SHARE).astype(np.int64),
        cash, wire,
        _merchants(rng, m, (c, 6)) + c + a, rng.integers(0, c, (c, 5), dtype=np.int32), rng.integers(c, c + a, (c, 2), dtype=np.int32),
        np.exp(rng.normal(0, .6, m)), a)

def _pick(rng, table, rows):
    "One of each row's usual ones, the first the most often."
    slots = table.shape[1]
    return table[rows, (slots * rng.random(len(rows)) ** 1.7).astype(np.int64)]

def _anyone(rng, people, time):
    "pace-weighted customer that exists at time"
    cum = np.cumsum(people.pace)
    known = np.searchsorted(people.opened, time, side="right")
    return np.minimum(np.searchsorted(cum, rng.random(len(time)) * cum[known - 1], side="right"), known - 1)

def _newcomer(rng, people, time, days=20):
    "A customer who joined lately (if any joined)"
    known = np.searchsorted(people.opened, time, side="right")
    lately = np.maximum(np.searchsorted(people.opened, time - 24 * days, side="right"), people.customers // 2)
    lately = np.minimum(lately, known - 1)
    return (lately + (known - lately) * rng.random(len(time))).astype(np.int64)

def _any_merchant(rng, people, n):
    return people.first_merchant + _merchants(rng, len(people.price), n)

def _any_agent(rng, people, n):
    return people.customers + rng.integers(0, people.n_agents, n)

# ---------- ordinary
def _day_weights(hours):
    day = np.arange(int(np.ceil(hours / 24)))
    week = np.array([.95, .92, .95, 1, 1.15, 1.2, .83])[day % 7]
    payday = 1 + .35 * np.exp(-((day - 26) % 30) / 2.5)
    holiday = np.where(np.isin(day % 60, (40, 41, 42)), 1.4, 1)
    return week * payday * holiday

def _when(rng, people, who):
    "start hour (float) of visits of the customers `who`: a day of theirs, an hour of theirs"
    cum = np.concatenate([[0], np.cumsum(_day_weights(people.hours))])
    first = np.interp(people.opened / 24, np.arange(len(cum)), cum)[who]
    last = np.interp(people.hours / 24, np.arange(len(cum)), cum)
    day = np.floor(np.interp(first + (last - first) * rng.random(len(who)), cum, np.arange(len(cum))))
    time = day * 24 + _hour(rng, people.clock[who]) + rng.random(len(who))
    return np.where(time < people.hours, time, time - 24)

def _sizes(rng, rows, low, high, tail=None):
    "sizes of groups that add up to rows exactly"
    sizes = rng.integers(low, high + 1, rows // low + 1)
    cum = np.cumsum(sizes)
    k = np.searchsorted(cum, rows) + 1
    sizes = sizes[:k]
    sizes[-1] -= cum[k - 1] - rows
    return sizes

def _visits(rng, people, rows):
    sizes = 1 + (rng.random(rows) < .22) * rng.geometric(.45, rows)
    k = np.searchsorted(np.cumsum(sizes), rows) + 1
    sizes = sizes[:k]; sizes[-1] -= sizes.sum() - rows
    here = people.pace * (1 - people.opened / people.hours)
    who = np.repeat(np.arange(people.customers, dtype=np.int32), rng.multinomial(k, here / here.sum()))
    start = _when(rng, people, who)
    of = np.repeat(np.arange(k, dtype=np.int32), sizes)
    place = np.arange(rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    time = start[of] + place * rng.exponential(.5, rows)
    return who[of], np.where(time < people.hours, time, time - 24)

FACTOR = np.array([13.0, 4.0, 2.0, 1.0, 6.0])   # amounts by type against level
SPREAD = np.array([.5, .6, .5, .55, .8])

def _kinds(rng, people, who):
    u = rng.random(len(who))
    cash, wire = people.cash[who], people.wire[who]
    kind = np.full(len(who), PAYMENT, dtype=np.int8)
    kind[u < .15 + cash + wire] = TRANSFER
    kind[u < .15 + cash] = CASH_OUT
    kind[u < .15] = DEBIT
    kind[u < .11] = CASH_IN
    return kind

def _usual_dest(rng, people, who, kind, time, stray):
    "destination: one of the usual ones; with probability stray another"
    n = len(who)
    dest = _pick(rng, people.shops, who)
    cash = kind <= DEBIT
    dest[cash] = _pick(rng, people.agents, who[cash])
    wire = np.flatnonzero(kind == TRANSFER)
    dest[wire] = _pick(rng, people.friends, who[wire])
    away = np.flatnonzero(rng.random(n) < stray)
    dest[away] = _strange_dest(rng, people, kind[away], time[away])
    return _not_self(people, who, dest, time)

def _strange_dest(rng, people, kind, time):
    dest = _any_merchant(rng, people, len(kind))
    cash, wire = kind <= DEBIT, kind == TRANSFER
    dest[cash] = _any_agent(rng, people, cash.sum())
    known = np.searchsorted(people.opened, time[wire], side="right")
    dest[wire] = (known * rng.random(wire.sum())).astype(np.int64)
    return dest

def _not_self(people, who, dest, time):
    "no transfers to oneself, none to an account that doesn't exist yet"
    dest = np.asarray(dest)
    old = max(1, np.searchsorted(people.opened, 0, side="right"))
    bad = np.flatnonzero(dest < people.customers)
    bad = bad[(people.opened[dest[bad]] > time[bad]) | (dest[bad] == who[bad])]
    dest[bad] = (who[bad] + 1 + dest[bad] % (old - 1)) % old
    return dest

def _usual_amount(rng, people, who, kind, dest):
    amount = people.level[who] * FACTOR[kind] * np.exp(SPREAD[kind] * rng.standard_normal(len(who)))
    pay = kind == CASH_IN
    amount[pay] *= people.income[who[pay]] / (13 * people.level[who[pay]])
    shop = np.flatnonzero(kind == PAYMENT)
    amount[shop] *= people.price[dest[shop] - people.first_merchant]
    return amount

def _ordinary(rng, people, rows):
    who, time = _visits(rng, people, rows)
    kind = _kinds(rng, people, who)
    dest = _usual_dest(rng, people, who, kind, time, .15)
    amount = _usual_amount(rng, people, who, kind, dest)
    big = rng.random(rows) < .02
    amount[big] *= rng.uniform(2, 8, big.sum())
    return _events(time, kind, amount, who, dest)

# ---------- episodes
@dataclass(frozen=True)
class Episodes:
    of: np.ndarray
    place: np.ndarray
    size: np.ndarray
    start: np.ndarray

def _episodes(rng, rows, low, high, first, end, longest):
    size = _sizes(rng, rows, low, high)
    n = len(size)
    room = max(end - first - longest, (end - first) / 2)
    start = first + room * (np.arange(n) + rng.random(n)) / max(n, 1)
    return Episodes(np.repeat(np.arange(n), size), np.arange(rows) - np.repeat(np.cumsum(size) - size, size), size, start)

def _own_hour(rng, people, who, time):
    return np.floor(time / 24) * 24 + _hour(rng, people.clock[who]) + rng.random(len(who))

def _inside(time, first, end):
    "times that passed the end come round"
    return first + (time - first) % (end - first)

def _typical(people, who, kind):
    return people.level[who] * FACTOR[kind]

def _wealthy(rng, people, time, among):
    "the customer of the highest level among a few"
    several = _anyone(rng, people, np.repeat(time, among)).reshape(len(time), among)
    return several[np.arange(len(time)), np.argmax(people.level[several], axis=1)]

def _night(rng, time, share):
    "moves a share of the times to the hours from 0 to 6"
    late = rng.random(len(time)) < share
    return np.where(late, np.floor(time / 24) * 24 + 6 * rng.random(len(time)), time)

def _takeover(rng, people, rows, first, end, fraud):
    e = _episodes(rng, rows, 1, 9, first, end, 30)
    n = len(e.size)
    who = _wealthy(rng, people, e.start, 4 if fraud else 1)
    start = _night(rng, e.start, .75) if fraud else np.where(rng.random(n) < .25, e.start, _own_hour(rng, people, who, e.start))
    gap = rng.exponential(.5 if fraud else 1.0, n)
    time = _inside(start[e.of] + (e.place + rng.random(rows)) * gap[e.of], first, end)
    kind = rng.choice(5, rows, p=(0, .25, 0, .1, .65) if fraud else (0, .2, 0, .5, .3)).astype(np.int8)
    who = who[e.of]
    dest = _strange_dest(rng, people, kind, time)
    drop = np.where(rng.random(n) < .4, _newcomer(rng, people, e.start), _anyone(rng, people, e.start))
    if fraud:
        drop = drop[np.arange(n) // 3 * 3]
    wire = kind == TRANSFER
    dest[wire] = drop[e.of[wire]]
    dest = _not_self(people, who, dest, time)
    amount = _usual_amount(rng, people, who, kind, dest) * (rng.uniform(2, 6, rows) if fraud else 1 + rng.exponential(.7, rows))
    part = rng.uniform(.2, .55, rows)
    kept = np.cumsum(np.log1p(-part)) - np.log1p(-part)
    part *= np.exp(kept - kept[e.place == 0][e.of])
    last = e.place + 1 == e.size[e.of]
    part[last & (rng.random(rows) < .25)] = 2
    share = part if fraud else np.where(rng.random(rows) < .15, part, 0)
    return _events(time, kind, amount, who, dest, share)

def _mule(rng, people, rows, first, end, fraud):
    e = _episodes(rng, rows, 4, 14, first, end, 60)
    n = len(e.size)
    young = _newcomer(rng, people, e.start)
    mule = np.where(rng.random(n) < (.4 if fraud else .1), young, _anyone(rng, people, e.start))
    inflows = (e.size + 1) // 2
    span = rng.uniform(2, 24, n)
    comes = e.place < inflows[e.of]
    begin = np.cumsum(e.size) - e.size
    pair = np.where(comes, np.arange(rows), begin[e.of] + e.place - inflows[e.of])
    t_in = e.start[e.of] + span[e.of] * rng.random(rows)
    if fraud:
        wave = np.where(rng.random(n) < .35, rng.uniform(9, 20, n) * 24, 0)
        wave[e.start + wave + 60 > end] = 0
        t_in += wave[e.of] * (e.place % 2)
    victim = _anyone(rng, people, t_in)
    time = np.where(comes, t_in, t_in[pair] + (rng.uniform(.3, 5, rows) if fraud else rng.uniform(1, 30, rows)))
    time = _inside(time, first, end)
    habit = _typical(people, victim, TRANSFER)
    a_in = np.sqrt(habit * 6000) * np.exp(rng.normal(0, .6, rows)) if fraud else habit * np.exp(rng.normal(np.log(.6), .7, rows))
    amount = np.where(comes, a_in, a_in[pair] * (rng.uniform(.8, .99, rows) if fraud else rng.uniform(.2, .95, rows)))
    kind = np.where(comes, TRANSFER, rng.choice([CASH_OUT, TRANSFER], rows, p=[.75, .25])).astype(np.int8)
    who = np.where(comes, victim, mule[e.of])
    dest = np.where(comes, mule[e.of], _strange_dest(rng, people, kind, time))
    return _events(time, kind, amount, who, _not_self(people, who, dest, time))

LIMITS = np.array([3000., 10000.])
def _structuring(rng, people, rows, first, end, fraud):
    e = _episodes(rng, rows, 5, 16, first, end, 120 if fraud else 600)
    n = len(e.size)
    who = _wealthy(rng, people, e.start, 5)
    limit = np.where(people.level[who] * rng.uniform(.5, 2, n) > 150, LIMITS[1], LIMITS[0])
    gap = rng.exponential(4 if fraud else 60, n) + 1
    time = e.start[e.of] + np.minimum(e.place * gap[e.of], 120 if fraud else 600)
    who, limit = who[e.of], limit[e.of]
    kind = np.where(e.place * 5 < e.size[e.of] * 3, CASH_IN, rng.choice([CASH_OUT, TRANSFER], rows)).astype(np.int8)
    time = _inside(_own_hour(rng, people, who, time), first, end)
    dest = _usual_dest(rng, people, who, kind, time, .6 if fraud else .1)
    amount = limit * (1 - rng.uniform(.003, .07, rows))
    return _events(time, kind, amount, who, dest)

def _card_testing(rng, people, rows, first, end, fraud):
    e = _episodes(rng, rows, 3, 8, first, end, 24)
    n = len(e.size)
    who = _anyone(rng, people, e.start)
    start = _night(rng, e.start, .6) if fraud else _own_hour(rng, people, who, e.start)
    tests = 1 + np.floor(rng.random(n) * (e.size - 1)).astype(int)
    small = e.place < tests[e.of]
    wait = rng.uniform(.2, 6, n)
    time = start[e.of] + (e.place + rng.random(rows)) * .15 + np.where(small, 0, wait[e.of])
    time = _inside(time, first, end)
    who = who[e.of]
    dest = _any_merchant(rng, people, rows)
    if fraud:
        block = (e.start // 480).astype(int)
        testers = _any_merchant(rng, people, (block.max(initial=0) + 1) * 6).reshape(-1, 6)
        dest[small] = testers[block[e.of[small]], rng.integers(0, 6, small.sum())]
    else:
        dest[small] = _pick(rng, people.shops, who[small])
    big = _typical(people, who, PAYMENT) * (rng.uniform(5, 20, rows) if fraud else rng.uniform(.5, 5, rows))
    amount = np.where(small, np.exp(rng.normal(np.log(1.2 if fraud else 2.5), .6, rows)), big)
    return _events(time, PAYMENT, amount, who, dest)

def _rush(rng, people, rows, first, end, fraud):
    e = _episodes(rng, rows, 6, 20, first, end, 200)
    n = len(e.size)
    span = rng.uniform(24, 12 * 24, n)
    m = len(people.price)
    per_hour = np.diff((np.arange(m + 1) / m) ** (1 / POPULARITY)) * 0.5 * 0.4 / 24 * people.customers
    wanted = e.size / span * rng.uniform(.2, .9, n)
    shop = np.clip(m - np.searchsorted(per_hour[::-1], wanted), 0, m - 1)
    time = e.start[e.of] + span[e.of] * rng.random(rows)
    who = _anyone(rng, people, np.minimum(time, end))
    own = rng.random(rows) < (.4 if fraud else .9)
    time = _inside(np.where(own, _own_hour(rng, people, who, time), time), first, end)
    shop = shop[e.of]
    amount = _typical(people, who, PAYMENT) * people.price[shop] * (rng.uniform(3, 10, rows) if fraud else rng.uniform(.5, 2, rows))
    return _events(time, PAYMENT, amount, who, people.first_merchant + shop)

MAKERS = dict(zip(SCENARIOS, (_takeover, _mule, _structuring, _card_testing, _rush)))

def _quotas(total, mix):
    exact = total * np.asarray(mix)
    q = np.floor(exact).astype(int)
    q[np.argsort(q - exact, kind="stable")[:total - q.sum()]] += 1
    return q

def _frauds(rng, people, total, s):
    hours = people.hours
    cut = s.drift_step if s.drift_scenario else 0
    early = round(total * cut / hours)
    periods = [(early, 0, cut, np.array(MIX)), (total - early, cut, hours, _drifted_mix(s.drift_scenario))] if cut else [(total, 0, hours, np.array(MIX))]
    parts = []
    for rows, first, end, mix in periods:
        for code, quota in enumerate(_quotas(rows, mix)):
            if quota:
                made = MAKERS[SCENARIOS[code]](rng, people, quota, first, end, True)
                parts.append(replace(made, scenario=np.full(quota, code, np.int8)))
    return parts

def _drifted_mix(name):
    mix = np.array(MIX) * .2
    mix[SCENARIOS.index(name)] += .8
    return mix

# ---------- money
UNITS = np.array([
    [1, 1, 1, 100, 1000, 1000, 5000, 10000],
    [1, 1000, 1000, 1000, 1000, 2000, 5000, 5000],
    [1, 1, 1, 1, 1, 1, 100, 100],
    [1, 1, 1, 1, 1, 1, 10, 100],
    [1, 1, 1, 100, 1000, 1000, 5000, 10000]])

def _units(rng, kind):
    return UNITS[kind, rng.integers(0, 8, len(kind), dtype=np.int8)]

def _round(amount, unit):
    cents = np.rint(amount * 100).astype(np.int64)
    unit = np.where(cents < 4 * unit, 1, unit)
    return np.maximum(cents - cents % unit, 1)

@dataclass(frozen=True)
class Ledger:
    entry: np.ndarray
    account: np.ndarray
    first: np.ndarray
    segment: np.ndarray
    sign: np.ndarray

def _ledger(orig, dest, kind, accounts):
    n = len(kind)
    bits = int(2 * n).bit_length()
    key = np.empty(2 * n, np.int64)
    key[:n] = (orig.astype(np.int64) << bits) | np.arange(0, 2 * n, 2)
    key[n:] = (dest.astype(np.int64) << bits) | np.arange(1, 2 * n, 2)
    key = np.concatenate([key[:n][orig < accounts], key[n:][dest < accounts]])
    key.sort()
    entry = (key & ((1 << bits) - 1)).astype(np.int32)
    account = (key >> bits).astype(np.int32)
    del key
    new = np.empty(len(entry), bool); new[:1] = True
    np.not_equal(account[1:], account[:-1], out=new[1:])
    sign = np.where(((entry & 1) == 0) == (kind[entry >> 1] == CASH_IN), 1, -1).astype(np.int8)
    return Ledger(entry, account, np.flatnonzero(new), (np.cumsum(new, dtype=np.int32) - 1), sign)

def _balances(ledger, cents, opening):
    "before and after of every entry: never below zero"
    total = np.cumsum(ledger.sign * cents[ledger.entry >> 1])
    first = ledger.first
    base = np.empty(len(first), np.int64); base[0] = 0; base[1:] = total[first[1:] - 1]
    start = opening[ledger.account[first]]
    total += (start - base)[ledger.segment]
    step = 2 * int(np.abs(total).max()) + 1
    shift = ledger.segment * np.int64(step)
    low = np.minimum.accumulate(total - shift) + shift
    np.minimum(low, 0, out=low)
    after = total - low
    before = np.empty_like(after); before[1:] = after[:-1]; before[first] = start
    return before, after

def _spread(ledger, values, n):
    "entries -> (orig, dest) columns; 0 for who keeps no balance"
    both = np.zeros(2 * n, np.int64)
    both[ledger.entry] = values
    return both[0::2], both[1::2]

def _openings(rng, people):
    own = people.level * np.exp(rng.normal(np.log(50), 1.0, people.customers))
    return np.concatenate([(own * 100).astype(np.int64), (np.exp(rng.normal(np.log(8e5), .8, people.n_agents)) * 100).astype(np.int64)])

def _settle(rng, events, people):
    n = len(events.time)
    unit = _units(rng, events.kind)
    cents = _round(events.amount, unit)
    opening = _openings(rng, people)
    ledger = _ledger(events.orig, events.dest, events.kind, people.first_merchant)
    drains = events.share > 0
    old = _spread(ledger, _balances(ledger, np.where(drains, 0, cents), opening)[0], n)[0]
    want = drains & (old > 0)
    cents = np.where(want, _round(events.share * old / 100, unit), cents)
    outgoing = events.kind != CASH_IN
    keep = np.where(rng.random(n) < np.where((events.kind == CASH_OUT) | (events.kind == TRANSFER), .5, 0), 1, rng.uniform(.2, .95, n))
    for _ in range(3):
        old = _spread(ledger, _balances(ledger, cents, opening)[0], n)[0]
        short = np.flatnonzero((old > 0) & (old < cents) & outgoing)
        cents[short] = np.where(keep[short] == 1, old[short], _round(old[short] * keep[short] / 100, unit[short]))
    before, after = _balances(ledger, cents, opening)
    return cents, _spread(ledger, before, n), _spread(ledger, after, n)

# ---------- names and table
def _name_numbers(rng, n):
    "n different numbers below 2^31, in no order"
    prime = 2**31 - 1
    a, b = rng.integers(prime // 4, prime, 2)
    return (np.arange(1, n + 1, dtype=np.int64) * a + b) % prime

def _names(letter, numbers):
    import pyarrow as pa
    import pyarrow.compute as pc
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")

def _words(words, codes):
    import pyarrow as pa
    return pa.array(words).take(pa.array(codes, mask=codes < 0))

def _money(cents): return cents / 100.0

def _table(step, kind, cents, orig, dest, old, new, scenario, names, fraud, flagged):
    import pyarrow as pa
    n = len(step)
    columns = [np.arange(n), step.astype(np.int32), _words(TYPES, kind), _money(cents), orig, _money(old[0]), _money(new[0]), dest, _money(old[1]), _money(new[1]), fraud, flagged, _words(names, scenario)]
    schema = arrow_schema()
    return pa.table([pa.array(c, type=f.type) if isinstance(c, np.ndarray) else c for c, f in zip(columns, schema)], schema=schema)

def _hard(s):
    rng = np.random.default_rng(s.seed)
    hours = round(s.days * 24)
    frauds = round(s.rows * (s.fraud_rate or HARD_RATE))
    people = _people(rng, s.rows, hours)
    parts = _frauds(rng, people, frauds, s)
    for name, quota in zip(SCENARIOS, _quotas(round(LOOKALIKE * HARD_RATE * s.rows), MIX)):
        if quota: parts.append(MAKERS[name](rng, people, quota, 0, hours, False))
    done = sum(len(p.time) for p in parts)
    parts.append(_ordinary(rng, people, s.rows - done))
    events = _join(parts)
    del parts
    order = np.argsort(events.time)
    events = Events(*(getattr(events, f.name)[order] for f in fields(Events)))
    if s.drift_step:
        later = (events.time >= s.drift_step) & (events.scenario < 0)
        events.amount[later] *= s.drift_amount
    cents, old, new = _settle(rng, events, people)
    numbers = _name_numbers(rng, people.first_merchant + len(people.price))
    import pyarrow as pa
    names = pa.concat_arrays([_names("C", numbers[:people.first_merchant]), _names("M", numbers[people.first_merchant:])])
    step = np.floor(events.time)
    return _table(step, events.kind, cents, names.take(pa.array(events.orig)), names.take(pa.array(events.dest)), old, new, events.scenario, SCENARIOS,
        (events.scenario >= 0).astype(np.int8), np.zeros(len(step), np.int8))

def simulate(s): return _hard(s)

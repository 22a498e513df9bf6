// The live page: asks for the state, and asks only for what it has not got.

import { Chart } from "./charts.js";
import { Clients, table } from "./clients.js";
import { capital, count, duration, isShare, make, number, percent, size, when, whole } from "./words.js";

const POLL = 2000;
const CATCHING_UP = 400;
const HIDDEN = 20000;
const REST = 3000; // the least time between two looks at the table of clients
const $ = (id) => document.getElementById(id);

let state = null;
let tag = null;
let skew = 0; // this clock minus the server's
let failures = 0;
let away = ""; // why another machine's dashboard, whose page this is, does not answer
let timer = null;
let clients = null;
let asked = { revision: -1, at: 0 };
const charts = new Map();

// -- asking

async function poll() {
  clearTimeout(timer);
  try {
    const answer = await fetch("/api/state", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {}, signal: AbortSignal.timeout(8000) });
    const date = Date.parse(answer.headers.get("Date"));
    if (Number.isFinite(date)) skew = Date.now() - date;
    if (answer.status === 200) {
      state = await answer.json();
      tag = answer.headers.get("ETag");
      show();
    }
    away = answer.status === 502 ? (await answer.json()).error : "";
    if (![200, 304, 502].includes(answer.status)) {
      throw new Error(`status ${answer.status}`);
    }
    failures = 0;
  } catch {
    failures += 1;
  }
  tick();
  refreshClients();
  const wait = failures ? Math.min(1000 * 2 ** failures, 30000) : document.hidden ? HIDDEN : state?.status === "reading" ? CATCHING_UP : POLL;
  timer = setTimeout(poll, wait);
}

function refreshClients() {
  if (clients && state && asked.revision !== state.revision && Date.now() - asked.at >= REST) {
    asked = { revision: state.revision, at: Date.now() };
    clients.ask();
  }
}

// -- where it stands

function standing() {
  const { now, run } = state ?? {};
  if (away) return ["act", "Out of reach", `${away}; trying again`];
  if (failures > 1) return ["act", "Out of reach", "the dashboard does not answer; trying again"];
  if (!state) return ["wait", "Connecting", ""];
  const planned = run.rounds ? ` of ${whole(run.rounds)}` : "";
  const age = Math.max((Date.now() - skew) / 1000 - now.wall, 0);
  switch (state.status) {
    case "unreadable": return ["act", "Unreadable", state.problem];
    case "waiting": return ["wait", "Waiting", "there is no ledger yet"];
    case "empty": return ["wait", "Waiting", "no round has closed yet"];
    case "reading": return ["wait", "Reading the ledger", `round ${whole(now.round)}, ${whole(state.behind)} to go`];
    case "ended": return ["good", "Over", `${count(now.round, "round")}${state.total.skipped ? `, ${whole(state.total.skipped)} of them skipped` : ""}; the last closed on ${when(now.wall)}`];
  }
  const pace = now.pace === null ? "" : `, one every ${duration(now.pace)}`;
  if (age > now.quiet_after) return ["act", `No news for ${duration(age)}`, `round ${whole(now.round)}${planned} was the last${pace} before`];
  const level = state.concerns.some((c) => c.level === "act") ? "act" : state.concerns.length ? "watch" : "good";
  const skipped = state.total.skipped ? `; ${whole(state.total.skipped)} skipped so far` : "";
  return [level, "Running", `round ${whole(now.round)}${planned} closed ${age < 1.5 ? "just now" : `${duration(age)} ago`}${pace}${skipped}`];
}

function tick() {
  const [kind, word, text] = standing();
  $("status").dataset.kind = kind;
  $("status-word").textContent = word;
  $("status-text").textContent = text;
  const said = word.startsWith("No news") ? "No news" : word;
  if ($("said").dataset.word !== said) {
    $("said").dataset.word = said;
    $("said").textContent = `${word}: ${text}`;
  }
}

// -- showing

function show() {
  const { run, now, total } = state;
  const job = run.job ?? "Federation";
  const name = typeof job === "string" ? job : String(job);
  $("job").textContent = name;
  document.title = now.round ? `${whole(now.round)} · ${name} · fedkeel` : `${name} · fedkeel`;
  $("eyebrow").textContent = run.fedkeel ? `Live, by fedkeel ${run.fedkeel}` : "Live, by fedkeel";
  $("progress").hidden = !(run.rounds && now.round);
  $("progress").value = run.rounds ? Math.min(now.round / run.rounds, 1) : 0;
  const there = total.rounds > 0;
  $("empty").hidden = there;
  $("content").hidden = !there;
  if (!there) {
    const [title, text] = {
      waiting: ["There is no ledger yet", "The run has not begun. This page goes on looking, and fills by itself."],
      unreadable: ["The ledger cannot be read", state.problem],
    }[state.status] ?? ["No round has closed yet", "The run has begun. Its first figures stand here when its first round closes."];
    $("empty-title").textContent = title;
    $("empty-text").textContent = text;
    return;
  }
  clients ??= new Clients();
  concerns();
  cards();
  model();
  part();
  refused();
  people();
  cost();
  record();
}

function concerns() {
  const { recent } = state;
  const sent = recent.used + recent.unused + recent.refused + recent.lost;
  const share = (value) => `${Math.round((100 * value) / (sent || 1))}%`;
  const fine = { level: "good", what: "Nothing stood out", why: `of the last ${count(recent.rounds, "round")} none was skipped; ${share(recent.refused)} of the updates were refused, ${share(recent.lost)} lost` };
  const words = { act: "Act", watch: "Watch", good: "Well" };
  $("concerns").replaceChildren(...(state.concerns.length ? state.concerns : [fine]).map((c) =>
    make("li", { "data-level": c.level }, make("b", {}, words[c.level]), make("p", {}, make("b", {}, capital(c.what)), `: ${c.why}.`))));
}

function cards() {
  const { recent, total, metrics } = state;
  const sent = recent.used + recent.unused + recent.refused + recent.lost;
  const found = Object.entries(metrics).slice(0, 2).map(([name, curve]) => {
    const at = curve.value.length - 1;
    const format = isShare(name) ? percent : number;
    const interval = curve.low[at] === null ? "" : `${format(curve.low[at])} to ${format(curve.high[at])}, `;
    return [capital(name.replaceAll("_", " ")), format(curve.value[at], 3), `${interval}round ${whole(curve.round[at])}`];
  });
  found.push(["Clients heard of", whole(total.seen), `of ${whole(total.clients)}; ${number(recent.used / recent.rounds)} used a round lately`]);
  found.push(["Refused lately", sent ? percent(recent.refused / sent) : "–", `${whole(total.refused)} of all; ${whole(total.lost)} lost`]);
  found.push(["Age of updates", recent.staleness === null ? "–" : number(recent.staleness), `models behind, lately; ${whole(total.oldest)} at most`]);
  found.push(["Traffic", size(total.up + total.down), `${size(total.up)} up, ${size(total.down)} down`]);
  found.push(["Privacy spent", total.epsilon === null ? "none" : `ε = ${number(total.epsilon)}`, total.epsilon === null ? "no privacy noise recorded" : "over all rounds"]);
  $("cards").replaceChildren(...found.map(([name, figure, under]) =>
    make("li", { class: "card" }, make("p", { class: "name" }, name), make("p", { class: "figure" }, figure), make("p", { class: "under" }, under))));
}

// A chart by its key: made once, then only drawn anew.
function chart(home, key, spec) {
  if (!charts.has(key)) charts.set(key, new Chart());
  const found = charts.get(key);
  if (found.figure.parentNode !== $(home)) $(home).append(found.figure);
  found.show(spec);
}

function axis(source) {
  if (document.querySelector("input[name=axis]:checked").value === "time") return { label: "federation's clock", name: "At", values: source.time, format: duration };
  return { label: "round", name: "Round", values: source.round, format: whole };
}

function model() {
  for (const [name, curve] of Object.entries(state.metrics)) {
    const share = isShare(name);
    const title = capital(name.replaceAll("_", " "));
    const note = curve.low.some((v) => v !== null) ? "Band: the interval of each figure, and all figures between two points." : "";
    chart("model-charts", `metric ${name}`, { title, note, x: axis(curve), format: share ? percent : number, series: [{ ...curve, name: title, values: curve.value, quiet: true, kind: share ? "k1" : "k2" }] });
  }
  const found = Object.entries(state.by_class.classes);
  if (found.length < 2) return;
  const share = isShare(state.by_class.metric);
  const series = found.map(([name, curve]) => ({ name, values: curve.value, bridge: true }));
  chart("model-charts", "by class", { title: `${capital(state.by_class.metric)} on the clients of each class`, x: axis(longest(found)), format: share ? percent : number, series });
}

const longest = (found) => found.map(([, curve]) => curve).reduce((a, b) => (b.round.length > a.round.length ? b : a));

function part() {
  const { spans, shares, classes } = state;
  const parts = Object.entries(shares.classes).map(([name, values]) => ({ name: name || "unnamed", values }));
  if (parts.length) chart("part-charts", "shares", { title: "Each class's part of the updates used", x: axis(shares), format: percent, series: parts, from: 0, to: 1 });
  const age = { title: "Age of updates, in models behind the newest", x: axis(spans), format: number, from: 0, series: [{ name: "mean", values: spans.staleness }, { name: "oldest", values: spans.oldest }] };
  chart("part-charts", "age", age);
  const columns = [["Class"], ["Clients", "num"], ["Heard of", "num"], ["Part of all", "num"], ["Part of the updates", "num"], ["Part of the weight", "num"], ["Used", "num"], ["Refused", "num"], ["Lost", "num"], ["Behind", "num"], ["Bytes", "num"]];
  const rows = classes.map((c) => [c.device || "unnamed", whole(c.clients), whole(c.seen), percent(c.population), percent(c.share), percent(c.weight), whole(c.used), whole(c.refused), whole(c.lost), number(c.staleness), size(c.bytes)]);
  keep("classes", table("Class by class of devices", "", columns, rows));
}

function refused() {
  const { spans, rules, refusals } = state;
  const wide = spans.width > 1 ? `Means over ${spans.width} rounds.` : "";
  const series = [{ name: "used", values: spans.used, kind: "k1" }, { name: "refused", values: spans.refused, kind: "k2" }, { name: "lost", values: spans.lost, kind: "k6" }];
  if (state.total.unused) series.push({ name: "let in, but the round was skipped", values: spans.unused, kind: "k4" });
  chart("refused-charts", "verdicts", { title: "Updates a round, by what became of them", note: wide, x: axis(spans), format: number, series, from: 0 });
  const columns = [["Stage"], ["Outcome"], ["Rule"], ["Updates", "num"], ["Clients", "num"], ["Last in round", "num"], ["Its reason", "why"]];
  const rows = rules.map((r) => [r.stage, r.outcome, r.rule, whole(r.updates), whole(r.clients), whole(r.round), r.reason]);
  if (rows.length) keep("rules", table("Refused or lost: at which stage, and why", "", columns, rows));
  else $("rules").replaceChildren(make("p", {}, "No update was refused or lost."));
  const last = refusals.map((r) => [r.client, whole(r.round), whole(r.times), r.stage, r.rule, r.reason]);
  if (last.length) keep("newest", table("Who was refused last", "One line a client: its newest refusal.", [["Client", "name"], ["Round", "num"], ["Times refused", "num"], ["Stage"], ["Rule"], ["Reason", "why"]], last));
  else $("newest").replaceChildren();
}

// A table in its place; what the reader scrolled stays scrolled.
function keep(id, found) {
  const old = $(id).firstElementChild;
  if (old?.matches(".scroll")) old.replaceChildren(...found.childNodes);
  else $(id).replaceChildren(found);
}

function people() {
  const { trust, versions } = state;
  if (trust.counts.length) {
    const middle = trust.counts.map((_, i) => (trust.edges[i] + trust.edges[i + 1]) / 2);
    const x = { label: "trust (1: as the mean client)", name: "Trust about", values: middle.map((_, i) => i), format: (i) => number(Number((middle[i] ?? 0).toPrecision(2))), ticks: 4 };
    chart("client-charts", "trust", { title: "Trust of the clients", x, format: whole, from: 0, bars: true, series: [{ name: "clients", values: trust.counts }] });
  }
  const behind = versions.behind.map((age, i) => whole(age) + (versions.open && i === versions.behind.length - 1 ? " or more" : ""));
  if (behind.length) {
    const x = { label: "models behind the newest", name: "Models behind:", values: behind.map((_, i) => i), format: (i) => behind[i] ?? "", ticks: Math.ceil(behind.length / 10) };
    chart("client-charts", "versions", { title: "The model that each client's last judged work began from", x, format: whole, from: 0, bars: true, series: [{ name: "clients", values: versions.clients }] });
  }
}

function cost() {
  const { spans, parts, total } = state;
  const wide = spans.width > 1 ? `Means over ${spans.width} rounds.` : "";
  chart("cost-charts", "bytes", { title: "Bytes a round", note: wide, x: axis(spans), format: size, from: 0, series: [{ name: "up", values: spans.up }, { name: "down", values: spans.down }] });
  const most = Object.entries(parts).map(([name, seconds]) => `${name} ${duration(seconds)}`).join(", ");
  chart("cost-charts", "seconds", { title: "The server's work on a round, by the wall clock", note: most && `In all: ${most}.`, x: axis(spans), format: duration, from: 0, series: [{ name: "seconds", values: spans.seconds, quiet: true }] });
  if (spans.epsilon.length) chart("cost-charts", "epsilon", { title: "Privacy spent (ε)", x: axis(spans), format: number, from: 0, series: [{ name: "ε", values: spans.epsilon }] });
  $("privacy").textContent = total.epsilon === null ? "Privacy: none spent. The ledger records no privacy noise, so nothing is claimed." : `Privacy spent: ε = ${number(total.epsilon)} over ${count(total.rounds, "round")}.`;
}

function record() {
  const { run, now } = state;
  const rules = Array.isArray(run.plan) ? run.plan.map(([stage, text]) => [stage, text]) : [];
  const facts = [["seed", run.seed], ["backend", run.backend], ["model version", whole(now.version)], ["federation's clock", duration(now.time)], ...rules];
  $("facts").replaceChildren(...facts.filter(([, value]) => value !== null && value !== undefined).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

// -- the theme

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function theme(toggle) {
  if (toggle) {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("fedkeel-theme", document.documentElement.dataset.theme);
    } catch {
      // no storage: it holds until the page is closed
    }
  }
  $("theme").textContent = dark() ? "Light theme" : "Dark theme";
}

$("theme").addEventListener("click", () => theme(true));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(false));
$("axis").addEventListener("change", () => state && show());
document.addEventListener("visibilitychange", () => !document.hidden && poll());
theme(false);
poll();
setInterval(tick, 1000);

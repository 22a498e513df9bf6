// Charts as inline SVG: axes with units, a cursor for pointer and arrow keys, and the figures as a table.

import { make } from "./words.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 230;
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "5 2", "1 2", "12 4", "3 6"]; // lines differ without colour
const LINES = 40; // of the table of figures
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

function draw(tag, attributes, ...children) {
  const found = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

const brief = (text) => text.replace(/\.0(?=%)/, ""); // of a tick: 80%, not 80.0%
const kind = (index) => `k${(index % 6) + 1}`;

// A chart in a figure of its own. `show(spec)` draws it, again and again as news come. A spec has
// title, note, x {label, values, format}, format, series [{name, values, low?, high?, kind?}], from? (least y), to?, bars?
export class Chart {
  constructor() {
    this.caption = make("figcaption");
    this.plot = make("div", { class: "plot", tabindex: "0", role: "group" });
    this.readout = make("p", { class: "readout muted", "aria-live": "off" });
    this.rows = make("div", { class: "scroll", tabindex: "0", role: "region" });
    this.details = make("details", {}, make("summary", {}, "Figures"), this.rows);
    this.figure = make("figure", {}, this.caption, this.plot, this.readout, this.details);
    this.at = null;
    this.details.addEventListener("toggle", () => this.table());
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.move(null));
    new ResizeObserver(() => this.spec && this.plot.clientWidth !== this.width && this.redraw()).observe(this.plot);
  }

  show(spec) {
    this.spec = spec;
    const legend = spec.series.length > 1 ? [make("ul", { class: "legend" }, ...spec.series.map((s, i) => make("li", {}, this.mark(s, i), s.name)))] : [];
    this.caption.replaceChildren(make("b", {}, spec.title), ...legend);
    this.plot.setAttribute("aria-label", `${spec.title}. ${this.summary()} Arrow keys read its values.`);
    this.rows.setAttribute("aria-label", `Figures of: ${spec.title}`);
    this.redraw();
    this.table();
  }

  summary() {
    const { series, format, x } = this.spec;
    return series.slice(0, 8).map((s) => {
      const last = s.values.findLastIndex(known);
      return last < 0 ? `${s.name}: no figure.` : `${s.name}: ${format(s.values[last])} at ${x.label} ${x.format(x.values[last])}.`;
    }).join(" ");
  }

  mark(series, i) {
    const own = series.kind ?? kind(i);
    const shape = this.spec.bars
      ? draw("rect", { width: 11, height: 11, rx: 2, class: own })
      : draw("line", { x1: 0, y1: 6, x2: 26, y2: 6, class: own, "stroke-width": 3, "stroke-dasharray": DASHES[i] || "none" });
    return draw("svg", { width: this.spec.bars ? 12 : 26, height: 12, "aria-hidden": "true" }, shape);
  }

  redraw() {
    const { spec } = this;
    this.width = Math.max(this.plot.clientWidth, 240);
    const values = spec.series.flatMap((s) => [s.values, s.low ?? [], s.high ?? []]).flat().filter(known);
    if (!values.length || !spec.x.values.length) {
      this.plot.replaceChildren(make("p", { class: "note" }, spec.none ?? "No figure yet."));
      return;
    }
    let [low, high] = [spec.from ?? Math.min(...values), spec.to ?? Math.max(...values)];
    if (high <= low) [low, high] = spec.from === undefined ? [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10] : [low, low + 1];
    if (spec.from === undefined) low -= (high - low) * 0.04;
    if (spec.to === undefined) high += (high - low) * 0.06;
    const marks = ticks(low, high, 5).filter((m) => !spec.bars || Number.isInteger(m));
    const left = 14 + 7 * Math.max(...marks.map((m) => brief(spec.format(m)).length));
    const box = { left, right: this.width - 14, top: 10, bottom: HEIGHT - 40 };
    const [first, last] = [spec.x.from ?? spec.x.values[0], spec.x.values.at(-1)];
    const half = spec.bars ? 0.5 : 0;
    this.x = (v) => box.left + ((v - first + half) / (last - first + 2 * half || 1)) * (box.right - box.left);
    this.y = (v) => box.bottom - ((v - low) / (high - low)) * (box.bottom - box.top);
    this.box = box;
    const parts = [...this.axes(box, marks, first, last), ...(spec.bars ? this.bars() : this.lines())];
    this.cursor = draw("g", {});
    this.svg = draw("svg", { class: "chart", viewBox: `0 0 ${this.width} ${HEIGHT}`, "aria-hidden": "true" }, ...parts, this.cursor);
    this.plot.replaceChildren(this.svg);
    if (this.at !== null) this.move(Math.min(this.at, spec.x.values.length - 1));
  }

  axes(box, marks, first, last) {
    const { x, format } = this.spec;
    const found = marks.flatMap((mark) => [
      draw("line", { x1: box.left, x2: box.right, y1: this.y(mark), y2: this.y(mark), class: "grid-line" }),
      draw("text", { x: box.left - 8, y: this.y(mark) + 4, "text-anchor": "end" }, brief(format(mark))),
    ]);
    const wide = 9 * Math.max(x.format(last).length, 5);
    const below = x.ticks ? x.values.filter((_, i) => i % x.ticks === 0) : ticks(first, last, Math.max(Math.min((box.right - box.left) / wide, 8), 2));
    for (const mark of below) {
      const text = x.format(mark);
      const end = this.x(mark) > box.right - 3.5 * text.length ? "end" : "middle";
      found.push(draw("text", { x: end === "end" ? box.right + 6 : this.x(mark), y: box.bottom + 17, "text-anchor": end }, text));
    }
    found.push(draw("text", { x: (box.left + box.right) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, x.label + (x.unit ? `, ${x.unit}` : "")));
    return found;
  }

  lines() {
    const { x, series } = this.spec;
    const bands = series.filter((s) => s.low?.some(known)).map((s) => {
      const at = x.values.map((_, i) => i).filter((i) => known(s.low[i]) && known(s.high[i]));
      const there = at.map((i) => `${this.x(x.values[i])} ${this.y(s.high[i])}`);
      const back = at.reverse().map((i) => `${this.x(x.values[i])} ${this.y(s.low[i])}`);
      return draw("path", { d: `M${[...there, ...back].join("L")}Z`, class: `band ${s.kind ?? kind(series.indexOf(s))}` });
    });
    const lines = series.map((s, i) => {
      let [path, pen] = ["", "M"];
      s.values.forEach((value, at) => {
        if (known(value)) path += `${pen}${this.x(x.values[at]).toFixed(1)} ${this.y(value).toFixed(1)}`;
        pen = known(value) || s.bridge ? "L" : "M";
        if (!path) pen = "M";
      });
      return draw("path", { d: path, class: `line ${s.kind ?? kind(i)}`, "stroke-dasharray": DASHES[i] || "none" });
    });
    const ends = series.flatMap((s, i) => {
      const at = s.values.findLastIndex(known);
      return at < 0 ? [] : [draw("circle", { cx: this.x(x.values[at]), cy: this.y(s.values[at]), r: 3, class: s.kind ?? kind(i) })];
    });
    return [...bands, ...lines, ...ends];
  }

  bars() {
    const { x, series } = this.spec;
    const wide = Math.max((this.box.right - this.box.left) / x.values.length - 2, 1);
    return series[0].values.map((value, i) =>
      draw("rect", { x: this.x(x.values[i]) - wide / 2, width: wide, y: this.y(value), height: Math.max(this.box.bottom - this.y(value), 0), rx: 2, class: kind(0) }));
  }

  point(event) {
    if (!this.svg?.isConnected) return;
    const at = ((event.clientX - this.svg.getBoundingClientRect().left) * this.width) / this.svg.getBoundingClientRect().width;
    const away = this.spec.x.values.map((v) => Math.abs(this.x(v) - at));
    this.readout.setAttribute("aria-live", "off");
    this.move(away.indexOf(Math.min(...away)));
  }

  key(event) {
    const last = this.spec.x.values.length - 1;
    const from = this.at ?? last + 1;
    const jump = Math.max(Math.round(last / 10), 1);
    const to = { ArrowLeft: from - 1, ArrowRight: (this.at ?? -1) + 1, PageUp: from - jump, PageDown: (this.at ?? -1) + jump, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.move(null);
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    this.move(Math.min(Math.max(to, 0), last));
  }

  move(at) {
    this.at = at;
    const { x, series, format, note } = this.spec ?? {};
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    if (at === null) {
      this.readout.textContent = note ?? "";
      return;
    }
    const place = this.x(x.values[at]);
    this.cursor.append(draw("line", { x1: place, x2: place, y1: this.box.top, y2: this.box.bottom, class: "cursor" }));
    const told = series.map((s, i) => {
      if (known(s.values[at]) && !this.spec.bars) this.cursor.append(draw("circle", { cx: place, cy: this.y(s.values[at]), r: 4, class: s.kind ?? kind(i) }));
      return `${series.length > 1 || !s.quiet ? `${s.name} ` : ""}${this.value(s, at)}`;
    });
    this.readout.textContent = `${x.name ?? x.label} ${x.format(x.values[at])}: ${told.join(", ")}`;
  }

  value(series, at) {
    const { format } = this.spec;
    const text = known(series.values[at]) ? format(series.values[at]) : "–";
    return known(series.low?.[at]) ? `${text} (${format(series.low[at])} to ${format(series.high[at])})` : text;
  }

  table() {
    this.readout.textContent ||= this.spec?.note ?? "";
    if (!this.details.open || !this.spec) return;
    const { x, series } = this.spec;
    const [last, many] = [x.values.length - 1, x.values.length > LINES];
    const chosen = many ? Array.from({ length: LINES }, (_, i) => Math.round((i * last) / (LINES - 1))) : [...x.values.keys()];
    const head = make("tr", {}, make("th", { scope: "col" }, x.name ?? x.label), ...series.map((s) => make("th", { scope: "col", class: "num" }, s.name)));
    const rows = chosen.reverse().map((at) => make("tr", {}, make("th", { scope: "row" }, x.format(x.values[at])), ...series.map((s) => make("td", { class: "num" }, this.value(s, at)))));
    this.rows.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  }
}

// Figures and names as a reader wants them, the same words as in the report.

export const MINUS = "\u2212";

export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const text = Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-4) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
  return text.replace("-", MINUS);
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`;
}

export function whole(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

export function size(value) {
  if (value === null || value === undefined) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 999.5) return `${Number(value.toPrecision(3))} ${unit}`;
    value /= 1000;
  }
  return `${Number(value.toPrecision(3))} TB`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 59.5) return seconds < 9.95 ? `${Number(seconds.toPrecision(2))} s` : `${Math.round(seconds)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds) % 60} s`;
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}

export function count(value, noun) {
  return `${whole(value)} ${noun}${value === 1 ? "" : "s"}`;
}

export function when(wall) {
  return wall === null || wall === undefined ? "–" : new Date(1000 * wall).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });
}

// A moment in few letters: the time of today, or the day.
export function moment(wall) {
  const at = new Date(1000 * wall);
  const today = at.toDateString() === new Date().toDateString();
  return at.toLocaleString("en-GB", today ? { timeStyle: "medium" } : { day: "numeric", month: "short", year: "numeric" });
}

export function isShare(metric) {
  return metric.endsWith("accuracy");
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// An element. What others wrote comes in as text, never as markup.
export function make(tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) found.setAttribute(name, value);
  found.append(...children.map((child) => (child instanceof Node ? child : String(child ?? ""))));
  return found;
}

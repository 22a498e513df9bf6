// The table of clients: searched, sorted and paged by the server.

import { capital, make, moment, number, size, whole } from "./words.js";

const PAGE = 25;
const COLUMNS = [
  ["name", "Client"], ["device", "Class"], ["state", "Last news"], ["round", "In round", "num"], ["used", "Used", "num"], ["refused", "Refused", "num"],
  ["lost", "Lost", "num"], ["trust", "Trust", "num"], ["version", "Model", "num"], ["bytes", "Bytes", "num"],
];
const MEANINGS = {
  unseen: "not heard of yet", used: "used", unused: "let in, round skipped", refused: "refused", lost: "lost", "shut out": "shut out",
};

export class Clients {
  constructor() {
    this.wanted = { search: "", sort: "refused", order: "desc", offset: 0 };
    const table = document.getElementById("client-table");
    this.body = table.querySelector("tbody");
    this.heads = new Map();
    const row = make("tr");
    for (const [key, title, kind] of COLUMNS) {
      const button = make("button", { type: "button" }, title);
      button.addEventListener("click", () => this.sort(key));
      const head = make("th", { scope: "col", class: kind ?? "" }, button);
      this.heads.set(key, head);
      row.append(head);
    }
    row.append(make("th", { scope: "col" }, "Last reason"));
    table.querySelector("thead").append(row);
    const search = document.getElementById("search");
    search.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.ask({ search: search.value, offset: 0 }), 200);
    });
    this.before = document.getElementById("before");
    this.after = document.getElementById("after");
    this.before.addEventListener("click", () => this.ask({ offset: Math.max(this.wanted.offset - PAGE, 0) }));
    this.after.addEventListener("click", () => this.ask({ offset: this.wanted.offset + PAGE }));
  }

  sort(key) {
    const down = this.wanted.sort === key ? this.wanted.order !== "desc" : !["name", "device", "state"].includes(key);
    this.ask({ sort: key, order: down ? "desc" : "asc", offset: 0 });
  }

  async ask(changes = {}) {
    Object.assign(this.wanted, changes);
    const asked = new URLSearchParams({ ...this.wanted, limit: PAGE });
    const number = (this.asked = (this.asked ?? 0) + 1);
    try {
      const answer = await fetch(`/api/clients?${asked}`, { signal: AbortSignal.timeout(8000) });
      if (!answer.ok || number !== this.asked) return;
      this.show(await answer.json());
    } catch {
      // the page says by itself that the server cannot be reached
    }
  }

  show(found) {
    if (found.offset && found.offset >= found.total) {
      this.ask({ offset: 0 });
      return;
    }
    for (const [key, head] of this.heads) {
      if (key === this.wanted.sort) head.setAttribute("aria-sort", this.wanted.order === "desc" ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    this.body.replaceChildren(...found.clients.map((client) => this.row(client)));
    const to = found.offset + found.clients.length;
    const text = found.total ? `${whole(found.offset + 1)} to ${whole(to)} of ${whole(found.total)}` : "No client has such a name or class.";
    const told = document.getElementById("found");
    if (told.textContent !== text) told.textContent = text;
    this.before.disabled = found.offset === 0;
    this.after.disabled = to >= found.total;
  }

  row(client) {
    const cell = (text, kind = "num") => make("td", { class: kind }, text);
    const state = make("td", { class: "state", "data-kind": client.state }, MEANINGS[client.state] ?? client.state);
    const name = make("th", { scope: "row", class: "name" }, make("bdi", {}, client.name));
    if (client.hostile) name.append(" ", make("span", { class: "hostile" }, "(hostile)"));
    const round = make("td", { class: "num" }, client.round ? whole(client.round) : "–", ...(client.wall ? [make("small", {}, moment(client.wall))] : []));
    const why = client.reason ? `${client.reason_round === client.round ? "" : `round ${whole(client.reason_round)}: `}${client.reason}` : "";
    return make(
      "tr", {}, name, cell(client.device, "state"), state, round, cell(whole(client.used)), cell(whole(client.refused)), cell(whole(client.lost)),
      cell(number(client.trust)), cell(whole(client.version)), cell(size(client.bytes)), make("td", { class: "why" }, make("bdi", {}, why)),
    );
  }
}

export function table(caption, note, columns, rows) {
  const heads = columns.map(([title, kind]) => make("th", { scope: "col", class: kind ?? "" }, title));
  const lines = rows.map((cells) => make("tr", {}, ...cells.map((cell, i) => {
    const found = make(i ? "td" : "th", { class: columns[i][1] ?? "", ...(i ? {} : { scope: "row" }) });
    found.append(cell instanceof Node ? cell : make("bdi", {}, cell));
    return found;
  })));
  const told = make("caption", {}, caption, ...(note ? [make("small", {}, note)] : []));
  const found = make("table", {}, told, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": capital(caption) }, found);
}

"use strict";
// Data comes as classic scripts that call `atlas.put`; every text reaches the page as text, never as markup.
const atlas = { data: new Map(), waiting: new Map(), views: {} };

atlas.put = (name, value) => {
  atlas.data.set(name, value);
  (atlas.waiting.get(name) || []).forEach((resolve) => resolve(value));
  atlas.waiting.delete(name);
};

// A script of the folder `data`, once.
atlas.load = (name) => {
  if (atlas.data.has(name)) return Promise.resolve(atlas.data.get(name));
  return new Promise((resolve, reject) => {
    const waiting = atlas.waiting.get(name);
    if (waiting) return waiting.push(resolve);
    atlas.waiting.set(name, [resolve]);
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onerror = () => reject(new Error(`data/${name}.js is missing`));
    document.head.append(script);
  });
};

// An element: h("td", {class: "n", title: "…"}, child, …); children are elements or texts.
const h = (tag, given = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, of] of Object.entries(value)) element.style.setProperty(`--${key}`, of);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

const percent = (value, digits = 1) => (value === null ? "–" : `${(100 * value).toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−")} %`);
const number = (value, digits = 3) => (value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: digits }).replace("-", "−"));
const times = (value, digits) => `×\u00a0${number(value, digits)}`; // never at the end of a line
const whole = (value) => (value === null ? "–" : value.toLocaleString("en"));
const span = (low, high, shown) => (low === null || high === null ? "no interval" : `${shown(low)} to ${shown(high)}`);
// Loss in millinats: one decimal everywhere, so that numbers of a column and their intervals compare.
const milli = (value) => (value === null ? "–" : `${value < -5e-5 ? "−" : ""}${Math.abs(1000 * value).toLocaleString("en", Math.abs(value) < 1 ? { minimumFractionDigits: 1, maximumFractionDigits: 1 } : { maximumFractionDigits: 0 })}`);
const weightOf = (value) => (value === null ? "–" : value.toFixed(3));
const pValue = (value) => (value === null ? "not tested" : value < 0.001 ? "p < .001" : `p = ${value.toFixed(3).replace("0.", ".")}`);
const listed = (items) => items.flatMap((item, i) => [i ? (i + 1 < items.length ? ", " : " and ") : "", item]);

const SEEN = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\ufffd": "�" };
// A token as it can be read: whitespace and what has no shape of its own are named.
const readable = (text) =>
  [...text]
    .map((c) => SEEN[c] || (/[\p{C}\p{Z}]/u.test(c) ? `\\u{${c.codePointAt(0).toString(16)}}` : c))
    .join("") || "∅";

atlas.begin = () => {
  atlas.about = atlas.data.get("about");
  const words = atlas.data.get("words");
  atlas.texts = new Map(words.ids.map((id, place) => [id, words.texts[place]]));
  atlas.domains = atlas.about.domains.map((domain) => domain.name);
};

const textOf = (token) => (atlas.texts.has(token) ? atlas.texts.get(token) : `<${token}>`);
// What leads elsewhere; a card by itself leads nowhere.
const link = (given, ...children) => (atlas.alone ? h("span", { ...given, href: null }, ...children) : h("a", given, ...children));
const tokenLink = (token, more = {}) =>
  link({ class: "token", href: `#token=${token}`, title: `token ${token}`, ...more }, h("bdi", {}, readable(textOf(token))));
const expertLink = (layer, expert, label) =>
  link({ class: "expert", href: `#layer=${layer}&expert=${expert}` }, label === undefined ? `${layer}:${expert}` : label);
const expertName = (layer, expert) => `expert ${expert} of layer ${layer}`;

const scrolling = (element) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" }, element);
const table = (heads, rows, given = {}) =>
  scrolling(h("table", given,
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));
// Tables that are wider than the page say so. Called when they are on it.
atlas.measure = () => document.querySelectorAll(".scroll").forEach((of) => of.classList.toggle("wide", of.scrollWidth > of.clientWidth + 1));

// A table that is sorted by a column on request. Columns: {head, of (what is sorted by; null comes last), cell, up}.
const sortable = (columns, rows, { by, most = 20, given = {} }) => {
  let at = by, up = Boolean(columns[by].up), all = false;
  const box = h("div", { class: "sorted" });
  const value = (row) => columns[at].of(row);
  const draw = () => {
    const known = rows.filter((row) => value(row) !== null), missing = rows.filter((row) => value(row) === null);
    known.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (up ? 1 : -1));
    const ordered = [...known, ...missing], shown = all ? ordered : ordered.slice(0, most);
    const head = (column, number) => h("th", { scope: "col", "aria-sort": number === at ? (up ? "ascending" : "descending") : null },
      column.of ? h("button", { type: "button", class: "sort", onclick: () => { up = number === at ? !up : Boolean(column.up); at = number; draw(); } },
        column.head, h("span", { "aria-hidden": "true" }, number === at ? (up ? " ▲" : " ▼") : " ↕")) : column.head, column.term && [" ", term(column.term, "?")]);
    box.replaceChildren(
      scrolling(h("table", given, h("thead", {}, h("tr", {}, columns.map(head))),
        h("tbody", {}, shown.map((row) => h("tr", {}, columns.map((column) => h("td", {}, column.cell(row)))))))),
      rows.length > most ? h("p", {}, h("button", { type: "button", class: "more", onclick: () => { all = !all; draw(); } }, all ? `Show the first ${most} only` : `Show all ${whole(rows.length)}`)) : "");
    if (box.isConnected) atlas.measure();
  };
  draw();
  return box;
};
const section = (id, title, note, ...children) =>
  h("section", { id }, h("h2", {}, title), note && h("p", { class: "note" }, note), ...children);
const choose = (label, options, value, change) =>
  h("label", { class: "choose" }, label, " ",
    h("select", { onchange: (event) => change(event.target.value) },
      options.map(([key, shown]) => h("option", { value: key, selected: String(key) === String(value) }, shown))));

// The place after # as names and values; `go` changes some of them.
const place = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const go = (changes) => {
  const wanted = new URLSearchParams({ ...place(), ...changes });
  location.hash = wanted.toString().replace(/=(?=&|$)/g, "");
};

// Sequential colours that remain apart for all kinds of colour vision (cividis), and blue–orange about 0.
const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
const mixed = (stops, at) => {
  const x = Math.min(1, Math.max(0, at)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(x));
  return `rgb(${stops[i].map((from, k) => Math.round(from + (x - i) * (stops[i + 1][k] - from))).join(",")})`;
};
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const diverging = () => dark.matches
  ? [[110, 185, 255], [55, 110, 165], [44, 54, 64], [165, 98, 30], [255, 165, 70]]
  : [[5, 80, 160], [120, 170, 215], [236, 236, 236], [245, 175, 95], [190, 85, 0]];

const total = (what = "tokens") => atlas.about.domains.reduce((sum, domain) => sum + domain[what], 0);
const STAR = 0.05;
const passes = (p) => p !== null && p < STAR;

// The expert of a layer whose share is most above that of other domains.
const leaderOf = (row, domain) => {
  const differences = atlas.data.get("map").domains[domain].difference[row];
  return differences.indexOf(Math.max(...differences));
};

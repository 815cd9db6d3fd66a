"use strict";
// The search, pages of tokens, and keys.
atlas.views.token = async ({ token }) => {
  const id = Number(token), { about } = atlas;
  const shard = about.shards.filter((first) => first <= id).length - 1;
  const found = shard < 0 ? undefined : (await atlas.load(`search-${shard}`))[id];
  const head = h("h1", {}, "Token ", h("bdi", { class: "token" }, readable(textOf(id))));
  if (!found) return [head, h("p", {}, "It occurs in none of the texts, and is not among the first tokens of any expert's output.")];
  const rows = about.layers.map((layer) => [`Layer ${layer}`, found.sent.filter(([l]) => l === layer).map(([l, expert, n]) => h("span", { class: "sent" }, expertLink(l, expert, `expert ${expert}`), h("small", {}, ` ${percent(n / found.n, 0)} (${whole(n)})`)))]);
  const list = (items, title) => items && items.length > 0 && [h("h3", {}, title), h("p", { class: "tokens" }, [...items].sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).map(([l, expert, value, recurs]) => h("span", { class: "sent" }, expertLink(l, expert, `layer ${l}, expert ${expert}`), h("small", {}, ` ${number(value)}${recurs ? " ✓" : ""}`))))];
  return [head,
    section("sent", "Sent to", found.n ? `It occurred ${whole(found.n)} times${found.n < about.limits.at_least ? ": too few to tell" : ""}, and chose ${about.top_k} experts of each layer each time. Here are the three that it chose most often: the share of its occurrences that did, and how many.` : "It did not occur in the texts.", found.n > 0 && table(["", "Experts"], rows)),
    section("written", "Written by", "Experts with it among the first tokens of their mean output; ✓: in both halves of the sources.", list(found.promoted, "Promoted"), list(found.suppressed, "Suppressed"), !found.promoted && !found.suppressed && h("p", {}, "None."))];
};

// Tokens that a query names: the same, beginning with it, holding it; or the pieces that make it up.
const matches = (query) => {
  const wanted = query.trim().toLowerCase() || query, ranked = [[], [], []];
  for (const [id, text] of atlas.texts) {
    const bare = text.trim().toLowerCase();
    if (text === query || (bare && bare === wanted)) ranked[0].push(id);
    else if (bare.startsWith(wanted)) ranked[1].push(id);
    else if (wanted && text.toLowerCase().includes(wanted)) ranked[2].push(id);
  }
  return ranked.flat().slice(0, 40);
};
const pieces = (query) => {
  const known = new Map([...atlas.texts].map(([id, text]) => [text, id])), found = [];
  for (let rest = ` ${query}`; rest; ) {
    let length = rest.length;
    while (length && !known.has(rest.slice(0, length))) length -= 1;
    if (length) found.push(known.get(rest.slice(0, length)));
    rest = rest.slice(length || 1);
  }
  return found;
};
// The expert that a query such as 4:48 names, if there is one.
const expertOf = (query) => {
  const [, layer, expert] = (query.match(/^\s*(\d+)\s*:\s*(\d+)\s*$/) || []).map(Number);
  return atlas.about.layers.includes(layer) && expert < atlas.about.experts ? [layer, expert] : null;
};
// The experts that are most specialised in a domain, one of each layer, the foremost first.
const leadersOf = (i) => {
  const { difference } = atlas.data.get("map").domains[i];
  const each = atlas.about.layers.map((layer, row) => [layer, leaderOf(row, i), difference[row][leaderOf(row, i)]]);
  return each.sort((a, b) => b[2] - a[2]);
};
// The domains whose names begin as a query does.
const domainsOf = (query) => {
  const wanted = query.trim().toLowerCase(), { domains } = atlas;
  const led = domains.length < 2 || wanted.length < 2 ? [] : domains.map((name, i) => [name, i]).filter(([name]) => name.toLowerCase().startsWith(wanted));
  return led.map(([name, i]) => ({ shown: h("p", {}, link({ href: `#${new URLSearchParams({ domain: name })}` }, `Experts of ${name}`), ", the most specialised of each layer: ",
    listed(leadersOf(i).map(([layer, expert]) => expertLink(layer, expert)))), first: leadersOf(i)[0] }));
};
// What was found; `first`: what Enter opens: the expert that the query names, the token that it is, begins or holds, or
// the foremost expert of the domain.
const search = (event) => {
  const query = event.target.value, box = document.getElementById("found");
  if (!query) { box.hidden = true; return; }
  const found = matches(query), parts = found.length ? [] : pieces(query.trim()), named = expertOf(query), domains = domainsOf(query);
  const told = named || found.length || domains.length ? "" : parts.length > 1 ? "Not a token of these texts by itself. Pieces of it that are, which may come from other words: " : "No such token in these texts.";
  box.replaceChildren(...domains.map((of) => of.shown), told, ...(named ? [expertLink(...named, `layer ${named[0]}, expert ${named[1]}`)] : []), ...(found.length ? found : !named && !domains.length && parts.length > 1 ? parts : []).map((id) => tokenLink(id)));
  const expert = named || (found.length ? null : domains[0]?.first);
  box.dataset.first = expert ? `#layer=${expert[0]}&expert=${expert[1]}` : found.length ? `#token=${found[0]}` : "";
  box.hidden = false;
};

const keys = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const input = document.getElementById("search"), at = place();
  if (event.target === input) {
    if (event.key === "Enter") { const { first } = document.getElementById("found").dataset; if (first) location.hash = first; }
    if (event.key === "Escape") { input.value = ""; document.getElementById("found").hidden = true; }
    return;
  }
  if (/^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const by = { "[": -1, "]": 1, ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "/") { event.preventDefault(); input.focus(); }
  else if (event.key === "m") location.hash = "map";
  else if ("expert" in at && (event.key === "[" || event.key === "]")) go({ expert: Math.min(atlas.about.experts - 1, Math.max(0, Number(at.expert) + by)) });
  else if ("text" in at && event.key.startsWith("Arrow") && by) { event.preventDefault(); go({ pos: Math.max(0, Number(at.pos || 0) + by) }); }
};

"use strict";
// From the place after # to a view; the search; keys.
atlas.views.token = async ({ token }) => {
  const id = Number(token), { about } = atlas;
  const shard = about.shards.filter((first) => first <= id).length - 1;
  const found = shard < 0 ? undefined : (await atlas.load(`search-${shard}`))[id];
  const head = h("h1", {}, "Token ", h("bdi", { class: "token" }, readable(textOf(id))));
  if (!found) return [head, h("p", {}, "It occurs in none of the texts, and is not among the first tokens of any expert's output.")];
  const rows = about.layers.map((layer) => [`Layer ${layer}`, found.sent.filter(([l]) => l === layer).map(([l, expert, n]) => h("span", { class: "sent" }, expertLink(l, expert, `expert ${expert}`), h("small", {}, ` ${percent(n / found.n, 0)} (${whole(n)}) `)))]);
  const list = (items, title) => items && items.length > 0 && [h("h3", {}, title), h("p", { class: "tokens" }, [...items].sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).map(([l, expert, value, recurs]) => h("span", {}, expertLink(l, expert, `layer ${l}, expert ${expert}`), h("small", {}, ` ${number(value)}${recurs ? " ✓" : ""} · `))))];
  return [head,
    section("Sent to", found.n ? `The experts that it chose most often; it occurred ${whole(found.n)} times${found.n < about.limits.at_least ? ": too few to tell" : ""}.` : "It did not occur in the texts.", found.n > 0 && table(["", "Experts"], rows)),
    section("Written by", "Experts with it among the first tokens of their mean output; ✓: in both halves of the sources.", list(found.promoted, "Promoted"), list(found.suppressed, "Suppressed"), !found.promoted && !found.suppressed && h("p", {}, "None."))];
};

atlas.views.about = () => {
  const { about } = atlas, m = about.model;
  return [h("h1", {}, "About this atlas"),
    table(["", ""], [["Model", m.name], ["Type", m.type], ["Layers", `${m.layers}, of them with experts: ${about.layers.join(", ")}`], ["Experts", `${about.experts} a layer, ${about.top_k} active a token, ${m.shared_experts} shared`], ["Precision", `${m.dtype}, packed: ${m.quantised}`], ["Fingerprint", m.fingerprint],
      ["Windows", `of at most ${about.reading.context} tokens`], ["Written by", `moe_lens ${about.version}: ${about.command}`]].map(([name, value]) => [h("b", {}, name), String(value)])),
    section("Texts", "Intervals resample sources: a domain with fewer than " + about.limits.sources + " sources has none.", table(["Domain", "Tokens", "Windows", "Sources"], about.domains.map((d) => [h("b", {}, d.name), whole(d.tokens), whole(d.windows), whole(d.sources)]))),
    section("How to read it", null,
      h("ul", {}, [
        `An expert that fewer than ${about.limits.rare} tokens chose is too rare: its page says "cannot be told".`,
        "A star marks a test that is significant after correction for everything that was tested at once. Without a star, a difference may be chance.",
        "What an expert writes is read through the final norm and the unembedding, as if no layer followed. In early layers this may say little.",
        "Which experts a token chooses depends to a large part on the token alone: compare a domain's share with the share by the token alone.",
        "Links are stable: #layer=3&expert=17, #token=12, #text=0&layer=3&pos=4.",
      ].map((line) => h("li", {}, line)))),
    section("Keys", null, h("p", {}, "/ search · arrow keys on the map and in texts · [ and ] the expert before and after · m map")),
    about.attribution && section("Where the texts come from", null, h("pre", {}, about.attribution))];
};

const show = async () => {
  const at = place(), view = document.getElementById("view");
  const name = ["expert" in at || "text" in at ? ("text" in at ? "text" : "layer") : null, "token" in at && "token", "about" in at && "about"].find(Boolean) || "map";
  let content;
  try {
    content = await atlas.views[name](at);
  } catch (error) {
    content = [h("h1", {}, "Cannot be shown"), h("p", { class: "warn" }, String(error.message))];
  }
  if (JSON.stringify(at) !== JSON.stringify(place())) return; // somebody has gone on meanwhile
  const moved = view.dataset.view !== name || name === "layer" || name === "token";
  view.dataset.view = name;
  view.replaceChildren(...content.flat(Infinity).filter(Boolean));
  document.title = `${view.querySelector("h1").textContent} · Atlas of experts`;
  document.getElementById("found").hidden = true;
  if (moved) window.scrollTo(0, 0);
  view.dataset.shown = location.hash;
};

// Tokens that a query names: the same, beginning with it, holding it; or the pieces that make it up.
const matches = (query) => {
  const wanted = query.toLowerCase(), ranked = [[], [], []];
  for (const [id, text] of atlas.texts) {
    const bare = text.trim().toLowerCase();
    if (text === query || bare === wanted) ranked[0].push(id);
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
const search = (event) => {
  const query = event.target.value, box = document.getElementById("found");
  if (!query) { box.hidden = true; return; }
  const whole_ = matches(query), parts = whole_.length ? [] : pieces(query);
  box.replaceChildren(whole_.length ? "" : parts.length ? "Not a single token; it may be tokenised as " : "No such token in these texts.", ...(whole_.length ? whole_ : parts).map((id) => tokenLink(id)));
  box.hidden = false;
};

const keys = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const input = document.getElementById("search"), at = place();
  if (event.target === input) {
    if (event.key === "Enter") { const first = document.querySelector("#found a"); if (first) location.hash = first.hash; }
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

atlas.begin();
document.getElementById("model").textContent = atlas.about.model.name;
document.getElementById("to-texts").hidden = !atlas.about.texts.length;
document.getElementById("search").addEventListener("input", search);
document.addEventListener("keydown", keys);
window.addEventListener("hashchange", show);
dark.addEventListener("change", show);
show();

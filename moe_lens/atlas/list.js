"use strict";
// Tables of all experts: sorted and filtered, by what their removal costs, and which are chosen together.
const ALL_LAYERS = "";

// One row for each expert, of the domain that it is most specialised in.
const everyExpert = () => {
  const { all, domains, compared } = atlas.data.get("map"), held = new Map(compared.map((line) => [line.slice(0, 3).join(), line]));
  return atlas.about.layers.flatMap((layer, l) => all.share[l].map((_, e) => {
    const lines = domains.map((of) => [0, of.share[l][e], of.low[l][e], of.high[l][e], 0, of.difference[l][e], of.p_value[l][e], of.first[l][e]]);
    const main = mainDomain({ domains: lines }, l, e), of = domains[main], at = (name) => of[name][l][e];
    const star = held.get([layer, e, main].join());
    return { layer, e, main, rare: all.rare[l][e], n: all.assigned[l][e], share: at("share"), low: at("low"), high: at("high"), p: at("p_value"), first: at("first"),
      estimate: at("estimate"), exact: at("exact"), exactLow: at("exact_low"), exactHigh: at("exact_high"), starred: star ? star[6] : null };
  }));
};

const expertTable = (rows, most) => {
  const several = atlas.domains.length > 1;
  return sortable([
    { head: "Layer", up: true, of: (r) => r.layer * 1e6 + r.e, cell: (r) => String(r.layer) },
    { head: "Expert", up: true, of: (r) => r.e, cell: (r) => expertLink(r.layer, r.e, `${r.layer}:${r.e}`) },
    { head: several ? "Most specialised in" : "Domain", up: true, of: (r) => atlas.domains[r.main], cell: (r) => r.rare ? h("span", { class: "muted" }, "too rare to tell") : atlas.domains[r.main] },
    { head: "Share", of: (r) => r.share, cell: (r) => [percent(r.share), h("small", {}, ` ${span(r.low, r.high, percent)}`)] },
    several && { head: "p", term: "p (maxT)", up: true, of: (r) => r.p, cell: (r) => r.p === null ? "not tested" : `${pValue(r.p)}${passes(r.p) ? " *" : ""}` },
    { head: "First order, same tokens", term: "first order", of: (r) => r.estimate, cell: (r) => milli(r.estimate) },
    { head: "Exact knock-out", term: "star", of: (r) => r.exact, cell: (r) => r.exact === null ? h("span", { class: "muted" }, "not measured") : [milli(r.exact), r.starred && h("b", {}, " *"), h("small", {}, ` ${span(r.exactLow, r.exactHigh, milli)}`)] },
    { head: "n", of: (r) => r.n, cell: (r) => whole(r.n) },
  ].filter(Boolean), rows, { by: several ? 3 : 3, most, given: { class: "experts every" } });
};

const experts = () => {
  const rows = everyExpert(), box = h("div", {});
  const draw = (layer) => box.replaceChildren(expertTable(rows.filter((r) => layer === ALL_LAYERS || r.layer === Number(layer)), 20));
  draw(ALL_LAYERS);
  return section("experts", "All experts", ["Of each expert the domain that it is most specialised in: the ", term("share"), " of that domain's tokens, and what the domain loses without it, in ", term("millinats"), ` a token. n: tokens of all domains that choose it, of ${whole(total())}. Press a column's name to sort.`],
    h("div", { class: "controls" }, choose("Layer", [[ALL_LAYERS, "all"], ...atlas.about.layers.map((layer) => [layer, String(layer)])], ALL_LAYERS, (value) => { draw(value); atlas.measure(); })), box);
};

// Which experts' removal costs most: every one that was knocked out, on every domain.
const costs = (only) => {
  const { about, domains: names } = atlas, { domains, compared } = atlas.data.get("map"), held = new Map(compared.map((line) => [line.slice(0, 3).join(), line]));
  const rows = about.layers.flatMap((layer, l) => only !== undefined && layer !== only ? [] : domains.flatMap((of, d) => of.exact[l].map((added, e) => {
    const line = held.get([layer, e, d].join());
    const mean = domains.reduce((sum, other) => sum + other.exact[l][e], 0) / domains.length;
    return { layer, e, d, added, low: of.exact_low[l][e], high: of.exact_high[l][e], estimate: of.estimate[l][e], mean, line, first: of.at_first[l][e], least: Math.min(...domains.map((other) => other.exact[l][e])), better: domains.flatMap((other, i) => other.exact_high[l][e] !== null && other.exact_high[l][e] < 0 ? [`${names[i]} (${milli(other.exact[l][e])})`] : []) };
  }))).filter((r) => r.added !== null);
  const every = about.layers.length * about.experts, complete = about.knocked === every;
  const starred = compared.filter((line) => line[6] && (only === undefined || line[0] === only)), known = compared.filter((line) => only === undefined || line[0] === only).length;
  return section("costs", only === undefined ? "Whose removal costs most" : "Whose removal costs most here",
    [complete ? `All ${whole(every)} experts were ` : `${whole(about.knocked)} of ${whole(every)} experts, the most specialised of each layer and domain, were `, term("knock-out", "knocked out"), ", each by itself, on every domain: on the first tokens of all windows. A cost that falls mostly on the first four may be that of a word with which all texts begin. ",
      complete ? "" : "An expert that was not may cost more than any of these. ", "The ", term("first order"), " estimate, here for the same tokens, takes the loss for a straight line: it can miss the costliest. ",
      "The greatest of many numbers is likely to be somewhat too great. ",
      `${whole(starred.length)} of ${whole(known)} that were held against their controls (the two most specialised of each layer and domain, and the ${about.limits.costliest} that cost most of all) are shown to cost more than each of these `, term("star", "*"), starred.length ? [": ", listed(starred.map(([layer, e, d]) => [expertLink(layer, e, `${layer}:${e}`), ` on ${names[d]}`]))] : "", "; of the others this is not known. ", h("code", {}, "--knock-out LAYER:EXPERT"), " of the command holds any expert against controls, on all texts."],
    sortable([
      { head: "Expert", up: true, of: (r) => r.layer * 1e6 + r.e, cell: (r) => expertLink(r.layer, r.e, `${r.layer}:${r.e}`) },
      { head: "On texts of", up: true, of: (r) => names[r.d], cell: (r) => names[r.d] },
      { head: "Loss grows by", term: "millinats", of: (r) => r.added, cell: (r) => [milli(r.added), r.line?.[6] && h("b", {}, " *"), h("small", {}, ` ${span(r.low, r.high, milli)}`), r.added > 0 && r.first > MOSTLY * r.added && h("small", { class: "warn" }, ` mostly at the first four tokens of windows (${percent(r.first / r.added, 0)})`)] },
      { head: "Domains that improve", up: true, of: (r) => r.least, cell: (r) => r.better.length ? r.better.join(", ") : "–" },
      { head: "Mean of domains", of: (r) => r.mean, cell: (r) => milli(r.mean) },
      { head: "More than costliest control", term: "corrected", of: (r) => r.line ? r.line[3] : null, cell: (r) => !r.line ? h("span", { class: "muted" }, "not compared") : r.line[3] === null ? "no control" : [milli(r.line[3]), h("small", {}, ` ${span(r.line[4], r.line[5], milli)}`)] },
      { head: "First order", term: "first order", of: (r) => r.estimate, cell: (r) => milli(r.estimate) },
    ], rows, { by: 2, most: 10, given: { class: "experts" } }));
};

const pairTable = (l, most) => {
  const pairs = atlas.data.get("map").pairs[l] || [];
  return sortable([
    { head: "Pair", up: true, of: ([a, b]) => a * 1e6 + b, cell: ([a, b]) => [expertLink(l, a, `expert ${a}`), " and ", expertLink(l, b, `expert ${b}`)] },
    { head: "n: tokens that choose both", of: ([, , n]) => n, cell: ([, , n]) => [whole(n), h("small", {}, ` ${percent(n / total())}`)] },
    { head: "Lift", term: "lift", of: ([, , , lift]) => lift, cell: ([, , , lift]) => times(lift) },
  ], pairs, { by: 1, most });
};

// Of each layer the pair that most tokens choose, and the one that goes together most beyond chance.
const together = () => {
  const shown = (l, [a, b, n, lift]) => [expertLink(l, a, String(a)), " and ", expertLink(l, b, String(b)), h("small", {}, ` n = ${whole(n)}, lift ${times(lift)}`)];
  const rows = atlas.about.layers.map((l) => {
    const pairs = atlas.data.get("map").pairs[l] || [];
    if (!pairs.length) return [h("a", { href: `#layer=${l}` }, `Layer ${l}`), "none", "none"];
    const most = (of) => pairs.reduce((best, pair) => (of(pair) > of(best) ? pair : best));
    return [h("a", { href: `#layer=${l}` }, `Layer ${l}`), shown(l, most(([, , n]) => n)), shown(l, most(([, , n, lift]) => n * Math.log(lift)))];
  });
  return section("pairs", "Experts that are chosen together", ["Of each layer the pair that most tokens choose, and the one that goes together most beyond chance (n ln(", term("lift"), `)). n: tokens that choose both, of ${whole(total())}. The layer's page has more of its pairs.`],
    table(["", "Most often together", "Most beyond chance"], rows));
};

atlas.views.layer = ({ layer }) => {
  const { about } = atlas, l = Number(layer), row = about.layers.indexOf(l);
  if (row < 0) return [h("h1", {}, "No such layer"), h("p", {}, `Layers with experts are ${about.layers.join(", ")}.`)];
  const step = (to, label) => about.layers[to] !== undefined ? h("a", { href: `#layer=${about.layers[to]}` }, label) : h("span", {}, label);
  return [
    h("div", { class: "steps" }, step(row - 1, "‹ layer"), step(row + 1, "layer ›"), copyLink()),
    h("h1", {}, `Layer ${l}`),
    atlas.domains.length > 1 && foremost(null, l),
    section("pairs", "Which experts are chosen together", [`The pairs that most tokens choose and those that go together most beyond chance. n: of ${whole(total())} tokens, each of which chooses ${about.top_k} of ${about.experts} experts. `, term("lift", "Lift"), ": over independent choices."], pairTable(l, 12)),
    costs(l),
    section("experts", "Experts of the layer", ["Of each expert the domain that it is most specialised in; knock-outs in ", term("millinats"), " a token."], expertTable(everyExpert().filter((r) => r.layer === l), 64)),
  ];
};

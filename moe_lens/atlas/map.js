"use strict";
// Layers × experts, coloured by a measure.
const MEASURES = {
  difference: { label: "Specialisation: share above that of other domains", shown: (v) => `${(100 * v).toFixed(1).replace("-", "−")} points`, around: true, domain: true,
    what: "Share of the domain's tokens that choose the expert, minus the mean share of the other domains. Over all domains: the value of the domain where it is greatest." },
  beyond: { label: "Specialisation beyond the token", shown: (v) => `${(100 * v).toFixed(1).replace("-", "−")} points`, around: true, domain: true,
    what: "Share of the domain's tokens that choose the expert, minus what it would be if every token chose as it does in all domains together. Over all domains: the value of the domain where it is greatest." },
  share: { label: "Share of tokens that choose it", shown: (v) => percent(v), domain: true, what: "Under uniform routing all experts have the same share: active experts divided by experts." },
  first: { label: "Most specialised of its layer, share of resamples", shown: (v) => percent(v), domain: true,
    what: "How often the expert is its layer's most specialised for the domain when sources are resampled. Over all domains: the value of the domain where it is greatest." },
  exact: { label: "Loss without it (exact knock-out)", shown: (v) => `${milli(v)} millinats a token`, around: true, domain: true,
    what: "By how much the loss grows without the expert: an exact knock-out, on the first tokens of every window. Over all domains: the value of the domain where it is greatest." },
  saved: { label: "Loss without it (first order)", shown: (v) => `${milli(v)} millinats a token`, around: true, domain: true,
    what: "By how much the loss would grow without the expert, estimated by gradient × activation over all tokens. The estimate can be far from the exact knock-out, in size and in sign: an expert that looks small here may cost most. Where there is an exact one, believe that." },
  entropy: { label: "Entropy of the tokens that choose it", shown: (v) => `${number(v)} nats`, what: "Low: few different tokens choose it. For experts that few tokens chose the estimate is too low." },
  weight: { label: "Mean routing weight where chosen", shown: (v) => number(v), what: "" },
  relative_norm: { label: "Norm of its contribution, relative to the stream", shown: (v) => number(v), what: "Mean over its tokens of the norm of its contribution divided by the norm of the residual stream." },
  max_activation: { label: "Greatest activation (super experts)", shown: (v) => number(v), what: "Greatest component of the expert's output. Outlined: super experts, as far as was checked (see the glossary)." },
};

atlas.values = (measure, domain) => {
  const { all, domains } = atlas.data.get("map");
  const own = (of) => measure === "beyond" ? of.share.map((row, l) => row.map((v, e) => v - of.token_alone[l][e])) : of[measure];
  if (!MEASURES[measure].domain || (domain < 0 && all[measure])) return all[measure];
  if (domain >= 0) return own(domains[domain]);
  const each = domains.map(own);
  return each[0].map((row, l) => row.map((_, e) => {
    const known = each.map((grid) => grid[l][e]).filter((v) => v !== null);
    return known.length ? Math.max(...known) : null;
  }));
};

const scaleOf = (values, around) => {
  const known = values.flat().filter((v) => v !== null);
  const high = Math.max(...known, 1e-12), low = Math.min(...known, high);
  const most = Math.max(Math.abs(low), Math.abs(high));
  return around
    ? { low: -most, high: most, colour: (v) => mixed(diverging(), (v + most) / (2 * most)) }
    : { low, high, colour: (v) => mixed(CIVIDIS, high > low ? (v - low) / (high - low) : 0.5) };
};

atlas.views.map = ({ measure, domain, tested }) => {
  const { about } = atlas;
  measure = Object.hasOwn(MEASURES, measure || "") ? measure : about.domains.length > 1 ? "difference" : "share";
  const chosen = atlas.domains.indexOf(domain || "");
  const of = MEASURES[measure], values = atlas.values(measure, chosen), scale = scaleOf(values, of.around);
  const { all, domains } = atlas.data.get("map");
  const tells = (l, e) => domains.some((d, i) => (chosen < 0 || i === chosen) && passes(d.p_value[l][e]));
  const told = h("p", { id: "told", role: "status" }, h("span", { class: "keys" }, "Point at an expert, or move with the arrow keys; Enter opens its page. "), "Each square leads to a page.");
  // Of how many tokens a value is, and of which domain where the greatest of all is shown.
  const counted = (l, e, value) => {
    const single = chosen >= 0 || !of.domain || all[measure] ? chosen : domains.findIndex((_, d) => atlas.values(measure, d)[l][e] === value);
    const name = chosen < 0 && single >= 0 ? `on ${atlas.domains[single]}; ` : "", over = (what) => single < 0 ? total(what) : about.domains[single][what];
    if (measure === "exact") return `${name}n = ${whole(over("without"))} tokens read without it`;
    if (measure === "saved") return `${name}over ${whole(over("tokens"))} tokens`;
    return `${name}chosen by n = ${whole(single < 0 ? all.assigned[l][e] : domains[single].assigned[l][e])} tokens`;
  };
  const say = (l, e) => {
    const value = values[l][e];
    const rare = all.rare[l][e] ? `; only ${whole(all.assigned[l][e])} tokens chose it: cannot be told` : ` (${counted(l, e, value)})`;
    return `Layer ${about.layers[l]}, expert ${e}: ${value === null ? "not measured" : of.shown(value)}${rare}`;
  };
  const cell = (l, e) => {
    const value = values[l][e];
    const out = tested && !tells(l, e), rare = all.rare[l][e];
    const starred = measure === "max_activation" && all.super_expert[l][e];
    return h("a", {
      class: `cell${out ? " out" : ""}${rare ? " rare" : ""}${starred ? " marked" : ""}`,
      href: `#layer=${about.layers[l]}&expert=${e}`, "aria-label": say(l, e), title: say(l, e),
      tabindex: l || e ? -1 : 0, "data-l": l, "data-e": e,
      vars: rare || value === null ? {} : { c: scale.colour(value) },
      onfocus: () => { told.textContent = say(l, e); }, onmouseenter: () => { told.textContent = say(l, e); },
    });
  };
  const grid = h("div", { class: "map", id: "map", onkeydown: moveInMap },
    about.layers.map((layer, l) => h("div", { class: "row" },
      h("a", { class: "layer", href: `#layer=${layer}` }, `Layer ${layer}`),
      h("div", { class: "cells" }, values[l].map((_, e) => cell(l, e))))));
  const change = (what) => (value) => go({ [what]: value });
  return [
    h("h1", {}, "Map of experts"),
    h("p", { class: "lead" }, `Each square is one of ${about.experts} experts of a layer; a token chooses ${about.top_k} of them. Measured on ${whole(total())} tokens of ${whole(total("sources"))} sources in ${about.domains.length} domains.`),
    h("nav", { class: "contents", "aria-label": "On this page" }, [["map", "Map"], about.domains.length > 1 && ["foremost", "Most specialised"], ["experts", "All experts"], ["costs", "Whose removal costs most"], ["pairs", "Chosen together"]].filter(Boolean).map(([id, name]) => h("a", { href: `#map=&part=${id}` }, name))),
    h("div", { class: "controls" },
      choose("Colour", Object.entries(MEASURES).filter(([, m]) => about.domains.length > 1 || !["difference", "first"].includes(m)).map(([k, m]) => [k, m.label]), measure, change("measure")),
      choose("Domain", [["", "all domains"], ...atlas.domains.map((d) => [d, d])], domain || "", change("domain")),
      about.domains.length > 1 && h("label", { class: "choose" },
        h("input", { type: "checkbox", checked: Boolean(tested), onchange: (event) => go({ tested: event.target.checked ? "yes" : "" }) }),
        " only experts whose share differs between domains (corrected p < .05)")),
    h("p", { class: "note" }, of.what, chosen >= 0 && !of.domain ? " Over the tokens of all domains together." : ""),
    legend(scale, of),
    grid, told,
    about.domains.length > 1 && foremost(domain),
    experts(),
    costs(),
    together(),
  ];
};

const legend = (scale, of) => {
  const steps = Array.from({ length: 24 }, (_, i) => scale.low + ((i + 0.5) / 24) * (scale.high - scale.low));
  return h("div", { class: "legend" }, h("span", {}, of.shown(scale.low)),
    h("span", { class: "ramp", "aria-hidden": "true" }, steps.map((v) => h("i", { vars: { c: scale.colour(v) } }))),
    h("span", {}, of.shown(scale.high)), h("span", { class: "key" }, h("i", { class: "rare" }), " too rare to tell"));
};

const moveInMap = (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const { l, e } = event.target.dataset;
  if (!step || l === undefined) return;
  const next = event.currentTarget.querySelector(`[data-l="${Number(l) + step[0]}"][data-e="${Number(e) + step[1]}"]`);
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
};

// Whose expert is whose: of each layer and domain the one whose share is most above that of the other domains.
const foremost = (domain, only) => {
  const { domains } = atlas.data.get("map");
  const rows = atlas.about.layers.flatMap((layer, l) => only !== undefined && layer !== only ? [] : [[h("a", { href: `#layer=${layer}` }, `Layer ${layer}`), ...domains.map((d) => {
    const e = leaderOf(l, domains.indexOf(d));
    const starred = passes(d.p_value[l][e]);
    return h("span", {}, expertLink(layer, e, `expert ${e}${starred ? "*" : ""}`), h("br"),
      h("small", {}, `${percent(d.share[l][e], 0)} of tokens; `, d.first[l][e] === null ? "too few sources" : `again in ${percent(d.first[l][e], 0)}`));
  })]]);
  return section("foremost", "Most specialised expert of each domain",
    ["The ", term("most specialised"), ` expert of each layer, its share, and in how many of ${whole(atlas.about.limits.resamples)} resamples of the sources it is so again. *: the share differs between domains, `, term("p (maxT)", "corrected p"), " < .05."],
    table(["", ...atlas.domains.map((name) => h("span", { class: name === domain ? "chosen" : null }, name))], rows, { class: "foremost" }));
};

"use strict";
// Everything about one expert. Every number beside how many it is of; what cannot be told says so.
atlas.views.expert = async ({ layer, expert }) => {
  const { about } = atlas, l = Number(layer), e = Number(expert || 0);
  if (!about.layers.includes(l) || !(e >= 0 && e < about.experts)) return [h("h1", {}, "No such expert"), h("p", {}, `Layers are ${about.layers.join(", ")}; experts 0 to ${about.experts - 1}.`)];
  const file = await atlas.load(`layer-${l}`), of = file.experts[e];
  const row = about.layers.indexOf(l), early = l < about.model.layers / 2;
  const step = (to, label) => to >= 0 && to < about.experts ? expertLink(l, to, label) : h("span", {}, label);
  const layerStep = (to, label) => about.layers[to] !== undefined ? expertLink(about.layers[to], e, label) : h("span", {}, label);
  return [
    h("div", { class: "steps" }, step(e - 1, "‹ expert"), step(e + 1, "expert ›"), layerStep(row - 1, "‹ layer"), layerStep(row + 1, "layer ›"), link({ href: `#layer=${l}` }, `all of layer ${l}`), copyLink()),
    h("h1", {}, `Layer ${l}, expert ${e}`),
    verdict(of, row, e),
    !atlas.alone && contents(l, e),
    facts(of),
    profile(of),
    explained(of),
    h("div", { class: "columns" }, reads(of), writesSection(of, early)),
    about.contexts && contexts(of, file.sources, l),
    h("div", { class: "columns" }, goesWith(of, l), nearest(of, l)),
    effects(of, l, e),
  ];
};

atlas.drawAlone = async (layer, expert) => {
  const [, ...parts] = await atlas.views.expert({ layer, expert }); // without the steps to other experts
  document.getElementById("view").replaceChildren(...parts.flat(Infinity).filter(Boolean));
  atlas.measure();
};

const facts = (of) => h("ul", { class: "facts" }, [
  ["chosen by", `${whole(of.assigned)} of ${whole(total())} tokens (${percent(of.share)})`],
  ["with the greatest weight at", `${whole(of.top1)}`],
  ["mean", [term("weight"), " ", weightOf(of.weight)]],
  ["its", [term("norm", "relative norm"), " ", number(of.relative_norm)]],
  ["greatest activation", [number(of.max_activation), of.super && [" ", term("super expert", "super expert?")]]],
  ["entropy of its tokens", [`${number(of.entropy)} `, term("nats")]],
].map(([name, value]) => h("li", {}, h("span", { class: "muted" }, name), " ", h("b", {}, value))));

const profile = (of) => {
  const { about } = atlas, uniform = about.top_k / about.experts;
  const most = Math.max(...of.domains.map((d) => Math.max(d[HIGH] || 0, d[SHARE], d[ALONE])), uniform) * 1.05;
  const at = (v) => `${((100 * v) / most).toFixed(2)}%`;
  const bar = (d) => h("div", { class: "bar", role: "img", "aria-label": `${percent(d[SHARE])}, ${span(d[LOW], d[HIGH], percent)}; by the token alone ${percent(d[ALONE])}` },
    h("i", { class: "value", vars: { x: at(d[SHARE]) } }),
    d[LOW] !== null && h("i", { class: "whisker", vars: { x: at(d[LOW]), w: at(d[HIGH] - d[LOW]) } }),
    h("i", { class: "null", vars: { x: at(d[ALONE]) }, title: `by the token alone ${percent(d[ALONE])}` }),
    h("i", { class: "uniform", vars: { x: at(uniform) }, title: `uniform routing ${percent(uniform)}` }));
  const rows = of.domains.map((d, i) => [
    h("b", {}, atlas.domains[i]), bar(d),
    h("span", {}, percent(d[SHARE]), h("small", {}, ` ${span(d[LOW], d[HIGH], percent)}`)),
    percent(d[ALONE]), about.domains.length < 2 ? "nothing to compare with" : d[P] === null ? "not tested: too few tokens" : `${pValue(d[P])}${passes(d[P]) ? " *" : ""}`,
    d[FIRST] === null ? "too few sources" : percent(d[FIRST], 0),
    `${whole(d[ASSIGNED])} of ${whole(about.domains[i].tokens)}; ${whole(about.domains[i].sources)} sources`,
  ]);
  return section("whose", "Whose tokens choose it",
    ["Bar: ", term("share"), " of the domain's tokens; line: ", term("95 % interval"), " over sources; diamond: the share ", term("by the token alone"), "; dashed: ", term("uniform", "uniform routing"), `, ${percent(uniform)}. *: the share differs from the other domains', p < .05.`],
    table(["Domain", "", "Share", "By the token alone", term("p (maxT)", "p, corrected"), term("most specialised", "Most specialised in resamples"), "n"], rows, { class: "profile" }));
};

const explained = (of) => {
  const title = "What explains its choice";
  if (!of.explained.length) return section("why", title, null, h("p", { class: "warn" }, atlas.about.contexts ? "Cannot be told: it takes three sources of every domain." : "Left out: it would show pieces of the texts, which this atlas leaves out."));
  const shown = { token: "the token", previous: "the token before it", position: "its position", domain: "its domain", all: "all of these" };
  const [sentence, precision, low, high, recall, share, held] = of.said || [""];
  const rows = of.explained.map(([feature, , , auc, part, partLow, partHigh, gain, gainLow, gainHigh, shuffled]) => [
    h("b", {}, shown[feature] || feature), percent(part), span(partLow, partHigh, percent), percent(auc, 0),
    ...(feature === "token" ? ["", "", ""] : [percent(gain), span(gainLow, gainHigh, percent), percent(shuffled)])]);
  const value = (name) => (of.explained.find(([feature]) => feature === name) || [])[4];
  const lower = of.explained.filter(([feature]) => feature !== "all" && value("all") < value(feature)).map(([feature]) => shown[feature] || feature);
  return section("why", title,
    ["Predicted on sources that were held out. ", term("R²"), " and ", term("AUC"), " of a prediction from one feature alone; then the R² that the feature adds to the token, and the same with the feature ", term("shuffled"), "."],
    of.rare ? cannot(of) : [
      h("p", { class: "said" }, sentence ? [h("b", {}, sentence), `: ${percent(precision)} of such tokens choose it (${span(low, high, percent)}), and ${percent(share)} of all tokens; ${percent(recall)} of the tokens that choose it are such tokens. Picked on half of the sources, measured on the other half (n = ${whole(held)} tokens).`] : "With no token, position or domain is it chosen twice as often as on average."),
      table(["From", "R²", term("95 % interval"), "AUC", "R² added to the token", term("95 % interval"), "Shuffled (null)"], rows, { class: "numbers" }),
      lower.length > 0 && h("p", { class: "note" }, `All together explain less than ${listed(lower).join("")} alone. Features are fitted one after another, the token first: it takes what the others would explain better, and what rare tokens seemed to say of the sources that were fitted does not hold on those held out.`)]);
};

const reads = (of) => section("reads", "What it reads",
  ["Tokens that choose it, those first that add most to how it differs from the average (n ln(", term("lift"), `)). Only tokens that occur ${atlas.about.limits.at_least} times or more. n: occurrences that chose it, of all.`],
  of.rare ? cannot(of) : of.tokens.length ? table(["Token", "Lift", "n"], of.tokens.map(([token, assigned, occurred, lift]) => [tokenLink(token), times(lift), `${whole(assigned)} of ${whole(occurred)}`])) : h("p", {}, "None stands out."),
  h("h3", {}, "What its router row looks for"),
  h("p", { class: "note" }, "Tokens whose embedding, alone in the stream, raises its router logit most above the other experts'. In deep layers the stream is far from the embedding, and this says little."),
  of.router.length ? tokenList(of.router.map(([token, value]) => [token, number(value)])) : h("p", {}, "The routers of this family cannot be read in this way."));

const cannot = (of) => h("p", { class: "warn" }, `Cannot be told: ${whole(of.assigned)} tokens chose it.`);
const tokenList = (items) => h("p", { class: "tokens" }, items.map(([token, value, mark]) => h("span", {}, tokenLink(token, { class: `token${mark ? " recurs" : ""}` }), h("small", {}, ` ${value} `))));

const writesSection = (of, early) => section("writes", "What it writes",
  "Its mean output, minus the mean over the layer's experts, through the final norm and the unembedding: tokens and their logits.",
  early && h("p", { class: "warn" }, "An early layer: later layers may read this output in another basis than the unembedding."),
  of.promoted.length ? [
    h("h3", {}, "Promotes"), tokenList(of.promoted.map(([token, value, recurs]) => [token, number(value), recurs])),
    h("h3", {}, "Suppresses"), tokenList(of.suppressed.map(([token, value, recurs]) => [token, number(value), recurs])),
    h("p", { class: "note" }, of.promoted[0][2] === null ? "Whether they recur in other sources cannot be told: one half of the sources has too few tokens." : [term("recurs", "Underlined"), `: among the first ${atlas.about.limits.seen_again} in both halves of the sources. The others may be chance.`]),
  ] : of.rare ? cannot(of) : h("p", {}, "It writes nothing."),
  of.neurons.length > 0 && [
    h("h3", {}, "Its most used neurons"),
    table(["Neuron", "Mean activation", "Mean size of it", "Promotes", "Suppresses"], of.neurons.map(([index, , activation, size, up, down]) => [String(index), number(activation), number(size), tokenList(up.map((t) => [t, ""])), tokenList(down.map((t) => [t, ""]))])),
  ]);

const contexts = (of, sources, l) => {
  const most = Math.max(1e-9, ...Object.values(of.contexts).flat().flatMap((line) => line[6]));
  const from = ([domain, source, position, , , , , shown]) => [` ${atlas.domains[domain]} · `, h("bdi", {}, sources[source]), ` · token ${position}`,
    shown && !atlas.alone && [" · ", h("a", { href: `#text=${shown[0]}&layer=${l}&pos=${shown[1]}` }, "in its text")]];
  const written = new Map(Object.values(of.contexts).flat().map((line) => [line, characters(line[5].map(textOf))]));
  const piece = (line) => h("li", {},
    h("span", { class: "running", dir: "auto" }, line[5].map((_, i) => h("span", { class: `piece${i === line[3] ? " here" : ""}`, vars: { w: (line[6][i] / most).toFixed(3) }, title: `weight ${weightOf(line[6][i])}` }, shownInline(written.get(line)[i], "↵ ")))),
    h("small", { class: "muted" }, from(line)));
  const group = (kind, title, note) => h("div", {}, h("h3", {}, title), h("p", { class: "note" }, note),
    of.contexts[kind] ? h("ul", { class: "contexts" }, of.contexts[kind].map(piece)) : h("p", {}, "None."));
  return section("where", "Where it is chosen",
    ["Outlined: the token. Colour: the expert's ", term("weight"), " at each token. Tokens are counted from 0 in their window. The atlas shows two texts of each domain, as far as their first ", String(atlas.about.limits.text_tokens), " tokens; pieces of these lead there."],
    group("strongest", "Strongest", "Greatest weight. These alone mislead."),
    group("random", "At random", "Drawn at random from all tokens that chose it."),
    group("nearly", "Nearly", "Did not choose it, but came nearest by router logit."));
};

const goesWith = (of, l) => {
  const list = (kind, title) => of.partners[kind] && of.partners[kind].length > 0 && [h("h3", {}, title),
    table(["Expert", term("lift", "Lift"), "n"], of.partners[kind].map(([layer, other, tokens, lift]) => [expertLink(layer, other, layer === l ? `expert ${other}` : `layer ${layer}, expert ${other}`), times(lift), whole(tokens)]))];
  const lists = [list("with", "In its layer"), list("before", "In the layer before"), list("after", "In the next layer")].filter(Boolean);
  return section("with", "Who goes with it", ["Experts that its tokens choose more often than if choices were independent. n: tokens that chose both. ", link({ href: `#layer=${l}` }, `Strongest pairs of layer ${l}`), "."],
    of.rare ? cannot(of) : lists.length ? lists : h("p", {}, "None stands out."));
};

const nearest = (of, l) => {
  const list = (kind, title, note, heads, cells) => h("div", {}, h("h3", {}, title), h("p", { class: "note" }, note),
    table(["Expert", ...heads], (of.nearest[kind] || []).map(([other, ...values]) => [expertLink(l, other, `expert ${other}`), ...cells(values)])));
  return section("similar", "Which are similar to it", "The nearest of the layer; without intervals, so that only the order and the distance from chance are told.",
    list("weights", "By weights", "Overlap of the subspaces that its matrices read and write, in [0, 1]; by chance: the same for random matrices.", ["Overlap", "By chance"], ([value, , chance]) => [number(value), number(chance)]),
    list("outputs", "By outputs", ["On the same 256 tokens of each domain, whether they chose the experts or not: ", term("correlation"), " (by chance 0), and the cosine of the outputs, which the mean outputs alone make as large as it is on different tokens."], ["Correlation", "Cosine", "Cosine, different tokens"], (values) => values.map((value) => number(value))));
};

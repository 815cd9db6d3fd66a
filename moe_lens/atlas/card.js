"use strict";
// Everything about one expert. Every number beside how many it is of; what cannot be told says so.
const [ASSIGNED, SHARE, LOW, HIGH, ALONE, DIFFERENCE, P, FIRST, SAVED, SAVED_LOW, SAVED_HIGH] = Array(11).keys();

atlas.views.layer = async ({ layer, expert }) => {
  const { about } = atlas, l = Number(layer), e = Number(expert || 0);
  if (!about.layers.includes(l) || !(e >= 0 && e < about.experts)) return [h("h1", {}, "No such expert"), h("p", {}, `Layers are ${about.layers.join(", ")}; experts 0 to ${about.experts - 1}.`)];
  const file = await atlas.load(`layer-${l}`), of = file.experts[e];
  const row = about.layers.indexOf(l), early = l < about.model.layers / 2;
  const step = (to, label) => to >= 0 && to < about.experts ? expertLink(l, to, label) : h("span", {}, label);
  const layerStep = (to, label) => about.layers[to] !== undefined ? expertLink(about.layers[to], e, label) : h("span", {}, label);
  return [
    h("p", { class: "steps" }, step(e - 1, "‹ expert"), " ", step(e + 1, "expert ›"), " ", layerStep(row - 1, "‹ layer"), " ", layerStep(row + 1, "layer ›")),
    h("h1", {}, `Layer ${l}, expert ${e}`),
    summary(of, row, e),
    facts(of),
    profile(of),
    explained(of),
    h("div", { class: "columns" }, reads(of), writesSection(of, early)),
    about.contexts && contexts(of, file.sources),
    h("div", { class: "columns" }, together(of, l), nearest(of, l)),
    effects(of, l, e),
  ];
};

atlas.drawAlone = async (layer, expert) => {
  const [, ...parts] = await atlas.views.layer({ layer, expert }); // without the steps to other experts
  document.getElementById("view").replaceChildren(...parts.flat(Infinity).filter(Boolean));
};

const total = () => atlas.about.domains.reduce((sum, domain) => sum + domain.tokens, 0);

// The expert of a layer whose share is most above that of other domains.
const leaderOf = (row, domain) => {
  const differences = atlas.data.get("map").domains[domain].difference[row];
  return differences.indexOf(Math.max(...differences));
};

// The answer in a few sentences.
const summary = (of, l, e) => {
  const { about } = atlas;
  if (of.rare) return h("p", { class: "lead warn" }, `Only ${whole(of.assigned)} of ${whole(total())} tokens chose it: what it stands for cannot be told from these texts.`);
  if (about.domains.length < 2) return h("p", { class: "lead" }, `${percent(of.share)} of the tokens choose it. With one domain there is nothing to compare it with.`);
  const best = of.domains.reduce((most, d, i) => (d[DIFFERENCE] > of.domains[most][DIFFERENCE] ? i : most), 0);
  const d = of.domains[best], sure = d[P] !== null && d[P] < 0.05;
  const others = d[SHARE] - d[DIFFERENCE];
  const leader = leaderOf(l, best);
  const first = d[FIRST] === null ? "too few sources to tell whether it is the layer's most specialised expert" : `the layer's most specialised expert for ${atlas.domains[best]} in ${percent(d[FIRST], 0)} of resamples of the sources${leader === e ? "" : ` (it is expert ${leader})`}`;
  return h("p", { class: "lead" }, sure ? "It is most specialised in " : "No significant difference between domains. The largest is for ",
    h("b", {}, atlas.domains[best]), `: ${percent(d[SHARE])} of that domain's tokens choose it (${span(d[LOW], d[HIGH], percent)}), and ${percent(others)} of other domains'; ${first}; ${pValue(d[P])} (corrected).`);
};

const facts = (of) => h("ul", { class: "facts" }, [
  ["chosen by", `${whole(of.assigned)} of ${whole(total())} tokens (${percent(of.share)})`],
  ["first choice of", `${whole(of.top1)}`],
  ["mean weight", number(of.weight)],
  ["norm of its contribution, relative to the stream", number(of.relative_norm)],
  ["greatest activation", `${number(of.max_activation)}${of.super ? " (super expert?)" : ""}`],
  ["entropy of its tokens", `${number(of.entropy)} nats`],
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
    percent(d[ALONE]), d[P] === null ? "cannot be told" : `${pValue(d[P])}${d[P] < 0.05 ? " *" : ""}`,
    d[FIRST] === null ? "cannot be told" : percent(d[FIRST], 0),
    `${whole(d[ASSIGNED])} of ${whole(about.domains[i].tokens)}; ${whole(about.domains[i].sources)} sources`,
  ]);
  return section("Whose tokens choose it",
    "Bar: share of the domain's tokens; line: 95 % interval over sources; diamond: the share by the token alone, that is, if every token chose as it does in all domains together; "
    + `dashed: uniform routing, ${percent(uniform)}. p: the domain's share against the others', labels permuted over sources, corrected for all experts, layers and domains (maxT).`,
    table(["Domain", "", "Share", "By the token alone", "p (maxT)", "Most specialised in resamples", "n"], rows, { class: "profile" }));
};

const explained = (of) => {
  const title = "What explains its choice";
  if (!of.explained.length) return section(title, null, h("p", { class: "warn" }, atlas.about.contexts ? "Cannot be told: it takes three sources of every domain." : "Left out: it would show pieces of the texts, which this atlas leaves out."));
  const shown = { token: "the token", previous: "the token before it", position: "its position", domain: "its domain", all: "all of these" };
  const [sentence, precision, low, high, recall, share, held] = of.said || [""];
  const rows = of.explained.map(([feature, , , auc, part, partLow, partHigh, gain, gainLow, gainHigh, shuffled]) => [
    h("b", {}, shown[feature] || feature), percent(part), span(partLow, partHigh, percent), number(auc, 2),
    ...(feature === "token" ? ["", "", ""] : [percent(gain), span(gainLow, gainHigh, percent), percent(shuffled)])]);
  return section(title,
    "On held-out sources: R² of a prediction from the feature (the share of the squared error that it saves compared with the expert's mean share), its AUC, and the R² that the feature adds to the token; null: the same with the feature shuffled over tokens.",
    of.rare ? cannot(of) : [
      h("p", { class: "said" }, sentence ? [h("b", {}, sentence), `: ${percent(precision)} of such tokens choose it (${span(low, high, percent)}), and ${percent(share)} of all tokens; ${percent(recall)} of the tokens that choose it are such tokens. Picked on half of the sources, measured on the other half (n = ${whole(held)}).`] : "With no token, position or domain is it chosen twice as often as on average."),
      table(["From", "R²", "95 % interval", "AUC", "Added to the token", "95 % interval", "Shuffled"], rows)]);
};

const reads = (of) => section("What it reads",
  `Tokens that choose it, ranked by n ln(lift). Lift: the share of a token's occurrences that choose it, divided by the share of all tokens that do. Only tokens that occur ${atlas.about.limits.at_least} times or more.`,
  of.rare ? cannot(of) : of.tokens.length ? table(["Token", "Lift", "n"], of.tokens.map(([token, assigned, occurred, lift]) => [tokenLink(token), `× ${number(lift)}`, `${whole(assigned)} of ${whole(occurred)}`])) : h("p", {}, "None stands out."),
  h("h3", {}, "What its router row looks for"),
  h("p", { class: "note" }, "Tokens whose embedding, alone in the stream, raises its router logit most above the other experts'. In deep layers the stream is far from the embedding, and this says little."),
  of.router.length ? tokenList(of.router.map(([token, value]) => [token, number(value)])) : h("p", {}, "The routers of this family cannot be read in this way."));

const cannot = (of) => h("p", { class: "warn" }, `Cannot be told: ${whole(of.assigned)} tokens chose it.`);
const tokenList = (items) => h("p", { class: "tokens" }, items.map(([token, value, mark]) => h("span", {}, tokenLink(token, { class: `token${mark ? " recurs" : ""}` }), h("small", {}, ` ${value} `))));

const writesSection = (of, early) => section("What it writes",
  "Its mean output, minus the mean over the layer's experts, through the final norm and the unembedding: tokens and their logits.",
  early && h("p", { class: "warn" }, "An early layer: later layers may read this output in another basis than the unembedding."),
  of.promoted.length ? [
    h("h3", {}, "Promotes"), tokenList(of.promoted.map(([token, value, recurs]) => [token, number(value), recurs])),
    h("h3", {}, "Suppresses"), tokenList(of.suppressed.map(([token, value, recurs]) => [token, number(value), recurs])),
    h("p", { class: "note" }, of.promoted[0][2] === null ? "Whether they recur in other sources cannot be told: one half of the sources has too few tokens." : `Underlined: among the first ${atlas.about.limits.seen_again} in both halves of the sources. The others may be chance.`),
  ] : of.rare ? cannot(of) : h("p", {}, "It writes nothing."),
  of.neurons.length > 0 && [
    h("h3", {}, "Its most used neurons"),
    table(["Neuron", "Mean activation", "Promotes", "Suppresses"], of.neurons.map(([index, , activation, size, up, down]) => [String(index), h("span", {}, number(activation), h("small", {}, ` |…| ${number(size)}`)), tokenList(up.map((t) => [t, ""])), tokenList(down.map((t) => [t, ""]))])),
  ]);

const contexts = (of, sources) => {
  const most = Math.max(1e-9, ...Object.values(of.contexts).flat().flatMap((line) => line[6]));
  const piece = ([domain, source, position, at, , tokens, weights]) => h("li", {},
    h("span", { class: "running", dir: "auto" }, tokens.map((token, i) => h("span", { class: `piece${i === at ? " here" : ""}`, vars: { w: (weights[i] / most).toFixed(3) }, title: `weight ${number(weights[i], 2)}` }, shownInline(textOf(token), "↵ ")))),
    h("small", { class: "muted" }, ` ${atlas.domains[domain]} · `, h("bdi", {}, sources[source]), ` · token ${position}`));
  const group = (kind, title, note) => h("div", {}, h("h3", {}, title), h("p", { class: "note" }, note),
    of.contexts[kind] ? h("ul", { class: "contexts" }, of.contexts[kind].map(piece)) : h("p", {}, "None."));
  return section("Where it is chosen", "Outlined: the token. Colour: the expert's weight at each token.",
    group("strongest", "Strongest", "Greatest weight. These alone mislead."),
    group("random", "At random", "Drawn at random from all tokens that chose it."),
    group("nearly", "Nearly", "Did not choose it, but came nearest by router logit."));
};

const together = (of, l) => {
  const list = (kind, title) => of.partners[kind] && of.partners[kind].length > 0 && [h("h3", {}, title),
    table(["Expert", "Lift", "n"], of.partners[kind].map(([layer, other, tokens, lift]) => [expertLink(layer, other, layer === l ? `expert ${other}` : `layer ${layer}, expert ${other}`), `× ${number(lift)}`, whole(tokens)]))];
  const lists = [list("with", "In its layer"), list("before", "In the layer before"), list("after", "In the next layer")].filter(Boolean);
  return section("Who goes with it", "Experts that its tokens choose more often than if choices were independent. n: tokens that chose both.",
    of.rare ? cannot(of) : lists.length ? lists : h("p", {}, "None stands out."));
};

const nearest = (of, l) => {
  const list = (kind, title, note, tokens) => h("div", {}, h("h3", {}, title), h("p", { class: "note" }, note),
    table(["Expert", "Value", "By chance"], (of.nearest[kind] || []).map(([other, value, chance]) => [expertLink(l, other, `expert ${other}`), number(value), number(chance)])));
  return section("Which are similar to it", null,
    list("weights", "By weights", "Overlap of the subspaces that its matrices read and write, in [0, 1]; by chance: the same for random matrices."),
    list("outputs", "By outputs", "Correlation of outputs on the same tokens, whether they chose the experts or not; by chance: cosine of outputs on different tokens."));
};

const effects = (of, l, e) => {
  const { about } = atlas;
  const rows = of.domains.map((d, i) => [h("b", {}, atlas.domains[i]), milli(d[SAVED]), span(d[SAVED_LOW], d[SAVED_HIGH], milli), whole(about.domains[i].predicted || about.domains[i].tokens)]);
  return section("What breaks without it", "Loss in millinats a token; above 0: the loss grows without the expert.",
    of.knockouts.length > 0 && [h("h3", {}, "Exact knock-out"),
      h("p", { class: "note" }, `Its contribution is set to zero, on the first tokens of every window. It was picked for its share on these same texts. Controls: other experts of the layer that carry as much of the domain's routing weight. *: the loss grows more than without the controls, with an interval that is corrected for all such comparisons.`),
      of.knockouts.map(knockout)],
    of.asked.length > 0 && [h("h3", {}, "Exact knock-out, asked for"),
      h("p", { class: "note" }, "Its contribution is set to zero, on all texts. Controls: other experts of the layer that carry as much of the domain's routing weight. Intervals are of each row by itself."),
      table(["On texts of", "Loss grows by", "95 % interval", "More than controls", "95 % interval", "n"], of.asked.map(asked))],
    !of.knockouts.length && !of.asked.length && h("p", {}, "Exact knock-outs were made only of the two most specialised experts of each layer and domain; this is not one of them. The command that made the atlas adds it with ", h("code", {}, `--knock-out ${l}:${e}`), "."),
    h("h3", {}, "First order"),
    h("p", { class: "note" }, "Gradient × activation: a linear estimate of the exact knock-out. Where the expert contributes much, the two can differ widely."),
    table(["Domain", "Estimate", "95 % interval", "n"], rows));
};

const asked = ([domain, added, low, high, tokens, sources, mass, controls, controlMass, , beyond, beyondLow, beyondHigh]) => [
  h("b", {}, atlas.domains[domain]), milli(added), span(low, high, milli),
  controls ? milli(beyond) : "no control", controls ? span(beyondLow, beyondHigh, milli) : "",
  `${whole(tokens)} tokens, ${whole(sources)} sources; ${controls} control${controls === 1 ? "" : "s"}${controls ? `, with ${percent(controlMass)} of the weight; the expert has ${percent(mass)}` : ""}`];

const knockout = (k) => h("div", { class: "knockout" },
  table(["On texts of", "Loss grows by", "95 % interval", "n"], k.read.map(([domain, added, low, high, tokens, sources]) => [
    h("b", {}, atlas.domains[domain] + (domain === k.domain && k.starred ? " *" : "")), milli(added), span(low, high, milli), `${whole(tokens)} tokens, ${whole(sources)} sources`])),
  h("p", {}, k.controls ? `On ${atlas.domains[k.domain]}, ${k.controls} control${k.controls > 1 ? "s" : ""} with as much routing weight (${percent(k.control_mass)} of the layer's; the expert has ${percent(k.mass)}): the loss grows by ${milli(k.control_added)}. `
    + `The expert minus its controls: ${milli(k.beyond)} (${k.beyond_low === null ? "no interval: too few sources" : `${span(k.beyond_low, k.beyond_high, milli)}, corrected`}).` : `On ${atlas.domains[k.domain]}: no other experts of the layer carry as much weight, so there is no control.`));

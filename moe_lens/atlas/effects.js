"use strict";
// What breaks without an expert: exact knock-outs beside their controls, and the linear estimate.
const together_ = (experts) => experts.length > 1 ? `experts ${listed(experts.map(String)).join("")}, together` : `expert ${experts[0]}`;

const effects = (of, l, e) => {
  const { about, domains } = atlas, every = about.knocked === about.layers.length * about.experts;
  const least = Math.min(...about.domains.map((d) => d.first)), most = Math.max(...about.domains.map((d) => d.first));
  const first = least === most ? `${most}` : `${least} to ${most}`;
  const alone = of.knockouts.map((line) => [h("b", {}, domains[line[READ]]), milli(line[ADDED]), span(line[ADDED_LOW], line[ADDED_HIGH], milli), milli(line[AT_FIRST]), milli(line[ESTIMATE]), `${whole(line[TOKENS])} tokens, ${whole(line[SOURCES])} sources`]);
  const linear = of.domains.map((d, i) => [h("b", {}, domains[i]), milli(d[SAVED]), span(d[SAVED_LOW], d[SAVED_HIGH], milli), `${whole(about.domains[i].tokens)} tokens`]);
  return section("without", "What breaks without it",
    ["Growth of the loss in ", term("millinats"), " a token; below 0, the loss falls without the expert."],
    of.asked.length > 0 && [h("h3", {}, "Exact knock-out on all texts"), h("p", { class: "note" }, "You asked for this one."),
      plain(of.asked), of.asked.map((held) => comparison(held, e, "the domain's texts, all tokens; corrected for the domains of this table"))],
    of.knockouts.length > 0 ? [h("h3", {}, "Exact knock-out"),
      h("p", { class: "note" }, term("knock-out", "Knocked out"), ` everywhere${about.model.texts_open_with.length ? ", at the opening token (BOS) too" : ""}; the loss is that of the first ${first} tokens of each window of at most ${about.reading.context} (to read all of every text anew without each expert would take too long). Early tokens have little before them, so that their loss is higher than that of whole texts. Beside it the `, term("first order"), " estimate for the same tokens."),
      table(["On texts of", "Loss grows by", term("95 % interval"), "Of it at windows' first four tokens", "First order, same tokens", "n"], alone),
      of.compared.length > 0 ? of.compared.map((held) => comparison(held, e, held.by === "cost" ? "the first tokens of windows; it is held against controls because it costs most of all: corrected for every expert and domain that could have been the costliest" : "the first tokens of windows; corrected for all such comparisons of this atlas")) : h("p", {}, `Only the two most specialised experts of each layer and domain, and the ${about.limits.costliest} that cost most, are held against controls; this is not one of them. `, add(l, e))]
      : !of.asked.length && h("p", {}, "It was not knocked out: this model has too many experts. ", add(l, e)),
    h("h3", {}, "First order, all tokens"),
    h("p", { class: "note" }, "A ", term("first order", "linear estimate"), ` of the knock-out, over all tokens of every window. ${every ? "Where it differs from the exact one, believe the exact one. " : ""}Other tokens are read here than there, so that the two differ for two reasons.`),
    table(["Domain", "Estimate", term("95 % interval"), "n"], linear));
};
const add = (l, e) => ["The command that made the atlas adds it, on all texts, with ", h("code", {}, `--knock-out ${l}:${e}`), "."];

const plain = (lines) => table(["On texts of", "Loss grows by", term("95 % interval"), "n"], lines.map((k) => [
  h("b", {}, atlas.domains[k.domain]), milli(k.added), span(k.low, k.high, milli), `${whole(k.tokens)} tokens, ${whole(k.sources)} sources`]));

// An expert, each of its controls, and the difference that a star is about.
const comparison = (k, e, where) => {
  const name = atlas.domains[k.domain];
  if (!k.controls) return h("p", {}, `On ${name}: ${atlas.about.limits.controls} were sought, but no other experts of the layer carry as much weight, so there is no `, term("control"), ".");
  const rows = [
    [h("b", {}, `expert ${e}`), percent(k.mass), milli(k.added), span(k.low, k.high, milli)],
    ...k.each.map(([experts, mass, added, low, high]) => [together_(experts), percent(mass), milli(added), span(low, high, milli)]),
    [`mean of the ${k.controls} controls`, percent(k.control_mass), milli(k.control_added), `they cost ${range(k)}`],
    [h("b", {}, `expert ${e}, corrected`), "", milli(k.added), span(k.all_low, k.all_high, milli)],
    [h("b", {}, `expert ${e} − costliest control, corrected`), "", milli(k.over_most), span(k.over_most_low, k.over_most_high, milli)],
  ];
  const said = k.starred === null ? "Too few sources to tell." : k.starred ? "Both corrected intervals lie above 0: it costs more than each of its controls."
    : k.over_most_low > 0 ? "No star: its own cost is not distinguishable from 0 after correction, and its controls cost less than nothing, or little."
    : k.over_most_high < 0 ? "No star: its costliest control costs more." : "No star: not distinguishable from what its costliest control costs.";
  return h("div", { class: "knockout" },
    h("h3", {}, `Held against its controls, on ${name} `, k.starred && "*", " ", term("star", "?")),
    h("p", { class: "note" }, "Each ", term("control"), ` is taken out as a whole, on ${where}. Without `, term("corrected", "“corrected”"), ", an interval is of its row by itself."),
    table(["Taken out", "Weight", "Loss grows by", term("95 % interval")], rows, { class: "against" }), h("p", {}, said,
      unlike(k) && ` Controls differ by more than the expert costs: by ${milli(k.control_most - k.control_least)}. Which experts were drawn decides their mean.`,
      k.controls < atlas.about.limits.controls && ` ${atlas.about.limits.controls} controls were sought; for the others no experts of the layer were found that carry as much weight.`));
};

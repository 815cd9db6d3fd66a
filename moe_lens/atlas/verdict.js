"use strict";
// The answer before the evidence: whose expert it is and how sure that is, what it reads and writes, and what its removal
// costs. Made of the numbers below it, by rules.
const [ASSIGNED, SHARE, LOW, HIGH, ALONE, DIFFERENCE, P, FIRST, SAVED, SAVED_LOW, SAVED_HIGH] = Array(11).keys();
const [READ, ADDED, ADDED_LOW, ADDED_HIGH, ESTIMATE, TOKENS, SOURCES, AT_FIRST] = Array(8).keys();
const OFTEN = 0.95, LIKELY = 0.5;

const others = (d) => d[SHARE] - d[DIFFERENCE];
// The domain that an expert is most specialised in: of those where it is the layer's first the one where it is so most
// often in resamples, else the one where its share is most above the others'.
const mainDomain = (of, row, e) => {
  const numbers = of.domains.map((_, i) => i), { domains } = atlas;
  if (domains.length < 2) return 0;
  const led = numbers.filter((i) => of.domains[i][DIFFERENCE] > 0 && leaderOf(row, i) === e);
  const key = (i) => led.length ? [of.domains[i][FIRST] || 0, of.domains[i][DIFFERENCE]] : [0, of.domains[i][DIFFERENCE]];
  return (led.length ? led : numbers).reduce((best, i) => {
    const [a, b] = [key(i), key(best)];
    return a[0] > b[0] || (a[0] === b[0] && a[1] > b[1]) ? i : best;
  });
};

// Others of the layer that the domain chooses at least half as often, and significantly more than other domains do.
const peers = (row, domain, e, share) => {
  const of = atlas.data.get("map").domains[domain];
  return of.share[row].map((value, other) => [other, value])
    .filter(([other, value]) => other !== e && value >= share / 2 && of.difference[row][other] > 0 && passes(of.p_value[row][other]))
    .sort((a, b) => b[1] - a[1]);
};

const whose = (of, row, e) => {
  const { about, domains } = atlas, l = about.layers[row];
  if (domains.length < 2) return [`${percent(of.share)} of the tokens choose it. With one domain there is nothing to compare it with.`];
  const main = mainDomain(of, row, e), d = of.domains[main], leader = leaderOf(row, main);
  const name = h("b", {}, domains[main]);
  const numbers = `${percent(d[SHARE])} of ${domains[main]}'s tokens choose it (${span(d[LOW], d[HIGH], percent)}), and ${percent(others(d))} of other domains'; ${pValue(d[P])}${d[P] === null ? "" : ", corrected"}.`;
  const less = of.domains.map((other, i) => [other, i]).filter(([other]) => other[DIFFERENCE] < 0 && passes(other[P]));
  const fewer = less.length > 0 && [" Chosen significantly less by ", listed(less.map(([other, i]) => `${domains[i]} (${percent(other[SHARE])})`)), "."];
  if (!passes(d[P]) || d[DIFFERENCE] <= 0) return ["Nobody's for certain: ", d[P] === null ? "too few tokens to test it. " : "no domain chooses it significantly more than the others do. ", "Most above the others: ", name, `: ${numbers}`, fewer];
  const often = d[FIRST], again = often === null ? "" : ` (so again in ${percent(often, 0)} of resamples)`;
  const how = leader !== e ? ["Specialised in ", name, ", though less so than ", expertLink(l, leader, `expert ${leader}`), ". "]
    : [often === null ? "" : often >= OFTEN ? "Clearly " : often >= LIKELY ? "Probably " : "Perhaps ", name, `'s: the most specialised expert of its layer${again}. `];
  const more = of.domains.map((other, i) => [other, i]).filter(([other, i]) => i !== main && other[DIFFERENCE] > 0 && passes(other[P]));
  const same = leader === e ? peers(row, main, e, d[SHARE]) : [];
  return [how, numbers,
    more.length > 0 && [" Also chosen significantly more by ", listed(more.map(([other, i]) => `${domains[i]} (${percent(other[SHARE])})`)), "."], fewer,
    same.length > 0 && [` Not ${domains[main]}'s only one: also `, listed(same.slice(0, 3).map(([other, share]) => [expertLink(l, other, `expert ${other}`), ` (${percent(share)})`])), same.length > 3 ? [" and ", link({ href: `#layer=${l}&part=experts` }, `${same.length - 3} more`), "."] : "."]];
};

const reading = (of) => of.tokens.length ? [tokenList(of.tokens.slice(0, 6).map(([token, , , lift]) => [token, times(lift, 2)])),
  of.explained.length > 0 && h("small", {}, `the token explains ${percent(of.explained[0][4], 0)} of its choices (`, term("R²"), ")")] : "No token stands out.";
const writing = (of, early) => {
  const sure = of.promoted.filter(([, , recurs]) => recurs);
  if (!of.promoted.length) return "Nothing that can be told.";
  return [tokenList((sure.length ? sure : of.promoted).slice(0, 6).map(([token, , recurs]) => [token, "", recurs])),
    h("small", {}, sure.length ? "found in both halves of the sources" : "found in one half of the sources only: this may be chance", early ? "; an early layer, which this may not read rightly" : "")];
};

const DIRECTION = (low, high) => low === null ? "too few sources for an interval" : low > 0 ? "more than nothing" : high < 0 ? "less than nothing: the loss falls" : "not distinguishable from 0";
// What a domain loses; of an expert that is held against controls the interval that is corrected, as stars are.
const cost = (line, held) => {
  const corrected = held && held.controls > 0, [low, high] = corrected ? [held.all_low, held.all_high] : [line[ADDED_LOW], line[ADDED_HIGH]];
  return [`${atlas.domains[line[READ]]}'s loss grows by ${milli(line[ADDED])} `, term("millinats"), ` a token (${span(low, high, milli)}${low === null ? "" : corrected ? ", corrected" : ", not corrected"}; ${whole(line[TOKENS])} tokens, ${whole(line[SOURCES])} sources; perplexity ${times(Math.exp(line[ADDED]))}): ${DIRECTION(low, high)}${corrected || low === null ? "" : ", if it had been the only expert to look at"}. `,
    atFirst(line) && h("b", {}, `Mostly at the first four tokens of windows (${percent(line[AT_FIRST] / line[ADDED], 0)} of it). `), atFirst(line) && "Where texts begin alike, this is the cost of these few tokens, and the interval is far too sure. "];
};
const MOSTLY = 0.5;
const atFirst = (line) => line[ADDED] > 0 && line[AT_FIRST] > MOSTLY * line[ADDED];
const removal = (of, main) => {
  const name = atlas.domains[main], known = of.knockouts.find((line) => line[READ] === main), against_ = (domain) => of.compared.find((c) => c.domain === domain);
  if (!known) return ["Not taken out: too many experts for that. The linear estimate for ", name, ` is ${milli(of.domains[main][SAVED])} `, term("millinats"), " a token, and may be far off."];
  const worst = of.knockouts.reduce((most, line) => (line[ADDED] > most[ADDED] ? line : most));
  const better = of.knockouts.filter((line) => line[ADDED_HIGH] !== null && line[ADDED_HIGH] < 0);
  return [cost(known, against_(main)), against_(main) ? against(against_(main)) : "Here it was not held against controls. ",
    worst[READ] !== main && worst[ADDED] > 0 && ["It costs most elsewhere: ", cost(worst, against_(worst[READ])), against_(worst[READ]) && against(against_(worst[READ]))],
    better.length > 0 && ["Without it the loss falls on ", listed(better.map((line) => `${atlas.domains[line[READ]]} by ${milli(-line[ADDED])} (${span(-line[ADDED_HIGH], -line[ADDED_LOW], milli)}, not corrected)`)), "."]];
};
const than = (value) => value < 0 ? `${milli(-value)} less than` : `${milli(value)} more than`;
const range = (held) => `${milli(held.control_least)} to ${milli(held.control_most)}`;
// Controls that differ by more than the expert costs: which were drawn decides what it is held against.
const unlike = (held) => held.control_most - held.control_least > Math.abs(held.added);
const against = (held) => {
  if (!held.controls) return "There are no controls to hold it against: no others of the layer carry as much weight. ";
  const difference = `${than(held.over_most)} the costliest of its ${held.controls} controls, which cost ${range(held)} (difference ${span(held.over_most_low, held.over_most_high, milli)}, corrected)`;
  if (held.starred === null) return `Too few sources to hold it against its controls, which cost ${range(held)}. `;
  return h("span", {}, h("b", {}, held.starred ? "More than each of its controls *" : "Not shown to cost more than its controls"), `: ${difference}. `,
    !held.starred && held.over_most_low > 0 && "Its own cost is not distinguishable from 0 after correction. ", unlike(held) && "Controls differ by more than the expert costs. ");
};

const verdict = (of, row, e) => {
  const { about } = atlas, main = of.rare ? 0 : mainDomain(of, row, e);
  if (of.rare) return h("p", { class: "lead warn" }, `Only ${whole(of.assigned)} of ${whole(total())} tokens chose it: what it stands for cannot be told from these texts.`);
  const parts = [["Whose", whose(of, row, e)], ["Reads", reading(of)], ["Writes", writing(of, about.layers[row] < about.model.layers / 2)], ["Without it", removal(of, main)]];
  const picked = about.domains.length > 1 && (leaderOf(row, main) === e || of.compared.some((held) => held.by === "share"));
  if (picked) parts.push(["Caution", `It was picked for its share on these same texts; on others, expect its share to be less extreme.`]);
  return h("dl", { class: "verdict" }, parts.flatMap(([name, said]) => [h("dt", {}, name), h("dd", {}, said)]));
};

const PARTS = [["whose", "Whose tokens"], ["why", "What explains it"], ["reads", "Reads"], ["writes", "Writes"], ["where", "Contexts"], ["with", "Goes with"], ["similar", "Similar"], ["without", "Without it"]];
const contents = (l, e) => h("nav", { class: "contents", "aria-label": "On this page" },
  PARTS.filter(([id]) => id !== "where" || atlas.about.contexts).map(([id, name]) => h("a", { href: `#layer=${l}&expert=${e}&part=${id}` }, name)));

// The address of the page, into the clipboard; on a page from the disk by the older way, which needs no permission.
const copyLink = () => {
  const told = h("span", { class: "muted", role: "status" });
  const copy = async () => {
    const field = h("textarea", { readonly: true, class: "hidden" }, location.href);
    document.body.append(field);
    field.select();
    let done = document.execCommand("copy");
    field.remove();
    if (!done) done = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    const onDisk = location.protocol === "file:" ? ` It is an address on your disk: send the folder, and say “index.html${location.hash}”.` : "";
    told.replaceChildren(done ? `Copied.${onDisk}` : "It cannot be copied here; take it from the address bar.");
  };
  return [h("button", { type: "button", class: "copy", onclick: copy }, "Copy link"), told];
};

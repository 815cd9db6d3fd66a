"use strict";
// Texts token by token: which experts were chosen, with which weight, and what a lens reads after each of them alone.
atlas.views.text = async ({ text, layer, pos }) => {
  const { about } = atlas;
  if (!about.texts.length) return [h("h1", {}, "Texts"), h("p", {}, "This atlas was made without texts.")];
  const chosen = about.texts[Number(text)] ? Number(text) : 0;
  const row = Math.max(0, about.layers.indexOf(Number(layer)));
  const of = await atlas.load(`text-${chosen}`);
  const slots = of.layers[about.layers[row]];
  const at = of.tokens[Number(pos)] === undefined ? 0 : Number(pos || 0);
  const shares = slots.map((ranks) => ranks[0][1] / (ranks.reduce((sum, slot) => sum + slot[1], 0) || 1));
  const name = (t) => `${t.domain || "own"}: ${t.source}`;
  const written = characters(of.tokens.map(textOf));
  const words = of.tokens.map((token, i) => h("a", {
    class: `piece${i === at ? " here" : ""}`, href: `#text=${chosen}&layer=${about.layers[row]}&pos=${i}`, "aria-current": i === at ? "true" : null,
    vars: { w: shares[i].toFixed(3) }, title: `top expert ${slots[i][0][0]}, ${percent(shares[i], 0)} of the weight`,
  }, shownInline(written[i])));
  const mine = slots[at];
  const layersHere = about.layers.map((l) => [`Layer ${l}`, ...of.layers[l][at].map(([expert, weight]) => h("span", {}, expertLink(l, expert, String(expert)), h("small", {}, ` ${weightOf(weight)}`)))]);
  return [
    h("h1", {}, "Texts, token by token"),
    h("div", { class: "controls" },
      choose("Text", about.texts.map((t, i) => [i, name(t)]), chosen, (value) => go({ text: value, pos: 0 })),
      choose("Layer", about.layers.map((l) => [l, String(l)]), about.layers[row], (value) => go({ layer: value }))),
    h("p", { class: "note" }, ["Darker: rank 0 has more of the weight. Click a token", h("span", { class: "keys" }, ", or move with ← and →"), "."]),
    h("p", { class: "running", dir: "auto" }, words),
    section("at", `Token ${at} (counted from 0; ${of.tokens.length} are shown)`, null,
      h("p", {}, "Token ", tokenLink(of.tokens[at]), ". ", of.tokens[at + 1] === undefined ? "" : ["The text goes on with ", tokenLink(of.tokens[at + 1]), ". "], "The model thinks most likely: ", tokenLink(of.predicted[at]), "."),
      h("h3", {}, `Layer ${about.layers[row]}`),
      table([term("rank", "Rank"), "Expert", term("weight", "Weight"), "Next token read after this expert alone", "Probability"],
        mine.map(([expert, weight, token, prob], rank) => [String(rank), expertLink(about.layers[row], expert, `expert ${expert}`), weightOf(weight), token < 0 ? "–" : tokenLink(token), prob === null ? "–" : percent(prob)])),
      h("p", { class: "note" }, `The ${mine.length} weights add up to ${weightOf(mine.reduce((sum, slot) => sum + slot[1], 0))} (`, term("weight", "why not 1?"), "). Read after one expert: the ", term("logit lens"), " on ", term("u"), " plus its contribution."),
      h("h3", {}, "All layers"), h("p", { class: "note" }, "Experts by ", term("rank"), ", with their weights."),
      table(["", ...mine.map((_, rank) => `rank ${rank}`)], layersHere)),
  ];
};

// Spaces as they are; line ends and what has no shape of its own by name.
const shownInline = (text, newline = "↵\n") => [...text].map((c) => (c === " " ? " " : c === "\n" ? newline : readable(c))).join("") || "∅";

// Texts of tokens in a row; of a character that is spread over several, the last token shows it, and the others ‥.
const characters = (texts) => {
  let bytes = [];
  return texts.map((text) => {
    let shown = "";
    for (const [, byte, other] of text.matchAll(/\\x([89a-f][0-9a-f])|([\s\S])/gu)) {
      if (byte === undefined) { shown += bytes.length ? `\ufffd${other}` : other; bytes = []; continue; }
      bytes.push(parseInt(byte, 16));
      try { shown += new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes)); bytes = []; } catch { /* more of it follows */ }
    }
    return bytes.length ? `${shown}‥` : shown;
  });
};

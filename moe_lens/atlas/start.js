"use strict";
// What the atlas is of, and from the place after # to a view.
atlas.views.about = () => {
  const { about } = atlas, m = about.model;
  return [h("h1", {}, "About this atlas"),
    table(["", ""], [["Model", m.name], ["Type", m.type], ["Parameters", whole(m.parameters)], ["Layers", `${m.layers}, of them with experts: ${about.layers.join(", ")}`], ["Experts", `${about.experts} a layer, ${about.top_k} active a token, ${m.shared_experts} shared`], ["Precision", `${m.dtype}, packed: ${m.quantised}`], ["Fingerprint", m.fingerprint],
      ["Windows", `of at most ${about.reading.context} tokens`], ["Written by", `moe_lens ${about.version}: ${about.command}`]].map(([name, value]) => [h("b", {}, name), String(value)])),
    section("texts", "Texts, and how well the model predicts them", [`Intervals resample sources: a domain with fewer than ${about.limits.sources} sources has none. Loss: `, term("nats"), " a token, over all windows; uniform: if all tokens were alike; perplexity: e to the loss, as if the model had to choose between so many tokens."],
      table(["Domain", "Tokens", "Windows", "Sources", "Loss", term("95 % interval"), "Uniform", "Perplexity"], [...about.domains.map((d) => [h("b", {}, d.name), whole(d.tokens), whole(d.windows), whole(d.sources), d.loss.toFixed(2), span(d.low, d.high, (v) => v.toFixed(2)), d.uniform.toFixed(2), number(Math.exp(d.loss))]),
        [h("b", {}, "all"), whole(total()), whole(total("windows")), whole(total("sources")), "", "", "", ""]])),
    section("how", "How to read it", null,
      h("ul", {}, [
        `An expert that fewer than ${about.limits.rare} tokens chose is too rare: its page says "cannot be told".`,
        "A star marks what is significant after correction for everything that was tested at once. Beside a share: it differs between domains. Beside a knock-out: the expert costs more than nothing, and more than each of its controls. Without a star, a difference may be chance.",
        "What an expert writes is read through the final norm and the unembedding, as if no layer followed. In early layers this may say little.",
        "Which experts a token chooses depends to a large part on the token alone: compare a domain's share with the share by the token alone.",
        "Links are stable: #layer=3, #layer=3&expert=17, #layer=3&expert=17&part=without, #token=12, #text=0&layer=3&pos=4. The folder can be sent; the pages do not need its folders study and knockouts, which hold the tables.",
      ].map((line) => h("li", {}, line)))),
    section("glossary", "Words", null, glossary()),
    section("keys", "Keys", null, h("p", {}, "/ search: a token, or an expert such as 4:48 · arrow keys on the map and in texts · [ and ] the expert before and after · m map")),
    about.attribution && section("licences", "Where the texts come from", null, h("pre", {}, about.attribution))];
};

const show = async () => {
  const at = place(), view = document.getElementById("view");
  const name = ["text" in at ? "text" : "expert" in at ? "expert" : "layer" in at ? "layer" : null, "token" in at && "token", "about" in at && "about"].find(Boolean) || "map";
  let content;
  try {
    content = await atlas.views[name](at);
  } catch (error) {
    content = [h("h1", {}, "Cannot be shown"), h("p", { class: "warn" }, String(error.message))];
  }
  if (JSON.stringify(at) !== JSON.stringify(place())) return; // somebody has gone on meanwhile
  const moved = view.dataset.view !== name || ["expert", "layer", "token"].includes(name);
  view.dataset.view = name;
  view.replaceChildren(...content.flat(Infinity).filter(Boolean));
  document.title = `${view.querySelector("h1").textContent} · Atlas of experts`;
  document.getElementById("found").hidden = true;
  atlas.measure();
  const part = at.part && document.getElementById(at.part);
  if (part) part.scrollIntoView();
  else if (moved) window.scrollTo(0, 0);
  view.dataset.shown = location.hash;
};

atlas.begin();
document.getElementById("model").textContent = atlas.about.model.name;
document.getElementById("to-texts").hidden = !atlas.about.texts.length;
document.getElementById("search").addEventListener("input", search);
document.addEventListener("keydown", keys);
window.addEventListener("hashchange", show);
dark.addEventListener("change", show);
show();

"use strict";
// Words that are explained where they stand: a dotted word opens its explanation, by mouse, finger or key.
const TERMS = {
  "millinats": "A thousandth of a nat, the unit of loss with natural logarithms. 10 millinats a token are 1 % of perplexity.",
  "95 % interval": "Where the value would lie with other sources of the same kind: sources (documents) are resampled, not tokens. It is of one number by itself, unless it is called corrected.",
  "share": "The part of a domain's tokens that have the expert among their active ones.",
  "by the token alone": "What the share would be if every token chose as it does in all domains together. A share above it depends on more than the token itself.",
  "uniform": "The share of every expert if routing made no difference: active experts divided by experts.",
  "p (maxT)": "Of the domain's share against the mean share of the other domains; two-sided: a share may be above or below. Sources are given to domains at random, and each difference is compared with the greatest of all experts, layers and domains of a draw. So p is corrected for all of them (Westfall and Young's maxT). It is not tested where fewer than 10 tokens would be expected in some domain.",
  "most specialised": "The expert of a layer whose share of the domain's tokens is most above its mean share of the other domains' tokens. In resamples: how often it is so again when sources are drawn anew.",
  "lift": "How many times as often as expected. For a token: the share of its occurrences that choose the expert, divided by the share of all tokens that do. For two experts: the tokens that choose both, divided by what independent choices would give. Above 1: more often than by chance.",
  "weight": "The router's weight of an expert at a token, by which its output is multiplied. It is a probability over all experts of the layer, of which only those of the active ones are used. Unless the model rescales them, the weights of the active experts add up to less than 1; some models scale them to more.",
  "rank": "The active experts of a token by weight, counted from 0: rank 0 has the greatest weight.",
  "R²": "The part of the squared error that a prediction saves compared with the expert's mean share for every token, on sources that it was not fitted on: 1 is perfect, 0 no better than the mean, below 0 worse.",
  "AUC": "How often a token that chose the expert is scored above one that did not: 50 % is chance, 100 % perfect.",
  "shuffled": "The null: the same prediction with the feature shuffled over tokens, so that it says nothing. It should be 0 or a little less.",
  "nats": "The unit of entropy with natural logarithms. The entropy of an expert's tokens is low if few different tokens choose it.",
  "super expert": "An expert with extreme activations. Two of three conditions are checked: its greatest activation is above the 99.5th percentile of all experts, and above a tenth of the greatest.",
  "u": "The residual stream before the experts of a layer are added to it.",
  "logit lens": "What the model would predict if nothing followed: a stream through the final norm and the unembedding. In early layers it may say little.",
  "knock-out": "The expert's contribution is set to zero at every token that chose it, and all later layers are computed again.",
  "first order": "A linear estimate of a knock-out: gradient × activation, from one pass for all experts. It takes the loss for a straight line as far as the expert's whole contribution reaches, and later choices of experts as fixed. For an expert that contributes much it can be far off, in size and in sign.",
  "control": "Other experts of the same layer, drawn at random and taken out together, that carry as much of the domain's routing weight as the expert, within a tenth. Four are sought. They are few, and one that holds an expert of great cost decides their mean: so the costliest counts.",
  "star": "*: shown to cost more than its controls. Both are above 0, with corrected intervals: what the expert costs by itself, and what it costs more than the costliest of its controls. Either alone says little. It is said of these controls: of five coalitions that are alike, one is the costliest.",
  "corrected": "95 % for all such comparisons of this atlas together (Bonferroni), not for each by itself: half of the chance of error for the most specialised experts, half for the costliest, which are corrected for every expert and domain that could have been the costliest.",
  "\\x… and ‥": "A token may be part of a character. By itself it is shown by its bytes, such as \\xe2\\x80; in a text the last of such tokens shows the character, and those before it show ‥. ␣, ↵ and ⇥ are a space, a line's end and a tab.",
  "recurs": "Underlined: also found when only the other half of the sources is used. The rest may be chance.",
  "norm": "Mean over its tokens of the length of what the expert adds, divided by the length of the residual stream.",
  "correlation": "Of the outputs of both experts on the same tokens, after the mean output of each is taken away; tokens need not have chosen them. 0: unrelated.",
};

const term = (name, shown = name) =>
  h("button", { class: "term", type: "button", title: TERMS[name], onclick: () => explain(name) }, shown);

// One panel at the lower edge; Escape and the button close it.
const explain = (name) => {
  let panel = document.getElementById("explained");
  if (!panel) document.body.append(panel = h("aside", { id: "explained", role: "status", "aria-label": "Explanation" }));
  panel.hidden = !name;
  if (name) panel.replaceChildren(h("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => explain(null) }, "×"), h("b", {}, name), " ", TERMS[name]);
};
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && document.getElementById("explained")) explain(null); });

const glossary = () => h("dl", { class: "glossary" }, Object.entries(TERMS).flatMap(([name, said]) => [h("dt", {}, name), h("dd", {}, said)]));

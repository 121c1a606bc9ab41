// Experts: the text with each token's experts and their weights, a layer at a time.
const {tokens, n_experts: count, layers} = data; // layers: {name, indices [token][chosen], weights [token][chosen]}
// The number stands beside every colour, since there may be more experts than colours that can be told apart.
const colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"];
const colourOf = (expert) => colours[expert % colours.length];
let at = 0, expert = null, locked = null;
const said = make("p", {className: "said", ariaLive: "polite"}, "Hover over a token for its experts; click an expert for its tokens.");
const chart_ = make("div", {className: "row", role: "group", ariaLabel: "experts"});
const text = make("div", {className: "tokens", role: "group", ariaLabel: "tokens"});
const pairs = (i) => layers[at].indices[i].map((e, n) => [e, layers[at].weights[i][n]]);

function look(i) {
  said.textContent = `${quoted(tokens[i])} (${i}), ${layers[at].name}: ${pairs(i).map(([e, w]) => `expert ${e}: ${w.toFixed(3)}`).join(", ")}`;
}
function show() {
  const total = new Array(count).fill(0), first = new Array(count).fill(0);
  const words = tokens.map((token, i) => {
    const all = pairs(i), sum = all.reduce((so, [, w]) => so + Math.abs(w), 0) || 1;
    all.forEach(([e], n) => { total[e] += 1; if (!n) first[e] += 1; });
    const share = make("span", {className: "share"}, ...all.map(([e, w]) => {
      const part = make("i", {}, String(e));
      part.style.cssText = `flex:${Math.max(0.3, Math.abs(w) / sum)};background:${colourOf(e)};color:${inkOn(channels(colourOf(e)))}`;
      return part;
    }));
    const faded = expert !== null && !all.some(([e]) => e === expert);
    return make("button", {type: "button", className: `routed${faded ? " faded" : ""}${i === locked ? " locked" : ""}`, ariaLabel: `${quoted(token)}: ${all.map(([e]) => `expert ${e}`).join(", ")}`},
      make("span", {className: "token"}, visible(token)), share);
  });
  answer(words, (i) => { if (locked === null) look(i); }, (i) => { locked = locked === i ? null : i; look(i); });
  roving(words, 1);
  text.replaceChildren(...words);
  chart_.replaceChildren(...total.map((n, e) => {
    const swatch = make("span", {}, `${e}`);
    swatch.style.cssText = `background:${colourOf(e)};color:${inkOn(channels(colourOf(e)))};padding:0 .4em;border-radius:.2em`;
    const button = make("button", {type: "button", ariaPressed: String(e === expert), ariaLabel: `expert ${e}`}, swatch, ` ${n} of ${tokens.length}`);
    button.addEventListener("click", () => { expert = expert === e ? null : e; show(); });
    return button;
  }));
  if (expert !== null) said.textContent = `expert ${expert} of ${layers[at].name}: chosen for ${total[expert]} of ${tokens.length} tokens, first for ${first[expert]}`;
  ablate.disabled = forbid.disabled = expert === null;
}
const chosen = () => `${layers[at].name.replace("layer ", "L")}E${expert}`;
const ablate = live(() => ({ablate_expert: chosen()}), "ablate this expert"), forbid = live(() => ({forbid_expert: chosen()}), "route away from it");
const slider = make("input", {type: "range", min: 0, max: layers.length - 1, value: 0, ariaLabel: "layer"});
const name = make("output", {}, layers[0].name);
slider.addEventListener("input", () => { at = Number(slider.value); name.textContent = layers[at].name; show(); });
view.append(make("div", {className: "row"}, slider, name, ablate, forbid), text, said,
  make("p", {className: "quiet"}, "Under each token: the experts chosen, as wide as their weights. Below: how many tokens chose each expert."), chart_);
paintWith(show);

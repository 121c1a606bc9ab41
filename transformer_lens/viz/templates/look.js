// `transformer-lens look`: a text, the views of a live model as frames, and the list of what is switched off.
let state = data, shown = data.views[0];
const WORDS = {ablate_head: "without head", ablate_expert: "without expert", forbid_expert: "routed away from"};
const input = make("input", {value: state.text, ariaLabel: "text", style: "flex:1 1 20rem"});
const form = make("form", {className: "row"}, input, make("button", {}, "read this text"));
const tabs = make("div", {className: "row", role: "group", ariaLabel: "views"});
const edits = make("div", {className: "row"});
const said = make("p", {className: "said", role: "status"});
const frame = make("iframe", {title: "view", style: "width:100%;height:75vh;border:1px solid var(--line);border-radius:.4rem"});

/** Send a change, and show what the model is then. A change that is there already is undone. */
async function send(change) {
  said.textContent = "The model runs...";
  const answer = await fetch("change", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(change)});
  const result = await answer.json();
  said.textContent = result.error || "";
  if (!result.error) { state = result; show(); }
}
function show() {
  tabs.replaceChildren(...state.views.map((name) => {
    const tab = make("button", {type: "button", ariaPressed: String(name === shown)}, name);
    tab.addEventListener("click", () => { shown = name; show(); });
    return tab;
  }));
  edits.replaceChildren(...state.edits.map(([kind, place]) => {
    const undo = make("button", {type: "button", title: "undo"}, `${WORDS[kind]} ${place} ×`);
    undo.addEventListener("click", () => send({[kind]: place}));
    return undo;
  }));
  frame.src = shown;
}
form.addEventListener("submit", (event) => { event.preventDefault(); send({text: input.value}); });
addEventListener("message", (event) => { if (event.origin === location.origin && event.source === frame.contentWindow) send(event.data); });
view.append(form, tabs, edits, said, frame);
show();

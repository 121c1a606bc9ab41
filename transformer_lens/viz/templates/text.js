// Running text, each token coloured by a number; several rows of numbers have a menu.
const {tokens, names, rows, unit, notes} = data;
const said = make("p", {className: "said", ariaLive: "polite"}, "Hover over a token, or tap to lock it.");
const words = tokens.map((token) => make("span", {className: "token"}, visible(token)));
const scale = make("p", {className: "quiet"});
let row = 0, locked = null;

function look(i) {
  const numbers = names.map((name, n) => `${name} ${rows[n][i].toFixed(4)}${unit ? ` ${unit}` : ""}`).join(", ");
  said.textContent = `${quoted(tokens[i])} (${i}): ${numbers}${notes ? `\n${notes[i]}` : ""}`;
  words.forEach((word, n) => word.classList.toggle("locked", n === locked));
}
function paint() {
  const values = rows[row], most = Math.max(...values.map(Math.abs)) || 1;
  words.forEach((word, i) => {
    tint(word, values[i] / most, 0.75);
    word.title = word.ariaLabel = `${quoted(tokens[i])}: ${values[i].toFixed(4)} ${unit}`;
  });
  scale.textContent = `${names[row]}: full colour is ${`${digits(most)} ${unit}`.trim()}; blue is more than 0, orange less`;
}
answer(words, (i) => { if (locked === null) look(i); }, (i) => { locked = locked === i ? null : i; look(i); });
roving(words, 1);
// A line break in the text breaks the line, and otherwise text runs on.
const running = words.flatMap((word, i) => (tokens[i].endsWith("\n") ? [word, make("br")] : [word]));
view.append(
  make("div", {className: "row"}, picker("values", names, (i) => { row = i; paint(); })),
  make("div", {className: "tokens", role: "group", ariaLabel: "tokens"}, ...running), said, scale);
paintWith(paint);

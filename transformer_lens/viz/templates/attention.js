// Attention: the text, one head large, and thumbnails of all heads, each drawn when it comes into sight.
const {tokens, first_query: offset, heads: names, layers, queries, levels} = data;
const keys = tokens.length, counts = unpack(data.values, levels === 255 ? 1 : 2);
// A query sees the keys up to its own position; only those are stored, query after query.
const starts = Array.from({length: queries + 1}, (_, q) => q * (offset + 1) + (q * (q - 1)) / 2);
const value = (head, q, k) => (k > q + offset ? 0 : counts[head * starts[queries] + starts[q] + k] / levels);
const label = (position) => `${quoted(tokens[position])} (${position})`;
let head = data.first, locked = null, backward = false;

function draw(canvas, number) {
  canvas.width = keys;
  canvas.height = queries;
  const context = canvas.getContext("2d"), image = context.createImageData(keys, queries);
  for (let q = 0, at = 0; q < queries; q++) {
    for (let k = 0; k < keys; k++, at += 4) {
      image.data.set(mixed(Math.sqrt(value(number, q, k))), at);
      image.data[at + 3] = k > q + offset ? 0 : 255;
    }
  }
  context.putImageData(image, 0, 0);
}

const said = make("p", {className: "said", ariaLive: "polite"});
const words = tokens.map((token, i) => make("span", {className: "token", ariaLabel: label(i)}, visible(token)));
// Labels along the large pattern, while they can be read.
const along = (side, labels) => make("div", {className: side}, ...(keys > 40 ? [] : labels.map((token) => make("span", {title: token}, visible(token)))));
const large = make("canvas", {className: "large", ariaLabel: "the pattern of the chosen head"});
const heading = make("h2");
const direction = make("button", {type: "button", ariaPressed: "false"}, "who attends to it");

/** Colour the text by what the token at `position` attends to (or what attends to it), and say the largest values. */
function look(position) {
  const found = tokens.map((_, other) => {
    const [q, k] = backward ? [other, position] : [position, other];
    return q < offset ? 0 : value(head, q - offset, k);
  });
  words.forEach((word, i) => { tint(word, found[i], 0.8); word.classList.toggle("locked", i === locked); });
  const best = found.map((share, i) => [share, i]).sort(([a], [b]) => b - a).slice(0, 5).filter(([share]) => share >= 0.0005);
  const list = best.map(([share, i]) => `${label(i)} ${share.toFixed(3)}`).join("; ");
  said.textContent = `${names[head]}: ${backward ? "to" : "from"} ${label(position)}: ${list || "nothing"}`;
}
const again = () => look(locked ?? keys - 1);

answer(words, (i) => { if (locked === null) look(i); }, (i) => { locked = locked === i ? null : i; look(i); });
roving(words, 1);
direction.addEventListener("click", () => {
  backward = !backward;
  direction.ariaPressed = String(backward);
  again();
});
function cellUnder(event) {
  const box = large.getBoundingClientRect();
  const at = (share, size) => Math.max(0, Math.min(size - 1, Math.floor(share * size)));
  return [at((event.clientY - box.top) / box.height, queries), at((event.clientX - box.left) / box.width, keys)];
}
function tell(event) {
  const [q, k] = cellUnder(event);
  if (locked === null) look(backward ? k : q + offset);
  said.textContent = `${names[head]}: from ${label(q + offset)} to ${label(k)}: ${k > q + offset ? "it comes later" : value(head, q, k).toFixed(3)}`;
}
large.addEventListener("mousemove", tell);
large.addEventListener("click", (event) => {
  const [q, k] = cellUnder(event);
  locked = backward ? k : q + offset;
  again();
  tell(event);
});

const columns = Math.max(...layers.map((layer) => layer.heads.length));
const thumbs = make("div", {className: "thumbs"});
thumbs.style.gridTemplateColumns = `auto repeat(${columns}, max-content)`;
const buttons = [];
for (const layer of layers) {
  thumbs.append(make("span", {className: "name"}, layer.name));
  for (let i = 0; i < columns; i++) {
    const number = layer.heads[i];
    if (number === undefined) { thumbs.append(make("span")); continue; }
    buttons[number] = make("button", {type: "button", title: names[number], ariaLabel: names[number]}, make("canvas"));
    thumbs.append(buttons[number]);
  }
}
const seen = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
  draw(entry.target.firstChild, buttons.indexOf(entry.target));
  seen.unobserve(entry.target);
}), {rootMargin: "200px"});

function choose(number) {
  buttons[head].ariaPressed = "false";
  head = number;
  buttons[head].ariaPressed = "true";
  menu.selectedIndex = head;
  heading.textContent = `${names[head]}: each row is a token that attends, each column one it attends to`;
  draw(large, head);
  again();
}
const menu = picker("head", names, choose, head);
buttons.forEach((button, i) => button.addEventListener("click", () => choose(i)));
roving(buttons, columns);
view.append(
  make("div", {className: "row"}, menu, direction, live(() => ({ablate_head: names[head]}), "ablate this head")),
  make("p", {className: "quiet"}, "Hover over a token, or tap to lock it; blue is how much it attends to each."),
  make("div", {className: "tokens", role: "group", ariaLabel: "tokens"}, ...words), said,
  make("div", {className: "attention"},
    make("section", {}, heading, make("div", {className: "pattern"}, along("to", tokens), along("from", tokens.slice(offset)), large), make("p", {className: "quiet"}, `Drawn by the square root, so that small values can be seen; numbers are rounded to 1/${levels}.`)),
    make("section", {}, make("h2", {}, names.length > 1 ? `All ${names.length} heads` : ""), thumbs)));
paintWith(() => {
  choose(head);
  buttons.forEach((button) => seen.observe(button));
});

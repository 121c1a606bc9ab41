// Parts that add up to a whole: each bar starts where the one before ended.
const {labels, values, value: unit} = data;
const said = make("p", {className: "said", ariaLive: "polite"}, "Hover over a bar, or move with the arrow keys.");
const ends = values.reduce((so, v) => [...so, (so.at(-1) || 0) + v], []);
const names = [...labels, "total"], bars = [...values, ends.at(-1)];
const width = Math.max(Math.min(720, view.clientWidth - 32), 24 * names.length + 80), height = 380, left = 50, head = 14, bottom = 84;
const least = Math.min(0, ...ends), most = Math.max(0, ...ends, least + 1e-9);
const y = (v) => head + ((height - head - bottom) * (most - v)) / (most - least);
const step = (width - left - 10) / names.length;
const svg = makeSvg("svg", {width, height, role: "group", "aria-label": data.title});
for (const v of [least, 0, most]) {
  svg.append(makeSvg("line", {x1: left, x2: width, y1: y(v), y2: y(v), stroke: "var(--line)"}));
  svg.append(makeSvg("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, Number(v.toPrecision(2)).toString()));
}
const drawn = bars.map((v, i) => {
  const from = i < values.length ? ends[i] - v : 0, x = left + i * step;
  const colour = i === values.length ? "var(--total)" : v < 0 ? "var(--fall)" : "var(--rise)";
  const bar = makeSvg("rect", {x: x + 2, width: step - 4, y: y(Math.max(from, from + v)), height: Math.max(1.5, Math.abs(y(from) - y(from + v))), fill: colour, "aria-label": `${names[i]}: ${digits(v)}`});
  svg.append(bar);
  svg.append(makeSvg("text", {x: 0, y: 0, "text-anchor": "end", transform: `translate(${x + step / 2 + 4} ${height - bottom + 14}) rotate(-45)`}, visible(names[i]).slice(0, 14)));
  return bar;
});
roving(drawn, 1);
const tell = (i) => { said.textContent = i < values.length ? `${names[i]} adds ${digits(values[i])} ${unit}; so far ${digits(ends[i])}` : `in all ${digits(ends.at(-1) ?? 0)} ${unit}`; };
answer(drawn, tell, tell);
view.append(make("div", {className: "wide"}, svg), said, make("p", {className: "quiet"}, "Blue adds, orange takes away."));

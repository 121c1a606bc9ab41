// Labelled matrices: one, several with a menu, or several side by side whose cells answer together.
const panels = data.panels;
const holder = make("div", {className: "panels"});
// Side by side where both fit.
holder.style.setProperty("--least", data.beside ? `${Math.max(24, 7 + 3.4 * panels[0].columns.length)}rem` : "100%");
const more = make("div");
const shown = []; // of each panel on the page: its cells, row by row, and where it says what they hold

/** A column by its title and label; tokens with their positions, since one may occur twice. */
const columnOf = (panel, c) => `${panel.column_title} ` + (["position", "token", "after"].includes(panel.column_title)
  ? `${quoted(panel.columns[c])} (${c})` : visible(panel.columns[c]));
function about(panel, r, c) {
  const lines = [`${panel.row_title} ${visible(panel.rows[r])}, ${columnOf(panel, c)}: ${digits(panel.values[r][c])}`.trim()];
  if (panel.low) lines[0] += ` (${digits(panel.low[r][c])} to ${digits(panel.high[r][c])})`;
  if (panel.notes && panel.notes[r][c]) lines.push(panel.notes[r][c]);
  return lines.join("\n");
}

/** What a column does down the rows: its tokens' probabilities where the picture knows them, else its values. */
function follow(panel, r, c) {
  const known = panel.paths && panel.paths[c];
  const at = panel.texts && panel.texts[r][c];
  const lines = known
    ? Object.entries(known).map(([name, values]) => ({name, values, strong: name === at}))
    : [{name: panel.columns[c], values: panel.values.map((row) => row[c]), strong: true,
        ...(panel.low && {low: panel.low.map((row) => row[c]), high: panel.high.map((row) => row[c])})}];
  const best = lines.sort((a, b) => b.strong - a.strong || Math.max(...b.values) - Math.max(...a.values)).slice(0, 5);
  const what = known ? `${panel.name || data.title}: the path of ${quoted(at)}, ${columnOf(panel, c)}`
    : `${panel.name || data.title}: ${columnOf(panel, c)}, by ${panel.row_title}`;
  return make("section", {}, make("h2", {}, what), chart(best, panel.rows, panel.value));
}

function table(panel) {
  const said = make("p", {className: "said", ariaLive: "polite"}, "Hover, tap or move with the arrow keys; click for what a column does down the rows.");
  const turned = !panel.texts && panel.columns.some((name) => visible(name).length > 2);
  const head = panel.columns.map((name) => make("th", {scope: "col", className: turned ? "turned" : "", title: name}, make("span", {}, visible(name))));
  const cells = [], body = make("tbody"), few = panel.rows.length * panel.columns.length <= 200;
  panel.values.forEach((row, r) => {
    const line = make("tr", {}, make("th", {scope: "row", title: panel.rows[r]}, visible(panel.rows[r])));
    row.forEach((value, c) => {
      const cell = make("td", {}, panel.texts ? visible(panel.texts[r][c]) : few && value !== null ? value.toFixed(2) : "");
      if (panel.low && panel.low[r][c] <= 0 && panel.high[r][c] >= 0) cell.className = "unsure";
      cell.ariaLabel = about(panel, r, c);
      cells.push(cell);
      line.append(cell);
    });
    body.append(line);
  });
  paintWith(() => panel.values.flat().forEach((value, i) => {
    const [low, high] = panel.range;
    if (value !== null) tint(cells[i], low >= 0 ? (value - low) / (high - low) : value / Math.max(-low, high));
  }));
  roving(cells, panel.columns.length);
  const corner = make("th", {}, `${panel.row_title} \\ ${panel.column_title}`);
  const bar = make("span", {className: "scale"});
  paintWith(() => { bar.style.background = `linear-gradient(to right, ${css(mixed(panel.range[0] < 0 ? -1 : 0))}, ${css(mixed(panel.range[0] < 0 ? 0 : 0.5))}, ${css(mixed(1))})`; });
  const key = make("p", {className: "quiet"}, `${panel.value}: ${digits(panel.range[0])} `, bar, ` ${digits(panel.range[1])}`,
    panel.low ? "; dashed: the 95 % interval holds 0" : "");
  const section = make("section", {}, panel.name ? make("h2", {}, panel.name) : "",
    make("div", {className: "wide"}, make("table", {className: "grid"}, make("thead", {}, make("tr", {}, corner, ...head)), body)), key, said);
  const entry = {panel, cells, said};
  const twins = (i) => shown.filter((other) => other.cells.length === cells.length).map((other) => [other, i]);
  answer(cells, (i) => {
    const columns = panel.columns.length;
    for (const other of shown) other.cells.forEach((cell) => cell.classList.remove("twin"));
    for (const [other] of twins(i)) {
      other.said.textContent = about(other.panel, Math.floor(i / columns), i % columns);
      other.cells[i].classList.add("twin");
    }
  }, (i) => {
    const columns = panel.columns.length;
    more.replaceChildren(make("div", {className: "panels"}, ...twins(i).map(([other]) => follow(other.panel, Math.floor(i / columns), i % columns))));
  });
  shown.push(entry);
  return section;
}

function show(numbers) {
  shown.length = 0;
  more.replaceChildren();
  holder.replaceChildren(...numbers.map((i) => table(panels[i])));
}
const all = panels.map((_, i) => i);
if (!data.beside) view.append(make("div", {className: "row"}, picker("panel", panels.map((panel) => panel.name), (i) => show([i]), data.first)));
view.append(holder, more);
show(data.beside ? all : [data.first]);

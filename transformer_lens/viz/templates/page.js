// What every view uses. `data` is the page's JSON; `view` is the element that a view fills.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const view = document.getElementById("view");

/** Make an element: make("p", {className: "quiet"}, "text", otherElement). Text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** A token as it can be seen: signs for line breaks, tabs and for nothing at all, codes for other control characters. */
const code = (sign) => ({"\n": "⏎", "\t": "⇥"})[sign] || `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`;
const visible = (token) => token.replace(/\p{C}/gu, code) || "∅";
const quoted = (token) => `'${visible(token)}'`;
const digits = (value) => (value === null ? "none" : Number(value.toFixed(4)).toString());

/** Numbers from base64: little-endian unsigned integers of one or two bytes. */
function unpack(text, bytes) {
  const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return bytes === 1 ? raw : new Uint16Array(raw.buffer);
}

const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
let palette = {};
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = Object.fromEntries(
    ["paper", "rise", "fall"].map((name) => [name, channels(style.getPropertyValue(`--${name}`).trim())]));
}
readPalette();

/** [r, g, b] for a share from -1 to 1: paper at 0, one colour for more, another for less. */
function mixed(share, strength = 0.9) {
  const end = share < 0 ? palette.fall : palette.rise, part = Math.min(1, Math.abs(share)) * strength;
  return palette.paper.map((from, i) => Math.round(from + (end[i] - from) * part));
}
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
/** Black or white, whichever can be read on a colour. */
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff");
function tint(element, share, strength) {
  const colour = mixed(share, strength);
  element.style.background = css(colour);
  element.style.color = inkOn(colour);
}

/** Draw now, and again when the reader changes between light and dark. */
function paintWith(paint) {
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readPalette(); paint(); });
}

/** Arrow keys move the focus among elements in rows of `columns`; one of them at a time is in the tab order. */
function roving(elements, columns) {
  elements.forEach((element, i) => { element.tabIndex = i ? -1 : 0; });
  elements.forEach((element, i) => element.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
    const next = step && elements[i + step];
    if (!next) return;
    event.preventDefault();
    element.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }));
}

/** Call `show(i)` when the pointer or the focus comes to an element, and `choose(i)` on a click, a tap or Enter. */
function answer(elements, show, choose) {
  elements.forEach((element, i) => {
    element.addEventListener("mouseenter", () => show(i));
    element.addEventListener("focus", () => show(i));
    element.addEventListener("click", () => choose(i));
    if (element.tagName !== "BUTTON") {
      element.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(i); } });
    }
  });
}

/** A select with a label; hidden where there is nothing to choose. */
function picker(label, options, change, selected = 0) {
  const select = make("select", {ariaLabel: label}, ...options.map((name) => make("option", {}, name)));
  select.selectedIndex = selected;
  select.hidden = options.length < 2;
  select.addEventListener("change", () => change(select.selectedIndex));
  return select;
}

/** Where a live model is behind the page (`transformer-lens look`), ask it for a change. */
const live = (change, label) => {
  const button = make("button", {type: "button", hidden: !data.live}, label);
  button.addEventListener("click", () => parent.postMessage(change(), location.origin));
  return button;
};

/** A line chart: `lines` are {name, values, low?, high?, strong?}, `labels` name the steps. */
function chart(lines, labels, unit) {
  const width = Math.min(560, view.clientWidth - 32), height = 240, left = 48, right = 110, above = 12, below = 34;
  const all = lines.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])]).filter((v) => v !== null);
  const least = Math.min(0, ...all), most = Math.max(...all, least + 1e-9);
  const x = (i) => left + ((width - left - right) * i) / Math.max(1, labels.length - 1);
  const y = (v) => above + ((height - above - below) * (most - v)) / (most - least);
  const svg = makeSvg("svg", {width, height, role: "img", "aria-label": `${unit}: ${lines.map((l) => l.name).join(", ")}`});
  const put = (...parts) => svg.append(makeSvg(...parts));
  for (const value of [least, (least + most) / 2, most]) {
    put("line", {x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--line)"});
    put("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, Number(value.toPrecision(2)).toString());
  }
  const every = Math.ceil(labels.length / 8);
  labels.forEach((label, i) => { if (i % every === 0) put("text", {x: x(i), y: height - 12, "text-anchor": i ? "middle" : "start"}, visible(label).slice(0, 10)); });
  const dashes = ["", "6 3", "2 3", "8 3 2 3", "1 4"];
  // Names stand at the ends of their lines, from the lowest up, each above the one before where they would touch.
  let lowest = height - below + 13;
  const end = (line) => y(line.values.at(-1) ?? 0);
  for (const [line, i] of lines.map((line, i) => [line, i]).sort(([a], [b]) => end(b) - end(a))) {
    const points = line.values.map((v, at) => (v === null ? null : `${x(at)},${y(v)}`)).filter(Boolean);
    const colour = line.strong ? "var(--rise)" : "var(--quiet)";
    if (line.low) {
      const edge = [...line.high.map((v, at) => `${x(at)},${y(v)}`), ...line.low.map((v, at) => `${x(at)},${y(v)}`).reverse()];
      put("polygon", {points: edge.join(" "), fill: colour, opacity: 0.2});
    }
    put("polyline", {points: points.join(" "), fill: "none", stroke: colour, "stroke-width": line.strong ? 3 : 1.5, "stroke-dasharray": dashes[i % dashes.length]});
    lowest = Math.min(lowest - 13, end(line) + 4);
    put("text", {x: width - right + 8, y: lowest, "font-weight": line.strong ? "bold" : "normal"}, visible(line.name).slice(0, 18));
  }
  return svg;
}

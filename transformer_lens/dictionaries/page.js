(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const shown = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\p{Cc}/gu, "·") || "∅";
  const round = (value) => (value === 0 ? "0" : String(Number(value.toPrecision(3))));
  const percent = (share) => (share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2)) + " %";
  const word = (id) => shown(data.tokens[id]);

  const features = data.features.map((one) => {
    const fired = one.histogram.reduce((sum, [, count]) => sum + count, 0);
    const strongest = one.contexts.map((context) => word(context.tokens[context.peak]));
    const promoted = one.logits ? one.logits.up.map(([id]) => word(id)) : [];
    const texts = one.contexts.map((context) => context.tokens.map(word).join(""));
    return {
      ...one,
      share: fired / data.count,
      fired,
      most: one.contexts.length ? one.contexts[0].value : 0,
      label: [...new Set(strongest)].join(" ") || "does not fire here",
      haystack: [String(one.number), ...promoted, ...texts].join("\n").toLowerCase(),
    };
  });
  let listed = features;
  let current = null;

  const silent = features.filter((one) => !one.fired).length;
  $("about").textContent =
    `${data.about} · ${features.length.toLocaleString()} features on ${data.count.toLocaleString()} tokens` +
    (silent ? ` · silent on them: ${silent.toLocaleString()}` : "");

  function list() {
    const wanted = $("search").value.trim().toLowerCase();
    const order = $("order").value;
    listed = features.filter((one) => {
      if (/^\d+$/.test(wanted)) return String(one.number).startsWith(wanted);
      return one.haystack.includes(wanted);
    });
    if (order !== "number") listed.sort((a, b) => b[order] - a[order]);
    const rows = listed.map((one) => {
      const item = make("li");
      const button = make("button");
      button.dataset.number = one.number;
      button.append(make("span", "", one.number), make("span", "label", one.label));
      button.title = one.label;
      button.addEventListener("click", () => show(one));
      item.append(button);
      return item;
    });
    $("list").replaceChildren(...rows);
    $("shown").textContent =
      listed.length === features.length ? `all ${features.length}` : `${listed.length} of ${features.length}`;
    if (listed.length && !listed.includes(current)) show(listed[0]);
    mark();
  }

  function mark() {
    for (const button of $("list").querySelectorAll("button")) {
      const here = current !== null && Number(button.dataset.number) === current.number;
      button.setAttribute("aria-current", here);
      // Only the list scrolls: on a phone the page would jump.
      if (here) $("list").scrollTop = button.offsetTop - $("list").offsetTop - $("list").clientHeight / 2;
    }
  }

  function histogram(one) {
    if (!one.fired) return make("p", "none", "It is zero on all of these tokens.");
    const space = "http://www.w3.org/2000/svg";
    const draw = (tag, attributes, text) => {
      const node = document.createElementNS(space, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      if (text !== undefined) node.textContent = text;
      return node;
    };
    const first = one.histogram[0][0];
    const last = one.histogram[one.histogram.length - 1][0];
    const bins = Math.max(last - first + 1, 6);
    const [width, height, foot] = [Math.max(260, $("histogram").clientWidth), 150, 20];
    const step = width / bins;
    const most = Math.max(...one.histogram.map(([, count]) => count));
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    picture.append(draw("line", { x1: 0, x2: width, y1: height - foot, y2: height - foot }));
    for (const [bin, count] of one.histogram) {
      const tall = Math.max(2, ((height - foot - 14) * count) / most);
      const bar = draw("rect", {
        x: (bin - first) * step + 1,
        width: Math.max(1, step - 2),
        y: height - foot - tall,
        height: tall,
      });
      const [from, to] = [data.bins[bin], data.bins[bin + 1]].map(round);
      bar.append(draw("title", {}, `${count.toLocaleString()} tokens from ${from} to ${to}`));
      picture.append(bar);
    }
    const every = Math.ceil((80 * bins) / width);
    for (let bin = first; bin <= first + bins; bin += every) {
      const anchor = bin === first ? "start" : bin === first + bins ? "end" : "middle";
      const at = { x: (bin - first) * step, y: height - 5, "text-anchor": anchor };
      picture.append(draw("text", at, round(data.bins[Math.min(bin, data.bins.length - 1)])));
    }
    picture.append(draw("text", { x: 0, y: 10 }, `up to ${most.toLocaleString()} tokens in a bin, values on a log scale`));
    return picture;
  }

  function logits(one) {
    const column = (pairs, kind) => {
      const node = make("div");
      const most = Math.max(...pairs.map(([, value]) => Math.abs(value))) || 1;
      for (const [id, value] of pairs) {
        const row = make("div", `row ${kind}`);
        const bar = make("i", "bar");
        bar.style.width = `${(100 * Math.abs(value)) / most}%`;
        row.append(bar, make("span", "", word(id)), make("span", "", round(value)));
        node.append(row);
      }
      return node;
    };
    return [column(one.logits.up, "rise"), column(one.logits.down, "fall")];
  }

  function contexts(one) {
    if (!one.contexts.length) return [make("li", "none", "nowhere in these texts")];
    return one.contexts.map((context) => {
      const item = make("li");
      const tokens = make("div", "tokens");
      context.tokens.forEach((id, place) => {
        const value = context.strengths[place];
        const token = make("span", place === context.peak ? "peak" : "", word(id));
        if (value > 0) token.style.background = `rgba(var(--tint), ${(0.08 + (0.62 * value) / one.most).toFixed(3)})`;
        token.title = `${word(id)}: ${round(value)}`;
        tokens.append(token);
      });
      item.append(
        make("span", "value", round(context.value)),
        tokens,
        make("span", "where", `text ${context.text}, token ${context.place}`),
      );
      return item;
    });
  }

  function show(one) {
    current = one;
    $("name").textContent = `Feature ${one.number}`;
    $("facts").textContent = one.fired
      ? `fires on ${percent(one.share)} of the tokens (${one.fired.toLocaleString()}) · strongest ${round(one.most)}`
      : "does not fire on these texts";
    $("histogram").replaceChildren(histogram(one));
    $("written").hidden = !one.logits;
    if (one.logits) $("logits").replaceChildren(...logits(one));
    $("contexts").replaceChildren(...contexts(one));
    document.querySelector("article").scrollTop = 0;
    history.replaceState(null, "", `#${one.number}`);
    mark();
  }

  function move(by) {
    const place = listed.indexOf(current) + by;
    if (place >= 0 && place < listed.length) show(listed[place]);
  }

  $("search").addEventListener("input", list);
  $("order").addEventListener("change", list);
  $("before").addEventListener("click", () => move(-1));
  $("after").addEventListener("click", () => move(1));
  addEventListener("resize", () => current && $("histogram").replaceChildren(histogram(current)));
  addEventListener("hashchange", () => {
    const named = features.find((one) => `#${one.number}` === location.hash);
    if (named) show(named);
  });
  addEventListener("keydown", (event) => {
    const typing = document.activeElement === $("search");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      $("search").blur();
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      $("search").focus();
    } else if (event.key === "ArrowDown" || event.key === "ArrowRight" || (event.key === "j" && !typing)) {
      if (document.activeElement === $("order")) return;
      if (typing && event.key === "ArrowRight") return;
      event.preventDefault();
      move(1);
    } else if (event.key === "ArrowUp" || event.key === "ArrowLeft" || (event.key === "k" && !typing)) {
      if (document.activeElement === $("order")) return;
      if (typing && event.key === "ArrowLeft") return;
      event.preventDefault();
      move(-1);
    }
  });

  current = features.find((one) => `#${one.number}` === location.hash) || null;
  if (current) show(current);
  list();
})();

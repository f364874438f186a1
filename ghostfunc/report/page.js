"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const n = data.ids.length;
  const ranking = data.columns.findIndex((c) => c.name === data.ranking);
  const scores = data.columns[ranking].values;
  const ROW = 34, ENDS = 5;

  // Everything that comes from the data goes through textContent: it is shown, never parsed.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "class") element.className = value; else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  function draw(tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }
  const number = (x) => {
    if (x === 0) return "0";
    const size = Math.abs(x);
    const text = size >= 1e4 || size < 1e-3 ? x.toExponential(2) : x.toPrecision(3);
    return text.replace("-", "−");
  };
  const signed = (x) => (x > 0 ? "+" : "") + number(x);
  const whole = (x) => x.toLocaleString("en-US");
  const label = data.columns[ranking].label;

  // --- the table's order -----------------------------------------------------------------------

  const ranks = new Int32Array(n);
  const ranked = Array.from({ length: n }, (_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);
  ranked.forEach((i, rank) => { ranks[i] = rank + 1; });
  const line = (i) => data.texts[i].map(([role, text]) => (role ? role + ": " : "") + text).join(" ⏎ ");
  let lowered = null; // texts in lower case, made at the first search
  const state = { sort: "rank", up: true, shown: ranked, picked: -1 };

  const sortKeys = { rank: (i) => ranks[i], row: (i) => data.ids[i], text: null, group: null };
  data.columns.forEach((c, k) => { if (k !== ranking) sortKeys[c.name] = (i) => c.values[i]; });

  function arrange() {
    const query = by("search").value.trim().toLowerCase();
    const group = by("group").value, sign = by("sign").value;
    if (query && !lowered) lowered = data.texts.map((_, i) => line(i).toLowerCase());
    let shown = ranked.filter((i) =>
      (!query || lowered[i].includes(query)) && (!group || data.groups[i] === group) &&
      (!sign || (sign === "+" ? scores[i] > 0 : scores[i] <= 0)));
    if (state.sort !== "rank") {
      const key = state.sort === "group" ? (i) => data.groups[i] : sortKeys[state.sort];
      shown = shown.map((i) => [key(i), i])
        .sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1])).map((pair) => pair[1]);
    }
    if (!state.up) shown.reverse();
    state.shown = shown;
    by("count").textContent = shown.length === n ? `${whole(n)} samples` : `${whole(shown.length)} of ${whole(n)} samples`;
    by("space").style.height = shown.length * ROW + "px";
    by("table").scrollTop = 0;
    heads();
    render();
  }

  // --- the table ---------------------------------------------------------------------------------

  const shownColumns = [["rank", "rank", false]];
  shownColumns.push([data.columns[ranking].name, label, false]);
  data.columns.forEach((c, k) => { if (k !== ranking) shownColumns.push([c.name, c.label, false]); });
  if (data.group) shownColumns.push(["group", data.group, true]);
  shownColumns.push(["row", "row", false]);
  const template = shownColumns.map(([name]) => (name === "rank" || name === "row" ? "4.5rem" : name === "group" ? "8rem" : "6.5rem"))
    .join(" ") + " minmax(14rem, 1fr)";

  function heads() {
    const cells = shownColumns.map(([name, text, left]) => {
      const key = name === data.ranking ? "rank" : name;
      const on = state.sort === key;
      const arrow = on ? (state.up ? " ↑" : " ↓") : "";
      const button = make("button", { type: "button", "data-sort": key, class: left ? "left" : "" }, text + (name === data.ranking && on ? "" : arrow));
      if (on) button.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      return button;
    });
    by("head").style.gridTemplateColumns = template;
    by("head").replaceChildren(...cells, make("span", { class: "left" }, "text"));
  }

  function cell(name, i) {
    if (name === "rank") return make("span", {}, whole(ranks[i]));
    if (name === "row") return make("span", {}, whole(data.ids[i]));
    if (name === "group") return make("span", { class: "left" }, data.groups[i]);
    const column = data.columns.find((c) => c.name === name);
    const x = column.values[i];
    if (name !== data.ranking) return make("span", {}, number(x));
    return make("span", { class: "score " + (x > 0 ? "plus" : "minus") }, signed(x));
  }

  function render() {
    const table = by("table");
    const first = Math.max(0, Math.floor(table.scrollTop / ROW) - 5);
    const last = Math.min(state.shown.length, first + Math.ceil(table.clientHeight / ROW) + 10);
    const rows = [];
    for (let at = first; at < last; at++) {
      const i = state.shown[at];
      const row = make("div", { class: "row", role: "row", "data-at": at, "aria-selected": String(i === state.picked) },
        ...shownColumns.map(([name]) => cell(name, i)), make("span", { class: "left" }, line(i).slice(0, 300)));
      row.style.gridTemplateColumns = template;
      rows.push(row);
    }
    by("rows").style.transform = `translateY(${first * ROW}px)`;
    by("rows").replaceChildren(...rows);
  }

  // --- one sample --------------------------------------------------------------------------------

  function heat(i) {
    const found = data.heat[i];
    if (!found) return null;
    const most = Math.max(...found.shares.map(Math.abs)) || 1;
    const text = make("div", { class: "text" });
    found.pieces.forEach((piece, k) => {
      const share = found.shares[k] / most;
      const token = make("span", { title: signed(found.shares[k]) }, piece);
      token.style.background = `rgba(var(--${share > 0 ? "good" : "bad"}-rgb), ${(0.75 * Math.sqrt(Math.abs(share))).toFixed(3)})`;
      text.append(token);
    });
    return [text];
  }

  function card(i) {
    const meta = make("div", { class: "meta" },
      make("span", { class: "score " + (scores[i] > 0 ? "plus" : "minus") }, signed(scores[i])),
      make("span", {}, `rank ${whole(ranks[i])}`), make("span", {}, `row ${whole(data.ids[i])}`));
    data.columns.forEach((c, k) => { if (k !== ranking) meta.append(make("span", {}, `${c.label} ${number(c.values[i])}`)); });
    if (data.group) meta.append(make("span", {}, data.groups[i]));
    const parts = heat(i) || [make("div", { class: "text" }, ...data.texts[i].flatMap(([role, text]) =>
      role ? [make("span", { class: "role" }, role), text] : [text]))];
    return make("div", { class: "card" }, meta, ...parts);
  }

  function pick(at) {
    if (at < 0 || at >= state.shown.length) return;
    state.picked = state.shown[at];
    const detail = by("detail");
    detail.hidden = false;
    detail.replaceChildren(card(state.picked));
    const table = by("table"), top = at * ROW, head = ROW;
    if (top < table.scrollTop) table.scrollTop = top;
    else if (top + ROW + head > table.scrollTop + table.clientHeight) table.scrollTop = top + ROW + head - table.clientHeight;
    render();
  }

  // --- the summary -------------------------------------------------------------------------------

  function tiles() {
    const tile = (value, text) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, text));
    const above = scores.filter((x) => x > 0).length;
    const middle = ranked[Math.floor(n / 2)];
    by("tiles").append(tile(whole(n), "samples"), tile(Math.round((100 * above) / n) + "%", "above zero"),
      tile(signed(scores[ranked[0]]), "highest"), tile(signed(scores[middle]), "median"), tile(signed(scores[ranked[n - 1]]), "lowest"));
    by("about").textContent = `A sample's score is the ${label} of its loss's gradient with the gradient of the target's loss. ` +
      "Above zero, a training step on the sample lowers the target's loss, to first order.";
    document.querySelectorAll(".by").forEach((e) => { e.textContent = label; });
    for (const [name, value] of Object.entries(data.facts)) {
      by("facts").append(make("span", {}, `${name.replaceAll("_", " ")}: ${value}`));
    }
  }

  function histogram() {
    const low = Math.min(0, scores[ranked[n - 1]]), high = Math.max(0, scores[ranked[0]]);
    const width = 560, height = 170, foot = 20, bins = Math.max(8, Math.min(60, Math.ceil(Math.sqrt(n) * 2)));
    const counts = new Array(bins).fill(0), span = high - low || 1;
    for (const x of scores) counts[Math.min(bins - 1, Math.floor(((x - low) / span) * bins))]++;
    const most = Math.max(...counts), step = width / bins;
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${label}` });
    counts.forEach((count, k) => {
      const tall = (count / most) * (height - foot - 14);
      const middle = low + ((k + 0.5) / bins) * span;
      const bar = draw("rect", { x: k * step + 0.5, y: height - foot - tall, width: Math.max(0.5, step - 1), height: tall, class: middle > 0 ? "good" : "bad" });
      bar.append(draw("title", {}, `${whole(count)} samples around ${number(middle)}`));
      svg.append(bar);
    });
    const zero = ((0 - low) / span) * width;
    svg.append(draw("line", { x1: zero, x2: zero, y1: 0, y2: height - foot, class: "axis" }));
    svg.append(draw("text", { x: 0, y: height - 5 }, number(low)), draw("text", { x: width, y: height - 5, "text-anchor": "end" }, number(high)));
    if (zero > 60 && zero < width - 60) svg.append(draw("text", { x: zero, y: height - 5, "text-anchor": "middle" }, "0"));
    svg.append(draw("text", zero < 200 ? { x: width, y: 10, "text-anchor": "end" } : { x: 0, y: 10 }, `${whole(most)} samples in the tallest bar`));
    by("histogram").append(svg);
  }

  function groups() {
    if (!data.group) return;
    const members = new Map();
    ranked.forEach((i) => { members.has(data.groups[i]) ? members.get(data.groups[i]).push(scores[i]) : members.set(data.groups[i], [scores[i]]); });
    const quantile = (list, q) => list[Math.min(list.length - 1, Math.floor((1 - q) * list.length))];
    const all = [...members].map(([name, list]) => ({ name, count: list.length, low: quantile(list, 0.25), mid: quantile(list, 0.5), high: quantile(list, 0.75) }))
      .sort((a, b) => b.mid - a.mid);
    const kept = all.slice(0, 15), width = 560, left = 170, row = 24;
    const low = Math.min(0, ...kept.map((g) => g.low)), high = Math.max(0, ...kept.map((g) => g.high)), span = high - low || 1;
    const at = (x) => left + 8 + ((x - low) / span) * (width - left - 20);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${kept.length * row + 22}`, role: "img", "aria-label": "Groups" });
    svg.append(draw("line", { x1: at(0), x2: at(0), y1: 0, y2: kept.length * row, class: "axis" }));
    kept.forEach((g, k) => {
      const y = k * row + row / 2;
      const name = g.name.length > 20 ? g.name.slice(0, 19) + "…" : g.name;
      svg.append(draw("text", { x: left, y: y + 4, "text-anchor": "end" }, `${name} (${whole(g.count)})`),
        draw("line", { x1: at(g.low), x2: at(g.high), y1: y, y2: y, class: "range" }),
        draw("circle", { cx: at(g.mid), cy: y, r: 5, class: "median" }));
    });
    svg.append(draw("text", { x: left + 8, y: kept.length * row + 16 }, number(low)), draw("text", { x: width, y: kept.length * row + 16, "text-anchor": "end" }, number(high)));
    if (all.length > kept.length) by("groups").querySelector("figcaption").append(` (${kept.length} of ${all.length})`);
    by("groups").hidden = false;
    by("groups").querySelector("div").append(svg);
    by("group").hidden = false;
    by("group").append(make("option", { value: "" }, `any ${data.group}`), ...[...members.keys()].sort().map((g) => make("option", { value: g }, g)));
  }

  if (Object.keys(data.heat).length) {
    by("legend").hidden = false;
    by("legend").textContent = "Where tokens are coloured, each token's place has the colour of its share in the score: " +
      "blue helps, orange hinders. The deepest colour of a sample is its largest share; the pointer shows the numbers.";
  }

  // --- together ----------------------------------------------------------------------------------

  tiles();
  histogram();
  groups();
  const few = Math.min(ENDS, Math.ceil(n / 2));
  document.querySelector(".best > div").append(...ranked.slice(0, few).map(card));
  document.querySelector(".worst > div").append(...ranked.slice(Math.max(few, n - ENDS)).reverse().map(card));
  let waiting = 0;
  by("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(arrange, 120); });
  by("group").addEventListener("change", arrange);
  by("sign").addEventListener("change", arrange);
  by("filters").addEventListener("submit", (event) => { event.preventDefault(); arrange(); });
  by("head").addEventListener("click", (event) => {
    const key = event.target.dataset.sort;
    if (!key) return;
    state.up = state.sort === key ? !state.up : true;
    state.sort = key;
    arrange();
  });
  let drawing = false; // several events of one frame are drawn once
  by("table").addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; render(); });
  }, { passive: true });
  by("rows").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) pick(Number(row.dataset.at));
  });
  by("table").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    pick(state.shown.indexOf(state.picked) + step);
  });
  by("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme === "dark";
    root.dataset.theme = dark ? "light" : "dark";
  });
  new ResizeObserver(render).observe(by("table"));
  arrange();
})();

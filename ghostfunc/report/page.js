"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const n = data.ids.length;
  const ranking = data.columns.findIndex((c) => c.name === data.ranking);
  const scores = data.columns[ranking].values;
  const ENDS = 5;

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
    by("space").style.height = shown.length * height + "px";
    by("table").scrollTop = 0;
    heads();
    render();
  }

  // --- the table ---------------------------------------------------------------------------------

  // On a narrow page a row has two lines: rank, score and group, then the text; a list sorts.
  const NARROW = 620;
  let compact = false, height = 34, shownColumns = [];
  const columnOf = new Map(data.columns.map((c) => [c.name, c]));
  const sortable = [["rank", label, false]];
  data.columns.forEach((c, k) => { if (k !== ranking) sortable.push([c.name, c.label, false]); });
  if (data.group) sortable.push(["group", data.group, true]);
  sortable.push(["row", "row", false]);

  function fit() {
    const wide = by("table").clientWidth;
    compact = wide > 0 && wide < NARROW;
    height = compact ? 62 : 34;
    shownColumns = [["rank", "rank", false], [data.ranking, label, false]];
    if (!compact) data.columns.forEach((c, k) => { if (k !== ranking) shownColumns.push([c.name, c.label, false]); });
    if (data.group) shownColumns.push(["group", data.group, true]);
    if (!compact) shownColumns.push(["row", "row", false]);
    const sizes = { rank: "4.5rem", row: "4.5rem", group: compact ? "minmax(4rem, 1fr)" : "8rem" };
    const picture = data.images ? "34px " : "";
    by("table").style.setProperty("--columns", picture + shownColumns.map(([name]) => sizes[name] || "6.5rem").join(" ") +
      (compact ? "" : " minmax(14rem, 1fr)"));
    by("table").style.setProperty("--height", height + "px");
    by("table").classList.toggle("compact", compact);
    by("sort").hidden = !compact;
    forget();
  }

  function heads() {
    const cells = shownColumns.map(([name, text, left]) => {
      const key = name === data.ranking ? "rank" : name;
      const on = state.sort === key;
      const arrow = on ? (state.up ? " ↑" : " ↓") : "";
      const button = make("button", { type: "button", "data-sort": key, class: left ? "left" : "" }, text + (name === data.ranking && on ? "" : arrow));
      if (on) button.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      return button;
    });
    if (data.images) cells.unshift(make("span", {}));
    by("head").replaceChildren(...cells, make("span", { class: "left" }, "text"));
    by("sort").replaceChildren(...sortable.flatMap(([key, text]) => ["↑", "↓"].map((arrow) => {
      const option = make("option", { value: key + arrow }, `by ${text} ${arrow}`);
      option.selected = key === state.sort && (arrow === "↑") === state.up;
      return option;
    })));
  }

  function written(name, i) {
    if (name === "rank") return [whole(ranks[i]), ""];
    if (name === "row") return [whole(data.ids[i]), ""];
    if (name === "group") return [data.groups[i], "left"];
    const x = columnOf.get(name).values[i];
    return name === data.ranking ? [signed(x), "score " + (x > 0 ? "plus" : "minus")] : [number(x), ""];
  }

  // Rows are elements that are used again: those that a scroll leaves behind go to the other end and
  // are written anew, the others stay as they are.
  let slots = [], begin = 0;
  function forget() {
    slots = [];
    by("rows").replaceChildren();
  }

  function slot() {
    const row = make("div", { class: "row", role: "row" });
    if (data.images) row.append(make("span", { class: "thumb" }));
    row.append(...shownColumns.map(() => make("span", {})), make("span", { class: "left words" }));
    return { row, at: -1, i: -1, picked: false };
  }

  function fill(one, at) {
    const i = state.shown[at], picked = i === state.picked;
    if (one.at !== at) {
      one.row.style.transform = `translateY(${at * height}px)`;
      one.row.dataset.at = at;
      one.at = at;
    }
    if (one.picked !== picked || one.i < 0) one.row.setAttribute("aria-selected", String(picked));
    one.picked = picked;
    if (one.i === i) return;
    one.i = i;
    const cells = one.row.children, first = data.images ? 1 : 0;
    if (data.images) cells[0].replaceChildren(...picture(i));
    shownColumns.forEach(([name], k) => {
      const [text, kind] = written(name, i), cell = cells[first + k];
      cell.textContent = text;
      if (cell.className !== kind) cell.className = kind;
    });
    cells[first + shownColumns.length].textContent = line(i).slice(0, 200);
  }

  function render() {
    const table = by("table");
    const view = Math.ceil(table.clientHeight / height) + 10;
    const first = Math.max(0, Math.min(Math.floor(table.scrollTop / height) - 5, state.shown.length - view));
    const last = Math.min(state.shown.length, first + view);
    const rows = by("rows"), gone = first - begin;
    begin = first;
    if (gone > 0 && gone < slots.length) {
      const moved = slots.splice(0, gone);
      slots.push(...moved);
      rows.append(...moved.map((one) => one.row));
    } else if (gone < 0 && -gone < slots.length) {
      const moved = slots.splice(gone);
      slots.unshift(...moved);
      rows.prepend(...moved.map((one) => one.row));
    }
    while (slots.length > last - first) slots.pop().row.remove();
    while (slots.length < last - first) {
      const one = slot();
      slots.push(one);
      rows.append(one.row);
    }
    slots.forEach((one, k) => fill(one, first + k));
  }

  // --- one sample --------------------------------------------------------------------------------

  function heat(i) {
    const found = data.heat[i];
    if (!found) return null;
    const most = Math.max(...found.shares.map(Math.abs)) || 1;
    const text = make("div", { class: "text" });
    const begins = new Map(found.said.map(([first, , role]) => [first, role]));
    const inside = new Set(found.said.flatMap(([first, last]) => Array.from({ length: last - first }, (_, k) => first + k)));
    found.pieces.forEach((piece, k) => {
      if (begins.has(k)) text.append(make("span", { class: "role" }, begins.get(k)));
      const share = found.shares[k] / most;
      // Tokens that the template adds are smaller.
      const kind = found.said.length && !inside.has(k) ? "template" : "";
      const token = make("span", { title: signed(found.shares[k]), class: kind }, piece);
      token.style.background = `rgba(var(--${share > 0 ? "good" : "bad"}-rgb), ${(0.75 * Math.sqrt(Math.abs(share))).toFixed(3)})`;
      text.append(token);
    });
    return [text];
  }

  function picture(i) {
    const address = data.images && data.images[i];
    return address && address.startsWith("data:image/") ? [make("img", { src: address, alt: `row ${data.ids[i]}` })] : [];
  }

  function card(i) {
    const meta = make("div", { class: "meta" },
      make("span", { class: "score " + (scores[i] > 0 ? "plus" : "minus") }, signed(scores[i])),
      make("span", {}, `rank ${whole(ranks[i])}`), make("span", {}, `row ${whole(data.ids[i])}`));
    data.columns.forEach((c, k) => { if (k !== ranking) meta.append(make("span", {}, `${c.label} ${number(c.values[i])}`)); });
    if (data.group) meta.append(make("span", {}, data.groups[i]));
    const parts = heat(i) || [make("div", { class: "text" }, ...data.texts[i].flatMap(([role, text]) =>
      role ? [make("span", { class: "role" }, role), text] : [text]))];
    return make("div", { class: "card" }, meta, ...picture(i), ...parts);
  }

  function pick(at) {
    if (at < 0 || at >= state.shown.length) return;
    state.picked = state.shown[at];
    const detail = by("detail");
    detail.hidden = false;
    detail.replaceChildren(card(state.picked));
    const table = by("table"), top = at * height, head = compact ? 0 : height;
    if (top < table.scrollTop) table.scrollTop = top;
    else if (top + height + head > table.scrollTop + table.clientHeight) table.scrollTop = top + height + head - table.clientHeight;
    render();
  }

  // --- the summary -------------------------------------------------------------------------------

  function tiles() {
    const tile = (value, text) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, text));
    const above = scores.filter((x) => x > 0).length;
    const middle = ranked[Math.floor(n / 2)];
    by("tiles").append(tile(whole(n), "samples"), tile(Math.round((100 * above) / n) + "%", "above zero"),
      tile(signed(scores[ranked[0]]), "highest"), tile(signed(scores[middle]), "median"), tile(signed(scores[ranked[n - 1]]), "lowest"));
    const kind = data.ranking.split("_")[0];
    by("about").textContent = {
      influence: "A sample's score is its influence: the dot product of its loss's gradient with the gradient of the target's loss, after that " +
        "went through the inverse curvature of the loss. Above zero, training without the sample raises the target's loss, to first order.",
      shapley: "A sample's score is what its share of the training steps took off the target's loss, added up over the run. Above zero, it helped.",
    }[kind] || `A sample's score is the ${label} of its loss's gradient with the gradient of the target's loss. ` +
      "Above zero, a training step on the sample lowers the target's loss, to first order.";
    document.querySelectorAll(".by").forEach((e) => { e.textContent = label; });
    for (const [name, value] of Object.entries(data.facts)) {
      by("facts").append(make("span", {}, `${name.replaceAll("_", " ")}: ${value}`));
    }
  }

  // Charts are drawn in pixels of the page, so that their labels have the size of its text.
  const widthOf = (id) => Math.max(240, by(id).clientWidth || 560);

  function histogram() {
    const low = Math.min(0, scores[ranked[n - 1]]), high = Math.max(0, scores[ranked[0]]);
    const width = widthOf("histogram"), height = 170, foot = 20, bins = Math.max(8, Math.min(Math.floor(width / 9), Math.ceil(Math.sqrt(n) * 2)));
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
    svg.append(draw("text", zero < width * 0.4 ? { x: width, y: 10, "text-anchor": "end" } : { x: 0, y: 10 }, `${whole(most)} ${most === 1 ? "sample" : "samples"} in the tallest bar`));
    by("histogram").replaceChildren(svg);
  }

  function groups() {
    if (!data.group) return null;
    const members = new Map();
    ranked.forEach((i) => { members.has(data.groups[i]) ? members.get(data.groups[i]).push(scores[i]) : members.set(data.groups[i], [scores[i]]); });
    const quantile = (list, q) => list[Math.min(list.length - 1, Math.floor((1 - q) * list.length))];
    const all = [...members].map(([name, list]) => ({ name, count: list.length, low: quantile(list, 0.25), mid: quantile(list, 0.5), high: quantile(list, 0.75) }))
      .sort((a, b) => b.mid - a.mid);
    by("groups").hidden = false;
    const width = widthOf("groups"), left = Math.min(190, Math.round(width * 0.45)), row = 24, letters = Math.floor((left - 56) / 7);
    const kept = all.slice(0, 15);
    const low = Math.min(0, ...kept.map((g) => g.low)), high = Math.max(0, ...kept.map((g) => g.high)), span = high - low || 1;
    const at = (x) => left + 8 + ((x - low) / span) * (width - left - 20);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${kept.length * row + 22}`, role: "img", "aria-label": "Groups" });
    svg.append(draw("line", { x1: at(0), x2: at(0), y1: 0, y2: kept.length * row, class: "axis" }));
    kept.forEach((g, k) => {
      const y = k * row + row / 2;
      const name = g.name.length > letters ? g.name.slice(0, letters - 1) + "…" : g.name;
      svg.append(draw("text", { x: left, y: y + 4, "text-anchor": "end" }, `${name} (${whole(g.count)})`),
        draw("line", { x1: at(g.low), x2: at(g.high), y1: y, y2: y, class: "range" }),
        draw("circle", { cx: at(g.mid), cy: y, r: 5, class: "median" }));
    });
    svg.append(draw("text", { x: left + 8, y: kept.length * row + 16 }, number(low)), draw("text", { x: width, y: kept.length * row + 16, "text-anchor": "end" }, number(high)));
    by("groups").querySelector("div").replaceChildren(svg);
    return all;
  }

  function timeline() {
    const found = data.timeline;
    if (!found || found.steps.length < 2) return;
    by("timeline").hidden = false;
    by("timeline").querySelector("figcaption").textContent = `Over training: mean ${found.label} of a sample in a step`;
    const width = widthOf("timeline"), tall = 190, foot = 34, top = 16;
    const all = found.lines.flatMap((l) => l.values).filter((x) => x !== null);
    const low = Math.min(0, ...all), high = Math.max(0, ...all), span = high - low || 1;
    const end = found.steps[found.steps.length - 1];
    const x = (step) => 6 + (step / end) * (width - 16), y = (value) => top + (1 - (value - low) / span) * (tall - foot - top);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${tall}`, role: "img", "aria-label": `${found.label} over training` });
    svg.append(draw("line", { x1: 0, x2: width, y1: y(0), y2: y(0), class: "axis" }));
    found.lines.forEach((one, k) => {
      // A stretch that met no sample of a line leaves a gap.
      let path = "", pen = "M";
      one.values.forEach((value, at) => {
        if (value === null) { pen = "M"; return; }
        path += `${pen}${x(found.steps[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
        const dot = draw("circle", { cx: x(found.steps[at]), cy: y(value), r: 3, class: `line${k}` });
        dot.append(draw("title", {}, `${one.name}, to step ${whole(found.steps[at])}: ${signed(value)}`));
        svg.append(dot);
      });
      svg.append(draw("path", { d: path || "M0 0", class: `stroke line${k}`, "stroke-dasharray": k < 4 ? "none" : "5 3" }));
    });
    svg.append(draw("text", { x: 0, y: 11 }, signed(high)), draw("text", { x: width, y: tall - 4, "text-anchor": "end" }, `step ${whole(end)}`),
      draw("text", { x: 0, y: tall - 4 }, low < 0 ? `lowest ${signed(low)}` : "step 0"));
    by("timeline").querySelector("div").replaceChildren(svg);
    by("timeline").querySelector(".keys").replaceChildren(...found.lines.map((one, k) =>
      make("span", {}, make("i", { class: `key line${k}` }), one.name)));
  }

  const grouped = groups();
  if (grouped) {
    if (grouped.length > 15) by("groups").querySelector("figcaption").append(` (15 of ${grouped.length})`);
    by("group").hidden = false;
    by("group").append(make("option", { value: "" }, `any ${data.group}`), ...grouped.map((g) => g.name).sort().map((g) => make("option", { value: g }, g)));
  }

  if (Object.keys(data.heat).length) {
    by("legend").hidden = false;
    by("legend").textContent = "Where tokens are coloured, each token's place has the colour of its share in the score: " +
      "blue helps, orange hinders. The deepest colour of a sample is its largest share; the pointer shows the numbers.";
  }

  // --- together ----------------------------------------------------------------------------------

  function charts() {
    histogram();
    groups();
    timeline();
  }

  tiles();
  charts();
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
  by("sort").addEventListener("change", () => {
    state.sort = by("sort").value.slice(0, -1);
    state.up = by("sort").value.endsWith("↑");
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
  let wide = -1;
  new ResizeObserver(() => {
    if (by("table").clientWidth !== wide) {
      wide = by("table").clientWidth;
      fit();
      charts();
      by("space").style.height = state.shown.length * height + "px";
      heads();
    }
    render();
  }).observe(by("table"));
  fit();
  arrange();
})();

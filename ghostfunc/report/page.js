"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const n = data.ids.length;
  const ranking = data.columns.findIndex((c) => c.name === data.ranking);
  const scores = data.columns[ranking].values;
  const columnOf = new Map(data.columns.map((c) => [c.name, c]));
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
  const kind = data.ranking.split("_")[0];
  const unit = { dot: "loss per unit of learning rate", influence: "loss times samples", shapley: "loss" }[kind];

  // A system's text, or a template's, is that of many samples: what is said comes first.
  const isAside = (role) => data.aside.includes(role.toLowerCase());

  // --- the table's order -----------------------------------------------------------------------

  // The samples in the order of their keys, lowest first. Numbers alone are sorted, without a function
  // that compares; every sample then finds its place among them.
  function orderOf(keys) {
    const sorted = Float64Array.from(keys).sort(), order = new Int32Array(n), taken = new Int32Array(n);
    for (let i = 0; i < n; i++) {
      let low = 0, high = n;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (sorted[middle] < keys[i]) low = middle + 1; else high = middle;
      }
      order[low + taken[low]++] = i;
    }
    return order;
  }

  const ranks = new Int32Array(n);
  const ranked = orderOf(scores.map((x) => -x));
  ranked.forEach((i, rank) => { ranks[i] = rank + 1; });
  const spoken = (parts) => [...parts.filter(([role]) => !isAside(role)), ...parts.filter(([role]) => isAside(role))];
  const line = (i) => spoken(data.texts[i]).map(([role, text]) => (role ? role + ": " : "") + text).join(" ⏎ ");
  const lowered = new Array(n); // texts in lower case, made when they are first searched
  const state = { sort: "rank", up: true, shown: ranked, picked: -1 };

  const orders = new Map([["rank", ranked]]);
  function orderBy(sort) {
    if (!orders.has(sort)) {
      if (sort === "group") {
        const places = new Map([...new Set(data.groups)].sort().map((name, k) => [name, k]));
        orders.set(sort, orderOf(data.groups.map((name) => places.get(name))));
      } else orders.set(sort, orderOf(sort === "row" ? data.ids : columnOf.get(sort).values));
    }
    return orders.get(sort);
  }

  // All samples are looked at in slices, between which the page answers.
  const SLICE = 4000;
  const pause = () => new Promise((go) => setTimeout(go));
  let latest = 0;

  async function arrange() {
    const turn = ++latest;
    const query = by("search").value.trim().toLowerCase();
    const group = by("group").value, sign = by("sign").value;
    const order = orderBy(state.sort);
    let shown = order.slice();
    if (query || group || sign) {
      shown = [];
      for (let at = 0; at < n; at++) {
        if (at && at % SLICE === 0) {
          await pause();
          if (turn !== latest) return; // asked for something else meanwhile
        }
        const i = order[at];
        if ((group && data.groups[i] !== group) || (sign && (sign === "+") !== scores[i] > 0)) continue;
        if (!query || (lowered[i] ??= line(i).toLowerCase()).includes(query)) shown.push(i);
      }
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
    // With texts in them, which are written over: a scroll makes no nodes.
    row.append(...shownColumns.map(() => make("span", {}, " ")), make("span", { class: "left words" }, " "));
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
      cell.firstChild.data = text;
      if (cell.className !== kind) cell.className = kind;
    });
    cells[first + shownColumns.length].firstChild.data = line(i).slice(0, 200);
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

  const LONG = 40; // letters of a template that are folded away
  const fold = (name, ...content) => make("details", {}, make("summary", {}, name), ...content);

  // Stretches of tokens: messages, and between them what the template adds.
  function stretches(found) {
    const out = [];
    let at = 0;
    for (const [first, last, role] of found.said) {
      if (first > at) out.push([at, first, null]);
      out.push([first, last, role]);
      at = last;
    }
    if (at < found.pieces.length) out.push([at, found.pieces.length, null]);
    return out;
  }

  function heat(i) {
    const found = data.heat[i];
    if (!found) return null;
    const most = Math.max(...found.shares.map(Math.abs)) || 1;
    const text = make("div", { class: "text" });
    for (const [first, last, role] of stretches(found)) {
      const added = role === null && found.said.length > 0;
      const tokens = found.pieces.slice(first, last).map((piece, k) => {
        const share = found.shares[first + k];
        // Tokens that the template adds are smaller.
        const token = make("span", { title: signed(share), class: added ? "template" : "" }, piece);
        token.style.background = `rgba(var(--${share > 0 ? "good" : "bad"}-rgb), ${(0.75 * Math.sqrt(Math.abs(share) / most)).toFixed(3)})`;
        return token;
      });
      const long = found.pieces.slice(first, last).join("").length > LONG;
      if ((added && long) || (role !== null && isAside(role))) {
        const sum = found.shares.slice(first, last).reduce((a, b) => a + b, 0);
        text.append(fold(`${role ?? "template"}: ${whole(last - first)} ${last - first === 1 ? "token" : "tokens"}, ${signed(sum)}`, ...tokens));
      } else text.append(...(role ? [make("span", { class: "role" }, role)] : []), ...tokens);
    }
    const end = number(most);
    return [text, make("div", { class: "shares" }, `shares of tokens: hinders −${end}`, make("i", { class: "scale" }), `+${end} helps`)];
  }

  function picture(i) {
    const address = data.images && data.images[i];
    return address && address.startsWith("data:image/") ? [make("img", { src: address, alt: `row ${data.ids[i]}` })] : [];
  }

  function card(i) {
    const meta = make("div", { class: "meta" },
      make("span", { class: "score " + (scores[i] > 0 ? "plus" : "minus") }, signed(scores[i])),
      make("span", {}, label), make("span", {}, `rank ${whole(ranks[i])}`), make("span", {}, `row ${whole(data.ids[i])}`));
    data.columns.forEach((c, k) => { if (k !== ranking) meta.append(make("span", {}, `${c.label} ${number(c.values[i])}`)); });
    if (data.group) meta.append(make("span", {}, data.groups[i]));
    const parts = heat(i) || [make("div", { class: "text" }, ...data.texts[i].flatMap(([role, text]) => {
      if (isAside(role)) return [fold(`${role}: ${whole(text.length)} letters`, text)];
      return role ? [make("span", { class: "role" }, role), text] : [text];
    }))];
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
    const best = scores[ranked[0]];
    // A first order holds for steps that change little: those of a tenth of a unit of loss, or less.
    let power = 3;
    while (power < 12 && Math.abs(best) > 0.1 * 10 ** power) power += 1;
    const does = (x) => (x > 0 ? "lowers" : "raises") + ` the target's loss by ${number(Math.abs(x))}`;
    const product = `A sample's score is the ${label} of its loss's gradient with the gradient of the target's loss`;
    by("about").textContent = {
      dot: `${product}: what one step of plain gradient descent on the sample takes off the target's loss, to first order, per unit of learning rate. ` +
        `The highest: at a learning rate of ${(10 ** -power).toFixed(power)}, the step ${does(best / 10 ** power)}.`,
      influence: "A sample's score is its influence: the dot product of its loss's gradient with the gradient of the target's loss, after that " +
        "went through the inverse curvature of the loss. Divided by the number of samples that are trained on, it is how far the target's loss rises " +
        "where training goes without the sample, to first order.",
      shapley: "A sample's score is what its share of the training steps took off the target's loss, added up over the run. Above zero, it helped.",
    }[kind] || `${product}, between −1 and 1. Above zero, a training step on the sample lowers the target's loss, to first order.`;
    document.querySelectorAll(".by").forEach((e) => { e.textContent = label; });
    if (unit) document.querySelector(".unit").textContent = ` (${unit})`;
    for (const [name, value] of Object.entries(data.facts)) {
      by("facts").append(make("span", {}, `${name.replaceAll("_", " ")}: ${value}`));
    }
  }

  // Charts are drawn in pixels of the page, so that their labels have the size of its text.
  const widthOf = (id) => Math.max(240, by(id).clientWidth || 560);

  // Round numbers from low to high, about as many as asked for, and how they are written.
  function ticks(low, high, wanted) {
    const rough = (high - low) / Math.max(1, wanted) || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((x) => x * power >= rough * 0.999);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const write = (x) => (digits > 4 || Math.abs(x) >= 1e6 ? number(x) : Number(x.toFixed(digits)).toLocaleString("en-US", { minimumFractionDigits: digits })).replace("-", "−");
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push([k * step, k ? write(k * step) : "0"]);
    return found;
  }

  // Lines and numbers of an axis to the right, below a chart.
  function across(svg, values, place, bottom) {
    values.forEach(([value, text]) => {
      const x = place(value);
      svg.append(draw("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: "tick" }),
        draw("text", { x, y: bottom + 16, "text-anchor": "middle" }, text));
    });
  }

  function histogram() {
    let low = scores[ranked[n - 1]], high = scores[ranked[0]];
    // Zero is on the axis unless that would leave more than a third of it empty.
    const gap = Math.max(low, -high, 0);
    const zeroShown = gap <= (high - low) / 2 || high === low;
    if (zeroShown) { low = Math.min(0, low); high = Math.max(0, high); }
    const width = widthOf("histogram"), height = 170, foot = 22, side = 18;
    const bins = Math.max(8, Math.min(Math.floor(width / 9), Math.ceil(Math.sqrt(n) * 2)));
    const counts = new Array(bins).fill(0), span = high - low || 1;
    for (const x of scores) counts[Math.min(bins - 1, Math.floor(((x - low) / span) * bins))]++;
    const most = Math.max(...counts), step = (width - 2 * side) / bins;
    const place = (x) => side + ((x - low) / span) * (width - 2 * side);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${label}` });
    counts.forEach((count, k) => {
      const tall = (count / most) * (height - foot - 18);
      const middle = low + ((k + 0.5) / bins) * span;
      const bar = draw("rect", { x: side + k * step + 0.5, y: height - foot - tall, width: Math.max(0.5, step - 1), height: tall, class: middle > 0 ? "good" : "bad" });
      bar.append(draw("title", {}, `${whole(count)} samples around ${number(middle)}`));
      svg.append(bar);
    });
    if (zeroShown) svg.append(draw("line", { x1: place(0), x2: place(0), y1: 14, y2: height - foot, class: "axis" }));
    across(svg, ticks(low, high, Math.floor(width / 90)), place, height - foot);
    const tallest = `${whole(most)} ${most === 1 ? "sample" : "samples"} in the tallest bar`;
    const beyond = zeroShown ? "" : `; all are ${low > 0 ? "above" : "below"} zero, which is outside`;
    svg.append(draw("text", { x: 0, y: 10 }, tallest + beyond));
    by("histogram").replaceChildren(svg);
  }

  // Groups with their quartiles, highest median first; made once.
  const grouped = data.group ? (() => {
    const members = new Map();
    ranked.forEach((i) => { members.has(data.groups[i]) ? members.get(data.groups[i]).push(scores[i]) : members.set(data.groups[i], [scores[i]]); });
    const quantile = (list, q) => list[Math.min(list.length - 1, Math.floor((1 - q) * list.length))];
    return [...members].map(([name, list]) => ({ name, count: list.length, low: quantile(list, 0.25), mid: quantile(list, 0.5), high: quantile(list, 0.75) }))
      .sort((a, b) => b.mid - a.mid);
  })() : null;

  function groups() {
    if (!grouped) return;
    by("groups").hidden = false;
    const kept = grouped.slice(0, 15), row = 24, bottom = kept.length * row;
    const longest = Math.max(...kept.map((g) => g.name.length)) + 2 + whole(Math.max(...kept.map((g) => g.count))).length;
    const width = widthOf("groups"), left = Math.min(8 + 7 * longest, 190, Math.round(width * 0.45)), letters = Math.floor((left - 56) / 7);
    const low = Math.min(0, ...kept.map((g) => g.low)), high = Math.max(0, ...kept.map((g) => g.high)), span = high - low || 1;
    const written = kept.map((g) => signed(g.mid)), right = 14 + 7 * Math.max(...written.map((text) => text.length));
    const at = (x) => left + 18 + ((x - low) / span) * (width - left - right - 30);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${bottom + 22}`, role: "img", "aria-label": "Groups" });
    svg.append(draw("line", { x1: at(0), x2: at(0), y1: 0, y2: bottom, class: "axis" }));
    kept.forEach((g, k) => {
      const y = k * row + row / 2;
      const name = g.name.length > Math.max(letters, 4) && left < 8 + 7 * longest ? g.name.slice(0, letters - 1) + "…" : g.name;
      svg.append(draw("text", { x: left, y: y + 4, "text-anchor": "end" }, `${name} (${whole(g.count)})`),
        draw("line", { x1: at(g.low), x2: at(g.high), y1: y, y2: y, class: "range" }),
        draw("circle", { cx: at(g.mid), cy: y, r: 5, class: "median" }),
        draw("text", { x: width, y: y + 4, "text-anchor": "end", class: "value" }, written[k]));
    });
    across(svg, ticks(low, high, Math.max(3, Math.floor((width - left - right) / 80))), at, bottom);
    by("groups").querySelector("div").replaceChildren(svg);
  }

  function timeline() {
    const found = data.timeline;
    if (!found || found.steps.length < 2) return;
    by("timeline").hidden = false;
    by("timeline").querySelector("figcaption").textContent = `Over training: mean ${found.label} of a sample in a step`;
    const width = widthOf("timeline"), tall = 220, foot = 36, top = 10, side = 18;
    const all = found.lines.flatMap((l) => l.values).filter((x) => x !== null);
    const low = Math.min(0, ...all), high = Math.max(0, ...all), span = high - low || 1;
    const levels = ticks(low, high, 6);
    const left = 14 + 7 * Math.max(...levels.map(([, text]) => text.length));
    const begin = found.steps[0], end = found.steps[found.steps.length - 1];
    const x = (step) => left + side + ((step - begin) / (end - begin)) * (width - left - 2 * side), y = (value) => top + (1 - (value - low) / span) * (tall - foot - top);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${tall}`, role: "img", "aria-label": `${found.label} over training` });
    levels.forEach(([value, text]) => svg.append(
      draw("line", { x1: left, x2: width, y1: y(value), y2: y(value), class: value ? "grid" : "axis" }),
      draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, text)));
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
    across(svg, ticks(begin, end, Math.min(found.steps.length, Math.floor(width / 110))), x, tall - foot);
    svg.append(draw("text", { x: (left + width) / 2, y: tall - 3, "text-anchor": "middle" }, "training step"));
    by("timeline").querySelector("div").replaceChildren(svg);
    by("timeline").querySelector(".keys").replaceChildren(...found.lines.map((one, k) =>
      make("span", {}, make("i", { class: `key line${k}` }), one.name)));
  }

  if (grouped) {
    if (grouped.length > 15) by("groups").querySelector("figcaption").append(` (15 of ${grouped.length})`);
    by("group").hidden = false;
    by("group").append(make("option", { value: "" }, `any ${data.group}`), ...grouped.map((g) => g.name).sort().map((g) => make("option", { value: g }, g)));
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
  document.querySelector(".best > div").append(...Array.from(ranked.slice(0, few), card));
  document.querySelector(".worst > div").append(...Array.from(ranked.slice(Math.max(few, n - ENDS)).reverse(), card));
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

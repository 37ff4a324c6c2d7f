"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const { make, drawCut } = uhdParts;
  const percent = (share) => (100 * share).toFixed(1) + "%";
  const short = (value) => (value >= 1000 ? value / 1000 + "k" : String(value));
  const rules = data.rules;
  const rows = [...document.querySelectorAll("#rule-table tbody tr")];
  let picked = data.picked;

  // --- the chart: one picture that takes the focus, and points that are chosen by the nearest place
  const points = rules.map((rule, place) => ({ rule, place })).filter((point) => point.rule.tokens !== null);
  points.sort((a, b) => a.rule.tokens - b.rule.tokens);
  let at = Math.max(0, points.findIndex((point) => point.place === picked));
  let drawn = [];
  let ring = null;

  function ticks(low, high) {
    const found = [];
    for (let power = -3; power < 9; power++)
      for (const step of [1, 2, 5]) {
        const value = step * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    return found.length > 8 ? found.filter((value) => String(value).startsWith("1")) : found;
  }

  function chart() {
    const box = $("chart");
    const width = Math.max(box.clientWidth, 280);
    const narrow = width < 600;
    const height = narrow ? 300 : 400;
    const [left, right, top, bottom] = [46, 14, 14, 42];
    const xs = points.map((point) => Math.max(point.rule.tokens, 1));
    const [low, high] = [Math.min(...xs) / 1.15, Math.max(...xs) * 1.15];
    const x = (v) => left + (Math.log(Math.max(v, 1) / low) / Math.log(high / low)) * (width - left - right);
    const y = (v) => top + (1 - v / 1.04) * (height - top - bottom);
    const svg = make("svg", {
      viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "group", "font-size": 12,
      "aria-label": "Resolution kept against tokens, " + points.length + " rules; arrow keys step through them",
    });
    for (const v of [0, 0.25, 0.5, 0.75, 1]) {
      svg.append(make("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), stroke: "var(--line)" }));
      svg.append(make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", fill: "var(--faint)" }, 100 * v + "%"));
    }
    for (const v of ticks(low, high)) {
      svg.append(make("line", { x1: x(v), x2: x(v), y1: top, y2: height - bottom, stroke: "var(--line)" }));
      const place = { x: x(v), y: height - bottom + 16, "text-anchor": "middle", fill: "var(--faint)" };
      svg.append(make("text", place, short(v)));
    }
    const title = { x: (left + width) / 2, y: height - 6, "text-anchor": "middle", fill: "var(--ink)" };
    svg.append(make("text", title, "tokens an image, mean (log)"));
    const best = points.filter((point) => point.rule.front);
    const line = best.map((point, n) => `${n ? "L" : "M"}${x(point.rule.tokens)} ${y(point.rule.kept)}`).join("");
    svg.append(make("path", { d: line, fill: "none", stroke: "var(--accent)", "stroke-width": 1.5, opacity: 0.6 }));
    drawn = points.map((point) => [x(point.rule.tokens), y(point.rule.kept)]);
    for (const front of [false, true])
      points.forEach((point, n) => {
        if (Boolean(point.rule.front) !== front) return;
        const [cx, cy] = drawn[n];
        const fill = front ? "var(--accent)" : "var(--dot)";
        svg.append(make("circle", { cx, cy, r: front ? 5 : 4, fill, stroke: "var(--card)", "fill-opacity": 0.9 }));
      });
    label(svg, best, x, y, width, height - bottom - 4);
    ring = make("circle", { r: 10, fill: "none", stroke: "var(--ink)", "stroke-width": 2 });
    svg.append(ring);
    svg.addEventListener("keydown", key);
    svg.addEventListener("pointermove", (event) => point(event, false));
    svg.addEventListener("pointerdown", (event) => point(event, true));
    box.replaceChildren(svg);
    mark(false);
  }

  function label(svg, best, x, y, width, low) {
    const taken = [];
    for (const { rule } of best) {
      const long = 6.6 * rule.name.length;
      for (const [dx, dy] of [[9, 16], [9, -8], [-9, -8], [-9, 16], [9, 30], [-9, 30], [9, -22], [-9, -22]]) {
        const start = dx > 0 ? x(rule.tokens) + dx : x(rule.tokens) + dx - long;
        const line = y(rule.kept) + dy;
        const free = taken.every(([a, b, c]) => b < start || start + long < a || Math.abs(line - c) > 13);
        const bare = drawn.every(([px, py]) => px < start - 5 || px > start + long + 5 || Math.abs(py - line + 4) > 9);
        if (!free || !bare || start < 48 || start + long > width - 4 || line < 12 || line > low) continue;
        taken.push([start, start + long, line]);
        svg.append(make("text", { x: start, y: line, fill: "var(--ink)", "font-size": width < 600 ? 11 : 12 }, rule.name));
        break;
      }
    }
  }

  function point(event, pick) {
    const box = event.currentTarget.getBoundingClientRect();
    const scale = event.currentTarget.viewBox.baseVal.width / box.width;
    const [px, py] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let [near, least] = [-1, (event.pointerType === "mouse" ? 22 : 40) ** 2];
    drawn.forEach(([cx, cy], n) => {
      const far = (cx - px) ** 2 + (cy - py) ** 2;
      if (far < least) [near, least] = [n, far];
    });
    if (near < 0) return;
    at = near;
    mark(true);
    if (pick) choose(points[at].place);
  }

  function key(event) {
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
    if (event.key in steps) at = (at + steps[event.key] + points.length) % points.length;
    else if (event.key === "Home") at = 0;
    else if (event.key === "End") at = points.length - 1;
    else if (event.key === "Enter" || event.key === " ") choose(points[at].place);
    else return;
    event.preventDefault();
    mark(true);
  }

  function mark(tell) {
    ring.setAttribute("cx", drawn[at][0]);
    ring.setAttribute("cy", drawn[at][1]);
    if (!tell) return;
    const { rule } = points[at];
    const words = `: ${Math.round(rule.tokens)} tokens an image, ${percent(rule.kept)} kept, seam ${rule.seam.toFixed(1)}, `;
    const rest = `${Math.round(100 * rule.padding)}% padding, ${rule.tflops.toFixed(1)} TFLOPs`;
    $("told").replaceChildren(make("b", {}, rule.name), words + rest + (rule.front ? "; on the front" : ""));
  }

  // --- the table of rules
  function showRules() {
    const words = $("find-rule").value.trim().toLowerCase();
    const only = $("only-front").checked;
    for (const row of rows) {
      const rule = rules[row.dataset.rule];
      row.hidden = !rule.name.includes(words) || (only && !rule.front);
    }
  }

  function sortRules(button) {
    const head = button.parentElement;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => rules[row.dataset.rule][button.dataset.key];
    const order = (a, b) => (a === null) - (b === null) || (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1);
    rows.sort((a, b) => order(value(a), value(b)));
    document.querySelector("#rule-table tbody").append(...rows);
  }

  function choose(place) {
    picked = place;
    for (const row of rows) row.classList.toggle("picked", Number(row.dataset.rule) === place);
    for (const node of document.querySelectorAll(".rule-name")) node.textContent = rules[place].name;
    for (const node of document.querySelectorAll(".rule-select")) node.value = place;
    const found = points.findIndex((point) => point.place === place);
    if (found >= 0) {
      at = found;
      mark(true);
    }
    gallery();
    showImages();
  }

  // --- pictures, and what a rule does to them
  function cut(picture, place) {
    return drawCut(picture, picture.cuts[place], data.images[picture.i][0] + ", cut by " + rules[place].name);
  }

  const numbers = (image, place) => {
    const size = data.images[image][1];
    const tokens = data.tokens[place][size];
    return tokens < 0 ? null : { tokens, kept: data.kept[place][size] / 1000 };
  };

  function gallery() {
    if (!$("gallery")) return;
    const figures = data.pictures.map((picture) => {
      const figure = make("figure");
      const found = numbers(picture.i, picked);
      const words = found ? `${found.tokens} tokens, ${percent(found.kept)} kept` : "refused";
      const caption = make("figcaption");
      caption.append(make("b", {}, words), make("br"), data.images[picture.i][0]);
      figure.append(cut(picture, picked), caption);
      return figure;
    });
    $("gallery").replaceChildren(...figures);
  }

  // --- the list of images
  let shown = 50;
  const facts = data.images.map(([name, size], place) => {
    const [width, height] = data.sizes[size];
    const aspect = Math.max(width, height) / Math.min(width, height);
    return { name, place, width, height, aspect, area: (width * height) / 1e6 };
  });
  const inside = (value, bounds) => value >= bounds[0] && (bounds[1] === null || value < bounds[1]);

  function showImages() {
    const words = $("find-image").value.trim().toLowerCase();
    const [aspect, area] = [$("by-aspect").value, $("by-area").value];
    let found = facts.filter(
      (one) =>
        one.name.toLowerCase().includes(words) &&
        (aspect === "" || inside(one.aspect, data.aspects[aspect].bounds)) &&
        (area === "" || inside(one.area, data.areas[area].bounds)),
    );
    const own = new Map(found.map((one) => [one, numbers(one.place, picked)]));
    const last = (one) => own.get(one) === null;
    const orders = {
      kept: (a, b) => own.get(a).kept - own.get(b).kept || own.get(b).tokens - own.get(a).tokens,
      tokens: (a, b) => own.get(b).tokens - own.get(a).tokens,
      name: (a, b) => (a.name < b.name ? -1 : 1),
      area: (a, b) => b.area - a.area,
      aspect: (a, b) => b.aspect - a.aspect,
    };
    const by = $("sort-images").value;
    const needs = by === "kept" || by === "tokens";
    found.sort((a, b) => (needs && (last(a) || last(b)) ? last(a) - last(b) : orders[by](a, b)));
    $("count").textContent = `${found.length} of ${facts.length} images listed`;
    $("image-rows").replaceChildren(...found.slice(0, shown).map((one) => imageRow(one, own.get(one))));
    $("more").hidden = found.length <= shown;
  }

  function imageRow(one, own) {
    const row = make("tr");
    const head = make("th", { scope: "row" });
    const open = make("button", { type: "button", class: "open" }, one.name);
    open.addEventListener("click", () => openImage(one));
    head.append(open);
    const size = `${one.width}x${one.height}`;
    row.append(head, make("td", {}, size), make("td", {}, own ? own.tokens : "refused"));
    row.append(make("td", {}, own ? percent(own.kept) : ""));
    return row;
  }

  function openImage(one) {
    const body = [make("h3", {}, one.name), make("p", {}, `${one.width} x ${one.height} px (width x height)`)];
    const picture = (data.pictures || []).find((each) => each.i === one.place);
    if (picture) body.push(cut(picture, picked));
    const table = make("table");
    const head = make("tr");
    for (const word of ["rule", "tokens", "kept"]) head.append(make("th", { scope: "col" }, word));
    const top = make("thead");
    top.append(head);
    const lines = make("tbody");
    const found = rules.map((rule, place) => [rule, numbers(one.place, place)]);
    found.sort((a, b) => (a[1] === null) - (b[1] === null) || (a[1] && a[1].tokens - b[1].tokens));
    for (const [rule, own] of found) {
      const row = make("tr", rule.front ? { class: "front" } : {});
      row.append(make("th", { scope: "row" }, rule.name), make("td", {}, own ? own.tokens : "refused"));
      row.append(make("td", {}, own ? percent(own.kept) : ""));
      lines.append(row);
    }
    table.append(top, lines);
    const scroll = make("div", { class: "scroll" });
    scroll.append(table);
    $("one-body").replaceChildren(...body, scroll);
    $("one").showModal();
  }

  // --- wiring
  for (const node of document.querySelectorAll(".rule-select")) {
    node.append(...rules.map((rule, place) => make("option", { value: place }, rule.name)));
    node.addEventListener("change", () => choose(Number(node.value)));
  }
  for (const [id, buckets] of [["by-aspect", data.aspects], ["by-area", data.areas]])
    $(id).append(...buckets.map((bucket, n) => make("option", { value: n }, `${bucket.name} (${bucket.images})`)));
  for (const button of document.querySelectorAll("#rule-table thead button"))
    button.addEventListener("click", () => sortRules(button));
  for (const row of rows)
    row.querySelector(".pick").addEventListener("click", () => choose(Number(row.dataset.rule)));
  $("find-rule").addEventListener("input", showRules);
  $("only-front").addEventListener("change", showRules);
  for (const id of ["find-image", "by-aspect", "by-area", "sort-images"])
    $(id).addEventListener("input", () => {
      shown = 50;
      showImages();
    });
  $("more").addEventListener("click", () => {
    shown += 200;
    showImages();
  });
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(chart);
  });
  if (points.length) chart();
  choose(picked);
  const told = rules.filter((rule) => rule.front).map((rule) => rule.name);
  $("told").textContent = "On the front: " + (told.join(", ") || "no rule plans every image") + ".";
  document.documentElement.dataset.ready = "1";
})();

// The page of `uhd explore`: what a rule makes of a size, and the sliders, the photo and the cards that show it.
"use strict";

// Without a document: also a module of Node, where tests ask it.
const uhdExplore = (() => {
  const polynomial = (factors, n) => factors.reduceRight((total, factor) => total * n + factor, 0);
  const far = (a, b) => Math.abs(Math.log(a / b));

  // The lattice's side nearest to this one, by its place.
  const nearest = (lattice, side) =>
    lattice.reduce((best, one, place) => (far(one, side) < far(lattice[best], side) ? place : best), 0);

  function adaptive(data, config, imageHw) {
    const plan = uhdPlanner.plan(imageHw, config);
    const { vit, projector, lm, unit } = data.flops;
    const views = plan.views.map((view) => polynomial(vit[config.patch_size], view.patches_hw[0] * view.patches_hw[1]));
    const flops =
      views.reduce((total, one) => total + one, 0) +
      polynomial(projector, plan.num_visual_tokens) +
      polynomial(lm, plan.num_tokens);
    return {
      drawn_hw: imageHw,
      grid: plan.grid,
      slice_hw: plan.slice_hw,
      overview_hw: plan.overview_hw,
      views: plan.views.length,
      patches: plan.num_patches,
      visual: plan.num_visual_tokens,
      separators: plan.num_separators,
      flops: Math.round(flops / unit),
      cut: plan.grid || [1, 1],
      candidates: uhdPlanner.candidates(imageHw, config),
    };
  }

  // {error}, or what is shown; drawn_hw is the size that it is of, for rules that are known on a lattice alone.
  function look(data, rule, imageHw) {
    if (rule.config) {
      try {
        return adaptive(data, rule.config, imageHw);
      } catch (problem) {
        return { error: problem.message };
      }
    }
    const { lattice } = data;
    const [least, most] = [lattice[0], lattice[lattice.length - 1]];
    if (imageHw.some((side) => !(least <= side && side <= most)))
      return { error: `this page knows the rule for sides of ${least} to ${most} px; uhd plan plans any size` };
    const [row, column] = imageHw.map((side) => nearest(lattice, side));
    const found = rule.outcomes[rule.places[row * lattice.length + column]];
    const drawn_hw = [lattice[row], lattice[column]];
    if (typeof found === "string") return { error: found, drawn_hw };
    const [grid, slice_hw, overview_hw, views, patches, visual, separators, flops, cut] = found;
    return { drawn_hw, grid, slice_hw, overview_hw, views, patches, visual, separators, flops, cut, candidates: [] };
  }

  return { look };
})();

if (typeof module !== "undefined") module.exports = uhdExplore;

if (typeof document !== "undefined")
  (() => {
    const data = JSON.parse(document.getElementById("data").textContent);
    const $ = (id) => document.getElementById(id);
    const { make, drawCut } = uhdParts;
    const sides = ["width", "height"];
    const [LEAST, MOST, STEPS] = [32, 8192, 800]; // of a slider, px, and its steps, each by the same factor
    let photo = null; // {src, name, hw}

    const wide = ([h, w]) => `${w} x ${h}`;
    const count = (number) => number.toLocaleString("en-US");
    const tflops = (found) => (found.flops / 100).toFixed(2);

    // --- the cards
    const cards = [0, 1, 2, 3].map((place) => {
      const select = make("select", { "aria-label": `Rule ${place + 1}` });
      select.append(make("option", { value: "" }, "none"));
      select.append(...data.rules.map((rule, number) => make("option", { value: number }, rule.name)));
      select.value = place < data.shown ? place : "";
      const body = make("div", { class: "body" });
      const card = make("article", { class: "card" });
      card.append(select, body);
      select.addEventListener("change", show);
      return { card, select, body };
    });
    $("cards").append(...cards.map(({ card }) => card));

    const size = () => [Number($("height").value), Number($("width").value)];

    function show() {
      const imageHw = size();
      const told = [];
      for (const { card, select, body } of cards) {
        const rule = data.rules[select.value === "" ? -1 : Number(select.value)];
        card.classList.toggle("empty", !rule);
        if (!rule) {
          body.replaceChildren();
          continue;
        }
        const found = uhdExplore.look(data, rule, imageHw);
        if (found.error) {
          body.replaceChildren(make("p", { class: "refused" }, "Refused: " + found.error));
          told.push(`${rule.name}: refused`);
          continue;
        }
        const open = Boolean(body.querySelector("details[open]"));
        body.replaceChildren(...card_of(rule, found, imageHw, open));
        told.push(`${rule.name}: ${count(found.visual + found.separators)} tokens`);
      }
      $("told").textContent = `${wide(imageHw)} px. ${told.join("; ")}.`;
    }

    function card_of(rule, found, imageHw, open) {
      const scale = 1000 / Math.max(...found.drawn_hw);
      const [h, w] = found.drawn_hw.map((side) => Math.max(side * scale, 4));
      const label = `${wide(found.drawn_hw)} px, cut by ${rule.name}`;
      const parts = [drawCut({ w, h, src: photo && photo.src }, found.cut, label)];
      const separate = found.separators ? ` (${count(found.visual)} + ${count(found.separators)} separators)` : "";
      const rows = [
        ["tokens", count(found.visual + found.separators), separate],
        ["cut", found.grid && found.slice_hw ? found.grid.join(" x ") : "not cut", found.slice_hw ? " rows x columns" : ""],
        ["slices", found.slice_hw ? wide(found.slice_hw) : "none", found.slice_hw ? " px" : ""],
        ["overview", found.overview_hw ? wide(found.overview_hw) : "none", found.overview_hw ? " px" : ""],
        ["views", count(found.views), ""],
        ["patches", count(found.patches), ""],
        ["TFLOPs", tflops(found), ""],
      ];
      const list = make("dl");
      for (const [name, value, more] of rows) {
        const cell = make("dd");
        cell.append(make("b", { "data-key": name }, value), more);
        list.append(make("dt", {}, name), cell);
      }
      parts.push(list);
      const near = found.drawn_hw.some((side, n) => side !== imageHw[n]);
      const of = `Drawn and counted for ${wide(found.drawn_hw)} px, the nearest size that this page knows of this rule.`;
      if (near) parts.push(make("p", { class: "near" }, of));
      if (found.candidates.length) parts.push(scores(found.candidates, open));
      else parts.push(make("p", { class: "hint" }, rule.config ? "Not cut: no grids to compare." : "This page has no scores of this rule."));
      return parts;
    }

    function scores(candidates, open) {
      const details = make("details", open ? { open: "" } : {});
      details.append(make("summary", {}, `Scores of the ${candidates.length} grids compared`));
      const table = make("table");
      const head = make("tr");
      for (const word of ["rows x columns", "score"]) head.append(make("th", { scope: "col" }, word));
      const [top, lines] = [make("thead"), make("tbody")];
      top.append(head);
      candidates.forEach(({ grid, score }, place) => {
        const row = make("tr", place ? {} : { class: "front" });
        row.append(make("th", { scope: "row" }, grid.join(" x ") + (place ? "" : ", chosen")));
        row.append(make("td", {}, score.toFixed(4)));
        lines.append(row);
      });
      table.append(top, lines);
      const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores" });
      scroll.append(table);
      details.append(scroll);
      return details;
    }

    // --- the size: sliders move by a factor, fields take any px
    const ofSlider = (step) => Math.round(LEAST * (MOST / LEAST) ** (step / STEPS));
    const toSlider = (px) => Math.round((STEPS * Math.log(px / LEAST)) / Math.log(MOST / LEAST));

    function put(side, px, from) {
      $(side).value = px;
      if (from !== "slider" && px > 0) $(`${side}-slider`).value = toSlider(px);
      $(`${side}-slider`).setAttribute("aria-valuetext", `${px} px`);
    }

    for (const side of sides) {
      $(`${side}-slider`).addEventListener("input", (event) => {
        put(side, ofSlider(Number(event.target.value)), "slider");
        show();
      });
      $(side).addEventListener("input", () => {
        put(side, $(side).value);
        show();
      });
    }
    $("turn").addEventListener("click", () => {
      const [height, width] = size();
      put("width", height);
      put("height", width);
      show();
    });

    // --- a photo: read and made small here; its size is the upright one, as browsers show it
    function take(file) {
      const image = new Image();
      const url = URL.createObjectURL(file);
      image.onload = () => {
        const hw = [image.naturalHeight, image.naturalWidth];
        const scale = Math.min(1, 1000 / Math.max(...hw));
        const canvas = make("canvas", { width: Math.max(1, hw[1] * scale), height: Math.max(1, hw[0] * scale) });
        const pen = canvas.getContext("2d");
        pen.fillStyle = "#fff"; // under what is transparent
        pen.fillRect(0, 0, canvas.width, canvas.height);
        pen.drawImage(image, 0, 0, canvas.width, canvas.height);
        photo = { src: canvas.toDataURL("image/jpeg", 0.85), name: file.name, hw };
        URL.revokeObjectURL(url);
        $("no-photo").hidden = false;
        put("width", hw[1]);
        put("height", hw[0]);
        show();
        $("photo-said").textContent = `${file.name}: ${wide(hw)} px. Other sizes stretch it.`;
      };
      image.onerror = () => {
        URL.revokeObjectURL(url);
        $("photo-said").textContent = `${file.name} is no picture that this browser can read.`;
      };
      image.src = url;
    }

    $("photo").addEventListener("change", (event) => event.target.files[0] && take(event.target.files[0]));
    for (const name of ["dragover", "drop"])
      document.addEventListener(name, (event) => {
        event.preventDefault();
        if (name === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
      });
    $("no-photo").addEventListener("click", () => {
      photo = null;
      $("photo").value = "";
      $("no-photo").hidden = true;
      $("photo-said").textContent = "";
      show();
    });

    for (const side of sides) put(side, $(side).value);
    show();
    document.documentElement.dataset.ready = "1";
  })();

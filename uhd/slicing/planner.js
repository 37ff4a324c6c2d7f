// The adaptive (LLaVA-UHD) planner in plain JavaScript: the rule of uhd/slicing/adaptive.py with all of its options,
// step for step, since the order of operations decides the last bits. Latents are those of uhd/slicing/latents.py. A plain script, which defines `uhdPlanner`, and a module of Node.
//
// A config is what SlicingConfig.to_dict() gives, as in "slicing" of a model.json. Sizes are [height, width] in px,
// grids [rows, columns]. Other strategies are not here.
"use strict";

const uhdPlanner = (() => {
  // Of numbers as large as sides and counts, 2 ** 53 at most, // of Python is this.
  const div = (a, b) => Math.floor(a / b);

  // Half to even, as round() of Python.
  function round(x) {
    const low = Math.floor(x);
    if (x - low !== 0.5) return Math.round(x);
    return low % 2 === 0 ? low : low + 1;
  }

  // The natural logarithm, rounded once. Math.log of some engines is off by a bit, and one bit decides large squares:
  // ln(2/3) against ln(3/2). In pairs of numbers, high and low, by ln(m) = 2 (s + s^3/3 + s^5/5 ...), s = (m-1)/(m+1).
  function log(x) {
    const exponent = Math.round(Math.log2(x));
    const m = x / 2 ** exponent;
    const [top, bottom] = [sum(m, -1), sum(m, 1)];
    const first = (top[0] + top[1]) / bottom[0];
    const rest = add(top, times(bottom, [-first, 0]));
    const s = sum(first, (rest[0] + rest[1]) / bottom[0]);
    const square = times(s, s);
    let total = [0, 0];
    for (let n = 41; n > 0; n -= 2) total = add(times(total, square), quotient(2, n));
    const found = add(times(total, s), times([exponent, 0], [0.6931471805599453, 2.3190468138462996e-17]));
    return found[0] + found[1];
  }

  function sum(a, b) {
    const high = a + b;
    const part = high - a;
    return [high, a - (high - part) + (b - part)];
  }

  function product(a, b) {
    const [x, y] = [a, b].map((one) => {
      const far = 134217729 * one; // 2 ** 27 + 1 leaves 26 bits
      const high = far - (far - one);
      return [high, one - high];
    });
    const high = a * b;
    return [high, x[1] * y[1] - (high - x[0] * y[0] - x[1] * y[0] - x[0] * y[1])];
  }

  function quotient(a, b) {
    const high = a / b;
    const [p, low] = product(high, b);
    return [high, (a - p - low) / b];
  }

  function add(a, b) {
    const [high, low] = sum(a[0], b[0]);
    return sum(high, low + a[1] + b[1]);
  }

  function times(a, b) {
    const [high, low] = product(a[0], b[0]);
    return sum(high, low + a[0] * b[1] + a[1] * b[0]);
  }

  // The size of a view: the encoder's pixel budget at the content's aspect, or `most` units in its place.
  function fit(height, width, config, most = null) {
    const unit = config.patch_size * config.merge;
    const budget = most ?? div(config.image_size ** 2, unit ** 2);
    const imageSize = most === null ? config.image_size : Math.sqrt(most) * unit;
    let rows, columns;
    if (config.rule === "march2024") {
      const scale = Math.sqrt(budget * (unit / height) * (unit / width));
      rows = Math.min(Math.floor((scale * height) / unit) || 1, budget);
      columns = Math.min(Math.floor((scale * width) / unit) || 1, budget);
    } else {
      const aspect = width / height;
      const fitted = Math.floor(imageSize / Math.sqrt(aspect));
      const sides = [fitted, Math.floor(fitted * aspect)]; // from the truncated height, as released
      [rows, columns] = sides.map((side) => (config.rounding === "floor" ? div(side, unit) : round(side / unit)) || 1);
    }
    if ((config.clamp || most !== null) && rows * columns > budget) {
      if (rows >= columns) rows = div(budget, columns);
      else columns = div(budget, rows);
    }
    return [rows * unit, columns * unit];
  }

  // The grids that are compared under a cap on slices, in the rule's order; none where the image is not cut.
  function considered([height, width], config, cap) {
    const area = Math.ceil((width * height) / config.image_size ** 2);
    const side = config.cut_by === "shape" ? Math.ceil(Math.max(height, width) / config.image_size) : 0;
    const ideal = Math.min(Math.max(area, side), cap);
    let counts = [ideal - 1, ideal, ideal + 1];
    if (config.rule === "march2024") counts = ideal <= 2 ? counts.slice(1) : counts;
    else counts = ideal <= 1 ? [] : counts.filter((n) => 1 < n && n <= cap);
    const grids = [];
    for (const n of counts) {
      for (let columns = 1; columns <= n; columns++) if (n % columns === 0) grids.push([n / columns, columns]);
    }
    return grids;
  }

  // How well the cells match a square view: 0 is perfect, and less is worse.
  const score = ([height, width], [rows, columns]) =>
    0 - Math.abs(log(width / height) - log(columns / rows));

  function bestGrid(imageHw, config, cap) {
    let best = null;
    let most = -Infinity;
    for (const grid of considered(imageHw, config, cap)) {
      const found = score(imageHw, grid);
      if (found > most) [best, most] = [grid, found]; // the first of equal ones
    }
    return best && best[0] * best[1] === 1 ? null : best;
  }

  function sliceHw([height, width], [rows, columns], config) {
    const floors = config.rule === "march2024" || config.rounding === "floor";
    const side = (length, parts) => (floors ? div(length, parts) : round(length / parts)) || 1;
    return fit(side(height, rows), side(width, columns), config);
  }

  const area = ([rows, columns]) => rows * columns;

  // (rows, columns) of at most so many latents over a view of so many patches, in cells as square as can be.
  function latentGrid(tokens, [height, width]) {
    let rows = Math.max(Math.floor(Math.sqrt(div(tokens * height, width))), 1);
    while (rows > 1 && height * div(tokens, rows) < width * rows) rows--;
    while (rows < tokens && height * div(tokens, rows + 1) >= width * (rows + 1)) rows++;
    const options = [[rows, div(tokens, rows)]];
    if (rows < tokens) {
      const columns = div(tokens, rows + 1);
      options.push([div(tokens, columns), columns]);
    }
    const [one, other = one] = options;
    const longer = ([r, c], by) => Math.max(height * c, width * r) * area(by); // of a cell, times both areas
    const order = [longer(one, other) - longer(other, one), area(other) - area(one), one[0] - other[0]];
    return (order.find((difference) => difference !== 0) || 0) > 0 ? other : one;
  }

  function view(kind, sizeHw, place, config, latentsHw = null) {
    const unit = config.patch_size * config.merge;
    const tokens = config.tokens_per_view || div(sizeHw[0], unit) * div(sizeHw[1], unit);
    const found = { kind, place, size_hw: sizeHw, patches_hw: patchesOf(sizeHw, config), num_tokens: tokens };
    return latentsHw === null ? found : { ...found, num_tokens: area(latentsHw), latents_hw: latentsHw };
  }

  const patchesOf = (sizeHw, config) => sizeHw.map((side) => div(side, config.patch_size));

  // Grids of latents of each slice and of the overview: their patches' shares of the tokens of all.
  function sharedLatents(slices, slice, overview, config) {
    const tokens = (slices + 1) * config.tokens_per_view;
    const [whole, part] = [overview, slice ?? overview].map((sizeHw) => patchesOf(sizeHw, config));
    const share = div(tokens * area(part), slices * area(part) + area(whole));
    const own = latentGrid(Math.max(share, 1), part);
    return [own, latentGrid(tokens - slices * area(own), whole)];
  }

  // The plan with a given grid; null is one view alone.
  function build(imageHw, grid, config) {
    const overview = fit(...imageHw, config);
    const slice = grid === null ? null : sliceHw(imageHw, grid, config);
    const cells = grid === null ? 0 : area(grid);
    const fitted = config.latents === "fitted";
    const [own, rest] = fitted ? sharedLatents(cells, slice, overview, config) : [null, null];
    const views = [view("overview", overview, null, config, rest)];
    const counts = config.separators;
    let separators = counts.per_image;
    if (grid !== null) {
      const [rows, columns] = grid;
      const slices = [];
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) slices.push(view("slice", slice, [row, column], config, own));
      }
      views.splice(config.overview_first ? 1 : 0, 0, ...slices);
      separators += counts.per_cut + counts.per_slice * cells + counts.per_row * rows;
    }
    return planOf(imageHw, grid, slice, overview, views, separators);
  }

  // The image as one view, in place of the slices of a grid and the overview, of as many patches and tokens.
  function joined(imageHw, grid, config) {
    const overview = fit(...imageHw, config);
    const unit = config.patch_size * config.merge;
    const units = div(area(grid) * area(sliceHw(imageHw, grid, config)) + area(overview), unit ** 2);
    const sizeHw = fit(...imageHw, config, units);
    const tokens = config.tokens_per_view && (area(grid) + 1) * config.tokens_per_view;
    const latentsHw = tokens ? latentGrid(tokens, patchesOf(sizeHw, config)) : null;
    const views = [view("overview", sizeHw, null, config, latentsHw)];
    return planOf(imageHw, null, null, sizeHw, views, config.separators.per_image);
  }

  function planOf(imageHw, grid, slice, overview, views, separators) {
    const visual = views.reduce((sum, one) => sum + one.num_tokens, 0);
    return {
      image_hw: imageHw,
      grid,
      slice_hw: slice,
      overview_hw: overview,
      views,
      num_patches: views.reduce((sum, one) => sum + one.patches_hw[0] * one.patches_hw[1], 0),
      num_visual_tokens: visual,
      num_separators: separators,
      num_tokens: visual + separators,
    };
  }

  // The plan of the best grid under a cap, or of one view in its place.
  function chosen(imageHw, config, cap) {
    const grid = bestGrid(imageHw, config, cap);
    const below = config.one_view_below ?? 0;
    const near = Math.max(...imageHw) <= below * Math.min(...imageHw);
    return grid !== null && near ? joined(imageHw, grid, config) : build(imageHw, grid, config);
  }

  // The plan, and the cap on slices that it was made under; 0: the overview alone.
  function withinBudget(imageHw, config) {
    if (!config || !["released", "march2024"].includes(config.rule) || !config.separators) {
      const got = JSON.stringify(config && config.rule);
      throw new RangeError(`a config is "slicing" of a model.json, of the adaptive rule; this one's rule is ${got}`);
    }
    if (!(Number.isInteger(config.max_slices) && config.max_slices > 0)) {
      throw new RangeError(`max_slices must be a whole number above 0, got ${config.max_slices}`);
    }
    const most = config.max_tokens == null ? Infinity : config.max_tokens;
    const least = config.latents === "fitted" ? 1 : config.tokens_per_view || 1; // tokens of a cut image's views
    const caps = config.one_view_below == null ? div(most, least) : Infinity;
    for (let cap = Math.min(config.max_slices, caps); cap > 0; cap--) {
      const found = chosen(imageHw, config, cap);
      if (found.num_tokens <= most) return [found, cap];
    }
    const alone = build(imageHw, null, config);
    if (alone.num_tokens > most) {
      throw new RangeError(`the overview alone takes ${alone.num_tokens} tokens, max_tokens is ${most}: raise it`);
    }
    return [alone, 0];
  }

  function check(imageHw) {
    const whole = (side) => Number.isInteger(side) && 0 < side && side <= 1000000;
    if (!Array.isArray(imageHw) || imageHw.length !== 2 || !imageHw.every(whole)) {
      const got = JSON.stringify(imageHw);
      throw new RangeError(`an image is [height, width], two whole numbers of px above 0, at most 1000000; got ${got}`);
    }
    return imageHw;
  }

  const plan = (imageHw, config) => withinBudget(check(imageHw), config)[0];

  // Every grid that was compared, [{grid, score}], best first; none where the image is not cut.
  function candidates(imageHw, config) {
    const [found, cap] = withinBudget(check(imageHw), config);
    if (found.grid === null) return [];
    const scored = considered(imageHw, config, cap).map((grid) => ({ grid, score: score(imageHw, grid) }));
    return scored.sort((a, b) => b.score - a.score);
  }

  return { plan, candidates, log };
})();

if (typeof module !== "undefined") module.exports = uhdPlanner;

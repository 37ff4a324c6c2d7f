// What the pages with a script share: elements, and a cut drawn over a picture.
"use strict";

const uhdParts = (() => {
  const SVG = ["svg", "g", "line", "path", "circle", "rect", "text", "image"];

  function make(tag, attributes, text) {
    const svg = SVG.includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // A code is a grid over all of the image, or boxes in thousandths of it; null draws the image alone.
  function drawCut({ w, h, src }, code, label) {
    const svg = make("svg", { viewBox: `-2 -2 ${w + 4} ${h + 4}`, role: "img", "aria-label": label });
    svg.append(make("rect", { x: 0, y: 0, width: w, height: h, fill: "var(--head)" }));
    if (src) svg.append(make("image", { href: src, width: w, height: h, preserveAspectRatio: "none" }));
    const line = { fill: "none", stroke: "#d64028", "stroke-width": 2, "vector-effect": "non-scaling-stroke" };
    if (code === null) return svg;
    let boxes = [];
    if (code.length === 2)
      for (let r = 0; r < code[0]; r++)
        for (let c = 0; c < code[1]; c++)
          boxes.push([(1000 * r) / code[0], (1000 * c) / code[1], (1000 * (r + 1)) / code[0], (1000 * (c + 1)) / code[1]]);
    else for (let n = 0; n < code.length; n += 4) boxes.push(code.slice(n, n + 4));
    if (boxes.length === 1) line["stroke-dasharray"] = "6 4";
    for (const [t, l, b, r] of boxes) {
      const place = { x: (l * w) / 1000, y: (t * h) / 1000, width: ((r - l) * w) / 1000, height: ((b - t) * h) / 1000 };
      svg.append(make("rect", { ...place, ...line }));
    }
    return svg;
  }

  return { make, drawCut };
})();

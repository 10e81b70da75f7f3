"use strict";
// The coupling graph: a box per block, equal blocks as one, folded until it is clicked. In an unfolded box weights stand
// on the left and couplings on the right, in a drawing as wide as the page.
function couplingGraph({ found, element, where, reveal, drawCoupling, showRefusals }) {
  const ROW = 30, HALF = 11, LETTER = 7.4, NEAR = 4, SPLIT = 6;
  const starred = (name) => name.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");
  const shapes = new Map();
  const order = new Map();
  const shown = new Set(); // a bias goes with its weight: of a module its matrices, or its first vector
  for (const module of found.modules) {
    const matrices = module.parameters.filter((parameter) => parameter.dims.length > 1);
    for (const parameter of matrices.length ? matrices : module.parameters.slice(0, 1)) shown.add(parameter);
    for (const parameter of module.parameters) {
      const name = (module.path ? module.path + "." : "") + parameter.name;
      shapes.set(name, parameter.dims.map((dim) => dim.size).join("×"));
      if (shown.has(parameter)) order.set(name, order.size);
    }
  }

  // The block of a module, `layers.*` of layers.3.mlp, and the one of its equals that it is, layers.3.
  function blockOf(module) {
    const parts = module.split("."), at = parts.findIndex((part) => /^\d+$/.test(part));
    const own = at < 0 ? module : parts.slice(0, at + 1).join(".");
    return { key: at < 0 ? module : [...parts.slice(0, at), "*"].join("."), own };
  }
  const above = (name) => name.slice(0, Math.max(name.lastIndexOf("."), 0));
  const parse = (member) => /^(.*)\[(\d+)\](.*)$/.exec(member).slice(1, 3);

  const blocks = new Map();
  for (const coupling of found.couplings) {
    const { key, own } = blockOf(above(coupling.name));
    if (!blocks.has(key)) blocks.set(key, { key, owns: new Map(), refusals: [], open: false, only: "" });
    const owns = blocks.get(key).owns;
    if (!owns.has(own)) owns.set(own, []);
    owns.get(own).push(coupling);
  }
  for (const refusal of found.refusals) {
    for (const key of new Set(refusal.members.map((member) => blockOf(above(parse(member)[0])).key))) {
      blocks.get(key)?.refusals.push(refusal);
    }
  }
  if (blocks.size === 1) for (const block of blocks.values()) block.open = true;

  const couplingsOf = (block) => [...block.owns.values()].flat();

  // The nodes and edges of a box: of all blocks together, alike ones once, or of one of them.
  function contents(block) {
    const weights = new Map(), pills = [];
    const name = block.only ? (text) => text : starred;
    const inside = (text) => (text.startsWith(block.key + ".") ? text.slice(block.key.length + 1) : block.only && text.startsWith(block.only + ".") ? text.slice(block.only.length + 1) : text);
    const link = (pill, member) => {
      const [parameter, dim] = parse(member), key = name(parameter);
      if (!order.has(parameter)) return;
      if (!weights.has(key)) weights.set(key, { parameter, label: inside(key).replace(/\.weight$/, ""), dims: new Set(), at: order.get(parameter) });
      weights.get(key).dims.add(dim);
      pill.ends.set(key + " " + dim, { key, dim });
    };
    const seen = new Map();
    for (const coupling of block.only ? block.owns.get(block.only) : couplingsOf(block)) {
      const known = block.only ? undefined : seen.get(coupling.proof);
      if (known) { known.times += 1; continue; }
      const pill = { coupling, label: `${coupling.kind} ${coupling.size}`, colour: found.colours[coupling.kind], times: 1, ends: new Map(), title: coupling.name };
      seen.set(coupling.proof, pill);
      pills.push(pill);
      coupling.members.forEach((member) => link(pill, member));
    }
    for (const refusal of block.refusals) {
      const members = refusal.members.filter((member) => {
        const { key, own } = blockOf(above(parse(member)[0]));
        return key === block.key && (!block.only || own === block.only);
      });
      if (!members.some((member) => order.has(parse(member)[0]))) continue;
      const pill = { label: `whole ${refusal.size}`, times: refusal.times, ends: new Map(), title: refusal.reasons.join("; ") };
      pills.push(pill);
      members.forEach((member) => link(pill, member));
    }
    return { weights: [...weights.entries()].sort((a, b) => a[1].at - b[1].at), pills };
  }

  const SVG = "http://www.w3.org/2000/svg";
  function shape(tag, attributes, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  const short = (text, width) => (text.length * LETTER <= width ? text : "…" + text.slice(text.length - Math.max(1, Math.floor(width / LETTER) - 1)));

  function node(x, y, width, text, title, style, click) {
    const made = shape("g", { class: "node " + style.class, tabindex: 0, role: "button", "aria-label": `${text}: ${title}` },
      shape("title", {}, title),
      shape("rect", { x, y: y - HALF, width, height: 2 * HALF, rx: style.round, fill: style.fill, stroke: style.stroke, "stroke-dasharray": style.dash || "none" }),
      shape("text", { x: x + width / 2, y: y + NEAR, "text-anchor": "middle", fill: style.ink }, short(text, width - 12)));
    made.addEventListener("click", click);
    made.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { click(); event.preventDefault(); }
    });
    return made;
  }

  function drawing(block, width) {
    const { weights, pills } = contents(block);
    const rows = Math.max(weights.length, pills.length), height = rows * ROW;
    const left = Math.min(340, Math.max(120, width * 0.46)), right = Math.min(220, Math.max(110, width * 0.36));
    const y = new Map(weights.map(([key], i) => [key, (i + 0.5) * height / weights.length]));
    const port = ({ key, dim }) => {
      const dims = [...weights.find(([other]) => other === key)[1].dims].sort();
      return y.get(key) + (dims.indexOf(dim) - (dims.length - 1) / 2) * SPLIT * 2;
    };
    for (const pill of pills) {
      const ends = [...pill.ends.values()].map(port);
      pill.middle = ends.reduce((sum, at) => sum + at, 0) / ends.length;
    }
    pills.sort((a, b) => a.middle - b.middle);
    const lines = [], labels = new Map(), nodes = [];
    pills.forEach((pill, i) => {
      const at = (i + 0.5) * height / pills.length, from = left, to = width - right, colour = pill.colour || "var(--bad)";
      for (const end of pill.ends.values()) {
        const begin = port(end), bend = (to - from) / 2;
        labels.set(`${end.key} ${end.dim}`, shape("text", { class: "port", x: from + NEAR, y: begin + NEAR - 1 }, end.dim));
        lines.push(shape("path", { d: `M${from} ${begin} C${from + bend} ${begin} ${to - bend} ${at} ${to} ${at}`, stroke: colour, "stroke-dasharray": pill.colour ? "none" : "4 4", class: "edge" }));
      }
      const text = pill.label + (pill.times > 1 ? ` ×${pill.times}` : "");
      const style = pill.colour ? { class: "coupling", fill: pill.colour, stroke: "none", ink: "#fff", round: HALF }
        : { class: "whole", fill: "var(--ground)", stroke: "var(--bad)", ink: "var(--bad)", round: HALF, dash: "4 3" };
      nodes.push(node(to, at, right, text, pill.title, style, () => (pill.coupling ? drawCoupling(pill.coupling) : showRefusals())));
    });
    for (const [key, weight] of weights) {
      const style = { class: "weight", fill: "var(--panel)", stroke: "var(--line)", ink: "var(--ink)", round: 5 };
      const size = shapes.get(weight.parameter), whole = `${weight.label} ${size}`;
      const text = whole.length * LETTER <= left - 12 ? whole : weight.label;
      nodes.push(node(0, y.get(key), left, text, `${key} ${size}`, style, () => reveal(above(weight.parameter))));
    }
    return shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `weights and couplings of ${block.key || found.model}` },
      ...lines, ...labels.values(), ...nodes);
  }

  function box(block, redraw, width) {
    const couplings = couplingsOf(block), count = block.owns.size;
    const kinds = new Map();
    for (const { kind } of couplings) kinds.set(kind, (kinds.get(kind) || 0) + 1);
    const chips = [...kinds].map(([kind, times]) => element("span", { class: "kind", style: `background:${found.colours[kind]}` }, times > 1 ? `${kind} ×${times}` : kind));
    const head = element("button", { type: "button", class: "fold", "aria-expanded": String(block.open), "data-block": block.key, click: () => { block.open = !block.open; redraw(block.key); } },
      element("span", { "aria-hidden": "true" }, block.open ? "▾ " : "▸ "), element("b", { class: "mono" }, block.key || found.model), count > 1 ? ` ×${count} ` : " ");
    const made = element("div", { class: "block" }, head, ...chips.flatMap((chip) => [chip, " "]));
    if (!block.open) return made;
    if (count > 1) {
      const choice = element("select", { "aria-label": "which of the blocks" }, element("option", { value: "" }, `all ${count}, alike ones once`),
        ...[...block.owns.keys()].map((own) => element("option", { value: own }, own)));
      choice.value = block.only;
      choice.addEventListener("change", () => { block.only = choice.value; redraw(block.key); });
      made.append(choice);
    }
    made.append(element("div", { class: "drawing" }, drawing(block, width)));
    return made;
  }

  return function draw(query, focus) {
    const fitting = [...blocks.values()].filter((block) => !query || (block.key + " " + couplingsOf(block).map((c) => c.name + " " + c.members.join(" ")).join(" ")).toLowerCase().includes(query));
    const width = Math.max(300, Math.min(900, where.clientWidth - 68));
    const redraw = (key) => draw(query, key);
    const parts = fitting.map((block) => box(block, redraw, width));
    parts.unshift(element("p", { class: "faint" }, "Weights on the left, with the numbers of their dims; what shrinks them together on the right. Click a block to unfold it, a coupling for its proof, a weight for its place in the model."));
    if (!fitting.length) parts.push(element("p", { class: "faint" }, blocks.size ? "No block fits the filter." : "Nothing is coupled."));
    where.replaceChildren(...parts);
    if (focus !== undefined) where.querySelector(`[data-block="${CSS.escape(focus)}"]`)?.focus();
  };
}

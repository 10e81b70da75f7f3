"use strict";
// The page of a report. What was found lies in the element `document`; rows are made when they are opened.
(() => {
  const found = JSON.parse(document.getElementById("document").textContent);
  const byId = (id) => document.getElementById(id);
  const MOST_ROWS = 400; // of a table or a filtered tree at once; "show more" adds as many

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "click") made.addEventListener("click", value);
      else if (name === "style") made.style.cssText = value;
      else if (value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function count(number) {
    for (const [unit, scale] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (number >= scale && number >= 1e4) return Number((number / scale).toPrecision(3)) + unit;
    }
    return number.toLocaleString("en-US");
  }

  byId("facts").textContent =
    `${count(found.parameters)} parameters, ${found.size}, ${count(found.flops)} FLOPs in a forward of what was captured` +
    (found.latency ? `; ${found.latency}` : "");

  // Modules by path, with children in order.
  const modules = new Map();
  for (const module of found.modules) {
    const cut = module.path.lastIndexOf(".");
    const parent = module.path === "" ? null : module.path.slice(0, Math.max(cut, 0));
    modules.set(module.path, {
      ...module, parent, children: [], name: module.path.slice(cut + 1), depth: 0,
      text: (module.path + " " + module.class + " " + kindsOf(module).join(" ")).toLowerCase(),
    });
    if (parent !== null) {
      const above = modules.get(parent);
      above.children.push(module.path);
      modules.get(module.path).depth = above.depth + 1;
    }
  }

  function kindsOf(module) {
    const numbers = module.parameters.flatMap((p) => p.dims.flatMap((d) => d.couplings));
    return [...new Set(numbers.map((n) => found.couplings[n].name))];
  }

  const opened = new Set([""]);
  let chosen = "", query = "", limit = MOST_ROWS;
  // The way to the first list of blocks lies open.
  for (let at = modules.get(""); at; ) {
    opened.add(at.path);
    const children = at.children.map((path) => modules.get(path));
    at = children.some((m) => /^\d+$/.test(m.name)) ? null : children.find((m) => m.children.length);
  }

  function visible() {
    const rows = [];
    if (query) {
      const keep = new Set();
      for (const module of modules.values()) {
        if (module.text.includes(query)) {
          for (let at = module; at && !keep.has(at.path); at = modules.get(at.parent)) keep.add(at.path);
        }
      }
      for (const path of modules.keys()) if (keep.has(path)) rows.push(path);
      return rows;
    }
    const walk = (path) => {
      rows.push(path);
      if (opened.has(path)) modules.get(path).children.forEach(walk);
    };
    walk("");
    return rows;
  }

  function dims(parameter) {
    const shape = element("span", {}, parameter.name === "weight" ? "" : parameter.name + " ");
    parameter.dims.forEach((dim, i) => {
      if (i) shape.append(" × ");
      const kinds = [...new Set(dim.couplings.map((n) => found.couplings[n].kind))];
      const names = dim.couplings.map((n) => found.couplings[n].name);
      const title = names.length ? "shrinks along " + names.join(", ") : dim.refused.length ? "refused: " + dim.refused[0] : "whole";
      const part = 100 / kinds.length;
      const stops = kinds.map((k, j) => `${found.colours[k]} ${j * part}% ${(j + 1) * part}%`).join(", ");
      const style = kinds.length ? `border-image: linear-gradient(to right, ${stops}) 1` : null;
      const names_ = kinds.length ? "dim coupled" : dim.refused.length ? "dim refused" : "dim";
      shape.append(element("span", { class: names_, title, style }, String(dim.size)));
    });
    return shape;
  }

  function row(path) {
    const module = modules.get(path);
    const open = !module.children.length ? "" : query || opened.has(path) ? "▾" : "▸";
    const weight = module.parameters.find((p) => p.dims.length > 1) || module.parameters[0];
    return element("div", {
      class: "row", role: "treeitem", "data-path": path, style: `--depth:${module.depth}`,
      "aria-level": module.depth + 1, "aria-selected": path === chosen, tabindex: path === chosen ? 0 : -1,
      "aria-expanded": module.children.length ? String(Boolean(query) || opened.has(path)) : null,
      click: () => choose(path, true),
    },
    element("span", { class: "open", "aria-hidden": "true" }, open),
    element("span", {}, module.name || found.model),
    element("span", { class: "class" }, module.name ? module.class : ""),
    weight ? dims(weight) : null);
  }

  function drawTree(focus) {
    const rows = visible();
    if (!rows.includes(chosen)) chosen = rows[0] ?? "";
    const tree = byId("tree");
    tree.replaceChildren(...rows.slice(0, limit).map(row));
    if (rows.length > limit) tree.append(more(rows.length - limit, () => drawTree(false)));
    if (!rows.length) tree.append(element("p", { class: "faint" }, "No module fits the filter."));
    if (focus) tree.querySelector('[aria-selected="true"]')?.focus();
  }

  function more(rest, redraw) {
    return element("button", { type: "button", click: () => { limit += MOST_ROWS; redraw(); } }, `show ${rest} more`);
  }

  function choose(path, toggle) {
    if (toggle && modules.get(path).children.length && !query) {
      if (!opened.has(path)) opened.add(path);
      else if (path === chosen) opened.delete(path);
    }
    chosen = path;
    drawTree(true);
    drawModule(modules.get(path));
  }

  function reveal(path) {
    for (let at = modules.get(modules.get(path).parent); at; at = modules.get(at.parent)) opened.add(at.path);
    query = byId("filter").value = "";
    show("model");
    choose(path, false);
    byId("tree").querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
  }

  function chip(coupling, click) {
    const style = `background:${found.colours[coupling.kind]}`;
    return element(click ? "button" : "span", { class: "kind", style, click, type: click ? "button" : null }, coupling.kind);
  }

  function drawModule(module) {
    const parts = [element("h2", { class: "mono" }, module.path || found.model, element("span", { class: "faint" }, module.path ? " " + module.class : ""))];
    for (const parameter of module.parameters) {
      const shape = parameter.dims.map((d) => d.size).join(" × ");
      parts.push(element("h3", { class: "mono" }, `${parameter.name}: ${shape}`, parameter.tied ? ` (the same as ${parameter.tied})` : ""));
      parameter.dims.forEach((dim, i) => parts.push(...aboutDim(dim, i)));
    }
    if (!module.parameters.length) {
      const inside = [...modules.values()].filter((m) => m.path !== module.path && (module.path === "" || m.path.startsWith(module.path + ".")));
      const numbers = new Set(inside.flatMap((m) => m.parameters.flatMap((p) => p.dims.flatMap((d) => d.couplings))));
      parts.push(element("p", {}, `${inside.length} modules and ${numbers.size} couplings inside.`));
      for (const number of [...numbers].slice(0, 24)) parts.push(couplingCard(found.couplings[number]));
      if (numbers.size > 24) parts.push(element("p", { class: "faint" }, `and ${numbers.size - 24} more: open a block, or see the table.`));
    }
    byId("details").replaceChildren(...parts);
    byId("details").scrollTop = 0;
  }

  function aboutDim(dim, i) {
    const parts = dim.couplings.map((number) => couplingCard(found.couplings[number], `dim ${i}: `));
    for (const reason of dim.refused) {
      parts.push(element("div", { class: "card" }, `dim ${i} stays whole: `, element("span", { class: "reason" }, reason)));
    }
    if (!parts.length) parts.push(element("p", { class: "faint" }, `dim ${i} has no partner, so it stays whole.`));
    return parts;
  }

  function couplingCard(coupling, before = "") {
    const card = element("div", { class: "card" }, before, chip(coupling, () => drawCoupling(coupling)), " ",
      element("span", { class: "mono" }, coupling.name), ` ${coupling.size} entries`);
    card.append(element("div", { class: "faint" }, "an entry takes " + count(coupling.entry[0]) + " parameters; the proof is behind the coloured button"));
    return card;
  }

  function memberButton(name) {
    const parameter = name.replace(/\[\d+\].*$/, "");
    const path = parameter.slice(0, Math.max(parameter.lastIndexOf("."), 0));
    return element("button", { class: "member", type: "button", click: () => reveal(path) }, name);
  }

  function drawCoupling(coupling) {
    show("model");
    const proof = found.proofs[coupling.proof];
    const how = coupling.linear ? "everything between its weights is linear" : "there is a nonlinearity or a scale between its weights";
    const parts = [
      element("h2", { class: "mono" }, chip(coupling), " ", coupling.name),
      element("p", {}, `${coupling.size} entries; ${how}. An entry takes ${count(coupling.entry[0])} parameters and ${count(coupling.entry[2])} FLOPs; all but one ${count(coupling.most[0])} (${(100 * coupling.most[0] / found.parameters).toFixed(2)}%).`),
      element("p", {}, ...coupling.members.flatMap((name) => [memberButton(name), " "])),
    ];
    if (proof.of !== coupling.name) parts.push(element("p", { class: "faint" }, `The proof is that of ${proof.of}, whose block is equal.`));
    for (const path of proof.paths) {
      parts.push(element("h3", { class: "mono" }, `${path.start} → ${path.end}`));
      parts.push(element("ol", {}, ...path.steps.map((step) => element("li", {},
        element("b", { class: "mono" }, step.op), ` takes it to ${step.after}: ${step.because} `,
        element("span", { class: "faint" }, `(${step.where})`), step.code ? element("div", {}, element("code", {}, step.code)) : null))));
    }
    byId("details").replaceChildren(...parts);
    byId("details").scrollTop = 0;
  }

  function drawCouplings() {
    const fitting = found.couplings.filter((c) => !query || (c.name + " " + c.kind + " " + c.members.join(" ")).toLowerCase().includes(query));
    const largest = Math.max(1, ...found.couplings.map((c) => c.most[0]));
    const body = element("tbody", {}, ...fitting.slice(0, limit).map((c) => element("tr", {},
      element("td", {}, chip(c, () => drawCoupling(c))),
      element("td", {}, c.name),
      element("td", { class: "number" }, c.size),
      element("td", { class: "number" }, count(c.entry[0])),
      element("td", { class: "number" }, count(c.entry[2])),
      element("td", { class: "number" }, count(c.most[0])),
      element("td", {}, element("span", { class: "bar", style: `width:${(6 * c.most[0] / largest).toFixed(2)}rem` }), " ",
        (100 * c.most[0] / found.parameters).toFixed(2) + "%"))));
    const head = ["", "coupling", "size", "parameters an entry", "FLOPs an entry", "parameters, all but one", "share of the model"];
    byId("couplings").replaceChildren(
      element("table", {}, element("thead", {}, element("tr", {}, ...head.map((text, i) => element("th", { scope: "col", class: i > 1 && i < 6 ? "number" : null }, text)))), body));
    if (fitting.length > limit) byId("couplings").append(more(fitting.length - limit, drawCouplings));
    if (!fitting.length) byId("couplings").append(element("p", { class: "faint" }, "No coupling fits the filter."));
  }

  function drawRefusals() {
    const fitting = found.refusals.filter((r) => !query || (r.members.join(" ") + r.reasons.join(" ")).toLowerCase().includes(query));
    const parts = fitting.slice(0, limit).map((r) => element("div", { class: "card" },
      element("div", {}, ...r.members.slice(0, 12).flatMap((name) => [memberButton(name), " "]),
        r.members.length > 12 ? `and ${r.members.length - 12} more ` : "", element("span", { class: "faint" }, `size ${r.size}` + (r.times > 1 ? `, ${r.times} times` : ""))),
      element("ul", {}, ...r.reasons.map((reason) => element("li", { class: "reason" }, reason)))));
    if (fitting.length > limit) parts.push(more(fitting.length - limit, drawRefusals));
    if (!parts.length) parts.push(element("p", { class: "faint" }, found.refusals.length ? "No refusal fits the filter." : "Nothing was refused."));
    const lists = [["Ops without an axis rule (the axes they touch stay whole)", found.missing],
      ["Ops whose axis rule comes from an experiment (verified, not proved)", found.experiments], ["Not captured", found.given_up]];
    for (const [name, items] of lists) {
      const lines = Object.entries(items);
      if (lines.length) parts.push(element("h3", {}, name), element("ul", {}, ...lines.map(([what, why]) => element("li", { class: "mono" }, `${what}: ${why}`))));
    }
    byId("refusals").replaceChildren(...parts);
  }

  let drawn = false;
  function drawTraining() {
    if (!drawn) byId("training").replaceChildren(...found.figures.flatMap((figure, i) => [element("h3", {}, figure.title), element("div", { id: "figure" + i })]));
    drawn = true;
    paintFigures(found.figures);
  }

  const drawGraph = couplingGraph({
    found, element, where: byId("graph"), reveal, drawCoupling, showRefusals: () => show("refusals"),
  });
  addEventListener("resize", () => { if (view === "graph") drawGraph(query); });

  const views = [...document.querySelectorAll('[role="tab"]')].map((tab) => tab.getAttribute("aria-controls"));
  const draw = { model: () => drawTree(false), couplings: drawCouplings, refusals: drawRefusals, graph: () => drawGraph(query), training: drawTraining, sensitivity: () => {} };
  let view = "model";

  function show(name) {
    view = name;
    for (const other of views) {
      byId(other).hidden = other !== name;
      const tab = byId("tab-" + other);
      tab.setAttribute("aria-selected", String(other === name));
      tab.tabIndex = other === name ? 0 : -1;
    }
    limit = MOST_ROWS;
    draw[name]();
  }
  views.forEach((name, i) => {
    byId("tab-" + name).addEventListener("click", () => show(name));
    byId("tab-" + name).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = views[(i + step + views.length) % views.length];
      show(next);
      byId("tab-" + next).focus();
    });
  });

  byId("filter").addEventListener("input", (event) => {
    query = event.target.value.trim().toLowerCase();
    limit = MOST_ROWS;
    draw[view]();
  });

  byId("tree").addEventListener("keydown", (event) => {
    const rows = visible(), at = rows.indexOf(chosen), module = modules.get(chosen);
    const go = (path) => { if (path !== undefined && path !== null) choose(path, false); };
    switch (event.key) {
      case "ArrowDown": go(rows[Math.min(at + 1, rows.length - 1)]); break;
      case "ArrowUp": go(rows[Math.max(at - 1, 0)]); break;
      case "Home": go(rows[0]); break;
      case "End": go(rows[rows.length - 1]); break;
      case "ArrowRight":
        if (module.children.length && !opened.has(chosen) && !query) { opened.add(chosen); drawTree(true); } else go(module.children[0]);
        break;
      case "ArrowLeft":
        if (opened.has(chosen) && module.children.length && !query) { opened.delete(chosen); drawTree(true); } else go(module.parent);
        break;
      case "Enter": case " ": choose(chosen, true); break;
      default: return;
    }
    event.preventDefault();
  });

  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) {
      if (event.key === "Escape" && event.target.matches("input")) event.target.blur();
      return;
    }
    if (event.key === "/") { byId("filter").focus(); event.preventDefault(); }
    const number = Number(event.key);
    if (number >= 1 && number <= views.length) { show(views[number - 1]); byId("tab-" + view).focus(); }
  });

  themed(() => { if (view === "training") drawTraining(); });

  drawTree(false);
  drawModule(modules.get(""));
})();

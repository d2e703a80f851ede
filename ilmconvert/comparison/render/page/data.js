// The diff as the page was given it, and what follows from it. A row's node before is `x`, after is `y`; an equal node is
// stored once, as `y`. Names are only ever set as text.
const DIFF = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["changed", "inserted", "removed", "renamed", "moved"];
const ROWS = DIFF.rows;

for (const [i, row] of ROWS.entries()) {
  row.i = i;
  row.k = row.k || [];
  row.below = [];
  row.had = []; // what was below it in the first model, in its order; others than `below` where something moved
  row.size = 1;
  row.inside = 0; // changes below
  row.parent = row.p === undefined ? null : ROWS[row.p];
  row.depth = row.parent ? row.parent.depth + 1 : 0;
  if (row.parent) row.parent.below.push(row);
  const lone = row.k[0] === "inserted" || row.k[0] === "removed";
  row.before = row.x || (row.k[0] === "inserted" ? null : row.y);
  row.after = row.y || null;
  if (lone) row.lone = row.k[0];
  row.node = row.after || row.before;
}
for (let i = ROWS.length - 1; i >= 0; i--) {
  const row = ROWS[i];
  row.uniform = row.below.every((child) => child.uniform && child.k.join() === row.k.join());
  if (row.parent) {
    row.parent.size += row.size;
    row.parent.inside += row.inside + (row.k.length ? 1 : 0);
  }
}
for (const [i, parent] of DIFF.before) {
  ROWS[i].up = parent === null ? null : ROWS[parent];
  if (ROWS[i].up) ROWS[i].up.had.push(ROWS[i]);
}

function element(tag, properties, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);
const pathOf = (node) => node.path || "(the model)";
const fullClass = (node) => node.full || node.cls;
const titleOf = (node, side) => node.name || DIFF.names[side === "before" ? 0 : 1];

// The short name, or the qualified one where only that tells two classes apart.
function classOf(row, node) {
  const { before, after } = row;
  const alike = before && after && before.cls === after.cls && fullClass(before) !== fullClass(after);
  return alike ? fullClass(node) : node.cls;
}

function classChange(row) {
  return [...new Set([row.before, row.after].filter(Boolean).map((node) => classOf(row, node)))].join(" → ");
}

// A path of which the end is seen where it does not fit.
function pathText(node, className) {
  return element("span", { className: `path ${className}`, title: pathOf(node) }, element("bdi", { dir: "ltr", textContent: pathOf(node) }));
}

// What a folded block hides; a whole that came or went says it itself.
function insideText(row) {
  if (!row.inside || (row.lone && row.uniform)) return "";
  return `${row.inside} change${row.inside === 1 ? "" : "s"}`;
}

// A name that breaks after its parts.
function breakable(name) {
  return name.split(/(?<=[_.])/).flatMap((part, i) => (i ? [element("wbr"), part] : [part]));
}

function errorText(row) {
  if (!row.num) return "";
  const error = row.num[0];
  return error === null || error === undefined ? "–" : error === 0 ? "0" : error.toExponential(1);
}

// The block around the selected node as a graph: what is before and after in one drawing, norms with a thick border.
const MOST_NODES = 160;

// The two models, each with its own tree: what moved has another parent in the first.
const SIDES = {
  before: { node: (row) => row.before, parent: (row) => row.up, below: (row) => row.had },
  after: { node: (row) => row.after, parent: (row) => row.parent, below: (row) => row.below.filter((child) => child.after) },
};

// The child of `block` that a row is, or is inside of; null if it is elsewhere.
function childOf(block, row, side) {
  while (row && side.parent(row) !== block) row = side.parent(row);
  return row;
}

function subtree(row, side) {
  return [row, ...side.below(row).flatMap((child) => subtree(child, side))];
}

// Edges between children of a block: key "from-to" to which sides have it.
function edgesOf(block) {
  const found = new Map();
  for (const name of state.side === "both" ? ["before", "after"] : [state.side]) {
    const side = SIDES[name];
    for (const child of side.below(block)) {
      for (const row of subtree(child, side)) {
        for (const input of side.node(row).in || []) {
          const source = childOf(block, ROWS[input], side);
          if (source === child) continue;
          const key = `${source ? source.i : "in"}-${child.i}`;
          if (!found.has(key)) found.set(key, new Set());
          found.get(key).add(name);
        }
      }
    }
  }
  return found;
}

// What is in a block on the side shown; on both, what moved out of it stands where it was.
function childrenOf(block) {
  if (state.side !== "both") return SIDES[state.side].below(block);
  const rows = [...block.below];
  block.had.forEach((row, i) => {
    if (row.parent !== block) rows.splice(rows.indexOf(block.had[i - 1]) + 1, 0, row);
  });
  return rows;
}

function isNorm(row) {
  return [row.before, row.after].some((node) => node && node.role);
}

function label(text, most) {
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

function blockGraph(block) {
  const all = childrenOf(block);
  const children = all.filter((row) => !bookkeeping(row)).slice(0, MOST_NODES);
  const nodes = children.map((row) => {
    const node = state.side === "both" ? row.node : SIDES[state.side].node(row);
    const name = label(titleOf(node) + (node.kind === "call" ? "()" : ""), 26);
    const kind = node.kind === "call" ? "" : label(shownClass(row), 34);
    return { row, name, kind, width: Math.max(name.length * 7.1, kind.length * 6.1, 40) + 20 };
  });
  const at = new Map(children.map((row, i) => [row.i, i]));
  const edges = [];
  let entry = -1;
  for (const [key, sides] of edgesOf(block)) {
    const [from, to] = key.split("-");
    const target = at.get(Number(to));
    if (target === undefined) continue;
    if (from === "in" && entry < 0) entry = nodes.push({ row: null, name: "input", kind: "", width: 56 }) - 1;
    const source = from === "in" ? entry : at.get(Number(from));
    if (source === undefined) continue;
    const only = sides.size === 2 || state.side !== "both" ? "" : sides.has("before") ? "removed" : "inserted";
    const back = source !== entry && source > target; // of what was moved: laid out the other way round
    edges.push(back ? [target, source, only, true] : [source, target, only, false]);
  }
  return { nodes, edges, left: all.length - children.length };
}

function bookkeeping(row) {
  return row.node.kind !== "call" && row.node.n === 0 && !row.k.length; // modules that never run
}

function shownClass(row) {
  return state.side === "both" ? classChange(row) : classOf(row, SIDES[state.side].node(row));
}

function nodeShape(node, place) {
  const { row } = node;
  const classes = ["node"];
  if (row && row.k.length) classes.push(`is-${row.k[0]}`);
  if (row && isNorm(row)) classes.push("has-norm");
  if (row && insideText(row)) classes.push("has-changes");
  if (row && row === state.selected) classes.push("on");
  const x = place.x - node.width / 2, y = place.y - NODE_HEIGHT / 2;
  const made = drawn("g", { class: classes.join(" "), transform: `translate(${x} ${y})` },
    drawn("rect", { width: node.width, height: NODE_HEIGHT }),
    drawn("text", { x: node.width / 2, y: node.kind ? 16 : 23 }, node.name));
  if (node.kind) made.append(drawn("text", { class: "kind", x: node.width / 2, y: 30 }, node.kind));
  if (row) {
    made.append(drawn("title", {}, [pathOf(row.node), classChange(row), insideText(row)].filter(Boolean).join("\n")));
    made.dataset.row = row.i;
    made.addEventListener("click", () => select(row));
  }
  return made;
}

function edgeShape(stops, kind, back) {
  const half = NODE_HEIGHT / 2;
  const points = stops.map(({ x, y }) => ({ x, y }));
  points[0].y += half + (back ? 5 : 0);
  points[points.length - 1].y -= half + (back ? 0 : 5);
  let path = `M${points[0].x} ${points[0].y}`;
  for (let i = 1; i < points.length; i++) {
    const a = points[i - 1], b = points[i], bend = (b.y - a.y) / 2;
    path += `C${a.x} ${a.y + bend} ${b.x} ${b.y - bend} ${b.x} ${b.y}`;
  }
  return drawn("path", { class: `edge ${kind}`, d: path, [back ? "marker-start" : "marker-end"]: "url(#arrow)" });
}

function showGraph() {
  const row = state.selected;
  byId("block").hidden = !row;
  if (!row) return;
  const block = row.below.length ? row : row.parent || row;
  byId("block-name").textContent = `Graph of ${pathOf(block.node)}`;
  byId("block-name").title = pathOf(block.node);
  for (const button of byId("sides").children) button.setAttribute("aria-pressed", String(button.dataset.side === state.side));
  const { nodes, edges, left } = blockGraph(block);
  if (!nodes.length) {
    byId("drawing").replaceChildren(element("p", { className: "muted", textContent: "There is nothing on this side." }));
    return;
  }
  const plan = layout(nodes, edges);
  const arrow = drawn("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 3, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" },
    drawn("path", { class: "arrow-head", d: "M0 0L8 4L0 8z" }));
  const svg = drawn("svg", { width: plan.width, height: plan.height, viewBox: `0 0 ${plan.width} ${plan.height}`, role: "img" },
    drawn("defs", {}, arrow),
    ...plan.routes.map((stops, i) => edgeShape(stops, edges[i][2], edges[i][3])),
    ...nodes.map((node, i) => nodeShape(node, plan.places[i])));
  svg.setAttribute("aria-label", `Graph of ${pathOf(block.node)}: ${nodes.length} nodes, ${edges.length} edges`);
  const note = left > 0 ? [element("p", { className: "muted", textContent: `${left} more that never run, or beyond ${MOST_NODES}` })] : [];
  byId("drawing").replaceChildren(svg, ...note);
  const on = svg.querySelector(".on");
  if (on) {
    const place = plan.places[nodes.findIndex((node) => node.row === row)];
    byId("drawing").scrollTo(place.x - byId("drawing").clientWidth / 2, place.y - byId("drawing").clientHeight / 2);
  }
}

function startGraph() {
  for (const side of ["before", "both", "after"]) {
    const button = element("button", { type: "button", textContent: side });
    button.dataset.side = side;
    button.addEventListener("click", () => {
      state.side = side;
      showGraph();
    });
    byId("sides").append(button);
  }
  listeners.select.push(showGraph);
}

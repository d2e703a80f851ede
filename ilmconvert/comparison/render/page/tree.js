// Both models side by side: one row for each matched pair, so that they scroll, fold and are selected together.
const tree = { scroller: byId("tree"), shown: [] };

function treeCell(row, node, side) {
  const cell = element("div", { className: `cell ${side}` });
  cell.setAttribute("role", "gridcell");
  cell.style.paddingLeft = `${Math.min(row.depth, 12) * 13}px`;
  if (!node) return cell;
  const open = row.below.length > 0 && !state.closed.has(row.i);
  const moved = side === "before" && row.k.includes("moved"); // its parent there is another
  const title = titleOf(node, side) + (node.kind === "call" ? "()" : "");
  cell.append(
    element("span", { className: "twist", textContent: row.below.length ? (open ? "▾" : "▸") : "" }),
    moved ? pathText(node, "name") : element("span", { className: `name ${node.kind}`, textContent: title }),
    element("span", { className: `cls ${node.role || ""}`, textContent: node.kind === "call" ? "" : classOf(row, node) }),
  );
  if (side === (row.after ? "after" : "before") && row.below.length && !open) cell.append(element("span", { className: "inside", textContent: insideText(row) }));
  const shapes = (node.out || []).map((shape) => shape.join("×")).join(", ");
  cell.title = [pathOf(node), fullClass(node), shapes && `returns ${shapes}`, node.why && `not traced: ${node.why}`]
    .filter(Boolean).join("\n");
  return cell;
}

function gapRow(entry, index) {
  const many = narrowed() ? "others" : "unchanged";
  const depth = entry.gap[0].depth;
  const text = element("div", { className: "cell" }, element("span", { className: "twist", textContent: "⋯" }), `${entry.hidden} ${many}`);
  text.style.paddingLeft = `${Math.min(depth, 12) * 13}px`;
  const made = element("div", { className: "row gap", id: `row-${index}` }, element("span"), text);
  made.setAttribute("role", "row");
  made.setAttribute("aria-level", depth + 1);
  made.classList.toggle("on", entry.gap[0] === state.gap);
  made.addEventListener("click", () => showGap(entry));
  return made;
}

function treeRow(entry, index) {
  if (entry.gap) return gapRow(entry, index);
  const { row } = entry;
  const kind = row.k[0];
  const sign = element("span", { className: `sign ${kind || ""}`, textContent: kind ? DIFF.marks[kind] : "", title: row.k.join(", ") });
  const made = element("div", { className: `row${kind ? ` is-${kind}` : ""}`, id: `row-${index}` }, sign,
    treeCell(row, row.before, "before"), treeCell(row, row.after, "after"));
  if (DIFF.numerics) made.append(element("span", { className: "figure", textContent: errorText(row), title: row.num ? row.num[2] || "" : "" }));
  made.setAttribute("role", "row");
  made.setAttribute("aria-level", row.depth + 1);
  if (row.below.length) made.setAttribute("aria-expanded", String(!state.closed.has(row.i)));
  const on = row === state.selected && !state.gap;
  made.setAttribute("aria-selected", String(on));
  made.classList.toggle("on", on);
  made.dataset.row = row.i;
  made.addEventListener("click", (event) => {
    if (event.target.className === "twist") toggle(row);
    select(row);
  });
  made.addEventListener("dblclick", () => toggle(row));
  return made;
}

function showTree() {
  tree.shown = shownRows();
  tree.window.show(tree.shown);
  tree.scroller.setAttribute("aria-rowcount", tree.shown.length);
  if (standing() < 0) state.gap = null; // it is shown now
  tellStanding();
}

function showSelected() {
  tellStanding();
  if (standing() >= 0) tree.window.reveal(standing());
  else tree.window.draw();
}

// Where the keyboard stands among the rows shown; -1 for nowhere.
function standing() {
  const here = ({ row, gap }) => (state.gap ? gap && gap[0] === state.gap : row && row === state.selected);
  return tree.shown.findIndex(here);
}

function tellStanding() {
  const index = standing();
  if (index >= 0) tree.scroller.setAttribute("aria-activedescendant", `row-${index}`);
  else tree.scroller.removeAttribute("aria-activedescendant");
}

function step(by) {
  const from = standing(), last = tree.shown.length - 1;
  const entry = tree.shown[from < 0 ? (by > 0 ? 0 : last) : Math.min(Math.max(from + by, 0), last)];
  if (entry && entry.row) select(entry.row);
  else if (entry) {
    state.gap = entry.gap[0];
    showSelected();
  }
}

function openGap() {
  const first = state.gap;
  showGap(tree.shown[standing()]);
  select(first);
}

function treeKey(event) {
  const row = state.selected;
  const page = Math.max(1, Math.floor(tree.scroller.clientHeight / tree.window.height) - 1);
  const moves = {
    ArrowDown: () => step(1),
    ArrowUp: () => step(-1),
    PageDown: () => step(page),
    PageUp: () => step(-page),
    Home: () => step(-tree.shown.length),
    End: () => step(tree.shown.length),
  };
  const onRow = {
    ArrowRight: () => row && (state.closed.has(row.i) ? toggle(row, true) : row.below.length && step(1)),
    ArrowLeft: () => row && (row.below.length && !state.closed.has(row.i) ? toggle(row, false) : row.parent && select(row.parent)),
    Enter: () => row && toggle(row),
    " ": () => row && toggle(row),
  };
  const onGap = { ArrowRight: openGap, ArrowLeft: () => state.gap.parent && select(state.gap.parent), Enter: openGap, " ": openGap };
  const keys = { ...moves, ...(state.gap ? onGap : onRow) };
  if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  keys[event.key]();
}

function startTree() {
  byId("left").textContent = DIFF.names[0];
  byId("right").textContent = DIFF.names[1];
  byId("error-head").textContent = DIFF.numerics ? "error" : "";
  tree.window = new Window(tree.scroller, 24, treeRow);
  tree.scroller.addEventListener("keydown", treeKey);
  listeners.show.push(showTree);
  listeners.select.push(showSelected);
}

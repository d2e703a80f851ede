// The list of what changed, and the filters on it.
const changes = { rows: [] };

function changeItem(row, index) {
  const made = element("div", { className: "item", id: `change-${index}` },
    element("span", { className: `mono ${row.k[0]}`, textContent: DIFF.marks[row.k[0]], title: row.k.join(", ") }),
    pathText(row.node, "mono"),
    element("span", { className: "what", textContent: [...row.k.slice(1), classChange(row)].join(" · ") }));
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", String(row === state.selected));
  made.classList.toggle("on", row === state.selected);
  made.addEventListener("click", () => select(row));
  return made;
}

function showChanges() {
  changes.rows = changedRows();
  changes.window.show(changes.rows);
  const all = ROWS.filter((row) => row.k.length).length;
  byId("shown").textContent = changes.rows.length === all ? String(all) : `${changes.rows.length} of ${all}`;
}

function nextChange(by) {
  if (!changes.rows.length) return;
  const at = state.selected ? state.selected.i : by > 0 ? -1 : ROWS.length;
  const later = changes.rows.filter((row) => (by > 0 ? row.i > at : row.i < at));
  const next = by > 0 ? later[0] || changes.rows[0] : later[later.length - 1] || changes.rows[changes.rows.length - 1];
  select(next);
}

function startChanges() {
  changes.window = new Window(byId("list"), 40, changeItem);
  byId("list").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    nextChange(by);
  });
  for (const kind of KINDS) {
    if (!DIFF.counts[kind]) continue;
    const chip = element("button", { type: "button", className: "chip", id: `kind-${kind}` },
      element("b", { className: kind, textContent: DIFF.marks[kind] }), `${DIFF.counts[kind]} ${kind}`);
    chip.setAttribute("aria-pressed", "true");
    chip.addEventListener("click", () => {
      const on = !state.kinds.delete(kind);
      if (on) state.kinds.add(kind);
      chip.setAttribute("aria-pressed", String(on));
      tell("show");
    });
    byId("filters").append(chip);
  }
  listeners.show.push(showChanges);
  listeners.select.push(() => {
    const index = changes.rows.indexOf(state.selected);
    if (index >= 0) changes.window.reveal(index);
    else changes.window.draw();
  });
}

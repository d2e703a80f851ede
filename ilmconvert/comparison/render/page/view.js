// What is selected, searched for and folded; everything that shows it listens.
const state = {
  selected: null,
  gap: null, // the first of a run of rows left out, where the keyboard stands on that
  search: "",
  kinds: new Set(KINDS),
  closed: new Set(), // blocks that are folded
  opened: new Set(), // rows after which a run of other rows is shown
  everything: false,
  kept: null, // how it was folded before a search
  side: "both",
};
const listeners = { select: [], show: [] };

function tell(what) {
  for (const listener of listeners[what]) listener();
}

function select(row, { reveal = true } = {}) {
  state.selected = row;
  state.gap = null;
  if (row && reveal) {
    let changed = false;
    for (let above = row.parent; above; above = above.parent) changed = state.closed.delete(above.i) || changed;
    if (!shownRows().some((entry) => entry.row === row)) {
      state.opened.add(row.i);
      changed = true;
    }
    if (changed) tell("show");
  }
  tell("select");
}

function narrowed() {
  return state.search !== "" || state.kinds.size < KINDS.length;
}

function matches(row) {
  const kind = row.k.some((k) => state.kinds.has(k));
  if (!state.search) return kind;
  if (state.kinds.size < KINDS.length && !kind) return false;
  const text = [row.before, row.after].filter(Boolean).map((n) => `${n.path} ${n.cls}`).join(" ").toLowerCase();
  return state.search.split(/\s+/).every((word) => text.includes(word));
}

function changedRows() {
  return ROWS.filter((row) => row.k.length && matches(row));
}

// The rows on show, in order: {row} or {gap: rows, hidden: how many}. What does not match is left out in runs.
function shownRows() {
  const keep = new Uint8Array(ROWS.length), everything = state.everything && !narrowed();
  for (let i = ROWS.length - 1; i >= 0; i--) {
    if (keep[i] || everything || matches(ROWS[i]) || state.opened.has(i)) {
      keep[i] = 1;
      if (ROWS[i].parent) keep[ROWS[i].parent.i] = 1;
    }
  }
  const shown = [];
  const visit = (rows) => {
    let run = [];
    const flush = () => {
      if (run.length) shown.push({ gap: run, hidden: run.reduce((sum, row) => sum + row.size, 0) });
      run = [];
    };
    for (const row of rows) {
      if (!keep[row.i]) {
        run.push(row);
        continue;
      }
      flush();
      shown.push({ row });
      if (row.below.length && !state.closed.has(row.i)) visit(row.below);
    }
    flush();
  };
  visit(ROWS.filter((row) => !row.parent));
  return shown;
}

function fold(rows, everything = false) {
  Object.assign(state, { closed: new Set(rows.map((row) => row.i)), opened: new Set(), everything });
  tell("show");
}

// The first view: wholes that came or went are folded.
function showOnlyChanges() {
  fold(ROWS.filter((row) => row.lone && row.uniform && row.below.length));
}

// A search shows all it finds; at its end everything is folded as it was, apart from where the selection is now.
function setSearch(text) {
  const { search, selected, closed, opened, everything } = state;
  state.search = text.trim().toLowerCase();
  if (!search) state.kept = { selected, closed, opened, everything };
  if (state.search) {
    fold([]);
    return;
  }
  Object.assign(state, state.kept, { selected });
  tell("show");
  if (selected !== state.kept.selected) select(selected);
}

function showGap(entry) {
  for (const row of entry.gap) {
    state.opened.add(row.i);
    if (row.below.length) state.closed.add(row.i);
  }
  tell("show");
}

function toggle(row, open) {
  if (!row.below.length) return;
  const closed = state.closed.has(row.i);
  if (open === undefined ? closed : open) state.closed.delete(row.i);
  else state.closed.add(row.i);
  tell("show");
}

// A list of equal heights of which only what is in view is in the document.
class Window {
  constructor(scroller, height, make) {
    this.scroller = scroller;
    this.height = height;
    this.make = make;
    this.entries = [];
    this.space = element("div", { className: "space" });
    scroller.append(this.space);
    scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(scroller);
    addEventListener("beforeprint", () => this.draw(true));
    addEventListener("afterprint", () => this.draw());
  }

  show(entries) {
    this.entries = entries;
    this.space.style.height = `${entries.length * this.height}px`;
    this.draw();
  }

  draw(all = false) {
    const first = all ? 0 : Math.max(0, Math.floor(this.scroller.scrollTop / this.height) - 8);
    const last = all ? this.entries.length : Math.min(this.entries.length, first + Math.ceil(this.scroller.clientHeight / this.height) + 17);
    const made = [];
    for (let i = first; i < last; i++) {
      const row = this.make(this.entries[i], i);
      row.style.top = `${i * this.height}px`;
      made.push(row);
    }
    this.space.replaceChildren(...made);
  }

  reveal(index) {
    const top = index * this.height;
    const { scrollTop, clientHeight } = this.scroller;
    if (top < scrollTop || top + this.height > scrollTop + clientHeight) {
      this.scroller.scrollTop = Math.max(0, top - clientHeight / 3);
    }
    this.draw();
  }
}

// The header, the keys, and the start.
function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const apply = () => {
    document.documentElement.dataset.theme = chosen || (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", apply);
  addEventListener("beforeprint", () => { document.documentElement.dataset.theme = "light"; });
  addEventListener("afterprint", apply);
  byId("theme").addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    apply();
  });
  apply();
}

function startHeader() {
  byId("title").append(DIFF.names[0], element("span", { className: "arrow", textContent: "→" }), DIFF.names[1]);
  const same = ROWS.every((row) => !row.k.length);
  const facts = DIFF.totals.map(([what, before, after, by]) => [what, by ? `${before} → ${after} (${by})` : before]);
  facts.unshift(["nodes", same ? "the same structure" : `${DIFF.counts.unchanged} unchanged`]);
  for (const error of new Set(DIFF.errors)) if (error) facts.push(["not run", error, "trouble"]);
  byId("totals").append(...facts.map(([name, text, className = ""]) =>
    element("div", { className }, element("dt", { textContent: name }), element("dd", { textContent: text }))));
}

function foldAll() {
  fold(ROWS.filter((row) => row.below.length && row.parent));
}

function unfoldAll() {
  fold([], true);
}

function pageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === byId("search")) {
    if (event.key === "Escape") {
      byId("search").value = "";
      setSearch("");
      tree.scroller.focus();
    } else if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      tree.scroller.focus();
      const first = tree.shown.find((entry) => entry.row && matches(entry.row));
      if (first) select(first.row);
    }
    return;
  }
  const keys = {
    "/": () => byId("search").focus(),
    n: () => nextChange(1),
    p: () => nextChange(-1),
    f: foldAll,
    c: showOnlyChanges,
    u: unfoldAll,
    t: () => byId("theme").click(),
    Escape: () => select(null),
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
}

startTheme();
startHeader();
startTree();
startChanges();
startDetails();
startGraph();
startChart();
byId("search").addEventListener("input", () => setSearch(byId("search").value));
byId("previous").addEventListener("click", () => nextChange(-1));
byId("next").addEventListener("click", () => nextChange(1));
byId("fold").addEventListener("click", foldAll);
byId("only").addEventListener("click", showOnlyChanges);
byId("unfold").addEventListener("click", unfoldAll);
document.addEventListener("keydown", pageKey);
showOnlyChanges();
select(ROWS.find((row) => row.k.length && row.parent) || ROWS[0]);
tree.scroller.scrollTop = 0;
performance.mark("ready");
document.documentElement.dataset.ready = "yes";

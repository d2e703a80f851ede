// Everything about the selected row.
function section(title, ...content) {
  return [element("h4", { textContent: title }), ...content];
}

function comparison(fields) {
  const rows = fields.map(([, name, before, after]) =>
    element("tr", {}, element("th", { scope: "row" }, ...breakable(name)),
      element("td", { className: before === null ? "" : "old" }, ...breakable(before === null ? "–" : before)),
      element("td", { className: after === null ? "" : "new" }, ...breakable(after === null ? "–" : after))));
  const head = element("tr", {}, element("th"), element("th", { textContent: "before" }), element("th", { textContent: "after" }));
  return element("table", {}, head, ...rows);
}

function facts(pairs) {
  return element("table", {}, ...pairs.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, ...breakable(name)), element("td", {}, ...breakable(value)))));
}

function listed(lines, className) {
  return element("ul", {}, ...lines.map((line) => element("li", { className, textContent: line })));
}

function keys(row) {
  const added = row.add || [], removed = row.del || [], renamed = row.ren || [];
  if (!added.length && !removed.length && !renamed.length) return [];
  return section("State dict", listed(added.map((key) => `+ ${key}`), "new"), listed(removed.map((key) => `- ${key}`), "old"),
    listed(renamed.map(([from, to]) => `${from} → ${to}`), ""));
}

function figures(row) {
  if (!row.num) return [];
  const [error, cosine, note] = row.num;
  const pairs = [["relative error", error === null ? note : error.toExponential(3)]];
  if (cosine !== null) pairs.push(["cosine", cosine.toFixed(7)]);
  return section("Activations", facts(pairs));
}

function keptAttributes(row) {
  if (!row.x || row.x.a === undefined || row.y === undefined || row.y.a === undefined) return [];
  const now = new Map(DIFF.attributes[row.y.a]);
  const same = DIFF.attributes[row.x.a].filter(([name, value]) => now.get(name) === value);
  return same.length ? section("Kept", facts(same)) : [];
}

function wholeNode(title, node) {
  const pairs = [["class", fullClass(node)]];
  if (node.out) pairs.push(["returns", node.out.map((shape) => shape.join(" × ")).join(", ")]);
  if (node.n !== undefined) pairs.push(["calls", String(node.n)]);
  if (node.also) pairs.push(["also", node.also.join(", ")]);
  if (node.why) pairs.push(["not traced", node.why]);
  if (node.a !== undefined) pairs.push(...DIFF.attributes[node.a]);
  if (node.t !== undefined) pairs.push(...DIFF.tensors[node.t].map(([kind, name, text]) => [`${kind} ${name}`, text]));
  return element("details", {}, element("summary", { textContent: title }), facts(pairs));
}

function weight([, name]) {
  return ["num_groups", "num_key_groups", "eps"].includes(name) ? 0 : 1;
}

function showDetails() {
  const row = state.selected;
  byId("side").classList.toggle("closed", !row);
  if (!row) {
    byId("details").replaceChildren(element("p", { className: "muted", textContent: "Select a node to see what changed in it." }));
    return;
  }
  const { before, after } = row;
  const parts = [element("h3", { textContent: pathOf(row.node) })];
  if (before && after && before.path !== after.path) parts.push(element("p", { className: "muted", textContent: `was ${pathOf(before)}` }));
  const words = element("p");
  for (const kind of row.k) words.append(element("span", { className: kind, textContent: `${DIFF.marks[kind]} ${kind}  ` }));
  if (!row.k.length) words.append(element("span", { className: "muted", textContent: "unchanged " }));
  words.append(element("span", { className: "mono", textContent: classChange(row) }));
  parts.push(words, ...figures(row));
  const groups = [["class", "Class"], ["attribute", "Attributes"], ["parameter", "Parameters"], ["buffer", "Buffers"], ["graph", "In the graph"]];
  for (const [group, title] of groups) {
    const fields = (row.f || []).filter((field) => field[0] === group).sort((a, b) => weight(a) - weight(b));
    if (fields.length) parts.push(...section(title, comparison(fields)));
  }
  if (row.f) parts.push(...keptAttributes(row));
  parts.push(...keys(row));
  if (before && after && row.x) parts.push(wholeNode("All of it before", before), wholeNode("All of it after", after));
  else parts.push(wholeNode("All of it", row.node));
  if (!row.k.length || row.lone) parts[parts.length - 1].open = true;
  byId("details").replaceChildren(...parts);
  byId("details").scrollTop = 0;
}

function startDetails() {
  byId("close").addEventListener("click", () => select(null));
  listeners.select.push(showDetails);
}

// The relative error along the depth, on a logarithmic scale; a click, or the arrow keys, selects the node.
const chart = { svg: byId("chart"), rows: [], at: -1 };
const CHART_HEIGHT = 84, CHART_LEFT = 38, CHART_TOP = 6, CHART_FOOT = 4;

function exponents() {
  const logs = chart.rows.map((row) => row.num[0]).filter((error) => error > 0).map(Math.log10);
  const high = Math.ceil(Math.max(-3, ...logs)), low = Math.floor(Math.max(-9, Math.min(high - 2, ...logs)));
  return [low, Math.max(high, low + 2)];
}

function drawChart() {
  const width = Math.max(chart.svg.clientWidth, 100);
  const [low, high] = exponents();
  const base = CHART_HEIGHT - CHART_FOOT;
  const y = (log) => base - ((Math.min(Math.max(log, low), high) - low) / (high - low)) * (base - CHART_TOP);
  const each = (width - CHART_LEFT) / chart.rows.length;
  const every = Math.max(1, Math.ceil((high - low) / 4));
  const parts = [];
  for (let log = low; log <= high; log += every) {
    parts.push(drawn("line", { x1: CHART_LEFT, x2: width, y1: y(log), y2: y(log) }));
    parts.push(drawn("text", { x: CHART_LEFT - 5, y: y(log) + 3, "text-anchor": "end" }, `1e${log}`));
  }
  chart.rows.forEach((row, i) => {
    const top = row.num[0] > 0 ? y(Math.log10(row.num[0])) : base;
    const attributes = { class: row.k.length ? "bar on" : "bar", x: CHART_LEFT + i * each, width: Math.max(each - (each > 4 ? 1 : 0), 0.6), y: Math.min(top, base - 1), height: Math.max(base - top, 1) };
    parts.push(drawn("rect", attributes));
  });
  if (chart.at >= 0) {
    const x = CHART_LEFT + (chart.at + 0.5) * each;
    parts.push(drawn("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: CHART_HEIGHT }));
  }
  chart.svg.replaceChildren(...parts);
}

function chartIndex(event) {
  const box = chart.svg.getBoundingClientRect();
  const part = (event.clientX - box.left - CHART_LEFT) / (box.width - CHART_LEFT);
  return Math.min(Math.max(Math.floor(part * chart.rows.length), 0), chart.rows.length - 1);
}

function chartHead(row) {
  const [inputs, notes] = DIFF.numerics;
  const right = row ? `${pathOf(row.node)}: ${row.num[0].toExponential(2)}` : [`on ${inputs}`, ...notes].join("; ");
  const spans = [chart.title, right].map((text) => element("span", { textContent: text, title: text }));
  byId("strip-head").replaceChildren(...spans);
}

function startChart() {
  if (!DIFF.numerics) return;
  chart.rows = ROWS.filter((row) => row.num && row.num[0] !== null && !row.below.length);
  document.body.classList.add("numeric");
  byId("strip").hidden = false;
  const same = chart.rows.every((row) => row.num[0] === 0);
  chart.title = "Relative error of each module's output, in order of depth";
  if (same) chart.title = chart.rows.length ? `All ${chart.rows.length} outputs compared are identical` : "No outputs could be compared";
  chartHead(null);
  if (same) {
    chart.svg.remove();
    return;
  }
  chart.svg.setAttribute("aria-label", `Relative error of ${chart.rows.length} modules; left and right select one`);
  new ResizeObserver(drawChart).observe(chart.svg);
  chart.svg.addEventListener("click", (event) => select(chart.rows[chartIndex(event)]));
  chart.svg.addEventListener("mousemove", (event) => chartHead(chart.rows[chartIndex(event)]));
  chart.svg.addEventListener("mouseleave", () => chartHead(chart.rows[chart.at] || null));
  chart.svg.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    select(chart.rows[Math.min(Math.max(chart.at + by, 0), chart.rows.length - 1)]);
  });
  listeners.select.push(() => {
    chart.at = chart.rows.indexOf(state.selected);
    chartHead(chart.rows[chart.at] || null);
    drawChart();
  });
}

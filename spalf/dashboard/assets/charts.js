// Charts, by uPlot. Each is drawn again when colours change, and resized with its place.

const drawnCharts = new Map(); // element -> { plot, build }

const chartResizer = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const chart = drawnCharts.get(target);
    const width = Math.floor(target.clientWidth);
    if (chart && width > 0 && width !== chart.plot.width) {
      chart.plot.setSize({ width, height: chart.plot.height });
    }
  }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [element, { build }] of [...drawnCharts]) draw(element, build);
});

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Draws into `element` what `build(width)` returns: uPlot's options and data.
function draw(element, build) {
  discard(element);
  const { options, data } = build(Math.max(240, Math.floor(element.clientWidth)));
  drawnCharts.set(element, { plot: new uPlot(options, data, element), build });
  chartResizer.observe(element);
}

function discard(element) {
  const chart = drawnCharts.get(element);
  if (!chart) return;
  chart.plot.destroy();
  chartResizer.unobserve(element);
  drawnCharts.delete(element);
}

// Forgets the charts inside an element that is about to be emptied.
function discardInside(parent) {
  for (const element of [...drawnCharts.keys()]) {
    if (parent.contains(element)) discard(element);
  }
}

// A figure with its caption and, for those who do not see it, what it shows in words.
function figure(caption, description, build) {
  const place = make("div", { class: "chart", role: "img", "aria-label": description });
  const element = make("figure", {}, place, make("figcaption", {}, caption));
  // Its width is known once it is in the page.
  requestAnimationFrame(() => place.isConnected && draw(place, build));
  return element;
}

function axis(label, extra = {}) {
  const font = "12px system-ui, sans-serif";
  return {
    label,
    stroke: colour("muted"),
    font,
    labelFont: font,
    labelSize: 18,
    grid: { stroke: colour("grid"), width: 1 },
    ticks: { stroke: colour("grid"), width: 1, size: 4 },
    values: (_, values) => values.map((value) => (value === null ? "" : tick(value))),
    ...extra,
  };
}

// Options common to all charts; the x axis is never a time.
function chartOptions(width, series, axes, extra = {}) {
  return {
    width,
    height: 220,
    series: [{ label: axes[0].label, value: (_, value) => number(value) }, ...series],
    axes,
    padding: [10, 12, 0, 0],
    scales: { x: { time: false }, ...extra.scales },
    cursor: { points: { size: 7 }, ...extra.cursor },
    legend: { live: true },
    hooks: extra.hooks ?? {},
  };
}

// Distances between ticks of an axis that counts.
const WHOLE_STEPS = Array.from(
  { length: 30 },
  (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3),
);

// Bars of equal width. `layers`: name, colour and counts, each drawn over the one before.
function bars(width, xLabel, edges, layers, yLabel) {
  const step = edges[1] - edges[0];
  const last = edges.length - 1;
  const series = layers.map(({ label, stroke, shown }) => ({
    label,
    stroke,
    fill: stroke,
    width: 0,
    points: { show: false },
    paths: uPlot.paths.bars({ align: 1, size: [1, Infinity], gap: 1 }),
    value: (_, value, __, index) => (index === null ? "–" : String(shown ? shown[index] : value)),
  }));
  const axes = [axis(xLabel, { size: 32 }), axis(yLabel, { size: 56, incrs: WHOLE_STEPS })];
  const scales = {
    x: { time: false, range: () => [edges[0], edges[last]] },
    y: { range: (_, __, max) => [0, Math.max(1, max * 1.05)] },
  };
  const options = chartOptions(width, series, axes, {
    scales,
    cursor: { drag: { x: false, y: false }, points: { show: false } },
  });
  const from = (_, value) => (value === null ? "–" : `${tick(value)} to ${tick(value + step)}`);
  options.series[0].value = from;
  return { options, data: [edges.slice(0, last), ...layers.map((layer) => layer.counts)] };
}

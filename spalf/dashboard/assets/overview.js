// The SAE as a whole. Drawn when it is first looked at.

const overview = document.getElementById("overview");

function showOverview() {
  if (overview.childElementCount) return;
  overview.append(
    frontierSection(),
    chartSection("Features", [densityFigure(), thresholdFigure()]),
    chartSection("Course of training", traceFigures()),
  );
}

function chartSection(title, figures) {
  const shown = figures.filter(Boolean);
  const body = shown.length
    ? make("div", { class: "charts" }, ...shown)
    : make("p", { class: "notice" }, "There is no metrics log of this SAE.");
  return make("section", {}, make("h2", {}, title), body);
}

function frontierSection() {
  const { frontier, sweep } = summary;
  if (!frontier.length && !sweep.length) {
    return make(
      "section",
      {},
      make("h2", {}, "Frontier"),
      make("p", { class: "notice" }, "No frontier was given."),
    );
  }
  const charts = [
    frontierFigure("delta_ce", "ΔCE (nats per token)"),
    frontierFigure("explained_variance", "explained variance"),
  ];
  return make(
    "section",
    {},
    make("h2", {}, "Frontier"),
    make("div", { class: "charts" }, ...charts),
    frontierTable(),
  );
}

const METHOD_COLOURS = ["series-1", "series-3", "series-4", "series-5"];

// Methods of the other SAEs on the frontier.
function otherMethods() {
  const others = summary.frontier.filter((row) => !row.own);
  return [...new Set(others.map((row) => row.method))].sort();
}

// This SAE, the others of its model, and what scaling its thresholds would give, against L0.
function frontierFigure(key, label) {
  const { frontier, sweep } = summary;
  const kinds = [...(sweep.length ? ["thresholds scaled"] : []), ...otherMethods(), "this SAE"];
  const points = [
    ...frontier.map((row) => ({ x: row.l0, y: row[key], kind: row.own ? "this SAE" : row.method })),
    ...sweep.map((row) => ({ x: row.l0, y: row[key], kind: "thresholds scaled" })),
  ].sort((a, b) => a.x - b.x);
  const column = (kind) => points.map((point) => (point.kind === kind ? point.y : null));
  const data = [points.map((point) => point.x), ...kinds.map(column)];
  const dots = (name, stroke, size) => ({
    label: name,
    stroke,
    paths: () => null,
    points: { show: true, size, fill: stroke },
    value: (_, value) => number(value),
  });
  const count = `${label} of ${frontier.length} SAEs against their L0`;
  const described = `${count}; the numbers are in the table below`;
  return figure(`${label} against L0`, described, (width) => {
    const scaled = {
      label: "thresholds scaled",
      stroke: colour("muted"),
      width: 1.5,
      dash: [4, 4],
      spanGaps: true,
      points: { show: true, size: 4 },
      value: (_, value) => number(value),
    };
    const series = [
      ...(sweep.length ? [scaled] : []),
      ...otherMethods().map((name, i) => dots(name, colour(METHOD_COLOURS[i % 4]), 9)),
      dots("this SAE", colour("series-2"), 12),
    ];
    const scales = { x: { time: false, distr: 3, range: (_, min, max) => [min / 1.2, max * 1.2] } };
    const ticks = {
      size: 32,
      splits: () => logTicks(data[0][0] / 1.2, data[0].at(-1) * 1.2),
      filter: (_, splits) => splits,
    };
    return {
      options: chartOptions(width, series, [axis("L0", ticks), axis(label, { size: 60 })], {
        scales,
      }),
      data,
    };
  });
}

// 1, 2, 5, 10, … inside a range, more of them where it is narrow, and evenly where it is very.
function logTicks(low, high) {
  const ticks = [];
  if (high < 2 * low) {
    const power = 10 ** Math.floor(Math.log10((high - low) / 5));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= (high - low) / 5);
    for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
    return ticks;
  }
  const factors = high / low < 10 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : [1, 2, 5];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    for (const factor of factors) {
      if (power * factor >= low && power * factor <= high) ticks.push(power * factor);
    }
  }
  return ticks;
}

function frontierTable() {
  const keys = ["L0_target", "seed", "l0", "explained_variance", "delta_ce"];
  const names = ["L0 asked", "seed", "L0", "explained variance", "ΔCE"];
  const shown = plainTable(
    [["method"], ...names.map((name) => [name, true])],
    summary.frontier.map((row) => [
      row.method + (row.own ? " (this SAE)" : ""),
      ...keys.map((key) => (Number.isInteger(row[key]) ? String(row[key]) : number(row[key]))),
    ]),
  );
  summary.frontier.forEach((row, i) => shown.tBodies[0].rows[i].classList.toggle("own", row.own));
  return make("details", {}, make("summary", {}, "As a table"), shown);
}

function strataBars(width, histogram, label) {
  const total = histogram.free.map((count, i) => count + histogram.anchored[i]);
  const layers = [
    { label: summary.anchored ? "free" : "features", stroke: colour("series-1"), counts: total, shown: histogram.free },
    { label: "anchored", stroke: colour("series-2"), counts: histogram.anchored },
  ].slice(0, summary.anchored ? 2 : 1);
  return bars(width, label, histogram.edges, layers, "features");
}

function densityFigure() {
  const silent = table.fired.filter((fired) => fired === 0).length;
  const tokens = summary.tokens.toLocaleString("en");
  const caption =
    `Density: log₁₀ of the share of ${tokens} tokens on which a feature is active. ` +
    `Silent, and so not drawn: ${silent}.`;
  return figure(caption, `Histogram of feature densities; ${silent} features are silent`, (width) =>
    strataBars(width, summary.density, "log₁₀ density"),
  );
}

function thresholdFigure() {
  if (!summary.threshold) return null; // it keeps the k largest instead
  return figure(
    "Thresholds θ, in units of the activations' scale",
    "Histogram of thresholds",
    (width) => strataBars(width, summary.threshold, "θ"),
  );
}

const TRACES = [
  [
    "Active features per token",
    [
      ["l0", "L0"],
      ["l0_ref", "reference"],
    ],
    "L0",
  ],
  ["Multipliers λ", constraintSeries("lambda"), "λ"],
  ["Penalty coefficients ρ", constraintSeries("rho"), "ρ"],
  ["Error budget τ", [["log_tau", "log τ"]], "log τ"],
  ["Violations g (0 is the bound)", constraintSeries("g"), "g"],
  ["Explained variance", [["explained_variance", "explained variance"]], "R²"],
];

function constraintSeries(kind) {
  return [
    ["faith", "faithfulness"],
    ["drift", "drift"],
    ["ortho", "orthogonality"],
  ].map(([name, label]) => [`${kind}_${name}`, label]);
}

function traceFigures() {
  const { traces } = summary;
  if (!traces.tokens.length) return [];
  const thinned = traces.every > 1 ? `, every ${traces.every}th logged step` : "";
  return TRACES.map(([title, columns, unit]) => {
    const shown = columns.filter(([key]) => traces[key].some((value) => value !== null));
    if (!shown.length) return null;
    const last = shown.map(([key, label]) => `${label} ${number(traces[key].at(-1))}`).join(", ");
    return figure(title + thinned, `${title} over training; at the end: ${last}`, (width) => {
      const series = shown.map(([, label], i) => ({
        label,
        stroke: colour(`series-${i + 1}`),
        width: 1.5,
        points: { show: false },
        value: (_, value) => number(value),
      }));
      const millions = (_, values) => values.map((value) => `${value / 1e6} M`);
      const axes = [
        axis("tokens", { values: millions, space: 60, size: 32 }),
        axis(unit, { size: 56 }),
      ];
      const extra = { cursor: { sync: { key: "traces" } }, hooks: { drawClear: [shadePhase2] } };
      return {
        options: chartOptions(width, series, axes, extra),
        data: [traces.tokens, ...shown.map(([key]) => traces[key])],
      };
    });
  });
}

function shadePhase2(plot) {
  if (summary.traces.phase2 === null) return;
  const { left, top, width, height } = plot.bbox;
  const start = Math.max(left, plot.valToPos(summary.traces.phase2, "x", true));
  plot.ctx.fillStyle = colour("shade");
  plot.ctx.fillRect(start, top, left + width - start, height);
}

// One feature: where it fires, how strongly, what it promotes, what lies near.

const detail = document.getElementById("detail");
let shownFeature = null;

async function showFeature(j) {
  if (shownFeature === j) return;
  shownFeature = j;
  const feature = await item("features", j);
  const sequences = await Promise.all(feature.contexts.map(([s]) => item("sequences", s)));
  if (shownFeature !== j) return; // another one was asked for meanwhile
  discardInside(detail);
  detail.replaceChildren(
    featureHeader(j),
    featureFacts(j),
    make("div", { class: "columns" }, activationFigure(j, feature), effectTables(feature)),
    contextList(j, feature, sequences),
    nearestTable(feature),
  );
  detail.scrollTop = 0;
}

function featureHeader(j) {
  const step = (label, shift, name) => {
    const button = make("button", { type: "button", "aria-label": name }, label);
    button.addEventListener("click", () => {
      const place = order.indexOf(j) + shift;
      if (order.includes(j) && place in order) goTo(`#feature-${order[place]}`, { focus: true });
    });
    return button;
  };
  const back = make("button", { type: "button", class: "back" }, "← List");
  back.addEventListener("click", backToList);
  const anchored = j < summary.anchored;
  const kind = anchored ? make("span", {}, "anchored to ", chip(table.anchor[j])) : "free";
  return make(
    "header",
    {},
    back,
    make("h2", { id: "feature-name" }, `Feature ${j}`),
    make("span", { class: "tag" }, summary.anchored ? kind : ""),
    make(
      "span",
      { class: "steps" },
      step("↑", -1, "Previous in the list"),
      step("↓", 1, "Next in the list"),
    ),
  );
}

function featureFacts(j) {
  const fired = table.fired[j];
  const facts = [
    ["Density", fired ? `${percent(density(j))} (${fired.toLocaleString("en")} tokens)` : "0"],
    ["Largest activation", number(table.max[j])],
    ["Mean when active", number(table.mean[j])],
  ];
  if (summary.threshold) facts.push(["Threshold θ", number(table.threshold[j])]);
  if (j < summary.anchored) {
    facts.push(["Drift from its token", number(table.drift[j])]);
    facts.push(["Cosine with it", number(table.cosine[j])]);
  }
  const rows = facts.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value)),
  );
  return make("dl", { class: "facts" }, ...rows);
}

function activationFigure(j, feature) {
  if (!table.fired[j]) {
    const silent = `Silent on all ${summary.tokens.toLocaleString("en")} held-out tokens.`;
    return make("p", { class: "notice" }, silent);
  }
  const counts = feature.histogram;
  const edges = Array.from({ length: counts.length + 1 }, (_, i) => i * feature.bin_width);
  const range = `from ${number(table.threshold[j] ?? 0)} to ${number(table.max[j])}`;
  const described = `Histogram of ${table.fired[j]} activations ${range}`;
  const layers = () => [{ label: "tokens", stroke: colour("series-1"), counts }];
  return figure("Activations on the tokens where it is active", described, (width) =>
    bars(width, "activation", edges, layers(), "tokens"),
  );
}

function effectTables(feature) {
  const side = (name, title) => {
    const [tokens, effects] = feature[name];
    const rows = tokens.map((token, i) => [chip(token), number(effects[i])]);
    return plainTable([["token"], ["logit", true]], rows, make("caption", {}, title));
  };
  const sides = [side("promoted", "Promotes"), side("suppressed", "Suppresses")];
  return make("div", { class: "effects" }, ...sides);
}

function contextList(j, feature, sequences) {
  const items = feature.contexts.map((context, i) => contextItem(j, context, sequences[i]));
  const heading = make("h3", {}, "Strongest contexts");
  if (!items.length)
    return make("section", {}, heading, make("p", { class: "notice" }, "None: it never fired."));
  const hint = make(
    "p",
    { class: "hint" },
    "One from each sequence. Colour: share of the largest activation. Press one to see all of it.",
  );
  return make("section", {}, heading, hint, make("ol", { class: "contexts" }, ...items));
}

// Before it is opened a context is one line with the peak in the middle.
function contextItem(j, [, start, position, peak, codes], [first, tokens]) {
  const level = new Map();
  for (let i = 0; i < codes.length; i += 2) level.set(start + codes[i], codes[i + 1] / 255);
  const length = Math.min(tokens.length - (start - first), summary.window);
  const before = make("span");
  const after = make("span", { class: "after" });
  if (start === 0)
    before.append(make("span", { class: "edge", title: "start of the sequence" }, "⊢"));
  let middle = null;
  for (let p = start; p < start + length; p++) {
    const share = level.get(p) ?? 0;
    const token = tokens[p - first];
    const span = contextToken(token, share, p === position, number(share * table.max[j]));
    if (p === position) middle = span;
    else (p < position ? before : after).append(span);
  }
  const line = make(
    "span",
    { class: "line" },
    make("span", { class: "before" }, before),
    middle,
    after,
  );
  const folded = make("summary", {}, make("span", { class: "peak-value" }, number(peak)), line);
  return make("li", {}, make("details", { class: "context" }, folded));
}

function nearestTable(feature) {
  const [indices, cosines] = feature.nearest;
  const rows = indices.map((near, i) => [
    make("a", { href: `#feature-${near}` }, `Feature ${near}`),
    number(cosines[i]),
    chips([table.fires_on[near]]),
    chips(table.promotes[near]),
  ]);
  const shown = plainTable([["feature"], ["cosine", true], ["fires on"], ["promotes"]], rows);
  shown.classList.add("near");
  return make("section", {}, make("h3", {}, "Nearest features"), shown);
}

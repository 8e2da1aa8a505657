// The list of features: a table of which only the rows in view exist.

const ROW_HEIGHT = 32;
const ROWS_BEYOND = 8; // rows kept on either side of those in view

// Where no feature is anchored, the columns that speak of anchors leave their room to others.
const COLUMNS = [
  { key: "feature", label: "Feature", number: true, value: (j) => j },
  {
    key: "fires_on",
    label: "Fires on",
    title: "commonest token at the peak of its strongest contexts",
    value: (j) => text(table.fires_on[j]),
    cell: (j) => chips([table.fires_on[j]]),
  },
  {
    key: "promotes",
    label: "Promotes",
    title: "tokens whose logits it raises most",
    room: summary.anchored ? "medium" : "small",
    value: (j) => text(table.promotes[j][0]),
    cell: (j) => chips(table.promotes[j]),
  },
  {
    key: "density",
    label: "Density",
    title: "share of tokens on which it is active",
    number: true,
    value: (j) => density(j),
    cell: (j) => percent(density(j)),
  },
  {
    key: "max",
    label: "Max",
    title: "largest activation",
    number: true,
    value: (j) => table.max[j],
    cell: (j) => number(table.max[j]),
  },
  { key: "stratum", label: "Stratum", anchors: true, room: "wide", value: (j) => stratum(j) },
  {
    key: "anchor",
    anchors: true,
    room: "small",
    label: "Anchor",
    title: "token it is anchored to",
    value: (j) => text(table.anchor[j]),
    cell: (j) => chips([table.anchor[j]]),
  },
  {
    key: "drift",
    anchors: true,
    label: "Drift",
    title: "relative distance from that token's direction",
    number: true,
    value: (j) => table.drift[j],
    cell: (j) => number(table.drift[j]),
  },
].filter((column) => summary.anchored || !column.anchors);

let table = null; // columns of data, an entry per feature
let order = []; // features in the list, in order
let active = 0; // place in `order` of the current row
let sorting = { key: "max", descending: true };
let haystacks = null; // what a search looks at, an entry per feature

const scroller = document.getElementById("scroller");
const grid = document.getElementById("list");
const rows = document.getElementById("rows");
const search = document.getElementById("search");
const stratumChoice = document.getElementById("stratum");

const density = (j) => table.fired[j] / summary.tokens;
const stratum = (j) => (j < summary.anchored ? "anchored" : "free");
const text = (token) => (token === null || token === undefined ? null : tokenTexts[token]);

function chips(tokens) {
  const known = tokens.filter((token) => token !== null && token !== undefined);
  if (!known.length) return "–";
  return make("span", { class: "chips" }, ...known.map(chip));
}

function buildHeader() {
  for (const column of COLUMNS) {
    const button = make("button", { type: "button" }, column.label);
    if (column.title) button.title = column.title;
    button.addEventListener("click", () => sortBy(column.key));
    const cell = make("th", { scope: "col", role: "columnheader", "data-key": column.key }, button);
    mark(cell, column);
    document.getElementById("columns").append(cell);
  }
  grid.setAttribute("aria-colcount", COLUMNS.length);
}

function mark(cell, column) {
  if (column.number) cell.classList.add("number");
  if (column.room) cell.classList.add(column.room); // shown where there is that much of it
}

function sortBy(key) {
  const first = ["density", "max", "drift"].includes(key); // the largest are looked for first
  sorting = { key, descending: sorting.key === key ? !sorting.descending : first };
  refreshList();
}

// Features that match the search and the filter, sorted; the current one stays so if it is there.
function refreshList() {
  const current = order[active];
  const wanted = search.value.trim().toLowerCase();
  const chosen = stratumChoice.value;
  order = [];
  for (let j = 0; j < summary.features; j++) {
    const inStratum =
      chosen === "all" || chosen === stratum(j) || (chosen === "silent" && !table.fired[j]);
    if (inStratum && matches(j, wanted)) order.push(j);
  }
  sortOrder();
  for (const cell of document.querySelectorAll("#columns th")) {
    const direction = sorting.descending ? "descending" : "ascending";
    cell.setAttribute("aria-sort", cell.dataset.key === sorting.key ? direction : "none");
  }
  document.getElementById("count").textContent =
    order.length === summary.features
      ? `${order.length.toLocaleString("en")} features`
      : `${order.length.toLocaleString("en")} of ${summary.features.toLocaleString("en")} features`;
  grid.setAttribute("aria-rowcount", order.length + 1);
  active = Math.max(0, order.indexOf(current));
  showRow(active);
}

function matches(j, wanted) {
  if (!wanted) return true;
  if (/^\d+$/.test(wanted) && Number(wanted) === j) return true;
  haystacks ??= Array.from({ length: summary.features }, (_, i) =>
    [table.fires_on[i], table.anchor[i], ...table.promotes[i]]
      .map((token) => text(token) ?? "")
      .join("\u0000")
      .toLowerCase(),
  );
  return haystacks[j].includes(wanted);
}

function sortOrder() {
  const { value } = COLUMNS.find((column) => column.key === sorting.key);
  const values = Array.from({ length: summary.features }, (_, j) => value(j));
  const sign = sorting.descending ? -1 : 1;
  const missing = (v) => v === null || v === undefined;
  order.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b; // always last
    return sign * (x < y ? -1 : x > y ? 1 : 0) || a - b;
  });
}

function buildRow(place) {
  const j = order[place];
  const row = make("tr", { role: "row", id: `row-${j}`, "aria-rowindex": place + 2 });
  row.setAttribute("aria-selected", place === active);
  row.dataset.place = place;
  for (const column of COLUMNS) {
    const content = column.cell ? column.cell(j) : String(column.value(j));
    const cell = make("td", { role: "gridcell" }, content);
    mark(cell, column);
    row.append(cell);
  }
  return row;
}

function spacer(count) {
  const cell = make("td");
  cell.style.height = `${count * ROW_HEIGHT}px`;
  return make("tr", { class: "spacer", "aria-hidden": "true" }, cell);
}

function drawRows() {
  const above = Math.floor(scroller.scrollTop / ROW_HEIGHT) - ROWS_BEYOND;
  const inView = Math.ceil(scroller.clientHeight / ROW_HEIGHT) + 2 * ROWS_BEYOND;
  const first = Math.max(0, Math.min(above, order.length - inView));
  const last = Math.min(order.length, first + inView);
  const built = [];
  for (let place = first; place < last; place++) built.push(buildRow(place));
  rows.replaceChildren(spacer(first), ...built, spacer(order.length - last));
  if (active >= first && active < last) {
    grid.setAttribute("aria-activedescendant", `row-${order[active]}`);
  } else {
    grid.removeAttribute("aria-activedescendant");
  }
}

// Makes the row at `place` the current one and brings it into view.
function showRow(place) {
  active = Math.max(0, Math.min(place, order.length - 1));
  const top = active * ROW_HEIGHT;
  const room = scroller.clientHeight - 2 * ROW_HEIGHT; // the header covers the first row
  if (top < scroller.scrollTop) scroller.scrollTop = top;
  else if (top > scroller.scrollTop + room) scroller.scrollTop = top - room;
  drawRows();
}

function onListKey(event) {
  const page = Math.max(1, Math.floor(scroller.clientHeight / ROW_HEIGHT) - 2);
  const moves = {
    ArrowDown: 1,
    ArrowUp: -1,
    PageDown: page,
    PageUp: -page,
    Home: -Infinity,
    End: Infinity,
  };
  if (event.target !== grid || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in moves && order.length) {
    event.preventDefault();
    showRow(active + moves[event.key]);
    if (isWide()) goTo(`#feature-${order[active]}`, { replace: true });
  } else if (event.key === "Enter" && order.length) {
    event.preventDefault();
    goTo(`#feature-${order[active]}`, { focus: true });
  }
}

function onListClick(event) {
  const row = event.target.closest("tr[data-place]");
  if (!row) return;
  showRow(Number(row.dataset.place));
  goTo(`#feature-${order[active]}`, { focus: !isWide() });
}

function startList() {
  buildHeader();
  if (!summary.anchored) {
    for (const choice of stratumChoice.querySelectorAll(".anchors")) choice.remove();
  }
  let asked = false;
  scroller.addEventListener("scroll", () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      drawRows();
    });
  });
  new ResizeObserver(drawRows).observe(scroller);
  grid.addEventListener("keydown", onListKey);
  rows.addEventListener("click", onListClick);
  search.addEventListener("input", refreshList);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      grid.focus();
      if (isWide() && order.length) goTo(`#feature-${order[active]}`, { replace: true });
    }
  });
  stratumChoice.addEventListener("change", refreshList);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  refreshList();
}

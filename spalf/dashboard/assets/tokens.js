// Tokens as text. They come from arbitrary documents: they enter the page as text nodes only.

let tokenTexts = []; // text of each token of the page's vocabulary

// An element with attributes and children; a string child is text.
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// A table. Columns are [name, whether it holds numbers]; a row is an array of cells.
function plainTable(columns, rows, ...caption) {
  const kind = (i) => (columns[i][1] ? { class: "number" } : {});
  const heads = columns.map(([name], i) => make("th", { scope: "col", ...kind(i) }, name));
  const body = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell, i) => make("td", kind(i), cell))),
  );
  const head = make("thead", {}, make("tr", {}, ...heads));
  return make("table", { class: "plain" }, ...caption, head, make("tbody", {}, ...body));
}

const CONTROL = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

// Text with what cannot be seen made visible.
function visible(text) {
  return text
    .replaceAll("\n", "↵")
    .replaceAll("\t", "⇥")
    .replace(CONTROL, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

// A token on its own; spaces at its ends are drawn, since they are part of it.
function chip(token) {
  const drawn = (spaces) => (spaces.length > 4 ? `␣×${spaces.length}` : "␣".repeat(spaces.length));
  const text = visible(tokenTexts[token]).replace(/^ +| +$/g, drawn);
  return make("code", { class: "chip", title: JSON.stringify(tokenTexts[token]) }, text);
}

// A token in its context, coloured by its share of the feature's largest activation.
function contextToken(token, share, isPeak, value) {
  const span = make("span", { class: "token" });
  // Where a context is one line, indentation is drawn small and lines do not break.
  for (const part of visible(tokenTexts[token]).split(/(↵+| {3,})/)) {
    span.append(part.startsWith("   ") ? make("span", { class: "gap" }, part) : part);
    if (part.startsWith("↵")) span.append(make("br"));
  }
  if (share > 0) {
    span.classList.add("active");
    span.style.setProperty("--share", share.toFixed(3));
    span.title = `${JSON.stringify(tokenTexts[token])}: ${value}`;
  }
  if (isPeak) span.classList.add("peak");
  return span;
}

// Three significant digits, without an exponent where that is readable.
function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(1);
  return size < 999.5 ? value.toPrecision(3) : Math.round(value).toLocaleString("en");
}

// The same without the zeros at the end, for an axis.
function tick(value) {
  return value === 0 || Math.abs(value) >= 999.5
    ? number(value)
    : String(Number(value.toPrecision(3)));
}

function percent(share) {
  if (share === 0) return "0";
  return share < 0.0001 ? "< 0.01 %" : `${(100 * share).toPrecision(share < 0.995 ? 2 : 3)} %`;
}

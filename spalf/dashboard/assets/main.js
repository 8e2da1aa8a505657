// What is shown follows the address: #features, #feature-12 or #overview.

const isWide = () => matchMedia("(min-width: 900px)").matches;

// Goes to an address. `replace` leaves no entry in the history; `focus` moves to the feature.
function goTo(hash, { replace = false, focus = false } = {}) {
  if (replace || location.hash === hash) {
    try {
      history.replaceState(null, "", hash);
    } catch {
      // Inside another document there is no address to change.
    }
    show(hash, focus);
  } else {
    focusNext = focus;
    location.hash = hash;
  }
}

let focusNext = false;

function show(hash, focus = false) {
  const wanted = /^#feature-(\d+)$/.exec(hash);
  const isOverview = hash === "#overview";
  document.getElementById("features").hidden = isOverview;
  overview.hidden = !isOverview;
  setCurrent("to-overview", isOverview);
  setCurrent("to-features", !isOverview);
  document.body.classList.toggle("one-feature", Boolean(wanted));
  if (isOverview) {
    showOverview();
  } else if (wanted && Number(wanted[1]) < summary.features) {
    const feature = Number(wanted[1]);
    const place = order.indexOf(feature);
    if (place >= 0 && place !== active) showRow(place);
    showFeature(feature);
    if (focus) detail.focus();
  } else {
    drawRows();
    if (isWide() && shownFeature === null && order.length) showFeature(order[active]);
  }
}

function setCurrent(id, current) {
  const link = document.getElementById(id);
  if (current) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

function backToList() {
  if (!isWide()) goTo("#features");
  document.body.classList.remove("one-feature");
  showRow(active);
  grid.focus();
}

function onKey(event) {
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    if (!overview.hidden || !isWide()) goTo("#features", { replace: true });
    search.focus();
    search.select();
  } else if (event.key === "Escape" && detail.contains(event.target)) {
    backToList();
  }
}

async function start() {
  [table, tokenTexts] = await Promise.all([block("table"), block("strings")]);
  unpackedBlocks.clear(); // kept above for good
  startList();
  addEventListener("hashchange", () => {
    show(location.hash, focusNext);
    focusNext = false;
  });
  document.addEventListener("keydown", onKey);
  show(location.hash);
  performance.mark("ready");
}

start();

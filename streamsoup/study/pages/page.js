"use strict";
// Tables: a click on a head sorts by that column; what has no number comes last either way.
const leading = /^\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)/i;
const plain = /^\s*[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?\s*$/i;
function key(row, column) {
  const text = row.cells[column].textContent;
  const found = (column > 0 ? leading : plain).exec(text);
  return found ? parseFloat(found[1] ?? text) : text.trim();
}
function missing(value) {
  return value === "" || value === "–";
}
function compare(a, b) {
  const one = typeof a === "number", two = typeof b === "number";
  if (one && two) return a - b;
  if (one !== two) return one ? -1 : 1;
  return a.localeCompare(b, undefined, { numeric: true });
}
function sort(button) {
  const head = button.closest("th"), column = head.cellIndex;
  const body = button.closest("table").tBodies[0];
  const rows = Array.from(body.rows, row => [key(row, column), row]);
  const numbers = rows.some(([value]) => typeof value === "number");
  const before = head.getAttribute("aria-sort");
  const down = before ? before === "ascending" : numbers && column > 0;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  rows.sort(([a], [b]) => missing(a) - missing(b) || compare(a, b) * (down ? -1 : 1));
  body.append(...rows.map(([, row]) => row));
}
for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sort(button));

// Hints: shown at once, and on a touch too, in place of those of the browser.
for (const cell of document.querySelectorAll("[title]")) {
  cell.dataset.hint = cell.title;
  cell.removeAttribute("title");
}
for (const title of document.querySelectorAll(".mark > title")) {
  title.parentNode.dataset.hint = title.textContent;
  title.remove();
}
const hint = document.createElement("div");
hint.id = "hint";
hint.hidden = true;
hint.setAttribute("role", "status");
document.body.append(hint);
function show(event) {
  const target = event.target instanceof Element ? event.target : null;
  const of = target?.closest("[data-hint], th[scope=row]");
  const text = of?.dataset.hint ?? (of && of.scrollWidth > of.clientWidth ? of.textContent : "");
  hint.hidden = !text;
  if (!text) return;
  hint.textContent = text;
  const box = of.getBoundingClientRect(), { offsetWidth: wide, offsetHeight: high } = hint;
  const x = box.left + box.width / 2 - wide / 2, below = box.bottom + 6;
  hint.style.left = `${Math.max(4, Math.min(x, document.documentElement.clientWidth - wide - 4))}px`;
  hint.style.top = `${below + high < innerHeight ? below : Math.max(4, box.top - high - 6)}px`;
}
addEventListener("pointerover", show);
addEventListener("click", show);
addEventListener("scroll", () => { hint.hidden = true; }, true);
addEventListener("keydown", event => { if (event.key === "Escape") hint.hidden = true; });

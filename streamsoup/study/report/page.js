"use strict";
const leading = /^\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)/i;
function key(row, column) {
  const text = row.cells[column].textContent;
  const found = leading.exec(text);
  return found && column > 0 ? Number(found[1]) : text;
}
function compare(a, b) {
  const one = typeof a === "number", two = typeof b === "number";
  if (one && two) return a - b;
  if (one !== two) return one ? 1 : -1;
  return a.localeCompare(b);
}
function sort(button) {
  const head = button.closest("th");
  const body = button.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending" && head.cellIndex > 0
    || head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = Array.from(body.rows);
  rows.sort((a, b) => compare(key(a, head.cellIndex), key(b, head.cellIndex)) * (down ? -1 : 1));
  body.append(...rows);
}
for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sort(button));

"use strict";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
function paint() { root.dataset.theme = chosen || (dark.matches ? "dark" : "light"); }
dark.addEventListener("change", paint);
paint();

document.getElementById("theme").addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  paint();
});

function value(cell) {
  const number = Number.parseFloat(cell.textContent);
  return Number.isNaN(number) ? null : number;
}

function compare(a, b) {
  const left = value(a), right = value(b);
  if (left !== null && right !== null) return left - right;
  if (left !== null || right !== null) return left === null ? 1 : -1;
  return a.textContent.localeCompare(b.textContent);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1, column = head.cellIndex;
    const rows = [...body.rows].sort((a, b) => sign * compare(a.cells[column], b.cells[column]));
    body.append(...rows);
  });
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const block = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(block);
    try { await navigator.clipboard.writeText(block.textContent); button.textContent = "Copied"; }
    catch { button.textContent = "Selected"; }
  });
}

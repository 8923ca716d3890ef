"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const words = head.hasAttribute("data-words");
    const key = row => row.cells[column].dataset.value;
    const first = words ? "ascending" : "descending";
    const other = words ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    heads.forEach(cell => cell.setAttribute("aria-sort", cell === head ? order : "none"));
    const compare = (a, b) => words ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
    body.append(...[...body.rows].sort((a, b) =>
      (key(a) === "") - (key(b) === "") || sign * compare(key(a), key(b))));
  }));
}
const all = document.getElementById("open-all");
all.hidden = false;
all.addEventListener("click", () => {
  const open = all.getAttribute("aria-pressed") !== "true";
  all.setAttribute("aria-pressed", open);
  document.querySelectorAll("details").forEach(part => { part.open = open; });
});

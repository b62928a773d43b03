"use strict";

// Tables: a click on a column's name sorts by it, a second click the other way round (sign -1).
function compareCells(a, b, sign) {
  const [x, y] = [a.dataset.order, b.dataset.order];
  if (x !== undefined && y !== undefined) return sign * (x - y);
  if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;  // what has no number comes last both ways
  return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => compareCells(a.cells[column], b.cells[column], down ? -1 : 1));
      body.append(...rows);
    });
  });
}

// Answers: only prompts of the chosen kind in which, or in whose answers, the text occurs; at first only a few of them.
const FEW = 8;
const lists = [];
for (const form of document.querySelectorAll("form.filter")) {
  const asked = [...form.parentElement.querySelectorAll("article.asked")];
  const texts = asked.map((article) =>
    [...article.querySelectorAll(".said, .prompt, .text")].map((part) => part.textContent).join("\n").toLowerCase());
  const more = form.parentElement.querySelector("button.more");
  let limit = FEW;
  const apply = () => {
    const wanted = form.elements.text.value.trim().toLowerCase();
    const kind = form.elements.kind ? form.elements.kind.value : "";
    let found = 0;
    asked.forEach((article, index) => {
      const fits = texts[index].includes(wanted) && (kind === "" || article.dataset.kind === kind);
      found += fits ? 1 : 0;
      article.hidden = !fits || found > limit;
    });
    more.hidden = found <= limit;
    form.querySelector("output").textContent = `${Math.min(found, limit)} of ${found} shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    limit = Infinity;
    apply();
  });
  lists.push({ get limit() { return limit; }, set limit(value) { limit = value; apply(); } });
  apply();
}

// On paper nothing can be opened: everything is open, and all that the filters let through is there.
let before = null;
window.addEventListener("beforeprint", () => {
  before ??= { closed: [...document.querySelectorAll("details:not([open])")], limits: lists.map((list) => list.limit) };
  for (const details of before.closed) details.open = true;
  for (const list of lists) list.limit = Infinity;
});
window.addEventListener("afterprint", () => {
  if (before === null) return;
  for (const details of before.closed) details.open = false;
  lists.forEach((list, index) => { list.limit = before.limits[index]; });
  before = null;
});

"use strict";

// Tables: a click on a column's name sorts by it, a second click the other way round.
function compareCells(a, b) {
  const [x, y] = [a.dataset.order, b.dataset.order];
  if (x !== undefined && y !== undefined) return x - y;
  if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;  // what has no number comes last
  return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => compareCells(a.cells[column], b.cells[column]) * (down ? -1 : 1));
      body.append(...rows);
    });
  });
}

// Answers: only prompts of the chosen kind in which, or in whose answers, the text occurs; at first only a few of them.
const FEW = 8;
for (const form of document.querySelectorAll("form.filter")) {
  const asked = [...form.parentElement.querySelectorAll("article.asked")];
  const texts = asked.map((article) => article.textContent.toLowerCase());
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
  apply();
}

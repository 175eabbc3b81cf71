// What the tables of questions and of latents have in common: heads that sort, pages, and copies as CSV.
const PER_PAGE = 25;

// columns: {title, name (of one that can be sorted by), hint, optional}.  chosen: the name of the one sorted by.
function renderHead(table, columns, chosen) {
  const heads = columns.map(({ name, title, hint = "", optional }) => {
    const head = element("th", { scope: "col", className: optional ? "optional" : "", title: hint });
    head.append(name ? sortButton(name, title, chosen) : title);
    if (name && name === chosen) head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
    return head;
  });
  table.tHead.replaceChildren(element("tr", {}, ...heads));
}

function sortButton(name, title, chosen) {
  const up = chosen === name && !state.up ? "yes" : "";
  return buttonTo(() => go({ sort: name, up, page: "0" }), { id: `sort-${name}`, textContent: title });
}

function inOrder(rows, order) {
  const direction = state.up ? 1 : -1;
  const keyed = rows.map((of) => [order(of), of]);
  keyed.sort(([a], [b]) => (a === b ? 0 : a < b ? -direction : direction));
  return keyed.map(([, of]) => of);
}

function onPage(rows) {
  const first = pageNumber() * PER_PAGE;
  return rows.slice(first, first + PER_PAGE);
}

function renderPager(count) {
  const pages = Math.ceil(count / PER_PAGE);
  const page = pageNumber();
  const turn = (to, text) => {
    const isNone = to < 0 || to >= pages;
    return buttonTo(() => go({ page: String(to) }), { id: `page-${text}`, textContent: text, disabled: isNone });
  };
  find("pager").hidden = pages < 2;
  find("pager").replaceChildren(turn(page - 1, "Previous"), ` page ${page + 1} of ${pages} `, turn(page + 1, "Next"));
}

// ---------------------------------------------------------------------------------------------------------------------
// CSV

function writeCsv(rows) {
  const quote = (value) => `"${String(value).replaceAll('"', '""')}"`;
  return rows.map((values) => values.map(quote).join(",")).join("\n") + "\n";
}

// rows: texts and numbers, the heads first.
async function copyCsv(rows, button) {
  const before = button.textContent;
  await navigator.clipboard.writeText(writeCsv(rows));
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1500);
}

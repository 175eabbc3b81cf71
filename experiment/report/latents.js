// The latents of the chosen ranking's lists, a row each.
const [LATENT, ACTIVATION, ALONE, QUESTIONS] = [0, 1, 2, 3]; // places in a row of data.latents
const latentPlaces = new Map(data.latents.map((row, place) => [row[LATENT], place]));

const isOfLatents = () => state.tab === "latents" && data.latents.length > 0;

// In how many questions the mask's K takes a latent of its list.
function countQuestions(id, number) {
  const { list, k } = data.masks[number];
  return data.lists[list].often[k][latentPlaces.get(id)] ?? 0;
}

function latentLink(id) {
  if (!data.neuronpedia) return String(id);
  const href = data.neuronpedia + id;
  return element("a", { href, textContent: id, target: "_blank", rel: "noreferrer" });
}

// How many questions' lists hold a latent; shows them.
function questionsButton(id, number) {
  const count = countQuestions(id, number);
  if (!count) return "0";
  const show = () => {
    const { ranking, mask, k } = data.masks[number];
    filter({ ranking, mask, k, ...REST_OF_TAB, tab: "questions", show: "kept", latent: String(id), question: "" });
    find("questions-head").scrollIntoView();
  };
  const label = `${count}: show the questions with latent ${id}`;
  return buttonTo(show, { className: "count", textContent: count, "aria-label": label, title: label });
}

function questionLink(number) {
  const { id, question } = data.questions[number];
  return element("a", { href: `#${encodeURIComponent(id)}`, textContent: question, title: question });
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

// order: what a row is sorted by.  show: what stands in its cell.  text: of it in a CSV, where that is something else.
function latentColumns(number) {
  const { list, k } = data.masks[number];
  const often = (row) => countQuestions(row[LATENT], number);
  const title = `Questions with it in ${data.lists[list].name}, K = ${k}`;
  const idsOf = (row) => row[QUESTIONS].map((place) => data.questions[place].id).join(" / ");
  const all = [
    { name: "latent", title: "Latent", order: (row) => row[LATENT], show: (row) => [latentLink(row[LATENT])] },
    { name: "often", title, order: often, show: (row) => [questionsButton(row[LATENT], number)] },
    figureColumn("activation", "Mean activation", ACTIVATION),
    figureColumn("alone", "Mean effect alone, nats per token", ALONE),
    {
      title: `Questions in which it matters most, by ${data.matters}`,
      order: idsOf,
      show: (row) => row[QUESTIONS].map(questionLink),
    },
  ];
  return all.filter(({ place }) => place === undefined || data.latents.some((row) => row[place] !== null));
}

function figureColumn(name, title, place) {
  return { name, title, place, order: (row) => row[place] ?? -Infinity, show: (row) => [row[place] ?? ""] };
}

// Those that the mask takes in any question and the reader looks for, in order.
function listedLatents(number) {
  const columns = latentColumns(number);
  const chosen = sortOfLatents(columns);
  const wanted = state.search.trim();
  const taken = data.latents.filter((row) => countQuestions(row[LATENT], number));
  const found = taken.filter((row) => String(row[LATENT]).includes(wanted));
  return { columns, chosen, count: taken.length, rows: inOrder(found, chosen.order) };
}

function sortOfLatents(columns) {
  const sortable = columns.filter(({ name }) => name);
  return sortable.find(({ name }) => name === state.sort) ?? sortable.find(({ name }) => name === "often");
}

function renderLatents(number) {
  const { columns, chosen, count, rows } = listedLatents(number);
  const { list, k } = data.masks[number];
  renderHead(find("latents"), [...columns, { title: "Row" }], chosen.name);
  find("latents").tBodies[0].replaceChildren(...onPage(rows).map((row) => latentRow(row, columns)));
  find("count").textContent = `${rows.length} of ${count} latents in ${data.lists[list].name}, K = ${k}`;
  find("filters").replaceChildren();
  renderPager(rows.length);
}

function latentRow(row, columns) {
  const [id, ...cells] = columns.map(({ show }) => show(row));
  const label = `Copy the row of latent ${row[LATENT]} as CSV`;
  const properties = { className: "copy", textContent: "Copy", title: label, "aria-label": label };
  const copy = element("button", { type: "button", ...properties });
  copy.addEventListener("click", () => copyCsv(latentRows([row], columns), copy));
  const made = [...cells, [copy]].map((cell) => element("td", {}, ...cell));
  return element("tr", {}, element("th", { scope: "row" }, ...id), ...made);
}

// For a CSV; questions by their ids.
function latentRows(rows, columns) {
  const values = rows.map((row) => columns.map(({ order }) => order(row)));
  const known = values.map((row) => row.map((value) => (value === -Infinity ? "" : value)));
  return [columns.map(({ title }) => title.toLowerCase()), ...known];
}

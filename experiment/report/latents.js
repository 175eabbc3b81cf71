// The latents of the chosen ranking's lists, a row each.
const [LATENT, ACTIVATION, ALONE, QUESTIONS, COSTS] = [0, 1, 2, 3, 4]; // places in a row of data.latents
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

// A question, and what masking the latent alone costs it, where that was measured.
function questionLink(number, cost) {
  const { id, question } = data.questions[number];
  const link = element("a", { href: `#${encodeURIComponent(id)}`, textContent: question, title: question });
  return element("p", {}, link, cost === undefined ? null : element("small", {}, ` ${cost}`));
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

// order: what a row is sorted by.  show: what stands in its cell.  text: of it in a CSV, where that is something else.
function latentColumns(number) {
  const { list, k } = data.masks[number];
  const often = (row) => countQuestions(row[LATENT], number);
  const title = `Questions with it in ${data.lists[list].name}, K = ${k}`;
  const idsOf = (row) => row[QUESTIONS].map((number) => data.questions[number].id).join(" / ");
  const all = [
    { name: "latent", title: "Latent", order: (row) => row[LATENT], show: (row) => [latentLink(row[LATENT])] },
    { name: "often", title, order: often, show: (row) => [questionsButton(row[LATENT], number)] },
    figureColumn("activation", "Mean activation", ACTIVATION),
    figureColumn("alone", "Mean effect alone, nats per token", ALONE),
    {
      title: `Questions in which it matters most, by ${data.matters}`,
      order: idsOf,
      show: (row) => row[QUESTIONS].map((number, place) => questionLink(number, row[COSTS][place])),
    },
  ];
  return all.filter(({ place }) => place === undefined || data.latents.some((row) => row[place] !== null));
}

function figureColumn(name, title, place) {
  return { name, title, place, order: (row) => row[place] ?? -Infinity, show: (row) => [row[place] ?? ""] };
}

// Those that the mask takes in any question, in order; of a search, all that are in any list.
function listedLatents(number) {
  const columns = latentColumns(number);
  const chosen = sortOfLatents(columns);
  const wanted = state.search.trim();
  const taken = data.latents.filter((row) => countQuestions(row[LATENT], number));
  const found = wanted ? data.latents.filter((row) => String(row[LATENT]).includes(wanted)) : taken;
  const { list, k } = data.masks[number];
  const all = `${taken.length} latents in ${data.lists[list].name}, K = ${k}`;
  const count = wanted ? `${found.length} of ${data.latents.length} latents in any list` : all;
  return { columns, chosen, count, rows: inOrder(found, chosen.order) };
}

function sortOfLatents(columns) {
  const sortable = columns.filter(({ name }) => name);
  return sortable.find(({ name }) => name === state.sort) ?? sortable.find(({ name }) => name === "often");
}

function renderLatents(number) {
  const { columns, chosen, count, rows } = listedLatents(number);
  renderHead(find("latents"), [...columns, { title: "Row" }], chosen.name);
  find("latents").tBodies[0].replaceChildren(...onPage(rows).map((row) => latentRow(row, columns)));
  find("count").textContent = count;
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

// The latents of the chosen ranking's lists, a row each. Precedes page.js, in the same module.
const [LATENT, ACTIVATION, ALONE, QUESTIONS] = [0, 1, 2, 3]; // places in a row of data.latents

const isOfLatents = () => state.tab === "latents" && data.latents.length > 0;

// The list that the chosen mask takes latents from; a control, which takes none, stands beside its ranking's.
function chosenList(number) {
  const { list, ranking, mask } = data.masks[number];
  if (list !== null) return data.lists[list];
  const of = `${ranking.split(", ")[0]} ${mask.split(", ")[0]}`;
  return data.lists.find(({ name }) => name === of) ?? data.lists[0];
}

function latentColumns(list) {
  const often = (row) => list.often[row[LATENT]];
  const all = [
    { name: "latent", title: "Latent", order: (row) => row[LATENT], show: (row) => [latentLink(row[LATENT])] },
    { name: "often", title: `Questions with it in ${list.name}, K = ${list.k}`, order: often, show: (row) => [often(row)] },
    figureColumn("activation", "Mean activation", ACTIVATION),
    figureColumn("alone", "Mean effect alone, nats per token", ALONE),
    { title: `Questions in which it matters most, by ${data.matters}`, show: (row) => row[QUESTIONS].map(questionLink) },
  ];
  return all.filter(({ place }) => place === undefined || data.latents.some((row) => row[place] !== null));
}

function figureColumn(name, title, place) {
  return { name, title, place, order: (row) => row[place] ?? -Infinity, show: (row) => [row[place] ?? ""] };
}

function questionLink(number) {
  const { id, question } = data.questions[number];
  return element("a", { href: `#${encodeURIComponent(id)}`, textContent: question, title: question });
}

function renderLatents(number) {
  const list = chosenList(number);
  const columns = latentColumns(list);
  const sortable = columns.filter(({ name }) => name);
  const chosen = sortable.find(({ name }) => name === state.sort) ?? sortable.find(({ name }) => name === "often");
  const wanted = state.search.trim();
  const listed = data.latents.filter((row) => list.often[row[LATENT]] && String(row[LATENT]).includes(wanted));
  const first = pageNumber() * PER_PAGE;
  const rows = inOrder(listed, chosen.order).slice(first, first + PER_PAGE);
  renderHead(find("latents"), columns, chosen.name);
  find("latents").tBodies[0].replaceChildren(...rows.map((row) => latentRow(row, columns)));
  find("count").textContent = `${listed.length} of ${Object.keys(list.often).length} latents in ${list.name}, K = ${list.k}`;
  renderPager(listed.length);
}

function latentRow(row, columns) {
  const [id, ...cells] = columns.map(({ show }) => show(row));
  return element("tr", {}, element("th", { scope: "row" }, ...id), ...cells.map((cell) => element("td", {}, ...cell)));
}

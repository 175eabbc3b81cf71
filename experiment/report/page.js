// All together: the controls, what is shown of a state, and what a state is gone to by.

// What another tab begins with.
const REST_OF_TAB = { sort: DEFAULTS.sort, up: DEFAULTS.up, search: "", bar: "", latent: "" };

// What the reader chose of masks is a mask that was run, the nearest one.
function choose(name, value) {
  if (!CHOICES.includes(name)) return filter({ [name]: value });
  const { ranking, mask, k } = data.masks[nearestMask({ ...state, [name]: value }, name)];
  filter({ ranking, mask, k });
}

function fillSelect(id, values, names = values) {
  const options = values.map((value, place) => element("option", { value, textContent: names[place] }));
  find(id).replaceChildren(...options);
  find(id).parentElement.classList.toggle("single", values.length < 2);
  find(id).addEventListener("change", () => choose(id, find(id).value));
}

function renderControls(number) {
  const { ranking, name, mask, k } = data.masks[number] ?? {};
  Object.entries({ ranking, mask, k, show: state.show }).forEach(([id, value]) => (find(id).value = value));
  find("view").textContent = ranking === undefined ? "" : `; masked: ${name} ${mask}, K = ${k}`;
  if (document.activeElement !== find("search")) find("search").value = state.search;
}

// Which of the two tables is there, with its controls.
function renderTabs() {
  for (const tab of ["questions", "latents"]) {
    const isChosen = isOfLatents() === (tab === "latents");
    find(`tab-${tab}`).setAttribute("aria-pressed", isChosen);
    for (const part of document.querySelectorAll(`[data-tab=${tab}]`)) part.hidden = !isChosen;
  }
}

function render() {
  const focused = document.activeElement?.id;
  const number = chosenMask();
  renderControls(number);
  renderTabs();
  if (isOfLatents()) renderLatents(number);
  else renderQuestions(number);
  if (focused) find(focused)?.focus({ preventScroll: true });
}

const openTab = (tab) => filter({ ...REST_OF_TAB, tab, question: "" });

function copyTable() {
  const number = chosenMask();
  if (!isOfLatents()) return copyCsv(questionRows(shown), find("copy"));
  const { columns, rows } = listedLatents(number);
  copyCsv(latentRows(rows, columns), find("copy"));
}

// The page of the list that the opened question is on; where it is not shown, none.
function turnToOpened() {
  const place = shown.findIndex((question) => question.id === state.question);
  if (place >= 0) state.page = String(Math.floor(place / PER_PAGE));
  return place >= 0;
}

// A question that the address names is shown, whatever filters hide it.
function openLinked() {
  state = readState();
  render();
  if (!state.question || isOfLatents()) return;
  if (!shown.some((question) => question.id === state.question)) {
    state = { ...state, show: "all", search: "", bar: "", latent: "" };
    render();
  }
  if (!turnToOpened()) return;
  render();
  const button = find(`open-${state.question}`);
  const focused = document.activeElement;
  if (focused === document.body || !focused.checkVisibility()) button.focus({ preventScroll: true });
  button.scrollIntoView({ block: "nearest" });
  document.querySelector(".detail").scrollIntoView({ block: "nearest" });
}

fillSelect(
  "ranking",
  distinct(data.masks.map((mask) => mask.ranking)),
  distinct(data.masks.map((mask) => mask.name)),
);
fillSelect("mask", distinct(data.masks.map((mask) => mask.mask)));
fillSelect("k", distinct(data.masks.map((mask) => mask.k)));
fillSelect(
  "show",
  Object.keys(SHOWN),
  Object.values(SHOWN).map(([words]) => words),
);
for (const tab of ["questions", "latents"]) find(`tab-${tab}`).addEventListener("click", () => openTab(tab));
find("tabs").hidden = !data.latents.length;
find("skip").addEventListener("click", () => find("questions-head").focus());
find("search").addEventListener("input", () => filter({ search: find("search").value }, true));
find("controls").addEventListener("submit", (event) => event.preventDefault());
find("copy").addEventListener("click", copyTable);
addEventListener("popstate", openLinked);
narrow.addEventListener("change", render);
openLinked();
bindFigure();

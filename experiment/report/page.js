// The questions, and what all parts share. All that is shown is in the address: state -> render, and every control goes to another state.
// Texts of models and data sets reach the page as text nodes, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const distinct = (values) => [...new Set(values)];
const [ANSWER, TEXT, EM, F1, NAMED] = [0, 1, 2, 3, 4]; // places in an answer
const PER_PAGE = 25;
const BARS = 40; // of the histogram, about

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role" || key === "colspan") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// ---------------------------------------------------------------------------------------------------------------------
// The state, which is the address: results.html#ranking=gradsae&k=10&question=ID; results.html#ID opens a question

const usual = data.masks.find((mask) => mask.k === "50%") ?? data.masks[0];
const DEFAULTS = {
  ranking: usual?.ranking ?? "",
  mask: usual?.mask ?? "",
  k: usual?.k ?? "",
  tab: "questions", // or "latents"
  show: "kept",
  search: "",
  bar: "", // of the histogram, "low:high"
  sort: usual ? "drop" : "", // a column's name; of a tab that has none such, its first
  up: "", // "yes": smallest first
  page: "0",
  question: "",
};
let state = readState();
let chosenCell = null; // number of the mask whose answer is opened in a question's matrix

function readState() {
  const text = location.hash.slice(1);
  if (text && !text.includes("=")) return { ...DEFAULTS, question: decodeURIComponent(text) };
  return { ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(text)) };
}

function writeState(wanted) {
  const changed = Object.entries(wanted).filter(([name, value]) => name in DEFAULTS && value !== DEFAULTS[name]);
  return `#${new URLSearchParams(changed)}`;
}

function go(changes, replace = false) {
  if ("question" in changes) chosenCell = null;
  state = { ...state, ...changes };
  history[replace ? "replaceState" : "pushState"](null, "", writeState(state));
  render();
}

const pageNumber = () => Math.max(0, Math.floor(Number(state.page))) || 0;

// A filter shows its first page.
const filter = (changes, replace) => go({ bar: "", page: "0", ...changes }, replace);

// The number of the mask that the reader chose; of a combination that was not run, of the nearest one.
function chosenMask() {
  const fits = (fields) => data.masks.findIndex((mask) => fields.every((field) => mask[field] === state[field]));
  const numbers = [fits(["ranking", "mask", "k"]), fits(["ranking", "mask"]), fits(["ranking"]), 0];
  return numbers.find((number) => number >= 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// A question's answers

// Null where it was not asked under this mask.
function answerOf(question, number) {
  const found = question.masked?.[number] ?? null;
  return found === 0 ? question.unmasked : found;
}

const dropOf = (question, number) => question.drops?.[number] ?? null;

function isChanged(question, number) {
  const found = answerOf(question, number);
  return Boolean(found && question.unmasked && found[ANSWER] !== question.unmasked[ANSWER]);
}

function judge(found) {
  if (found[F1] >= data.right) return "right";
  return found[NAMED] ? "format" : "wrong";
}

const VERDICTS = {
  right: ["✓", "right"],
  wrong: ["✗", "wrong"],
  format: ["≁", "format broken: a ground truth stands in the text, and was not parsed"],
};

const SHOWN = {
  kept: ["kept questions", (question) => Boolean(question.masked)],
  changed: ["changed answers", isChanged],
  wrong: ["wrong answers", (question, number) => judgedAs(question, number, "wrong")],
  format: ["answers with the format broken", (question, number) => judgedAs(question, number, "format")],
  unkept: ["asked, not kept", (question) => !question.masked],
  all: ["all asked questions", () => true],
};

function judgedAs(question, number, verdict) {
  const found = answerOf(question, number);
  return found !== null && judge(found) === verdict;
}

const countChanged = (question) => (question.masked ?? []).filter((_, number) => isChanged(question, number)).length;
const countAsked = (question) => (question.masked ?? []).filter((found) => found !== null).length;

// ---------------------------------------------------------------------------------------------------------------------
// Which questions are shown, in which order

const contexts = data.contexts.map((context) => context.toLowerCase());

// What a search looks at besides the context; made once, by the first search.
function ownTexts(question) {
  if (question.texts === undefined) {
    const answers = [question.unmasked, ...(question.masked ?? [])].filter(Boolean);
    const texts = answers.flatMap((found) => [found[ANSWER], found[TEXT]]);
    const all = [question.id, question.question, ...question.truths, ...distinct(texts)];
    question.texts = all.join("\n").toLowerCase();
  }
  return question.texts;
}

function searched(questions, text) {
  if (!text) return questions;
  const wanted = text.toLowerCase();
  const inContext = contexts.map((context) => context.includes(wanted));
  return questions.filter((question) => inContext[question.context] || ownTexts(question).includes(wanted));
}

function inBar(question, number) {
  if (!state.bar) return true;
  const [low, high] = state.bar.split(":").map(Number);
  const drop = dropOf(question, number);
  return drop !== null && drop >= low && drop < high;
}

const ORDERS = {
  drop: (question, number) => dropOf(question, number) ?? -Infinity,
  changed: countChanged,
  question: (question) => question.question,
};

function sorted(questions, number) {
  if (!Object.hasOwn(ORDERS, state.sort)) return questions;
  return inOrder(questions, (question) => ORDERS[state.sort](question, number));
}

function inOrder(rows, order) {
  const direction = state.up ? 1 : -1;
  const keyed = rows.map((of) => [order(of), of]);
  keyed.sort(([a], [b]) => (a === b ? 0 : a < b ? -direction : direction));
  return keyed.map(([, of]) => of);
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

const COLUMNS = [
  { name: "question", title: "Question" },
  { title: "Ground truth", optional: true },
  { title: "Unmasked", optional: true },
  { title: "Masked" },
  { name: "drop", title: "Drop", hint: "what the answer lost in log probability, nats per token" },
  { name: "changed", title: "Changed", hint: "masks that change the answer, of all", optional: true },
];

const narrow = matchMedia("(max-width: 640px)"); // page.css leaves out the optional columns there

// chosen: the name of the column that the rows are sorted by.
function renderHead(table, columns, chosen) {
  const heads = columns.map(({ name, title, hint = "", optional }) => {
    const head = element("th", { scope: "col", className: optional ? "optional" : "", title: hint });
    if (!name) head.append(title);
    else head.append(sortButton(name, title, chosen));
    if (name && name === chosen) head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
    return head;
  });
  table.tHead.replaceChildren(element("tr", {}, ...heads));
}

function sortButton(name, title, chosen) {
  const button = element("button", { type: "button", id: `sort-${name}`, textContent: title });
  button.addEventListener("click", () => {
    const isAgain = chosen === name;
    go({ sort: name, up: isAgain && !state.up ? "yes" : "", page: "0" });
  });
  return button;
}

function verdictSign(found) {
  const verdict = judge(found);
  const [sign, words] = VERDICTS[verdict];
  return element("span", { className: `sign ${verdict}`, title: words, role: "img", "aria-label": words }, sign);
}

function showAnswer(found) {
  return found ? [verdictSign(found), " ", found[ANSWER] || "(empty)"] : [];
}

const showDrop = (drop) => (drop === null ? "" : drop.toFixed(3));

function row(question, number) {
  const isOpen = question.id === state.question;
  const button = element("button", { type: "button", id: `open-${question.id}`, "aria-expanded": isOpen });
  button.append(question.question);
  button.addEventListener("click", () => go({ question: isOpen ? "" : question.id }));
  const cells = [
    [button],
    [question.truths.join(" / ")],
    showAnswer(question.unmasked),
    showAnswer(answerOf(question, number)),
    [showDrop(dropOf(question, number))],
    [question.masked ? `${countChanged(question)} of ${countAsked(question)}` : ""],
  ];
  const made = cells.map((cell, place) => {
    const { name, optional } = COLUMNS[place];
    const className = `${optional ? "optional" : ""} ${name && place ? "number" : ""}`;
    return element("td", { className }, ...cell);
  });
  return element("tr", { className: isChanged(question, number) ? "changed" : "" }, ...made);
}

function renderRows(questions, number) {
  const first = pageNumber() * PER_PAGE;
  const rows = questions.slice(first, first + PER_PAGE).flatMap((question) => {
    const of = [row(question, number)];
    if (question.id === state.question) {
      const columns = COLUMNS.filter((column) => !column.optional || !narrow.matches);
      const cell = element("td", { colspan: columns.length }, detail(question, number));
      of.push(element("tr", { className: "opened" }, cell));
    }
    return of;
  });
  find("questions").tBodies[0].replaceChildren(...rows);
}

function renderPager(count) {
  const pages = Math.ceil(count / PER_PAGE);
  const page = pageNumber();
  const turn = (to, text) => {
    const button = element("button", { type: "button", id: `page-${text}`, textContent: text });
    button.disabled = to < 0 || to >= pages;
    button.addEventListener("click", () => go({ page: String(to) }));
    return button;
  };
  find("pager").hidden = pages < 2;
  find("pager").replaceChildren(turn(page - 1, "Previous"), ` page ${page + 1} of ${pages} `, turn(page + 1, "Next"));
}

// ---------------------------------------------------------------------------------------------------------------------
// All together

function fillSelect(id, values, names = values) {
  const options = values.map((value, place) => element("option", { value, textContent: names[place] }));
  find(id).replaceChildren(...options);
  find(id).parentElement.classList.toggle("single", values.length < 2);
  find(id).addEventListener("change", () => filter({ [id]: find(id).value }));
}

function renderControls(number) {
  const { ranking, mask, k } = data.masks[number] ?? {};
  Object.entries({ ranking, mask, k, show: state.show }).forEach(([id, value]) => (find(id).value = value));
  if (document.activeElement !== find("search")) find("search").value = state.search;
}

let shown = [];

function render() {
  const focused = document.activeElement?.id;
  const number = chosenMask();
  renderControls(number);
  renderTabs();
  if (isOfLatents()) renderLatents(number);
  else renderQuestions(number);
  if (focused) find(focused)?.focus({ preventScroll: true });
}

function renderQuestions(number) {
  const [, fits] = Object.hasOwn(SHOWN, state.show) ? SHOWN[state.show] : SHOWN.all;
  const found = searched(data.questions.filter((question) => fits(question, number)), state.search);
  shown = sorted(found.filter((question) => inBar(question, number)), number);
  renderHistogram(found, number);
  find("count").textContent = `${shown.length} of ${data.questions.length} questions`;
  renderHead(find("questions"), COLUMNS, state.sort);
  renderRows(shown, number);
  renderPager(shown.length);
}

// Which of the two tables is there, with its controls.
function renderTabs() {
  for (const tab of ["questions", "latents"]) {
    const isChosen = isOfLatents() === (tab === "latents");
    find(`tab-${tab}`).setAttribute("aria-pressed", isChosen);
    for (const part of document.querySelectorAll(`[data-tab=${tab}]`)) part.hidden = !isChosen;
  }
}

function openTab(tab) {
  const { sort, up, search } = DEFAULTS;
  filter({ tab, sort, up, search, question: "" });
}

// A question that the address names is shown, whatever filters hide it.
function openLinked() {
  state = readState();
  chosenCell = null;
  render();
  if (!state.question) return;
  if (!shown.some((question) => question.id === state.question)) {
    state = { ...state, show: "all", search: "", bar: "" };
    render();
  }
  const place = shown.findIndex((question) => question.id === state.question);
  if (place < 0) return;
  state.page = String(Math.floor(place / PER_PAGE));
  render();
  const button = find(`open-${state.question}`);
  const focused = document.activeElement;
  if (focused === document.body || !focused.checkVisibility()) button.focus({ preventScroll: true });
  button.scrollIntoView({ block: "nearest" });
  document.querySelector(".detail").scrollIntoView({ block: "nearest" });
}

fillSelect("ranking", distinct(data.masks.map((mask) => mask.ranking)));
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
find("copy").addEventListener("click", () => copyCsv(shown, find("copy")));
addEventListener("popstate", openLinked);
narrow.addEventListener("change", render);
openLinked();
bindFigure();

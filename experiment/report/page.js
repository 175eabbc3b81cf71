// The questions. All that is shown is in the address: state -> render, and every control goes to another state.
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
  show: "kept",
  search: "",
  bar: "", // of the histogram, "low:high"
  sort: usual ? "drop" : "",
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
  const order = ORDERS[state.sort];
  const direction = state.up ? 1 : -1;
  const keyed = questions.map((question) => [order(question, number), question]);
  keyed.sort(([a], [b]) => (a === b ? 0 : a < b ? -direction : direction));
  return keyed.map(([, question]) => question);
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

const COLUMNS = [
  { name: "question", title: "Question" },
  { title: "Ground truth", optional: true },
  { title: "Unmasked", optional: true },
  { title: "Masked" },
  { name: "drop", title: "Drop" },
  { name: "changed", title: "Changed", optional: true },
];

const narrow = matchMedia("(max-width: 640px)"); // page.css leaves out the optional columns there

function renderHead() {
  const heads = COLUMNS.map(({ name, title, optional }) => {
    const head = element("th", { scope: "col", className: optional ? "optional" : "" });
    if (!name) head.append(title);
    else head.append(sortButton(name, title));
    if (name === state.sort) head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
    return head;
  });
  find("questions").tHead.replaceChildren(element("tr", {}, ...heads));
}

function sortButton(name, title) {
  const button = element("button", { type: "button", id: `sort-${name}`, textContent: title });
  button.addEventListener("click", () => {
    const isAgain = state.sort === name;
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
// An opened question

function markTruths(text, truths) {
  const longestFirst = truths.filter(Boolean).sort((a, b) => b.length - a.length);
  if (!longestFirst.length) return [text];
  const pattern = longestFirst.map((truth) => truth.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  const whole = new RegExp(`(?<![\\p{L}\\p{N}])(?:${pattern})(?![\\p{L}\\p{N}])`, "gu");
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(whole)) {
    parts.push(text.slice(end, match.index), element("mark", { textContent: match[0] }));
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)];
}

function detail(question, number) {
  const box = element("div", { className: "detail" });
  const link = element("a", { className: "link", href: `#${encodeURIComponent(question.id)}` }, question.id);
  const copy = element("button", { type: "button", className: "copy", textContent: "Copy row as CSV" });
  copy.addEventListener("click", () => copyCsv([question], copy));
  box.append(element("p", { className: "tools" }, link, " ", copy));
  if (question.context !== null) {
    const context = data.contexts[question.context];
    box.append(element("p", { className: "context" }, ...markTruths(context, question.truths)));
  }
  const truths = question.truths.flatMap((truth, place) => [place ? " / " : "", element("mark", {}, truth)]);
  box.append(element("p", {}, "Ground truth: ", ...truths));
  if (question.unmasked) box.append(answerLine("Unmasked: ", question.unmasked));
  if (question.masked && data.masks.length) {
    const inCell = element("div", { className: "cell", role: "status" });
    box.append(matrix(question, number, inCell), inCell);
    renderCell(inCell, question, data.masks[chosenCell]?.mask === data.masks[number].mask ? chosenCell : number);
  }
  return box;
}

function answerLine(name, found) {
  return element("p", { className: "answer" }, name, ...showAnswer(found), " ", element("code", {}, found[TEXT]));
}

// Rankings down, K across, of the chosen mask.
function matrix(question, number, inCell) {
  const mask = data.masks[number].mask;
  const numbers = [...data.masks.keys()].filter((other) => data.masks[other].mask === mask);
  const rankings = distinct(numbers.map((other) => data.masks[other].ranking));
  const ks = distinct(numbers.map((other) => data.masks[other].k));
  const heads = ["", ...ks.map((k) => `K = ${k}`)].map((text) => element("th", { scope: "col" }, text));
  const rows = rankings.map((ranking) => {
    const cells = ks.map((k) => {
      const at = numbers.find((other) => data.masks[other].ranking === ranking && data.masks[other].k === k);
      return element("td", {}, at === undefined ? null : matrixCell(question, at, inCell));
    });
    return element("tr", {}, element("th", { scope: "row" }, ranking), ...cells);
  });
  const caption = element("caption", {}, "Masked: ", ...maskButtons(mask));
  const table = element("table", { className: "matrix" }, caption, element("thead", {}, element("tr", {}, ...heads)));
  table.append(element("tbody", {}, ...rows));
  return element("div", { className: "wide" }, table);
}

function maskButtons(chosen) {
  return distinct(data.masks.map((mask) => mask.mask)).map((name) => {
    const button = element("button", { type: "button", textContent: name, "aria-pressed": name === chosen });
    button.addEventListener("click", () => filter({ mask: name }));
    return button;
  });
}

function matrixCell(question, number, inCell) {
  const found = answerOf(question, number);
  if (!found) return null;
  const button = element("button", { type: "button", className: judge(found) }, ...showAnswer(found));
  button.classList.toggle("same", !isChanged(question, number));
  button.dataset.mask = number;
  button.addEventListener("click", () => renderCell(inCell, question, number));
  return button;
}

// What is under the matrix: the cell's text and figures, and its latents.
function renderCell(box, question, number) {
  chosenCell = number;
  const mask = data.masks[number];
  const found = answerOf(question, number);
  const drop = dropOf(question, number);
  const facts = [`${mask.ranking}, ${mask.mask}, K = ${mask.k}`];
  if (found) facts.push(`EM ${100 * found[EM]}, F1 ${(100 * found[F1]).toFixed(0)}`);
  if (drop !== null) facts.push(`the unmasked answer lost ${showDrop(drop)} nats per token`);
  const parts = [element("h3", {}, facts.join("; "))];
  if (found) parts.push(answerLine("", found));
  if (mask.list !== null) parts.push(latentTable(question, number));
  box.replaceChildren(...parts);
  for (const button of box.parentElement.querySelectorAll("[data-mask]")) {
    button.setAttribute("aria-pressed", button.dataset.mask === String(number));
  }
}

function latentTable(question, number) {
  const { list, mask } = data.masks[number];
  const count = question.counts[number];
  const ids = question.latents[list].slice(0, count);
  const { often, k } = data.lists[list];
  const scores = question.scores?.[list] ?? [];
  const effects = question.effects ?? {};
  const columns = [
    ["", (_, place) => place + 1],
    ["latent", (id) => latentLink(id)],
    ["score", (_, place) => scores[place] ?? ""],
    [`questions that mask it at K = ${k}`, (id) => often[id] ?? 1],
    ["effect alone", (id) => effects[id] ?? ""],
  ].filter(([title, show]) => ids.some((id, place) => title === "" || show(id, place) !== ""));
  const heads = columns.map(([title]) => element("th", { scope: "col" }, title));
  const rows = ids.map((id, place) => {
    return element("tr", {}, ...columns.map(([, show]) => element("td", {}, show(id, place))));
  });
  const shown = ids.length < count ? `${ids.length} of ${count}` : `${count}`;
  const what = mask.startsWith("all but") ? "latents kept" : "latents masked";
  const table = element("table", { className: "latents" }, element("thead", {}, element("tr", {}, ...heads)));
  table.append(element("tbody", {}, ...rows));
  const summary = element("summary", {}, `${shown} ${what}`);
  return element("details", { open: true }, summary, element("div", { className: "wide" }, table));
}

function latentLink(id) {
  if (!data.neuronpedia) return String(id);
  const href = data.neuronpedia + id;
  return element("a", { href, textContent: id, target: "_blank", rel: "noreferrer" });
}

// ---------------------------------------------------------------------------------------------------------------------
// CSV

function toCsv(questions) {
  const number = chosenMask();
  const mask = data.masks[number];
  const name = mask ? `${mask.ranking} ${mask.mask} K = ${mask.k}` : "masked";
  const rows = [["id", "question", "ground truth", "unmasked", name, "drop", "changed", "masks"]];
  for (const question of questions) {
    const masked = answerOf(question, number);
    rows.push([
      question.id,
      question.question,
      question.truths.join(" / "),
      question.unmasked?.[ANSWER] ?? "",
      masked?.[ANSWER] ?? "",
      dropOf(question, number) ?? "",
      countChanged(question),
      countAsked(question),
    ]);
  }
  const quote = (value) => `"${String(value).replaceAll('"', '""')}"`;
  return rows.map((values) => values.map(quote).join(",")).join("\n") + "\n";
}

async function copyCsv(questions, button) {
  const before = button.textContent;
  await navigator.clipboard.writeText(toCsv(questions));
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1500);
}

// ---------------------------------------------------------------------------------------------------------------------
// All together

function fillSelect(id, values, names = values) {
  const options = values.map((value, place) => element("option", { value, textContent: names[place] }));
  find(id).replaceChildren(...options);
  find(id).parentElement.hidden = values.length < 2;
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
  const [, fits] = Object.hasOwn(SHOWN, state.show) ? SHOWN[state.show] : SHOWN.all;
  const found = searched(data.questions.filter((question) => fits(question, number)), state.search);
  shown = sorted(found.filter((question) => inBar(question, number)), number);
  renderControls(number);
  renderHistogram(found, number);
  find("count").textContent = `${shown.length} of ${data.questions.length} questions`;
  renderHead();
  renderRows(shown, number);
  renderPager(shown.length);
  if (focused) find(focused)?.focus({ preventScroll: true });
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
  find(`open-${state.question}`).scrollIntoView({ block: "nearest" });
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
find("search").addEventListener("input", () => filter({ search: find("search").value }, true));
find("controls").addEventListener("submit", (event) => event.preventDefault());
find("copy").addEventListener("click", () => copyCsv(shown, find("copy")));
addEventListener("popstate", openLinked);
narrow.addEventListener("change", render);
openLinked();

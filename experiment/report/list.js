// The list of questions: which of them are shown, in which order, and a row of each.

// {name: [what the reader chooses, which questions fit, of which it says how many these are]}
const SHOWN = {
  kept: ["kept questions", isKept, "kept"],
  changed: ["changed answers", isChanged, "kept"],
  wrong: ["wrong answers", (question, number) => isJudged(question, number, "wrong"), "kept"],
  format: ["answers with the format broken", (question, number) => isJudged(question, number, "format"), "kept"],
  unkept: ["asked, not kept", (question) => !isKept(question), "unkept"],
  all: ["all asked questions", () => true, "all"],
};
const COUNTED = {
  kept: [data.questions.filter(isKept).length, "kept questions"],
  unkept: [data.questions.filter((question) => !isKept(question)).length, "questions that were not kept"],
  all: [data.questions.length, "asked questions"],
};

function isKept(question) {
  return Boolean(question.masked);
}

const contexts = data.contexts.map((context) => context.toLowerCase());

// What a search looks at besides the context; made once, by the first search.
function ownTexts(question) {
  if (question.texts === undefined) {
    const texts = question.answers.filter(Boolean).flatMap((found) => [found[ANSWER], found[TEXT]]);
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

const hasLatent = (question, number) => !state.latent || latentsOf(question, number).includes(Number(state.latent));

const ORDERS = {
  drop: (question, number) => dropOf(question, number) ?? -Infinity,
  changed: countChanged,
  question: (question) => question.question,
};

function sorted(questions, number) {
  if (!Object.hasOwn(ORDERS, state.sort)) return questions;
  return inOrder(questions, (question) => ORDERS[state.sort](question, number));
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

const COLUMNS = [
  { name: "question", title: "Question" },
  { title: "Ground truth", optional: true },
  { title: "Unmasked", optional: true },
  { title: "Masked", hint: "the answer under the chosen mask; of several draws, how many are right" },
  { name: "drop", title: "Drop, nats per token", hint: "what the answer lost in log probability" },
  {
    name: "changed",
    title: "Changed by, of all masks",
    hint: "how many masks change the answer, of TopK and BottomK by all rankings at all K",
    optional: true,
  },
];

const narrow = matchMedia("(max-width: 640px)"); // page.css leaves out the optional columns there

let shown = []; // the questions of all pages

// Of questions that no mask was tried on, none about masks: the unmasked answer has their room, on a narrow screen too.
function listColumns() {
  if (!shown.length || shown.some((question) => question.masked?.length)) return COLUMNS;
  const [question, truth, unmasked] = COLUMNS;
  return [question, truth, { ...unmasked, optional: false }];
}

function renderQuestions(number) {
  const [, fits, counted] = Object.hasOwn(SHOWN, state.show) ? SHOWN[state.show] : SHOWN.all;
  const fitting = data.questions.filter((question) => fits(question, number) && hasLatent(question, number));
  const found = searched(fitting, state.search);
  shown = sorted(found.filter((question) => inBar(question, number)), number);
  renderHistogram(found, number);
  const [count, what] = COUNTED[counted];
  find("count").textContent = `${shown.length} of ${count} ${what}`;
  find("filters").replaceChildren(...listFilters(number));
  const columns = listColumns();
  renderHead(find("questions"), columns, state.sort);
  renderRows(onPage(shown), number, columns);
  renderPager(shown.length);
}

// What filters besides the controls, each with a button that takes it back.
function listFilters(number) {
  const filters = [];
  if (state.bar) filters.push(undoButton("bar", `drop from ${state.bar.replace(":", " to ")}`));
  if (state.latent) filters.push(undoButton("latent", tellLatent(number)));
  return filters;
}

function undoButton(name, text) {
  const label = `Show again without: ${text}`;
  return buttonTo(() => go({ [name]: "", page: "0" }), { id: `undo-${name}`, "aria-label": label }, `${text} ×`);
}

function tellLatent(number) {
  if (number === undefined) return `latent ${state.latent}`;
  const { list, k } = data.masks[number];
  const longest = Math.max(...data.questions.map((question) => question.latents?.[list].length ?? 0));
  const isCut = data.questions.some((question) => question.counts?.[number] > longest);
  const some = isCut ? `, among a question's first ${longest}` : "";
  return `latent ${state.latent} in ${data.lists[list].name}, K = ${k}${some}`;
}

function renderRows(questions, number, columns) {
  const rows = questions.flatMap((question) => {
    const own = row(question, number, columns);
    return question.id === state.question ? [own, openedRow(question, number, columns)] : [own];
  });
  find("questions").tBodies[0].replaceChildren(...rows);
}

function row(question, number, columns) {
  const isOpen = question.id === state.question;
  const properties = { id: `open-${question.id}`, "aria-expanded": isOpen };
  const before = unmaskedOf(question);
  const truths = question.truths.join(" / ");
  // Without a column of its own the ground truth stands below the question: else no answer could be judged.
  const below = narrow.matches && truths ? element("small", {}, `ground truth: ${truths}`) : null;
  const cells = [
    [buttonTo(() => go({ question: isOpen ? "" : question.id }), properties, question.question), below],
    [truths],
    before ? showAnswer(before) : [],
    showAnswers(answersOf(question, number)),
    [showDrop(dropOf(question, number))],
    [isKept(question) ? `${countChanged(question)} of ${countAsked(question)}` : ""],
  ];
  const made = columns.map(({ name, optional }, place) => {
    const className = `${optional ? "optional" : ""} ${name && place ? "number" : ""}`;
    return element("td", { className }, ...cells[place]);
  });
  return element("tr", {}, ...made);
}

function openedRow(question, number, columns) {
  const seen = columns.filter((column) => !column.optional || !narrow.matches);
  const cell = element("td", { colspan: seen.length }, detail(question, number));
  return element("tr", { className: "opened" }, cell);
}

function questionRows(questions) {
  const number = chosenMask();
  const { ranking, mask, k } = data.masks[number] ?? {};
  const name = ranking === undefined ? "masked" : `${ranking} ${mask} K = ${k}`;
  const rows = [["id", "question", "ground truth", "unmasked", name, "verdict", "drop", "changed", "masks"]];
  for (const question of questions) {
    const answers = answersOf(question, number);
    rows.push([
      question.id,
      question.question,
      question.truths.join(" / "),
      unmaskedOf(question)?.[ANSWER] ?? "",
      answers.map((found) => found[ANSWER]).join(" / "),
      answers.map((found) => VERDICTS[judge(found)][1]).join(" / "),
      dropOf(question, number) ?? "",
      countChanged(question),
      countAsked(question),
    ]);
  }
  return rows;
}

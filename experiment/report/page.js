// The table of questions. Texts of models and data sets reach the page as text nodes or escaped, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");
const distinct = (values) => [...new Set(values)];
const SEVERAL = data.folders.length > 1;
const [ANSWER, TEXT, EM, F1, NAMED] = [0, 1, 2, 3, 4]; // places in an answer

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// The masks in view are those that the filters folder, ranking, mask and K leave: numbers into data.masks.
const selects = [...document.querySelectorAll("select[data-field]")];
let inView = [];

const folderName = (mask) => data.folders[mask.folder].name;
const valueOf = (mask, field) => (field === "folder" ? folderName(mask) : mask[field]);

function chooseMasks() {
  const fits = (mask) =>
    selects.every((select) => !select.value || select.value === valueOf(mask, select.dataset.field));
  inView = [...data.masks.keys()].filter((number) => fits(data.masks[number]));
}

function before(question, number) {
  return question.unmasked[data.masks[number].folder];
}

// A masked answer; null where the question was not asked.
function answerOf(question, number) {
  return question.masked[number] === 0 ? before(question, number) : question.masked[number];
}

function isChanged(question, number) {
  const found = question.masked[number];
  return Boolean(found && before(question, number) && found[ANSWER] !== before(question, number)[ANSWER]);
}

function isMisparsed(question, number) {
  const found = answerOf(question, number);
  return Boolean(found && found[NAMED] && found[F1] < data.right);
}

const STATES = { "": () => true, changed: isChanged, misparsed: isMisparsed };
const changedIn = (question) => inView.filter((number) => isChanged(question, number));
const askedIn = (question) => inView.filter((number) => question.masked[number] !== null).length;
const unmaskedAnswers = (question) => distinct(question.unmasked.filter(Boolean).map((found) => found[ANSWER]));
const newAnswers = (question) => distinct(changedIn(question).map((number) => question.masked[number][ANSWER]));

// What a search looks at. DataTables reads it as HTML, so it is escaped.
function allTexts(question) {
  const answers = [...question.unmasked, ...question.masked]
    .filter(Boolean)
    .flatMap((found) => [found[ANSWER], found[TEXT]]);
  const context = question.context === null ? "" : data.contexts[question.context];
  return escape([question.id, question.question, ...question.truths, ...distinct(answers), context].join("\n"));
}
for (const question of data.questions) question.texts = allTexts(question); // once: every filter asks for it again

function list(texts) {
  return (
    texts
      .slice(0, 3)
      .map((text) => escape(text) || "(empty)")
      .join("<br>") + (texts.length > 3 ? `<br>and ${texts.length - 3} more` : "")
  );
}

// ---------------------------------------------------------------------------------------------------------------------
// An opened row

function context(question) {
  if (question.context === null) return null;
  const made = element("p", { className: "context" }),
    text = data.contexts[question.context];
  const truths = question.truths.filter(Boolean).sort((a, b) => b.length - a.length);
  const pattern = truths.map((truth) => truth.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  let end = 0;
  for (const match of pattern
    ? text.matchAll(new RegExp(`(?<![\\p{L}\\p{N}])(?:${pattern})(?![\\p{L}\\p{N}])`, "gu"))
    : []) {
    made.append(text.slice(end, match.index), element("mark", { textContent: match[0] }));
    end = match.index + match[0].length;
  }
  made.append(text.slice(end));
  return made;
}

// The columns of numbers, those on narrow screens only where there is room.
const NUMBERS = { EM: "number", F1: "number", Named: "number optional", Latents: "number optional" };

function answerRow(names, found, changed, misparsed, count) {
  const cells = names.map((name) => element("td", { textContent: name }));
  const answer = element("td", { className: "answer" }, found[ANSWER] || "(empty)");
  if (changed) answer.append(" ", element("span", { className: "tag", textContent: "changed" }));
  if (misparsed) answer.append(" ", element("span", { className: "tag", textContent: "named, parsed wrong" }));
  if (found[TEXT] !== found[ANSWER]) answer.append(element("code", { textContent: found[TEXT] }));
  const numbers = [100 * found[EM], (100 * found[F1]).toFixed(0), found[NAMED] ? "yes" : "no", count];
  cells.push(
    answer,
    ...Object.values(NUMBERS).map((className, place) => element("td", { className, textContent: numbers[place] })),
  );
  return element("tr", { className: changed ? "changed" : "" }, ...cells);
}

function answers(question) {
  const names = [...(SEVERAL ? ["Folder"] : []), "Ranking", "Mask", "K", "Answer", ...Object.keys(NUMBERS)];
  const head = element(
    "tr",
    {},
    ...names.map((name) => element("th", { scope: "col", textContent: name, className: NUMBERS[name] ?? "" })),
  );
  const rows = data.folders.flatMap((folder, number) => {
    const found = question.unmasked[number];
    return found ? [answerRow([...(SEVERAL ? [folder.name] : []), "", "none", ""], found, false, false, "")] : [];
  });
  for (const number of inView) {
    const mask = data.masks[number],
      found = answerOf(question, number);
    const called = [...(SEVERAL ? [folderName(mask)] : []), mask.ranking, mask.masked, mask.k];
    if (found)
      rows.push(
        answerRow(
          called,
          found,
          isChanged(question, number),
          isMisparsed(question, number),
          question.counts[number] || "",
        ),
      );
  }
  const table = element("table", { className: "answers" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { className: "wide" }, table);
}

function latents(question) {
  return distinct(inView.map((number) => data.masks[number].list)).flatMap((place) => {
    const ids = question.latents[place],
      { name, folder } = data.lists[place],
      page = data.folders[folder].page;
    if (!ids.length) return [];
    const links = ids.flatMap((id) => [
      page ? element("a", { href: page + id, textContent: id, target: "_blank", rel: "noreferrer" }) : `${id}`,
      " ",
    ]);
    const title = `${SEVERAL ? `${data.folders[folder].name}, ` : ""}${name}: latents, first those that the smallest K masks`;
    return [element("details", { className: "latents" }, element("summary", { textContent: title }), ...links)];
  });
}

function openRow(button, row) {
  if (row.child.isShown()) row.child.hide();
  else {
    const question = row.data(),
      truths = element("p", {}, "Right: ");
    const link = element("a", {
      className: "link",
      href: `#${encodeURIComponent(question.id)}`,
      textContent: question.id,
    });
    question.truths.forEach((truth, place) =>
      truths.append(place ? " / " : "", element("mark", { textContent: truth })),
    );
    row
      .child(
        element(
          "div",
          { className: "detail" },
          link,
          context(question),
          truths,
          answers(question),
          ...latents(question),
        ),
      )
      .show();
  }
  button.setAttribute("aria-expanded", row.child.isShown());
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

const followTheme = (media) => document.documentElement.classList.toggle("dark", media.matches);
const theme = matchMedia("(prefers-color-scheme: dark)");
followTheme(theme);
theme.addEventListener("change", followTheme);

for (const select of selects) {
  const values = distinct(data.masks.map((mask) => valueOf(mask, select.dataset.field)));
  values.forEach((value) => select.append(element("option", { textContent: value, value })));
  select.parentElement.hidden = values.length < 2;
}
find("filters").hidden = !data.masks.length;
chooseMasks();

// A column: what it shows (HTML), and what it is sorted by.
function column(title, show, order = (question) => show(question), more = {}) {
  const render = (question, _, type) => (type === "display" ? show(question) : order(question));
  return { title, data: null, searchable: false, render: (question, type) => render(question, null, type), ...more };
}

const table = new DataTable("#questions", {
  data: data.questions,
  deferRender: true,
  autoWidth: false,
  order: [],
  pageLength: 25,
  language: {
    info: "_TOTAL_ questions",
    infoEmpty: "0 questions",
    infoFiltered: "of _MAX_",
    emptyTable: "No question was kept",
    zeroRecords: "No question fits",
    lengthMenu: "_MENU_ per page",
  },
  columns: [
    column(
      "Question",
      (q) => `<button type="button" aria-expanded="false">${escape(q.question)}</button>`,
      (q) => q.question,
    ),
    column("Right", (q) => list(q.truths), undefined, { className: "optional" }),
    column("Unmasked", (q) => list(unmaskedAnswers(q)), undefined, { className: "optional" }),
    column("Masked, where changed", (q) => list(newAnswers(q)), undefined, { visible: data.masks.length > 0 }),
    column(
      "Changed",
      (q) => `${changedIn(q).length} of ${askedIn(q)}`,
      (q) => changedIn(q).length,
      { className: "count", type: "num", visible: data.masks.length > 0 },
    ),
    { data: "texts", visible: false },
  ],
});
table.search.fixed("state", (_, question) => {
  const state = find("state").value;
  return !state || inView.some((number) => STATES[state](question, number));
});
find("questions").addEventListener("click", (event) => {
  const button = event.target.closest("button[aria-expanded]");
  if (button) openRow(button, table.row(button.closest("tr")));
});
find("filters").addEventListener("submit", (event) => event.preventDefault());
find("filters").addEventListener("change", () => {
  chooseMasks();
  table.rows(".dt-hasChild").every(function () {
    this.child.hide();
  });
  table.rows().invalidate().draw();
});

// results.html#ID opens that question.
function openLinked() {
  const id = decodeURIComponent(location.hash.slice(1)),
    row = table.row((_, question) => question.id === id);
  const place = table.rows({ order: "applied", search: "applied" }).indexes().indexOf(row.index());
  if (!row.any() || place < 0) return;
  table.page(Math.floor(place / table.page.len())).draw("page");
  if (!row.child.isShown()) openRow(row.node().querySelector("button"), row);
  for (const node of [row.child()[0], row.node()]) node.scrollIntoView({ block: "nearest" });
}
addEventListener("hashchange", openLinked);
openLinked();

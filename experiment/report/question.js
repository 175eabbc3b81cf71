// An opened question: what was asked, what was answered under each mask, and which latents matter.
const FIRST_LATENTS = 10; // of the table, until all are asked for
const FOREMOST_LATENTS = 3; // that are told before the table

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
  copy.addEventListener("click", () => copyCsv(questionRows([question]), copy));
  box.append(element("p", { className: "tools" }, link, " ", copy));
  if (question.context !== null) {
    const context = data.contexts[question.context];
    box.append(element("p", { className: "context" }, ...markTruths(context, question.truths)));
  }
  const truths = question.truths.flatMap((truth, place) => [place ? " / " : "", element("mark", {}, truth)]);
  const before = unmaskedOf(question);
  const facts = [element("p", {}, "Ground truth: ", ...truths), before && answerLine("Unmasked: ", before)];
  box.append(element("div", { className: "facts" }, ...facts));
  if (!isKept(question)) box.append(element("p", { className: "unkept" }, tellUnkept(before)));
  if (isKept(question) && data.masks.length) box.append(tellForemost(question), masksBox(question, number));
  return box;
}

// Why no mask was tried on a question.
function tellUnkept(before) {
  if (!before) return "Not kept: its unmasked answer is not known.";
  if (judge(before) === "right") return "Not kept: right, but without a [ up to which latents could be ranked.";
  const [reached, wanted] = [before[F1], data.right].map((share) => (100 * share).toFixed(0));
  return `Not kept, so no mask was tried: its unmasked answer has an F1 of ${reached}, below ${wanted}.`;
}

function answerLine(name, found) {
  return element("p", { className: "answer" }, name, ...showWhole(found));
}

// An answer and its text; of one that was cut short the text alone, which holds all of it.
function showWhole(found) {
  const isCut = found[ANSWER].endsWith("...") && found[ANSWER].length < found[TEXT].length;
  const answer = isCut ? [verdictSign(judge(found))] : showAnswer(found);
  return [...answer, " ", element("code", {}, found[TEXT])];
}

// [[latent, what masking it alone costs]], the costliest first.
function sortEffects(question) {
  const effects = Object.entries(question.effects ?? {}).map(([id, effect]) => [Number(id), effect]);
  return effects.sort(([, a], [, b]) => b - a);
}

// Which latents matter most, whatever is masked.
function tellForemost(question) {
  const line = element("p", { className: question.effects ? "foremost measured" : "foremost" });
  const effects = sortEffects(question);
  const costly = effects.filter(([, effect]) => effect > 0).slice(0, FOREMOST_LATENTS);
  const option = element("span", { className: "unbroken" }, "--ranking effect");
  if (!effects.length) line.append("Which latent matters most was not measured: run round 1 with ", option, ".");
  else if (!costly.length) line.append("No latent costs the answer anything where it is masked alone.");
  else line.append("Latents that matter most: ");
  costly.forEach(([id, effect], place) => {
    const cost = place ? effect : `masked alone, it costs ${effect} nats per token`;
    line.append(place ? ", " : "", latentLink(id), ` (${cost})`);
  });
  return line;
}

// ---------------------------------------------------------------------------------------------------------------------
// The matrix, and what its chosen cell holds

function masksBox(question, chosen) {
  const box = element("div", { className: "masks" });
  const render = (number) => {
    const inCell = element("div", { className: "cell", role: "status" }, ...cellParts(question, number));
    box.replaceChildren(matrix(question, number, choose), inCell);
  };
  // The list stays as it is.
  const choose = (number) => {
    state.cell = CHOICES.map((name) => data.masks[number][name]).join("|");
    history.replaceState(null, "", writeState(state));
    render(number);
    box.querySelector(`[data-mask="${number}"]`)?.focus({ preventScroll: true });
  };
  const [ranking, mask, k] = state.cell.split("|");
  render(state.cell ? nearestMask({ ranking, mask, k }, "mask") : chosen);
  return box;
}

// Rankings down, K across, of the mask of the chosen cell. choose: shows another cell.
function matrix(question, chosen, choose) {
  const { mask } = data.masks[chosen];
  const isThere = (number) => data.masks[number].mask === mask && answersOf(question, number).length > 0;
  const numbers = [...data.masks.keys()].filter(isThere);
  const masks = numbers.map((number) => data.masks[number]);
  const rankings = distinct(masks.map(({ ranking }) => ranking));
  const ks = distinct(masks.map(({ k }) => k));
  const heads = ["", ...ks.map((k) => titleOf(k, masks))].map((text) => element("th", { scope: "col" }, text));
  const rows = rankings.map((ranking, place) => {
    const cells = ks.map((k) => {
      const number = numbers.find((other) => data.masks[other].ranking === ranking && data.masks[other].k === k);
      if (data.masks[number]?.repeats) return null; // the cell above reaches down to here
      const cell = number === undefined ? null : matrixCell(question, number, chosen, choose);
      const isOfAll = k === "0";
      return element("td", isOfAll ? { rowspan: rankings.length, className: "of-all" } : {}, cell);
    });
    return element("tr", {}, rowHead(rankings, masks, place), ...cells);
  });
  const caption = element("caption", {}, "Masked: ", ...maskButtons(chosen, choose));
  const table = element("table", { className: "matrix" }, caption, element("thead", {}, element("tr", {}, ...heads)));
  table.append(element("tbody", {}, ...rows));
  return element("div", { className: "wide", tabIndex: 0, role: "group", "aria-label": "Answers under masks" }, table);
}

// A control stands below its ranking, whose name need not be said again.
function rowHead(rankings, masks, place) {
  const { ranking, name } = masks.find((mask) => mask.ranking === rankings[place]);
  const above = rankings[place - 1];
  const isBelow = place > 0 && ranking.startsWith(`${above}, `);
  const text = isBelow ? name.slice(above.length + 1) : name;
  return element("th", { scope: "row", className: isBelow ? "below" : "" }, text);
}

// A percentage says how many latents it is.
function titleOf(k, masks) {
  if (k === "0") return "K = 0: none kept";
  const { latents } = masks.find((mask) => mask.k === k);
  return k.endsWith("%") ? `K = ${k} (${latents.toFixed(1)})` : `K = ${k}`;
}

function maskButtons(chosen, choose) {
  const { ranking, mask, k } = data.masks[chosen];
  return distinct(data.masks.map((other) => other.mask)).map((name) => {
    const show = () => choose(nearestMask({ ranking, mask: name, k }, "mask"));
    return buttonTo(show, { textContent: name, "aria-pressed": name === mask });
  });
}

function matrixCell(question, number, chosen, choose) {
  const answers = answersOf(question, number);
  const className = `${judgeAll(answers)} ${isChanged(question, number) ? "" : "same"}`;
  const properties = { className, "data-mask": number, "aria-pressed": number === chosen };
  return buttonTo(() => choose(number), properties, ...showAnswers(answers));
}

// The texts and figures of a cell, and the question's latents.
function cellParts(question, number) {
  const answers = answersOf(question, number);
  const mask = data.masks[number];
  const facts = [`${mask.name}, ${mask.mask}, K = ${mask.k}`, ...tellScores(answers)];
  const drop = dropOf(question, number);
  if (drop !== null) facts.push(`the unmasked answer lost ${showDrop(drop)} nats per token`);
  const texts = answers.length === 1 ? [answerLine("", answers[0])] : [drawList(question, number)];
  return [element("h3", {}, facts.join("; ")), ...texts, latentTable(question, number)];
}

// Of several draws, the means.
function tellScores(answers) {
  if (!answers.length) return ["not asked"];
  const mean = (place) => answers.reduce((sum, found) => sum + found[place], 0) / answers.length;
  const scores = `EM ${(100 * mean(EM)).toFixed(0)}, F1 ${(100 * mean(F1)).toFixed(0)}`;
  return [answers.length > 1 ? `${answers.length} draws, means: ${scores}` : scores];
}

function drawList(question, number) {
  const drops = dropsOf(question, number);
  const items = answersOf(question, number).map((found, place) => {
    const lost = drops[place] === null ? "" : ` lost ${showDrop(drops[place])}`;
    return element("li", {}, ...showWhole(found), lost);
  });
  return element("ol", { className: "draws", "aria-label": "Draws" }, ...items);
}

// ---------------------------------------------------------------------------------------------------------------------
// The question's latents: those of the ranking's list, and those that cost most where they are masked alone. At first
// the first ones are shown, and the first ones of those that the mask takes.

function latentTable(question, number) {
  const rows = listLatents(question, number);
  const columns = detailColumns(question, number, rows);
  const heads = columns.map((column) => latentHead(column, question));
  const taken = rows.filter(({ isMasked }) => isMasked).slice(0, FIRST_LATENTS);
  const made = rows.map((latent, row) => {
    const isRest = row >= FIRST_LATENTS && !taken.includes(latent);
    const [id, ...cells] = columns.map(({ show }) => show(latent));
    const others = cells.map((cell) => element("td", {}, cell));
    const properties = { className: isRest ? "rest" : "", hidden: isRest };
    return element("tr", properties, element("th", { scope: "row" }, id), ...others);
  });
  const table = element("table", { className: "latents" }, element("thead", {}, element("tr", {}, ...heads)));
  table.append(element("tbody", {}, ...made));
  const label = "The question's latents";
  const wide = element("div", { className: "wide", tabIndex: 0, role: "group", "aria-label": label }, table);
  const box = element("details", { open: true }, element("summary", {}, tellMasked(question, number)), wide);
  const rest = made.filter((row) => row.hidden);
  if (rest.length) box.append(moreButton(rest, made.length));
  return box;
}

// rest: rows that are hidden until all are asked for.
function moreButton(rest, count) {
  const showAll = () => {
    for (const row of rest) row.hidden = false;
    button.hidden = true;
  };
  const button = buttonTo(showAll, { className: "more", textContent: `All ${count} latents` });
  return button;
}

// {id, place in the ranking's list or null, effect or null, isMasked}, in the order that the reader chose.
function listLatents(question, number) {
  const list = question.latents[data.masks[number].list];
  const effects = question.effects ?? {};
  const masked = latentsOf(question, number);
  const costliest = sortEffects(question).slice(0, FIRST_LATENTS);
  const ids = distinct([...list, ...costliest.map(([id]) => id)]);
  const rows = ids.map((id, row) => {
    const place = row < list.length ? row : null;
    return { id, place, effect: effects[id] ?? null, isMasked: masked.includes(id) };
  });
  if (!isByEffect(question)) return rows;
  return rows.sort((a, b) => (b.effect ?? -Infinity) - (a.effect ?? -Infinity));
}

const isByEffect = (question) => state.by === "effect" && Boolean(question.effects);

// Those that say something of any row.
function detailColumns(question, number, rows) {
  const mask = data.masks[number];
  const list = data.lists[mask.list];
  const scores = question.scores?.[mask.list] ?? [];
  const columns = [
    { title: "Latent", show: ({ id }) => latentLink(id) },
    { name: "ranking", title: `Place in ${list.name}`, show: ({ place }) => (place === null ? "" : place + 1) },
    { title: "Score", show: ({ place }) => (place === null ? "" : (scores[place] ?? "")) },
    { title: `At K = ${mask.k}`, show: ({ isMasked }) => (isMasked ? verbOf(mask) : "") },
    { name: "effect", title: "Effect alone, nats per token", show: ({ effect }) => effect ?? "" },
    { title: `Questions with it at K = ${mask.k}`, show: ({ id }) => questionsButton(id, number) },
  ];
  return columns.filter(({ title, show }) => title === "Latent" || rows.some((latent) => show(latent) !== ""));
}

// What becomes of the latents of its list under a mask.
function verbOf(mask) {
  if (mask.control) return "imitated";
  return mask.keeps ? "kept" : "masked";
}

function latentHead({ name, title }, question) {
  const head = element("th", { scope: "col" });
  if (!name || !question.effects) {
    head.append(title);
    return head;
  }
  const isChosen = (name === "effect") === isByEffect(question);
  if (isChosen) head.setAttribute("aria-sort", name === "effect" ? "descending" : "ascending");
  head.append(buttonTo(() => go({ by: name }, true), { id: `by-${name}`, textContent: title }));
  return head;
}

function tellMasked(question, number) {
  const mask = data.masks[number];
  const count = question.counts[number];
  const known = latentsOf(question, number).length;
  const some = known < count ? `, the first ${known} of them here` : "";
  return `The question's latents: ${count} ${verbOf(mask)}${some}`;
}

// An opened question, and its copy as CSV. Precedes page.js, in the same module.

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
    [`questions that mask it at K = ${k}`, (id) => often[id]],
    ["effect alone, nats per token", (id) => effects[id] ?? ""],
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

// A question's answers, and what became of them under a mask.
const [ANSWER, TEXT, EM, F1, NAMED] = [0, 1, 2, 3, 4]; // places in an answer

const unmaskedOf = (question) => question.answers[0];

// Under a mask, an answer per draw; none where it was not asked.
function answersOf(question, number) {
  const found = question.masked?.[number] ?? [];
  return [found].flat().map((place) => question.answers[place]);
}

// What each draw's answer lost in log probability, nats per token; null where that is not known.
const dropsOf = (question, number) => [question.drops?.[number] ?? null].flat();

// The mean over the draws, to three digits as each of them; null where that is not known.
function dropOf(question, number) {
  const drops = dropsOf(question, number);
  if (drops.includes(null)) return null;
  const mean = drops.reduce((sum, drop) => sum + drop, 0) / drops.length;
  return Math.round(1000 * mean) / 1000;
}

const showDrop = (drop) => (drop === null ? "" : drop.toFixed(3));

// The latents at the head of a list that the mask takes, as far as they are on the page.
function latentsOf(question, number) {
  const latents = question.latents?.[data.masks[number]?.list] ?? [];
  return latents.slice(0, question.counts?.[number] ?? 0);
}

// Of a mask that was drawn several times: in any draw.
function isChanged(question, number) {
  const before = unmaskedOf(question);
  return Boolean(before) && answersOf(question, number).some((found) => found[ANSWER] !== before[ANSWER]);
}

const isJudged = (question, number, verdict) => answersOf(question, number).some((found) => judge(found) === verdict);

// ---------------------------------------------------------------------------------------------------------------------
// Verdicts

const VERDICTS = {
  right: ["✓", "right"],
  wrong: ["✗", "wrong"],
  format: ["≁", "format broken"], // a ground truth stands in the text, and was not parsed
  some: ["◐", "right in some draws"],
};

function judge(found) {
  if (found[F1] >= data.right) return "right";
  return found[NAMED] ? "format" : "wrong";
}

// Of the answers of all draws.
function judgeAll(answers) {
  const verdicts = distinct(answers.map(judge));
  if (verdicts.length === 1) return verdicts[0];
  return verdicts.includes("right") ? "some" : "wrong";
}

function verdictSign(verdict) {
  const [sign, words] = VERDICTS[verdict];
  return element("span", { className: `sign ${verdict}`, title: words, role: "img", "aria-label": words }, sign);
}

const showAnswer = (found) => [verdictSign(judge(found)), " ", found[ANSWER] || "(empty)"];

// What stands in a cell: the answer, or of several draws how many are right.
function showAnswers(answers) {
  if (answers.length < 2) return answers.flatMap(showAnswer);
  const right = answers.filter((found) => judge(found) === "right").length;
  return [verdictSign(judgeAll(answers)), ` ${right} of ${answers.length} right`];
}

// ---------------------------------------------------------------------------------------------------------------------
// Over all masks, but for those that are the same as another

const once = data.masks.map((mask) => !mask.repeats);
const listMasked = (question) => (question.masked ?? []).map((_, number) => number).filter((number) => once[number]);
const countChanged = (question) => listMasked(question).filter((number) => isChanged(question, number)).length;
const countAsked = (question) => listMasked(question).filter((number) => question.masked[number] !== null).length;

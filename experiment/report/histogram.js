// The histogram of drops above the questions, whose bars filter them.
const BARS = 40; // about
const AXIS =
  "Drop of the answer's log probability, nats per token. Heights: root of the number of questions; click a bar for these.";

function niceStep(range) {
  const rough = range / BARS;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((found) => found >= rough);
  return Math.max(0.001, step); // drops have three digits
}

function countBars(drops) {
  const step = niceStep(Math.max(...drops) - Math.min(...drops));
  const placeOf = (drop) => Math.floor(Number((drop / step).toPrecision(9))); // 0.003 / 0.001 is a little under 3
  const first = placeOf(Math.min(...drops));
  const counts = new Array(placeOf(Math.max(...drops)) - first + 1).fill(0);
  for (const drop of drops) counts[placeOf(drop) - first] += 1;
  const tidy = (bound) => Number((bound * step).toPrecision(6));
  return counts.map((count, place) => ({ count, low: tidy(first + place), high: tidy(first + place + 1) }));
}

// Of a single value there is nothing to see in bars: it is told.
function renderHistogram(questions, number) {
  const drops = questions.map((question) => dropOf(question, number)).filter((drop) => drop !== null);
  const box = find("histogram");
  box.hidden = !drops.length;
  box.setAttribute("aria-label", "Questions by what the answer's log probability lost, nats per token");
  if (!drops.length) return box.replaceChildren();
  if (distinct(drops).length === 1) return box.replaceChildren(tellDrop(drops));
  const bars = countBars(drops);
  const most = Math.max(...bars.map((bar) => bar.count));
  const row = element("div", { className: "bars" }, ...bars.map((bar) => barButton(bar, most)));
  const told = element("p", { className: "notes" }, AXIS);
  box.replaceChildren(row, axis(bars[0].low, bars[bars.length - 1].high), told);
}

// The ends, and a tick at 0, which parts answers that lost from those that gained. Its number is left out where an end's
// would stand in its way: a digit takes at most 2% of a narrow screen.
function axis(low, high) {
  const scale = element("p", { className: "axis" }, element("span", {}, low), element("span", {}, high));
  const place = (100 * (0 - low)) / (high - low);
  if (place <= 0 || place >= 100) return scale;
  const isFree = place > 2 * String(low).length && 100 - place > 2 * String(high).length;
  const zero = element("span", { className: "zero" }, isFree ? "0" : "");
  zero.style.left = `${place}%`;
  scale.append(zero);
  return scale;
}

function barButton({ count, low, high }, most) {
  const name = `${low}:${high}`;
  const label = `${count} question${count === 1 ? "" : "s"} lost ${low} to ${high}`;
  const properties = { title: label, disabled: !count, "aria-label": label, "aria-pressed": state.bar === name };
  const button = buttonTo(() => go({ bar: state.bar === name ? "" : name, page: "0" }), properties);
  // Heights go by the root: most questions lose next to nothing, and the few that do are looked for.
  button.style.setProperty("--height", `${100 * Math.sqrt(count / most)}%`);
  return button;
}

function tellDrop(drops) {
  const which = drops.length === 1 ? "this question" : `each of these ${drops.length} questions`;
  return element("p", {}, `In ${which} the answer's log probability dropped by ${showDrop(drops[0])} nats per token.`);
}

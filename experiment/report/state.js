// What all scripts share: the page's data, and its state. All that is shown is in the address: state -> render, and
// every control goes to another state. Texts of models and data sets reach the page as text nodes, never as HTML.
// The scripts are parts of one module, this one the first, page.js the last.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const distinct = (values) => [...new Set(values)];

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || ["role", "colspan", "rowspan"].includes(key)) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// A button that acts. properties: as of element(); its text is textContent, or the children.
function buttonTo(act, properties, ...children) {
  const button = element("button", { type: "button", ...properties }, ...children);
  button.addEventListener("click", act);
  return button;
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
  latent: "", // that a question's list has to hold
  sort: usual ? "drop" : "", // a column's name; of a tab that has none such, its first
  up: "", // "yes": smallest first
  page: "0",
  question: "", // the one that is opened
  cell: "", // of its matrix, "ranking|mask|k"; "": that of the chosen ranking, mask and K
  by: "effect", // what its latents are sorted by; or "ranking"
};
const CHOICES = ["ranking", "mask", "k"]; // what tells masks apart
let state = readState();

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
  const isOther = ["question", ...CHOICES].some((name) => name in changes);
  state = { ...state, ...(isOther ? { cell: "" } : {}), ...changes };
  history[replace ? "replaceState" : "pushState"](null, "", writeState(state));
  render();
}

const pageNumber = () => Math.max(0, Math.floor(Number(state.page))) || 0;

// A filter shows its first page.
const filter = (changes, replace) => go({ bar: "", page: "0", ...changes }, replace);

// ---------------------------------------------------------------------------------------------------------------------
// Masks, which go by their numbers

// The number of the mask that is wanted; of a combination that was not run, of the nearest one.
// foremost: which of CHOICES counts most; the others count in their order.
function nearestMask(wanted, foremost = "ranking") {
  const order = [foremost, ...CHOICES.filter((name) => name !== foremost)];
  const weigh = (mask) => order.reduce((sum, name, place) => sum + (mask[name] === wanted[name] ? 4 >> place : 0), 0);
  const weights = data.masks.map(weigh);
  return weights.length ? weights.indexOf(Math.max(...weights)) : undefined;
}

const chosenMask = () => nearestMask(state);

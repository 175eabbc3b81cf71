// The figure: a mark says what it is, and shows its questions

function describePoint(mask, metric) {
  const removed = mask.removed === null ? "" : `, ${mask.removed.toFixed(1)}% of the norm removed`;
  return `${mask.name} ${mask.mask}, K = ${mask.k} (${mask.latents.toFixed(1)} latents per question${removed}): ${mask.drop[metric]}`;
}

function bindPoint(point, mask, metric) {
  const mark = point.querySelector("use");
  const target = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  for (const [name, value] of Object.entries({ cx: mark.getAttribute("x"), cy: mark.getAttribute("y"), r: 8 })) {
    target.setAttribute(name, value);
  }
  target.classList.add("target");
  mark.parentElement.append(target);
  const text = describePoint(mask, metric);
  for (const [name, value] of Object.entries({ tabindex: 0, role: "button", "aria-label": text, class: "point" })) {
    point.setAttribute(name, value);
  }
  const show = () => showTip(point, text);
  const open = () => {
    filter({ ranking: mask.ranking, mask: mask.mask, k: mask.k, tab: "questions", show: "changed", question: "" });
    find("questions-head").scrollIntoView();
  };
  for (const name of ["mouseenter", "focus"]) point.addEventListener(name, show);
  for (const name of ["mouseleave", "blur"]) point.addEventListener(name, () => (find("tip").hidden = true));
  point.addEventListener("click", open);
  point.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    open();
  });
}

function showTip(point, text) {
  const tip = find("tip");
  const box = point.getBoundingClientRect();
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${box.bottom + 6}px`;
}

// A ranking in the legend dims the lines of all others while it is pointed at, and for as long as it is pressed; the
// controls' lines can be left out.
function bindLegend() {
  const buttons = [...document.querySelectorAll(".legend button")];
  const isPressed = (button) => button.getAttribute("aria-pressed") === "true";
  const dim = (pointed) => {
    const chosen = buttons.filter((button) => button === pointed || isPressed(button));
    const rankings = chosen.map((button) => button.dataset.line);
    for (const drawn of document.querySelectorAll("[data-ranking]")) {
      drawn.classList.toggle("dim", rankings.length > 0 && !rankings.includes(drawn.dataset.ranking));
    }
  };
  for (const button of buttons) {
    for (const name of ["mouseenter", "focus"]) button.addEventListener(name, () => dim(button));
    for (const name of ["mouseleave", "blur"]) button.addEventListener(name, () => dim(null));
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", !isPressed(button));
      dim(null);
    });
  }
  const controls = document.querySelector(".legend .controls");
  controls?.addEventListener("change", () => {
    document.querySelector(".panels").parentElement.classList.toggle("uncontrolled", !controls.checked);
  });
}

function bindFigure() {
  bindLegend();
  for (const mask of data.masks) {
    for (const metric of Object.keys(mask.drop)) {
      const point = find(`${metric}:${mask.journal}`);
      if (point) bindPoint(point, mask, metric);
    }
  }
}

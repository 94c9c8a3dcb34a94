// The page's data and helpers, its head and the list of concepts.
//
// page.py joins page.js, card.js, text.js and live.js, in this order, into one module script. They share one scope, and
// functions of later files are available from the start.

const byId = (id) => document.getElementById(id);
const record = JSON.parse(byId("record").textContent);
const live = JSON.parse(byId("live").textContent);

const concepts = new Map(record.concepts.map((concept) => [concept.id, concept]));
const neverKept = new Set(record.never_kept);

/** An element. `text` is inserted as text, never as markup: all text of the record is untrusted. */
function make(tag, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  if (text !== undefined) element.textContent = text;
  element.append(...children.filter(Boolean));
  return element;
}

/** The same for SVG. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const whole = (value) => value.toLocaleString("en-US");
const number = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))).replace("-", "−"));
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
const many = (value, noun) => `${whole(value)} ${noun}${value === 1 ? "" : "s"}`;
/** A token as a label, with visible blanks and line ends. */
const tokenLabel = (text) => text.replace(/^ | $/g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "◦";
const oneLine = (text) => text.replace(/\n/g, "⏎");

function nameOf(id) {
  const known = concepts.get(id)?.name ?? record.names[id];
  return known ?? (neverKept.has(id) ? "never kept in this text" : "no name in this page");
}

// The chosen concept. Functions that draw it register with `onChoose`.
let chosen = null;
const drawers = [];
const onChoose = (drawer) => drawers.push(drawer);

function choose(id) {
  chosen = id;
  for (const drawer of drawers) drawer();
}

/** A button that chooses a concept. */
function conceptButton(id, note, extra = {}) {
  const button = make("button", { type: "button", class: "concept", "data-concept": id, ...extra });
  button.append(
    make("span", { class: "id", text: id }),
    make("span", { class: "name", text: nameOf(id), title: nameOf(id) }),
    make("span", { class: "value", text: note }),
  );
  button.addEventListener("click", () => choose(id));
  return button;
}

// ---- The head ----

function drawHead() {
  const { totals, teacher } = record;
  byId("model").textContent = record.model;
  byId("step").textContent = record.step === null ? "" : `step ${whole(record.step)}`;
  document.title = `Concepts of ${record.model}`;

  const slots = record.every === 1 ? "Every token has a slot." : `One token in ${record.every} has a slot.`;
  const facts = [
    ["tokens read", whole(record.num_tokens),
      `${many(record.num_windows, "window")} of at most ${whole(record.context)}, from ${record.texts.join(", ")}.`],
    ["kept", `${whole(totals.kept)} of ${whole(record.num_concepts)}`,
      `Concepts that were among the ${record.num_kept} largest at least once. ${slots}`],
    ["never kept", whole(totals.never_kept), "Concepts that the student never kept in this text."],
    ["small columns", totals.small_columns === null ? "–" : whole(totals.small_columns),
      "Concepts whose column of the compressing matrix is so small that keeping them changes almost nothing."],
    ["hit@1", percent(totals.hit_1), "Share of labelled tokens whose largest predicted concept is a label."],
    ["hit@4", percent(totals.hit_4), "Share of labelled tokens where any of the four largest predicted concepts is a label."],
    ["recall@4", percent(totals.recall_4),
      "Share of a token’s labels that are among the four largest predicted concepts; mean over labelled tokens."],
    ["labelled", totals.labelled === null ? "–" : whole(totals.labelled),
      "Concepts that were a label of the teacher at least once in this text."],
    ["dead in teacher", totals.teacher_dead === null ? "–" : whole(totals.teacher_dead),
      "Latents of the teacher’s autoencoder that were never active in this text."],
  ];
  for (const [name, value, meaning] of facts) {
    if (value === "–") continue; // without a teacher there is no value
    byId("totals").append(make("div", { title: meaning }, make("dt", { text: name }), make("dd", { text: value })));
    byId("explanations").append(make("dt", { text: name }), make("dd", { text: meaning }));
  }
  const about = [
    ["precision@k", "Of labelled tokens where the concept is among the k largest, the share where it is a label."],
    ["recall@k", "Of tokens that have the concept as a label, the share where it is among the k largest."],
    ["column norm", "Norm of the concept’s column of the compressing matrix: the effect of one unit of its logit."],
    ["promotes", "Tokens whose logit the concept’s column raises most when read directly through the student’s head."],
    ["teacher", teacher && `${teacher.model} with ${teacher.sae}: ${many(teacher.num_labels, "label")} a token by `
      + `${teacher.label_source} (${teacher.label_sign}), at ${many(teacher.num_labelled, "token")}.`],
    ["weights", `SHA-256 ${record.sha256}`],
  ];
  for (const [name, meaning] of about) {
    if (meaning) byId("explanations").append(make("dt", { text: name }), make("dd", { text: meaning }));
  }
}

// ---- The list ----

const SORTS = {
  kept: { label: "most kept", of: (concept) => concept.kept, show: whole },
  precision: { label: "precision@4", of: (concept) => concept.precision_4, show: percent },
  recall: { label: "recall@4", of: (concept) => concept.recall_4, show: percent },
  norm: { label: "column norm", of: (concept) => concept.column_norm, show: number },
};
const PAGE_SIZE = 100; // rows at a time: thousands of rows would be slow to lay out
let numShown = PAGE_SIZE;

const haystack = new Map(
  record.concepts.map(({ id, name, promotes }) => [
    id,
    `${id} ${name} ${promotes.map(([token]) => token).join(" ")}`.toLowerCase(),
  ]),
);

/** Concepts that match every word of the search, in the chosen order. A concept whose id is searched comes first. */
function found() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const { of } = SORTS[byId("sort").value];
  const rank = (concept) => of(concept) ?? -Infinity;
  const rows = record.concepts.filter(({ id }) => words.every((word) => haystack.get(id).includes(word)));
  rows.sort((a, b) => rank(b) - rank(a) || b.kept - a.kept || a.id - b.id);
  const id = words.length === 1 && /^\d+$/.test(words[0]) ? Number(words[0]) : NaN;
  if (!(id < record.num_concepts)) return rows;
  return [concepts.get(id) ?? { id }, ...rows.filter((concept) => concept.id !== id)];
}

function drawList() {
  const sort = SORTS[byId("sort").value];
  const rows = found();
  const largest = Math.max(...record.concepts.map((concept) => sort.of(concept) ?? 0));
  const items = rows.slice(0, numShown).map((concept) => {
    const value = concept.name === undefined ? null : sort.of(concept);
    const note = concept.name === undefined ? "" : value === null ? "–" : sort.show(value);
    const button = conceptButton(concept.id, note, { tabindex: -1 });
    button.style.setProperty("--share", value > 0 ? value / largest : 0);
    return make("li", {}, button, steerButton(concept.id, { tabindex: -1 }));
  });
  byId("concept-list").replaceChildren(...items);
  byId("list-count").textContent =
    rows.length === record.concepts.length ? whole(rows.length) : `${whole(rows.length)} found`;
  byId("more").hidden = rows.length <= numShown;
  byId("more").textContent = `Show ${whole(Math.min(PAGE_SIZE, rows.length - numShown))} more`;
  markChosenRow();
}

/** Mark the chosen row. Only one row is in the tab order: the chosen one if it is shown, else the first. */
function markChosenRow() {
  const list = byId("concept-list");
  for (const button of list.querySelectorAll("[aria-current], [tabindex='0']")) {
    button.removeAttribute("aria-current");
    button.tabIndex = -1;
  }
  const current = list.querySelector(`.concept[data-concept="${chosen}"]`);
  current?.setAttribute("aria-current", "true");
  const entry = current ?? list.querySelector(".concept");
  if (entry) entry.tabIndex = 0;
}

/** Arrow keys: up and down between rows, left and right between a row and its steer button. */
function moveInList(event) {
  const rows = [...byId("concept-list").children];
  const at = rows.findIndex((row) => row.contains(document.activeElement));
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    if (to < 0) byId("search").focus();
    else rows[to]?.firstChild.focus();
  } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    rows[at]?.[event.key === "ArrowRight" ? "lastChild" : "firstChild"].focus();
  }
}

function startList() {
  byId("sort").append(...Object.entries(SORTS).map(([value, { label }]) => make("option", { value, text: label })));
  for (const option of byId("sort").options) {
    option.hidden = !record.teacher && ["precision", "recall"].includes(option.value);
  }
  const redraw = () => {
    numShown = PAGE_SIZE;
    drawList();
  };
  byId("search").addEventListener("input", redraw);
  byId("sort").addEventListener("change", redraw);
  byId("more").addEventListener("click", () => {
    const last = byId("concept-list").children.length;
    numShown += PAGE_SIZE;
    drawList();
    byId("concept-list").children[last].firstChild.focus();
  });
  byId("concept-list").addEventListener("keydown", moveInList);
  byId("search").addEventListener("keydown", (event) => {
    const first = byId("concept-list").querySelector(".concept");
    if (event.key === "ArrowDown") {
      event.preventDefault();
      first?.focus();
    } else if (event.key === "Enter") first?.click();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input:not([type=range]):not([type=radio]), textarea, select")) return;
    event.preventDefault();
    byId("search").select();
    byId("search").focus();
  });
  const { num_described: described } = record;
  byId("left-out").hidden = described === record.concepts.length;
  byId("left-out").textContent =
    `${whole(record.concepts.length)} of ${whole(described)} concepts; all are in the JSON that --out writes.`;
  onChoose(markChosenRow);
  drawList();
}

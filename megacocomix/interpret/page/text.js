// Tokens, coloured by the chosen concept, with arrow-key navigation, and the hover card of the concepts at a token.

const VIEWS = {
  student: { label: "student", unit: "logit where kept", pairs: (token) => token.kept },
  active: { label: "teacher’s activation", unit: "activation in the teacher", pairs: (token) => token.active },
  labels: { label: "teacher’s labels", unit: "label", pairs: (token) => token.labels?.map((id) => [id, 1]) },
};
const MOST_PREDICTED = 8; // in the hover card

const tokenOf = new WeakMap(); // element → token
const shownTokens = []; // of the record's windows, in order; those of a generation are in live.js
let view = "student";

/**
 * The element of a token: {text, kept: [[id, logit]…], labels, active, where: its position as text, kl}.
 * Before each line end is an empty element to which the style adds a faint ⏎, so copied text does not have it.
 */
function tokenElement(token) {
  const element = make("span", { class: token.text ? "token" : "token empty", "data-testid": "token" });
  token.text.split("\n").forEach((line, index) => {
    if (index) element.append(make("span", { class: "newline" }), "\n");
    element.append(line);
  });
  tokenOf.set(element, token);
  token.element = element;
  token.heat = null;
  return element;
}

/** The strength of the chosen concept at a token; undefined if it is not there. */
const strength = (token, of) => VIEWS[of].pairs(token)?.find(([id]) => id === chosen)?.[1];

/** The values of the faintest and the strongest colour: the range of the chosen concept in the whole text. */
function scaleOf(of) {
  const top = of === "student" ? concepts.get(chosen)?.max_logit : null;
  let [low, high] = [Infinity, top ?? -Infinity];
  for (const token of shownTokens) {
    const value = strength(token, of);
    if (value !== undefined) [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  return high >= low ? { low, high } : { low: 0, high: Number.isFinite(high) ? high : 1 };
}

const HEATS = 10; // steps of colour, as many as page.css has

/** Colour one token. Updates only changes: a page has thousands of tokens, and few of them have the concept. */
function paint(token, of, { low, high }) {
  const value = strength(token, of);
  const share = high > low ? (value - low) / (high - low) : 1;
  const heat = value === undefined ? null : Math.min(Math.max(Math.floor(share * HEATS), 0), HEATS - 1);
  if (heat === token.heat) return;
  if (heat === null) delete token.element.dataset.heat;
  else token.element.dataset.heat = heat;
  token.heat = heat;
}

const isColoured = (token) => token.heat !== null;

function paintText() {
  const scale = scaleOf(view);
  for (const token of shownTokens) paint(token, view, scale);
  drawLegend(scale);
  countWindows();
}

function drawLegend({ low, high }) {
  const { unit } = VIEWS[view];
  const count = shownTokens.filter(isColoured).length;
  byId("legend-text").replaceChildren(
    make("strong", { text: `${chosen} ${nameOf(chosen)}` }),
    ` at ${whole(count)} of ${many(shownTokens.length, "shown token")}`,
  );
  const [from, to] = view === "labels" ? ["", ""] : [number(low), number(high)];
  byId("legend-scale").replaceChildren(
    make("span", { class: "unit", text: unit }), from,
    make("span", { class: view === "labels" ? "swatch" : "ramp" }), to,
  );
  byId("legend-scale").setAttribute("aria-label", from ? `Colour: ${unit}, ${from} to ${to}` : `Colour: ${unit}`);
  for (const id of ["jump-back", "jump-on"]) byId(id).disabled = count === 0;
}

// ---- The windows ----

function drawWindows() {
  const sections = record.windows.map((window, index) => {
    const body = make("p", { class: "tokens", dir: "auto" });
    window.tokens.forEach((text, position) => {
      const token = {
        text, window: index, kept: window.kept[position], labels: window.labels?.[position] ?? null,
        active: window.active?.[position] ?? null, where: `window ${index + 1}, token ${position + 1}`,
      };
      shownTokens.push(token);
      body.append(tokenElement(token));
    });
    const from = record.texts.length > 1 ? ` · ${record.texts[window.text]}` : "";
    return make("section", { class: "window", id: `window-${index}` },
      make("h3", { text: `Window ${whole(index + 1)}${from}` }), body);
  });
  byId("text").replaceChildren(...sections);
  if (record.windows.length < record.num_windows) {
    const rest = `The first ${whole(record.windows.length)} of ${many(record.num_windows, "window")} are shown`;
    byId("text").append(make("p", { class: "note", text: `${rest}; the numbers cover all of them. --shown shows more.` }));
  }
  if (shownTokens.length) shownTokens[0].element.tabIndex = 0;
}

/** Show in the picker how often the chosen concept is in each window. */
function countWindows() {
  const counts = record.windows.map(() => 0);
  for (const token of shownTokens) counts[token.window] += isColoured(token);
  counts.forEach((count, index) => {
    byId("window-picker").options[index].textContent = `${whole(index + 1)}${count ? ` · ${count}×` : ""}`;
  });
}

/** Scroll to a token of a window, and focus it. */
function goTo(window, position) {
  focusToken(byId(`window-${window}`).querySelectorAll(".token")[position]);
}

/** Roving tabindex: each passage has one token in the tab order, the last focused one. */
function focusToken(element, scroll = true) {
  if (!element) return;
  const entries = element.closest(".passage").querySelectorAll(".token[tabindex]");
  for (const entry of entries) entry.removeAttribute("tabindex");
  element.tabIndex = 0;
  element.focus({ preventScroll: true });
  if (scroll) element.scrollIntoView({ block: "center" });
}

/** Go to the next or previous coloured token from the last focused one, and wrap around. */
function jump(by) {
  const at = shownTokens.findIndex((token) => token.element.tabIndex === 0);
  const ahead = by > 0
    ? [...shownTokens.slice(at + 1), ...shownTokens.slice(0, at + 1)]
    : [...shownTokens.slice(0, at).reverse(), ...shownTokens.slice(at).reverse()];
  focusToken(ahead.find(isColoured)?.element);
}

// ---- Pointing at a token ----

const hover = () => byId("hover");
let pointedAt = null;
let pinned = false; // opened by a tap, a click or the keyboard: stays until Esc or a click elsewhere
let timer = 0;

function showHover(element) {
  const token = tokenOf.get(element);
  if (pointedAt !== element) hover().replaceChildren(...hoverParts(token));
  markHovered();
  pointedAt?.removeAttribute("aria-describedby");
  pointedAt = element;
  element.setAttribute("aria-describedby", "hover");
  hover().hidden = false;
  placeHover(element);
}

/** Place the card below the token, or above it if there is no room, in page coordinates, so it scrolls with the text.
 * On a phone it is a sheet at the bottom, and the page scrolls so that it does not cover the token. */
function placeHover(element) {
  const isSheet = getComputedStyle(hover()).position === "fixed";
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = hover();
  const below = box.bottom + 6 + height <= innerHeight || box.top < height + 6;
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
  const hidden = box.bottom + 12 - hover().getBoundingClientRect().top;
  if (isSheet && hidden > 0) scrollBy(0, hidden);
  hover().style.setProperty("--left", `${left + scrollX}px`);
  hover().style.setProperty("--top", `${(below ? box.bottom + 6 : box.top - height - 6) + scrollY}px`);
}

/** Mark the chosen concept in the hover card. */
function markHovered() {
  for (const button of hover().querySelectorAll(".concept")) {
    button.toggleAttribute("aria-current", Number(button.dataset.concept) === chosen);
  }
}

function hideHover() {
  clearTimeout(timer);
  pinned = false;
  pointedAt?.removeAttribute("aria-describedby");
  pointedAt = null;
  hover().hidden = true;
}

function hoverParts(token) {
  const { kept, labels, active } = token;
  const marksOf = (id) => [labels?.includes(id) && "✓ label", active?.some(([other]) => other === id) && "● active"];
  const student = kept.slice(0, MOST_PREDICTED).map(([id, logit]) =>
    make("li", { class: marksOf(id)[0] ? "match" : null },
      conceptButton(id, number(logit)), make("span", { class: "marks", text: marksOf(id).filter(Boolean).join(" ") })));
  const columns = [column("Student keeps", student, "No concept slot at this token.")];
  if (kept.length > MOST_PREDICTED) {
    columns[0].append(make("p", { class: "note", text: `and ${kept.length - MOST_PREDICTED} weaker ones` }));
  }
  if (record.teacher && token.window !== undefined) {
    const row = (id, note) => {
      const rank = kept.findIndex(([other]) => other === id) + 1;
      return make("li", { class: rank ? "match" : null }, conceptButton(id, note),
        make("span", { class: "marks", text: rank ? `✓ kept, no. ${rank}` : "not kept" }));
    };
    const teacher = column("Teacher’s labels", labels?.map((id) => row(id, "")) ?? [], "None at this token.");
    if (active) teacher.append(...column("Active latents", active.map(([id, value]) => row(id, number(value))),
      "None here.").children);
    columns.push(teacher);
  }
  const where = [token.where, token.kl > 0 && `KL ${number(token.kl)} nats`].filter(Boolean).join(" · ");
  return [
    make("p", { class: "hover-head" }, make("span", { class: "token-label", text: tokenLabel(token.text) }),
      make("span", { class: "muted", text: where })),
    make("div", { class: "hover-columns" }, ...columns),
  ];
}

function column(title, items, empty) {
  const body = items.length ? make("ul", {}, ...items) : make("p", { class: "note", text: empty });
  return make("div", {}, make("h3", { text: title }), body);
}

/** Keys of a focused token. Enter moves the focus into its card, Esc moves it back. */
function tokenKeys(event) {
  const element = event.target.closest(".token");
  if (!element || event.ctrlKey || event.metaKey || event.altKey) return;
  const tokens = [...event.currentTarget.querySelectorAll(".token")];
  const at = tokens.indexOf(element);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    focusToken(tokens[to]);
  } else if (event.key === "Enter") {
    event.preventDefault();
    hover().querySelector("button")?.focus();
  }
}

/** Show the hover card for the present and future tokens of `passage` when they are pointed at, focused or tapped. */
function watchTokens(passage) {
  passage.addEventListener("pointerover", (event) => {
    const element = event.target.closest(".token");
    if (event.pointerType !== "mouse" || pinned || !element) return;
    clearTimeout(timer);
    timer = setTimeout(showHover, 60, element);
  });
  passage.addEventListener("pointerleave", hideSoon);
  passage.addEventListener("focusin", (event) => {
    if (tokenOf.has(event.target)) {
      clearTimeout(timer);
      pinned = true;
      showHover(event.target);
    }
  });
  passage.addEventListener("click", (event) => {
    focusToken(event.target.closest(".token"), false);
  });
  passage.addEventListener("focusout", ({ relatedTarget: next }) => {
    if (next && !next.closest("#hover, .token")) hideHover();
  });
  passage.addEventListener("keydown", tokenKeys);
}

/** Hide with a delay, so that the pointer can move from the token into the card. */
function hideSoon() {
  if (pinned) return;
  clearTimeout(timer);
  timer = setTimeout(hideHover, 250);
}

function startText() {
  drawWindows();
  byId("window-picker").append(...record.windows.map((_, value) => make("option", { value })));
  byId("window-picker").addEventListener("change", (event) => {
    byId(`window-${event.target.value}`).scrollIntoView({ block: "start" });
  });
  const offered = Object.keys(VIEWS).filter((name) =>
    name === "student" || record.windows.some((window) => window[name]));
  byId("views").hidden = offered.length === 1;
  for (const name of offered) {
    const input = make("input", { type: "radio", name: "view", value: name });
    input.checked = name === view;
    input.addEventListener("change", () => {
      view = name;
      paintText();
    });
    byId("views").append(make("label", {}, input, make("span", { text: VIEWS[name].label })));
  }
  byId("jump-back").addEventListener("click", () => jump(-1));
  byId("jump-on").addEventListener("click", () => jump(1));
  watchTokens(byId("text"));
  hover().addEventListener("pointerenter", () => clearTimeout(timer));
  hover().addEventListener("pointerleave", hideSoon);
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#hover, .token")) hideHover();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || hover().hidden) return;
    const back = hover().contains(document.activeElement) ? pointedAt : null;
    if (back) back.focus({ preventScroll: true });
    hideHover();
  });
  onChoose(paintText);
  onChoose(markHovered);
}

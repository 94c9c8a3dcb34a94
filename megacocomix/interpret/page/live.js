// Steering, on a served page: sliders, and the plain and the steered text side by side while they are generated.

const SCALE = { min: -10, max: 10, step: 0.5, start: 5 }; // a scale of 1 leaves a concept as it is
const NO_EFFECT = 1e-6; // nats; a smaller KL is rounding
const steers = new Map(); // concept → scale
const streams = {}; // "plain" | "steered" → {tokens, body, mean_kl …} of the last generation
const serverToken = new URL(location.href).searchParams.get("token");
let running = null; // AbortController of the current request

const field = (id) => byId(id).value;
const setStatus = (text, isError = false) => {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
};

// ---- The sliders ----

/** A "steer" button for a concept; null in a file, which has no server. */
function steerButton(id, extra = {}) {
  if (!live) return null;
  const button = make("button", { type: "button", class: "steer", text: "steer", ...extra });
  button.setAttribute("aria-label", `Steer ${id} ${nameOf(id)}`);
  button.addEventListener("click", () => addSteer(id));
  return button;
}

function addSteer(id) {
  if (!steers.has(id)) {
    steers.set(id, SCALE.start);
    byId("steers").append(steerRow(id));
  }
  showWhetherSteered();
  byId("steers").querySelector(`[data-concept="${id}"] input`).focus();
}

function steerRow(id) {
  const { min, max, step } = SCALE;
  const name = `Scale of concept ${id} ${nameOf(id)}`;
  const slider = make("input", { type: "range", min, max, step, "aria-label": name, "data-testid": "steer-slider" });
  const box = make("input", { type: "number", min, max, step, required: "", "aria-label": name });
  const meaning = make("span", { class: "note" });
  const set = (value) => {
    steers.set(id, value);
    meaning.textContent = scaleMeaning(value);
  };
  slider.addEventListener("input", () => {
    box.value = slider.value;
    set(slider.valueAsNumber);
  });
  box.addEventListener("input", () => {
    if (!box.checkValidity()) return; // the form shows the problem when it is submitted
    slider.value = box.value;
    set(box.valueAsNumber);
  });
  slider.value = box.value = steers.get(id);
  set(steers.get(id));
  const remove = make("button", { type: "button", class: "remove", text: "×", "aria-label": `Do not steer ${id}` });
  remove.addEventListener("click", () => {
    steers.delete(id);
    remove.closest("li").remove();
    showWhetherSteered();
    byId("prompt").focus();
  });
  const label = make("button", { type: "button", class: "concept", title: "Choose this concept" },
    make("span", { class: "id", text: id }), make("span", { class: "name", text: nameOf(id) }));
  label.addEventListener("click", () => choose(id));
  const times = make("span", { class: "times" }, "×", box);
  return make("li", { "data-concept": id }, label, slider, times, meaning, remove);
}

function scaleMeaning(value) {
  if (value === 1) return "unchanged";
  if (value === 0) return "set to 0";
  return value < 0 ? "inverted" : value < 1 ? "weaker" : "stronger";
}

function showWhetherSteered() {
  byId("no-steers").hidden = steers.size > 0;
  byId("no-steers").textContent = "No concept is steered. Press “steer” beside a concept to scale it.";
}

// ---- A generation ----

function request() {
  const body = {
    prompt: field("prompt"),
    max_new_tokens: Number(field("max-new-tokens")),
    temperature: Number(field("temperature")),
    top_p: Number(field("top-p")),
    seed: Number(field("seed")),
  };
  if (!steers.size) return body;
  return { ...body, steer: [...steers].map(([id, scale]) => `${id}=${scale}`), place: field("place") };
}

async function generate() {
  running?.abort();
  const mine = (running = new AbortController());
  const body = request();
  setRunning(true);
  clearStreams(body);
  setStatus("Waiting for the model …");
  try {
    const headers = { "Content-Type": "application/json" };
    if (serverToken) headers.Authorization = `Bearer ${serverToken}`;
    const answer = await fetch("/api/generate", {
      method: "POST", headers, body: JSON.stringify(body), signal: mine.signal,
    });
    if (!answer.ok) throw new Error(await refusal(answer));
    await readEvents(answer.body, body);
    if (running === mine) finish(body);
  } catch (error) {
    if (running !== mine) return; // a newer request has replaced this one
    if (mine.signal.aborted) setStatus("Stopped.");
    else setStatus(error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message, true);
  } finally {
    if (running === mine) setRunning(false);
  }
}

/** The reason for which the server refused, in one line. */
async function refusal(answer) {
  const { error } = await answer.json().catch(() => ({}));
  const asks = "The server requires its token: open the address that it printed, with ?token=… at its end.";
  return answer.status === 401 ? asks : (error ?? `The server refused: ${answer.status} ${answer.statusText}`);
}

/** Each event is a line of JSON. Network chunks may end inside a line or a character. */
async function readEvents(stream, body) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const lines = (rest + chunk.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.trim()) handle(JSON.parse(line), body);
  }
  if (!ended) throw new Error("The answer was truncated.");
}

let ended = false; // the last answer ended with "done"

function handle(event, body) {
  if (event.event === "queued") {
    setStatus(`${many(event.ahead, "request")} ${event.ahead === 1 ? "is" : "are"} before yours.`);
  } else if (event.event === "start") {
    setStatus("Generating …");
    byId("truncated").hidden = !event.truncated;
    const dropped = `${many(event.truncated, "token")} of the prompt ${event.truncated === 1 ? "was" : "were"} dropped`;
    byId("truncated").textContent = `${dropped}: the context is ${whole(live.context)}.`;
    for (const { body: passage } of Object.values(streams)) {
      passage.append(make("span", { class: "prompt", text: event.prompt.join("") }));
    }
  } else if (event.event === "token") addToken(streams[event.stream], event);
  else if (event.event === "end") endStream(streams[event.stream], event);
  else if (event.event === "done") ended = true;
  else if (event.event === "error") throw new Error(event.message);
}

function clearStreams({ steer }) {
  ended = false;
  byId("truncated").hidden = true;
  byId("effect").replaceChildren();
  byId("streams").hidden = false;
  byId("streams").classList.toggle("one", !steer);
  byId("steered").hidden = !steer;
  for (const name of ["plain", "steered"]) delete streams[name];
  for (const name of steer ? ["plain", "steered"] : ["plain"]) {
    const body = make("p", { class: "tokens", dir: "auto" });
    const facts = make("span", { class: "muted" });
    streams[name] = { tokens: [], body, facts, end: null };
    const title = { plain: "Plain", steered: "Steered" }[name];
    byId(name).replaceChildren(make("h3", {}, title, " ", facts), make("div", { class: "passage" }, body));
    watchTokens(byId(name).lastChild);
  }
}

function addToken({ tokens, body }, { text, kept, kl }) {
  const token = { text, kept, kl, labels: null, active: null, where: `new token ${tokens.length + 1}` };
  tokens.push(token);
  body.append(tokenElement(token));
  if (tokens.length === 1) token.element.tabIndex = 0;
  paint(token, "student", liveScale);
}

function endStream(stream, event) {
  stream.end = event;
  const why = event.reason === "length" ? "" : `, ${event.reason}`;
  stream.facts.textContent = `${many(event.tokens, "token")}${why}`;
}

// ---- The effect of the steering ----

function finish({ steer, place }) {
  setStatus("Done.");
  if (!steer || !streams.steered.end) return;
  const { tokens, end } = streams.steered;
  const none = tokens.every(({ kl }) => kl < NO_EFFECT);
  const parts = [make("p", {}, make("strong", { text: none ? "The steering had no effect." : firstDifference() }),
    ` Mean KL of steered from plain: ${number(end.mean_kl)} nats a token.`)];
  for (const [id, times] of Object.entries(end.selected)) {
    parts.push(make("p", { class: "selected", text: selectionText(Number(id), times, end.tokens, none, place) }));
  }
  byId("effect").replaceChildren(...parts);
}

function firstDifference() {
  const [plain, steered] = [streams.plain.tokens, streams.steered.tokens];
  const at = steered.findIndex(({ text }, index) => text !== plain[index]?.text);
  if (at < 0 && plain.length === steered.length) return "The probabilities differ, but the text is the same.";
  return `The texts differ from new token ${(at < 0 ? steered.length : at) + 1} on.`;
}

function selectionText(id, times, steps, none, place) {
  const start = `${id} ${nameOf(id)} was selected at ${whole(times)} of ${many(steps, "step")}`;
  if (times || !none) return `${start}.`;
  return place === "after"
    ? `${start}, and after selection only selected concepts can be scaled: try “before selection”.`
    : `${start}: even scaled it was not among the ${record.num_kept} largest. Try a larger scale or another prompt.`;
}

// ---- Start ----

let liveScale = { low: 0, high: 1 };

function paintLive() {
  liveScale = scaleOf("student");
  for (const { tokens } of Object.values(streams)) for (const token of tokens) paint(token, "student", liveScale);
}

/** Enable the button that applies. The focus moves with it, because a disabled button would lose it. */
function setRunning(isRunning) {
  const [from, to] = isRunning ? ["generate", "stop"] : ["stop", "generate"];
  const hadFocus = document.activeElement === byId(from);
  byId(from).disabled = true;
  byId(to).disabled = false;
  if (hadFocus) byId(to).focus();
  byId("streams").setAttribute("aria-busy", isRunning);
  if (!isRunning) running = null;
}

function startLive() {
  if (!live) return;
  byId("live-section").hidden = false;
  byId("max-new-tokens").max = live.max_new_tokens;
  byId("max-new-tokens").value = Math.min(64, live.max_new_tokens);
  showWhetherSteered();
  byId("live-form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("live-form").requestSubmit();
  });
  onChoose(paintLive);
}

drawHead();
startList();
startText();
startLive();
onChoose(drawCard);
// Start with a rarer concept: one that is kept at every token would colour the whole text.
const first = record.concepts.find(({ kept_share: share }) => share < 0.1) ?? record.concepts[0];
if (first) choose(first.id);

// The card of the chosen concept: its numbers, the tokens it promotes, and where it is strongest.

function drawCard() {
  const concept = concepts.get(chosen);
  const title = make("h2", {}, make("span", { class: "id", text: chosen }), " ", nameOf(chosen));
  const head = make("div", { class: "card-head" }, title, steerButton(chosen, { "data-testid": "add-steer" }));
  byId("card").replaceChildren(head, ...(concept ? cardParts(concept) : [whyNoNumbers()]));
}

function whyNoNumbers() {
  const text = neverKept.has(chosen)
    ? "This concept was neither kept nor a label anywhere in the text, so there is nothing to show."
    : "This concept’s numbers are not in this page; they are in the JSON that --out writes.";
  return make("p", { class: "note", text });
}

function cardParts(concept) {
  const facts = [
    ["kept", `${whole(concept.kept)} (${percent(concept.kept_share)})`],
    ["largest", whole(concept.top_1)],
    ["mean logit", number(concept.mean_logit)],
    ["column norm", number(concept.column_norm)],
  ];
  if (record.teacher) {
    facts.push(
      ["labelled", concept.labelled === null ? "–" : whole(concept.labelled)],
      ["active in teacher", concept.active === null ? "–" : whole(concept.active)],
      ["precision @1 · @4", `${percent(concept.precision_1)} · ${percent(concept.precision_4)}`],
      ["recall @1 · @4", `${percent(concept.recall_1)} · ${percent(concept.recall_4)}`],
    );
  }
  const list = make("dl", { class: "facts" });
  for (const [name, text] of facts) list.append(make("div", {}, make("dt", { text: name }), make("dd", { text })));
  return [
    concept.named_by === "auto" && make("p", { class: "note", text: "automatic name" }),
    list,
    make("div", { class: "tokens-two" },
      tokenBars("Promotes", concept.promotes), tokenBars("Suppresses", concept.suppresses)),
    concept.histogram && histogram(concept.histogram),
    make("h3", { text: concept.contexts.length ? "Where it is strongest" : "Kept nowhere in this text" }),
    make("ol", { class: "contexts" }, ...concept.contexts.map(contextItem)),
  ].filter(Boolean);
}

function tokenBars(title, pairs) {
  const largest = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-9);
  const items = pairs.map(([token, value]) => {
    const label = make("span", { class: "token-label", text: tokenLabel(token) });
    const item = make("li", {}, label, make("span", { text: number(value) }));
    item.style.setProperty("--share", Math.abs(value) / largest);
    return item;
  });
  return make("div", {}, make("h3", { text: title }), make("ul", { class: "bars" }, ...items));
}

function histogram({ low, high, counts }) {
  const [width, height, left, bottom] = [320, 84, 4, 18];
  const most = Math.max(...counts, 1);
  const step = (width - 2 * left) / counts.length;
  const at = (index) => low + ((high - low) * index) / counts.length;
  const bars = counts.map((value, index) => {
    const tall = (value / most) * (height - bottom - 14);
    const title = draw("title");
    title.textContent = `${number(at(index))} to ${number(at(index + 1))}: ${many(value, "token")}`;
    // An empty bin has no bar; any other bar is at least one pixel high.
    const shown = value ? Math.max(tall, 1) : 0;
    return draw("rect", {
      x: left + index * step + 0.5, y: height - bottom - shown, width: step - 1, height: shown, class: "bar",
    }, title);
  });
  const label = (x, y, anchor, text) => {
    const element = draw("text", { x, y, "text-anchor": anchor });
    element.textContent = text;
    return element;
  };
  const tallest = `tallest bin: ${many(most, "token")}`;
  const description = `Logits where the concept is kept, from ${number(low)} to ${number(high)}; ${tallest}`;
  return make("figure", {},
    make("figcaption", { text: "Logits where it is kept" }),
    draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description, "data-testid": "histogram" },
      draw("line", { x1: left, x2: width - left, y1: height - bottom, y2: height - bottom, class: "axis" }), ...bars,
      label(left, height - 5, "start", number(low)), label(width / 2, height - 5, "middle", "logit"),
      label(width - left, height - 5, "end", number(high)), label(width - left, 9, "end", tallest),
    ),
  );
}

function contextItem(context) {
  const isShown = context.window < record.windows.length;
  const label = { true: "✓ label", false: "no label" }[context.labelled];
  const parts = [
    make("span", { class: "quote" },
      oneLine(context.before), make("mark", { text: oneLine(context.token) || "◦" }), oneLine(context.after)),
    make("span", { class: "where" },
      make("span", { text: `logit ${number(context.logit)}` }), label && make("span", { text: label }),
      make("span", { text: `window ${context.window + 1}${isShown ? "" : ", not shown"}` })),
  ];
  if (!isShown) return make("li", {}, ...parts);
  const button = make("button", { type: "button", title: "Go to it in the text" }, ...parts);
  button.addEventListener("click", () => goTo(context.window, context.position));
  return make("li", {}, button);
}

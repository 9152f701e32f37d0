"use strict";

let state = stateOfUrl();

function render() {
  const options = compareLayouts(state);
  const shown = options.find(({ name }) => name === state.shown) || options[0];
  const [headline, ...rest] = verdictOf(state, options);
  byId("headline").textContent = headline;
  byId("verdict").textContent = rest.join(" ");
  document.title = `${DATA.model.name}: ${headline}`;
  byId("inputs").textContent = inputsText(state);
  byId("layouts-note").textContent = layoutsNote();
  byId("layouts").replaceChildren(...layoutCards(state, options, shown, select));
  byId("memory-legend").replaceChildren(...memoryLegend(options[0]));
  byId("layout-title").textContent = `${shown.name}, in parts`;
  byId("parts").replaceChildren(partBars(shown));
  byId("memory").replaceChildren(memoryBars(state, shown));
  const command = commandOf(state, shown);
  byId("command").textContent = shown.fits ? command.text : "";
  byId("command-notes").replaceChildren(...command.notes.map((note) => element("p", {}, note)));
  byId("copy").hidden = byId("command").hidden = !shown.fits || !command.text;
  showComponents(shown);
  showAssumptions();
}

function layoutsNote() {
  const ranked = state.target
    ? `Ranked by tokens per second and device within ${state.target} ms per token.`
    : `Ranked by the time of a token at ${countText(state.sequences, "sequence")} in flight.`;
  return `${ranked} Choose one to see its parts, its memory and its command below.`;
}

function select(name) {
  update({ ...state, shown: name });
  byId("layouts").querySelector("input:checked")?.focus();
}

/* components ---------------------------------------------------------------------------------- */

/** The layout whose components are shown: the one chosen, or one rank for each device. */
function componentLayout(shown) {
  if (shown.layout.ranks > 1 && isFineGrained(shown.layout)) return shown.layout;
  const ranks = state.devices;
  const base = layoutOf(1, ranks, { experts: DATA.model.has_experts });
  return { ...base, sizes: ranks > 1 ? fineGrainedSizes(state, base) : {} };
}

function showComponents(shown) {
  const layout = componentLayout(shown);
  const tokens = Math.ceil(shown.sequences / layout.ranks);
  byId("components-note").textContent =
    `Of ${nameOf(layout)}, at ${countText(tokens, "token")} per rank and step. Change is of the time ` +
    "per output token against whole weights, with its range; bytes and messages are those of one rank.";
  const rows = DATA.components.map((component) => componentRow(layout, component, tokens));
  byId("table").replaceChildren(...componentTable(rows, layout));
  byId("legend").replaceChildren(...tpotLegend(state, layout, tokens));
  byId("tpot").replaceChildren(tpotChart(state, layout, tokens, byId("tpot").clientWidth));
  byId("diagram").replaceChildren(
    ...DATA.lanes.map((lane) => {
      const width = byId("diagram").clientWidth;
      return laneDiagram(lane, layout.sizes[lane.component] || 1, width);
    }),
  );
}

function componentRow(layout, component, tokens) {
  const size = layout.sizes[component.name] || 1;
  const change = (t) => changeSeconds(state, component, layout, size, t);
  return {
    component,
    size,
    whole: wholeBytes(state, component) / layout.cut,
    saved: savedBytes(state, component, size) / layout.cut,
    moved: FORMULAS.movedBytes(componentValues(state, component, layout, size, tokens)),
    messages: size > 1 ? component.messages : 0,
    change: predict(state, (scale) => changeSeconds(state, component, layout, size, tokens, scale)),
    lastPaying: size > 1 ? lastPaying(change) : 0,
  };
}

function componentTable(rows, layout) {
  const titles = ["component", "sites", "size", "weights", "freed", "sent per step", "messages"];
  const head = [...titles, "change of TPOT", "pays at tokens per rank"];
  const body = rows.map((row) => [
    element("span", {}, swatch(row.component.name), row.component.name),
    String(row.component.sites),
    sizeChoice(row, layout),
    bytesText(row.whole),
    bytesText(row.saved),
    bytesText(row.moved),
    String(row.messages),
    row.size > 1 ? changeRange(row.change) : "",
    paysText(row),
  ]);
  const total = (pick) => sum(rows.map(pick));
  const foot = [
    "total",
    String(total((row) => row.component.sites)),
    "",
    bytesText(total((row) => row.whole)),
    bytesText(total((row) => row.saved)),
    bytesText(total((row) => row.moved)),
    String(total((row) => row.messages)),
    changeText(1e3 * total((row) => row.change.mid)),
    "",
  ];
  return [
    element("thead", {}, tableRow("th", head)),
    element("tbody", {}, ...body.map((cells) => tableRow("td", cells, head))),
    element("tfoot", {}, tableRow("td", foot, head)),
  ];
}

/** A choice of the group size; sizes belong to ranks of one device, so only these have one. */
function sizeChoice(row, layout) {
  if (layout.cut > 1) return sizeText(row.size);
  const { name } = row.component;
  const asked = state.sizes[name];
  const option = (value, text) =>
    element("option", { value, ...(value === String(asked || "") ? { selected: "" } : {}) }, text);
  const sizes = [1, ...groupSizes(state, layout)];
  if (asked && !sizes.includes(asked)) sizes.push(asked);
  const auto = asked ? "auto" : `auto: ${sizeText(row.size)}`;
  const select = element(
    "select",
    { "aria-label": `group size of ${name}` },
    option("", auto),
    ...sizes.map((size) => option(String(size), sizeText(size))),
  );
  select.addEventListener("change", () => {
    const all = DATA.components.map((c) => [c.name, layout.sizes[c.name] || 1]);
    const asked = { ...Object.fromEntries(all), [name]: Number(select.value) };
    update({ ...state, sizes: select.value ? asked : {} });
  });
  return select;
}

/** A row whose cells know their titles, for screens on which rows become lists. */
function tableRow(tag, cells, titles = []) {
  return element(
    "tr",
    {},
    ...cells.map((cell, i) => element(tag, titles[i] ? { "data-title": titles[i] } : {}, cell)),
  );
}

/* assumptions --------------------------------------------------------------------------------- */

function showAssumptions() {
  const { title, constants, spreads } = deviceOf(state);
  const said = [
    "All ranks bring the same number of sequences; waiting for a late rank is not counted but for experts.",
    "A step decodes one token of every sequence. Prefill is timed by itself: one prompt on each data-parallel rank.",
    `${Math.round(100 * DATA.usable_share)} % of a device's memory holds weights and KV cache, for whole sequences at their ends.`,
    "Ranges come from the spreads of the constants, taken to be independent; a size whose sign is not certain is not taken.",
  ];
  if (DATA.model.latent) {
    said.push("Attention cut by heads keeps all latents on every device; data-parallel attention keeps each once.");
  }
  if (DATA.model.cache_assumed) {
    said.push(`The KV cache is assumed from the config's heads (${DATA.model.cache_assumed}).`);
  }
  byId("assumptions").replaceChildren(...said.map((text) => element("li", {}, text)));
  byId("constants-title").textContent = `Constants of ${title}`;
  const head = ["constant", "value", "source"];
  byId("constants").replaceChildren(
    element("thead", {}, tableRow("th", head)),
    element("tbody", {}, ...constants.map((row) => tableRow("td", row, head))),
  );
  const parts = Object.entries(spreads).filter(([, spread]) => spread > 0);
  byId("spreads").textContent = `How far off they may be: ${parts
    .map(([name, spread]) => `${name} ${Math.round(100 * spread)} %`)
    .join(", ")}.`;
}

/* start --------------------------------------------------------------------------------------- */

function update(changed) {
  state = changed;
  showControls(state);
  history.replaceState(null, "", urlOf(state));
  render();
}

function start() {
  const { model } = DATA;
  byId("subject").textContent =
    `fgtp plan: ${model.name} (${model.architecture}, ${countText(model.layers, "layer")})`;
  byId("diagram-note").textContent =
    "Columns are ranks, a filled part is what a rank holds, time goes down. Attention, norms and " +
    "routed experts around these components stay as they are.";
  byId("derivations").replaceChildren(
    ...DATA.derivations.flatMap(({ title, text }) =>
      text.map((part, i) => element("p", {}, ...coded(i ? part : `${title}. ${part}`))),
    ),
  );
  const expressions = Object.entries(FORMULAS).map(([name, body]) => `${name} = ${body}`);
  byId("expressions").textContent = expressions.join("\n\n");
  buildControls((id) => {
    const changed = changedState(state, id);
    if (changed) update(changed);
  });
  byId("reset").addEventListener("click", () => update({ ...START, shown: "" }));
  byId("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren(byId("command"));
    try {
      await navigator.clipboard.writeText(byId("command").textContent);
      byId("copy").textContent = "Copied";
    } catch {
      byId("copy").textContent = "Selected"; // browsers may keep a local file from the clipboard
    }
  });
  addEventListener("hashchange", () => update(stateOfUrl()));
  addEventListener("resize", render);
  addEventListener("beforeprint", render);
  showControls(state);
  render();
}

start();

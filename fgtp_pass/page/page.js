"use strict";

const byId = (id) => document.getElementById(id);

/** The stops of the group-size slider: what they are called, and the sizes that they mean. */
const SETTINGS = [
  ...(DATA.asked ? [{ name: "as asked", sizes: () => DATA.asked }] : []),
  { name: "recommended", sizes: (state) => recommendedIn(state).sizes },
  ...DATA.group_sizes.map((size) => ({
    name: size > 1 ? `${size} for all` : "off for all",
    sizes: () => Object.fromEntries(DATA.components.map((component) => [component.name, size])),
  })),
];

function stateOf() {
  const state = {
    tokens: DATA.token_stops[byId("tokens").value],
    device: DATA.devices[byId("hardware").value],
  };
  return { ...state, sizes: SETTINGS[byId("group").value].sizes(state) };
}

function render() {
  const state = stateOf();
  const rows = rowsOf(state);
  const memory = memoryOf(state);
  const change = totalChangeMs(state);
  showControls(state);
  const headline = headlineOf(state, memory, change);
  byId("headline").textContent = headline;
  document.title = `${DATA.model.name}: ${headline}`;
  byId("figures").replaceChildren(...figures(state, memory, change));
  byId("memory-note").textContent =
    `Weights by component and ${countText(state.tokens, "sequence")} of ` +
    `${countText(DATA.context, "token")} in the KV cache. Dashed: freed by sharding.`;
  byId("memory").replaceChildren(memoryBars(memory));
  byId("legend").replaceChildren(...tpotLegend(state));
  byId("tpot").replaceChildren(tpotChart(state));
  byId("table").replaceChildren(...componentTable(rows, state, change));
  showRecommended(state);
  byId("command").textContent = DATA.commands[Object.values(state.sizes).join(",")];
  byId("diagram").replaceChildren(
    ...DATA.lanes.map((lane) => laneDiagram(lane, state.sizes[lane.component])),
  );
  showAssumptions(state);
}

function headlineOf(state, memory, change) {
  const freed = memory.whole - memory.kept;
  const at = `at ${countText(state.tokens, "token")} per rank`;
  if (Object.values(state.sizes).every((size) => size === 1)) return `Nothing is sharded ${at}`;
  const side = change < 0 ? "less" : "more";
  return (
    `Frees ${bytesText(freed)} on every rank; an output token takes ` +
    `${durationText(change)} ${side} ${at}`
  );
}

function figures(state, memory, change) {
  const freed = memory.whole - memory.kept;
  const total = memory.kept + memory.kv;
  const fits = total <= memory.usable;
  const recommended = recommendedIn(state).sizes;
  return [
    figure("Freed on every rank", bytesText(freed), "", `${bytesText(memory.whole)} of weights before`),
    figure(
      `Change of TPOT at ${countText(state.tokens, "token")}`,
      changeText(change),
      change < 0 ? "good" : change > 0 ? "bad" : "",
      memory.whole + memory.kv > memory.usable
        ? "against whole weights, which would not fit"
        : "per output token; below zero is faster",
    ),
    figure(
      "Weights and KV cache",
      `${bytesText(total)} ${fits ? "fits" : "does not fit"}`,
      fits ? "good" : "bad",
      `of ${bytesText(memory.usable)} usable; whole: ${bytesText(memory.whole + memory.kv)}`,
    ),
    figure(
      "Recommended sizes",
      sizesText(recommended),
      "sizes",
      `objective: ${DATA.objective}, at these tokens on this hardware`,
    ),
  ];
}

function figure(label, value, kind, note) {
  return element(
    "div",
    { class: "figure" },
    element("span", { class: "label" }, label),
    element("b", { class: kind }, value),
    element("span", {}, note),
  );
}

function componentTable(rows, state, change) {
  const titles = ["component", "sites", "group", "weights", "freed", "sent per step", "messages"];
  const head = [...titles, "change of TPOT", "pays at tokens per rank"];
  const body = rows.map((row) => [
    element("span", {}, swatch(row.component.name), row.component.name),
    String(row.component.sites),
    sizeText(row.size),
    bytesText(row.component.weight_bytes),
    bytesText(row.saved),
    bytesText(row.moved),
    String(row.messages),
    row.size > 1 ? changeText(row.change) : "",
    paysText(row),
  ]);
  const total = (pick) => sum(rows.map(pick));
  const foot = [
    "total",
    String(total((row) => row.component.sites)),
    "",
    bytesText(total((row) => row.component.weight_bytes)),
    bytesText(total((row) => row.saved)),
    bytesText(total((row) => row.moved)),
    String(total((row) => row.messages)),
    changeText(change),
    paysText({ size: Math.max(...Object.values(state.sizes)), lastPaying: lastTotal(state) }),
  ];
  return [
    element("thead", {}, tableRow("th", head)),
    element("tbody", {}, ...body.map((cells) => tableRow("td", cells))),
    element("tfoot", {}, tableRow("td", foot)),
  ];
}

function lastTotal(state) {
  return lastPaying((tokens) => totalChangeMs({ ...state, tokens }));
}

function tableRow(tag, cells) {
  return element("tr", {}, ...cells.map((cell) => element(tag, {}, cell)));
}

function showRecommended(state) {
  const { sizes, reasons } = recommendedIn(state);
  byId("reasons-note").textContent =
    `For the objective "${DATA.objective}" at ${countText(state.tokens, "token")} per rank on ` +
    `${state.device.title}; groups stay within a node.`;
  const lines = Object.entries(reasons).flatMap(([name, reason]) => [
    element("dt", {}, swatch(name), `${name} ${sizeText(sizes[name])}`),
    element("dd", {}, reason),
  ]);
  byId("reasons").replaceChildren(...lines);
}

function showAssumptions(state) {
  const { replica, title, constants } = state.device;
  const stages = replica.pipeline_parallel_size;
  const split = `${replica.tensor_parallel_size}${stages > 1 ? ` with ${stages} pipeline stages` : ""}`;
  const said = [
    "Only what sharding changes is priced: weights read, multiplied and moved. Attention, routed " +
      "experts and everything else take the same time before and after.",
    "All ranks bring the same number of tokens; waiting for a late rank is not counted.",
    "Routed experts lie over all data-parallel ranks.",
    `Without fine-grained sizes, tensor_parallel_size ${split} at ` +
      `${countText(DATA.batch, "sequence")} per replica: ${replica.reason}.`,
  ];
  if (DATA.latent) {
    const { tensor_parallel_bytes: cut, data_parallel_bytes: own } = DATA.latent;
    said.push(
      `Attention is data parallel: cut by heads, every device would keep all latents, ` +
        `${bytesText(cut * state.tokens)} of KV cache in place of ${bytesText(own * state.tokens)}.`,
    );
  }
  byId("assumptions").replaceChildren(...said.map((text) => element("li", {}, text)));
  byId("constants-title").textContent = `Constants of ${title}`;
  byId("constants").replaceChildren(
    element("thead", {}, tableRow("th", ["constant", "value", "source"])),
    element("tbody", {}, ...constants.map((row) => tableRow("td", row))),
  );
}

/* controls ------------------------------------------------------------------------------------ */

function showControls(state) {
  const group = SETTINGS[byId("group").value].name;
  showControl("tokens", countText(state.tokens, "token"));
  showControl("group", group.endsWith("for all") ? group : `${group}: ${onText(state.sizes)}`);
  showControl("hardware", state.device.name, state.device.title);
}

function showControl(id, text, inFull = text) {
  byId(id).setAttribute("aria-valuetext", inFull);
  byId(`${id}-value`).textContent = text;
  byId(`${id}-value`).title = inFull;
}

function slider(id, count, start) {
  byId(id).max = count - 1;
  byId(id).value = start;
  byId(id).addEventListener("input", render);
}

function start() {
  const { model } = DATA;
  byId("subject").textContent =
    `fgtp plan: ${model.name} (${model.architecture}, ${countText(model.layers, "layer")}, ` +
    `${model.weights} weights) on ${countText(DATA.data_parallel_size, "data-parallel rank")}, ` +
    `${DATA.ranks_per_node} per node`;
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
  slider("tokens", DATA.token_stops.length, DATA.token_stops.indexOf(DATA.batch));
  slider("group", SETTINGS.length, 0);
  slider("hardware", DATA.devices.length, DATA.devices.findIndex((d) => d.name === DATA.hardware));
  byId("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren(byId("command"));
    try {
      await navigator.clipboard.writeText(byId("command").textContent);
      byId("copy").textContent = "Copied";
    } catch {
      byId("copy").textContent = "Selected"; // browsers may keep a local file from the clipboard
    }
  });
  render();
}

start();

"use strict";

/* The state: what the controls say. It is kept in the part of the URL behind the #, so that a link
   opens the page as it was. */

const START = DATA.start;
const byId = (id) => document.getElementById(id);

/* Each control: what it is called, and its choices or the numbers that it takes. */
const CONTROLS = [
  { id: "hardware", label: "Hardware", choices: DATA.devices.map(({ name }) => name) },
  { id: "devices", label: "Devices", least: 1, most: 1024 },
  { id: "node", label: "Devices per node", least: 1, most: 1024 },
  { id: "network", label: "Between nodes", choices: ["profile", ...Object.keys(DATA.networks)] },
  { id: "sequences", label: "Sequences in flight", least: 1, most: 1e6 },
  { id: "input", label: "Tokens in", least: 1, most: 1e7 },
  { id: "output", label: "Tokens out", least: 0, most: 1e7 },
  { id: "target", label: "TPOT target, ms (0: none)", least: 0, most: 1e5, fraction: true },
  { id: "weights", label: "Weights", choices: Object.keys(DATA.schemes) },
  { id: "kv", label: "KV cache", choices: ["auto", "bfloat16", "fp8"] },
  { id: "objective", label: "Sizes for", choices: DATA.objectives },
  { id: "latency", label: "Latency of collectives, times", least: 0.1, most: 10, fraction: true },
  ...(DATA.model.has_draft ? [{ id: "mtp", label: "Multi-token prediction", box: true }] : []),
];

/** The state that a URL says; the start where it says nothing, or nothing that can be. */
function stateOfUrl() {
  const said = new URLSearchParams(location.hash.slice(1));
  const state = { ...START, sizes: { ...START.sizes } };
  for (const control of CONTROLS) {
    if (!said.has(control.id)) continue;
    const value = valueOf(control, said.get(control.id));
    if (value !== undefined) state[control.id] = value;
  }
  if (said.has("sizes")) {
    const pairs = said.get("sizes").split(",").map((pair) => pair.split(":"));
    const known = pairs.filter(([name, size]) => componentOf(name) && Number(size) >= 1);
    if (known.length || !said.get("sizes")) {
      state.sizes = Object.fromEntries(known.map(([name, size]) => [name, Number(size)]));
    }
  }
  state.shown = said.get("layout") || "";
  return state;
}

/** What a control means by a text; undefined for what it cannot be. */
function valueOf(control, text) {
  if (control.box) return text === "true";
  if (control.choices) return control.choices.includes(text) ? text : undefined;
  const number = Number(text);
  if (text === "" || !(number >= control.least && number <= control.most)) return undefined;
  return control.fraction ? number : Math.round(number);
}

/** Only what differs from the start. */
function urlOf(state) {
  const said = new URLSearchParams();
  for (const { id } of CONTROLS) if (state[id] !== START[id]) said.set(id, String(state[id]));
  const sizes = Object.entries(state.sizes).map(([name, size]) => `${name}:${size}`).join(",");
  const started = Object.entries(START.sizes).map(([name, size]) => `${name}:${size}`).join(",");
  if (sizes !== started) said.set("sizes", sizes);
  if (state.shown) said.set("layout", state.shown);
  return said.size ? `#${said}` : "#";
}

function buildControls(change) {
  byId("controls").replaceChildren(
    ...CONTROLS.map((control) =>
      element("div", {}, element("label", { for: control.id }, control.label), inputOf(control)),
    ),
  );
  for (const { id } of CONTROLS) byId(id).addEventListener("change", () => change(id));
}

function inputOf({ id, choices, least, most, fraction, box }) {
  if (choices) {
    return element("select", { id }, ...choices.map((value) => element("option", { value }, value)));
  }
  if (box) return element("input", { id, type: "checkbox" });
  const step = fraction ? "any" : "1";
  return element("input", { id, type: "number", min: least, max: most, step, inputmode: "decimal" });
}

/** Put a state into the controls. */
function showControls(state) {
  for (const { id, box } of CONTROLS) {
    if (box) byId(id).checked = state[id];
    else byId(id).value = String(state[id]);
    byId(id).removeAttribute("aria-invalid");
  }
}

/** The state with what one control says now; null if it says nothing that can be. */
function changedState(state, id) {
  const control = CONTROLS.find((one) => one.id === id);
  const input = byId(id);
  const value = valueOf(control, control.box ? String(input.checked) : input.value);
  if (value === undefined) {
    input.setAttribute("aria-invalid", "true");
    return null;
  }
  const changed = { ...state, [id]: value };
  if (id === "hardware") changed.node = deviceOf(changed).node;
  return changed;
}

/** The inputs in words, for print. */
function inputsText(state) {
  const said = CONTROLS.map(({ id, label }) => `${label}: ${state[id]}`);
  return said.join("; ");
}

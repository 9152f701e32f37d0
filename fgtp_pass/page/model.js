"use strict";

/* The state: tokens per rank, a device of DATA.devices, a size for each component (1 for off). */

/** The numbers of all symbols of a component in a state. */
function valuesOf(component, state) {
  return {
    ...component.values,
    ...state.device.values[component.dtype],
    ...DATA.node_values,
    tokens: state.tokens,
    group: state.sizes[component.name],
  };
}

/** Change of a step's milliseconds by sharding the component as the state says. */
function changeMs(component, state) {
  return 1e3 * FORMULAS.changeSeconds(valuesOf(component, state));
}

function totalChangeMs(state) {
  return sum(DATA.components.map((component) => changeMs(component, state)));
}

/** Like `fgtp_pass.cost.estimate.Row`, for every component. */
function rowsOf(state) {
  return DATA.components.map((component) => {
    const size = state.sizes[component.name];
    return {
      component,
      size,
      saved: component.bytes_saved[size],
      moved: FORMULAS.movedBytes(valuesOf(component, state)),
      messages: size > 1 ? component.messages : 0,
      change: changeMs(component, state),
      lastPaying: lastPaying((tokens) => changeMs(component, { ...state, tokens })),
    };
  });
}

/**
 * The last whole number of tokens at which a change is a gain: 0 for never, Infinity for always.
 * A change never falls as tokens grow.
 */
function lastPaying(change) {
  let pays = 0;
  let loses = 1;
  while (change(loses) < 0) {
    pays = loses;
    loses *= 2;
    if (loses > 2 ** 40) return Infinity;
  }
  while (loses - pays > 1) {
    const middle = Math.floor((pays + loses) / 2);
    if (change(middle) < 0) pays = middle;
    else loses = middle;
  }
  return pays;
}

/** Bytes on a rank in a state: of each part, whole and sharded, and of the KV cache. */
function memoryOf(state) {
  const parts = DATA.components.map((component) => ({
    name: component.name,
    whole: component.weight_bytes,
    kept: component.weight_bytes - component.bytes_saved[state.sizes[component.name]],
  }));
  const fixed = [
    { name: "routed experts", whole: DATA.experts_bytes, kept: DATA.experts_bytes },
    { name: "other weights", whole: DATA.others_bytes, kept: DATA.others_bytes },
  ].filter((part) => part.whole > 0);
  const kv = DATA.kv_bytes_per_sequence * state.tokens;
  const weights = [...parts, ...fixed];
  return {
    weights,
    kv,
    whole: sum(weights.map((part) => part.whole)),
    kept: sum(weights.map((part) => part.kept)),
    usable: state.device.usable_bytes,
  };
}

/** What the planner recommends on the state's device at its tokens: sizes and reasons. */
function recommendedIn(state) {
  return state.device.recommended[DATA.token_stops.indexOf(state.tokens)];
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

"use strict";

/* What a layout takes and holds, by the planner's own expressions. The state is what the controls
   say: see `START`. A layout is { cut, ranks, stages, experts, sizes }: devices of one data-parallel
   rank, ranks, pipeline stages, whether experts lie over all ranks, and group sizes. */

function deviceOf(state) {
  return DATA.devices.find((device) => device.name === state.hardware);
}

/** The numbers of the hardware's symbols for a dtype in a state, some of them scaled. */
function hardwareValues(state, dtype, scale = {}) {
  const device = deviceOf(state);
  const values = { ...device.values, ...DATA.networks[state.network]?.values };
  values.matmul_rate = device.rates[dtype];
  for (const group of ["latency within node", "latency across nodes"]) {
    for (const name of DATA.groups[group]) values[name] *= state.latency;
  }
  for (const [name, factor] of Object.entries(scale)) if (name in values) values[name] *= factor;
  return values;
}

/** The numbers of all symbols of a component, for a data-parallel rank of `cut` devices. Its own
    values are those of its sites by themselves, or joined. */
function componentValues(state, component, layout, size, tokens, scale, own = component.values) {
  const kept = component.precision[state.weights];
  const perNode = Math.max(1, Math.floor(state.node / layout.cut));
  return {
    ...hardwareValues(state, kept.dtype, scale),
    ...own,
    elements: own.elements / layout.cut,
    all_to_all_width: own.all_to_all_width / layout.cut,
    element_bytes: kept.element_bytes,
    ranks_per_node: Math.min(perNode, layout.ranks),
    group: size,
    tokens,
  };
}

/** Change of a step's seconds by cutting a component over `size` ranks. */
function changeSeconds(state, component, layout, size, tokens, scale = {}) {
  return FORMULAS.changeSeconds(componentValues(state, component, layout, size, tokens, scale));
}

/** Bytes of a component's weights on a rank that holds them whole. */
function wholeBytes(state, component) {
  return sum(component.weights.map((w) => w.count * w.elements * w.bytes[state.weights]));
}

/** Bytes that each rank frees; the last shard is padded to the others' size. */
function savedBytes(state, component, size) {
  return sum(
    component.weights.map((w) => {
      const block = Math.ceil(w.width / w.blocks / size);
      const shard = (w.elements / w.width) * w.blocks * block;
      return w.count * (w.elements - shard) * w.bytes[state.weights];
    }),
  );
}

function kvBytes(state) {
  if (state.kv === "auto") return DATA.model.item_bytes;
  return state.kv === "fp8" ? 1 : 2;
}

/** The kinds of attention, with those of the layers for multi-token prediction. */
function kindsOf(state) {
  const kinds = DATA.kinds.map((kind) => ({ ...kind, kept_bytes: kind.width * kvBytes(state) }));
  if (state.mtp) kinds.push({ ...kinds.at(-1), kind_layers: DATA.model.draft_layers });
  return kinds;
}

function expertDevices(layout) {
  return layout.cut * (layout.experts ? layout.ranks : 1);
}

/** Seconds of a step by part, with `sequences` in flight or as prompts that are taken in. */
function partsOf(state, layout, sequences, { prefill = false, scale = {} } = {}) {
  const scheme = DATA.schemes[state.weights];
  const mine = Math.ceil(sequences / (layout.ranks * layout.stages));
  const tokens = mine * (prefill ? state.input : 1);
  const context = Math.max(1, prefill ? state.input : state.input + state.output / 2);
  const values = {
    ...scheme.values,
    tensor_parallel: layout.cut,
    expert_devices: expertDevices(layout),
    devices_per_node: state.node,
    sequences: mine,
    prefills: prefill ? 1 : 0,
    context,
    tokens,
  };
  const found = Object.fromEntries(DATA.parts.map((part) => [part, 0]));
  for (const [computing, moving] of componentSeconds(state, layout, mine, tokens, scale)) {
    found["dense matmuls"] += computing;
    found["fine-grained collectives"] += moving;
  }
  const linears = { ...values, ...hardwareValues(state, scheme.linears_dtype, scale) };
  found["dense matmuls"] += FORMULAS.linearsSeconds(linears);
  for (const kind of kindsOf(state)) {
    const hardware = hardwareValues(state, DATA.model.dtype, scale);
    found.attention += FORMULAS.attentionSeconds({ ...values, ...hardware, ...kind });
  }
  if (DATA.model.has_experts) {
    const experts = { ...values, ...hardwareValues(state, scheme.experts_dtype, scale) };
    found.experts += FORMULAS.expertsSeconds(experts);
    found["experts' all_to_all"] += FORMULAS.exchangeSeconds(experts);
  }
  found["tensor parallelism"] += FORMULAS.tensorParallelSeconds(linears);
  found["the rest"] += FORMULAS.fixedSeconds(linears);
  if (layout.stages > 1) {
    found["tensor parallelism"] += (layout.stages - 1) * hopSeconds(state, tokens, scale);
  }
  return found;
}

/** Of each component what it computes and what it moves, in seconds, along the fastest of the ways
    that this software takes: tokens or weights by site, or tokens through joined sites. */
function componentSeconds(state, layout, sequences, tokens, scale) {
  const seconds = (component, own, mayGather) => {
    const rows = component.sees_last_tokens ? sequences : tokens;
    const size = layout.sizes[component.name] || 1;
    const all = componentValues(state, component, layout, size, rows, scale, own);
    const tokensMove = [FORMULAS.computingSeconds(all), FORMULAS.collectivesSeconds(all)];
    if (!mayGather) return tokensMove;
    const weightsMove = [FORMULAS.wholeSeconds(all), FORMULAS.gatheringSeconds(all)];
    return sum(weightsMove) < sum(tokensMove) ? weightsMove : tokensMove;
  };
  const apart = DATA.components.map((component) =>
    seconds(component, component.values, component.precision[state.weights].may_gather),
  );
  const touching = DATA.components.filter((component) => component.joined);
  const [size, ...others] = new Set(touching.map(({ name }) => layout.sizes[name] || 1));
  if ((size || 1) === 1 || others.length) return apart;
  const joined = DATA.components.map((component, i) =>
    component.joined ? seconds(component, component.joined, false) : apart[i],
  );
  return sum(joined.flat()) < sum(apart.flat()) ? joined : apart;
}

/** Seconds to hand tokens on to the next pipeline stage. */
function hopSeconds(state, tokens, scale) {
  const values = hardwareValues(state, DATA.model.dtype, scale);
  const row = DATA.model.hidden * DATA.model.item_bytes;
  const sending = (tokens * row) / values.within_node_all_to_all_bandwidth;
  return values.within_node_all_to_all_base + sending;
}

function stepSeconds(state, layout, sequences, scale = {}) {
  return sum(Object.values(partsOf(state, layout, sequences, { scale })));
}

function prefillSeconds(state, layout) {
  return sum(Object.values(partsOf(state, layout, layout.ranks, { prefill: true })));
}

/** A prediction with its range under the spreads of the device's constants. */
function predict(state, compute) {
  const mid = compute({});
  let [low, high] = [0, 0];
  const spreads = { ...deviceOf(state).spreads, ...DATA.networks[state.network]?.spreads };
  for (const [group, spread] of Object.entries(spreads)) {
    if (!spread) continue;
    const moved = [1 / (1 + spread), 1 + spread].map((factor) => {
      const scale = Object.fromEntries(DATA.groups[group].map((name) => [name, factor]));
      return compute(scale) - mid;
    });
    low += Math.min(0, ...moved) ** 2;
    high += Math.max(0, ...moved) ** 2;
  }
  return { low: mid - Math.sqrt(low), mid, high: mid + Math.sqrt(high) };
}

/* memory -------------------------------------------------------------------------------------- */

function usableBytes(state) {
  return DATA.usable_share * deviceOf(state).memory;
}

/** Bytes of weights on one device: [name, whole, kept] of each component and of all else. */
function weightParts(state, layout) {
  const scheme = DATA.schemes[state.weights];
  const draft = state.mtp ? 1 : 0;
  const parts = DATA.components.map((component) => {
    const whole = wholeBytes(state, component) / layout.cut;
    const saved = savedBytes(state, component, layout.sizes[component.name] || 1) / layout.cut;
    return { name: component.name, whole, kept: whole - saved };
  });
  const experts = scheme.experts_bytes + draft * scheme.draft_experts_bytes;
  const linears = scheme.linears_bytes + draft * scheme.draft_linears_bytes;
  const others = linears / layout.cut + scheme.replicated_bytes + DATA.model.vectors_bytes;
  const fixed = [
    { name: "experts", whole: experts / expertDevices(layout) },
    { name: "other weights", whole: others },
  ].map((part) => ({ ...part, kept: part.whole }));
  return [...parts, ...fixed].map(({ name, whole, kept }) => ({
    name,
    whole: whole / layout.stages,
    kept: kept / layout.stages,
  }));
}

function weightBytes(state, layout) {
  return sum(weightParts(state, layout).map((part) => part.kept));
}

/** Bytes of KV cache that one device keeps of one sequence at its end. */
function sequenceBytes(state, layout) {
  const context = state.input + state.output;
  const each = kindsOf(state).map((kind) =>
    FORMULAS.cacheBytes({ ...kind, context, tensor_parallel: layout.cut }),
  );
  return sum(each) / layout.stages;
}

function cacheBytes(state, layout, sequences) {
  return Math.ceil(sequences / layout.ranks) * sequenceBytes(state, layout);
}

/** Sequences that fit beside the weights, on all devices together. */
function maxSequences(state, layout) {
  const room = usableBytes(state) - weightBytes(state, layout);
  const each = sequenceBytes(state, layout);
  if (room < 0) return 0;
  return (each ? Math.floor(room / each) : 2 ** 20) * layout.ranks;
}

function fitsWith(state, layout, sequences) {
  const needed = weightBytes(state, layout) + cacheBytes(state, layout, sequences);
  return needed <= usableBytes(state);
}

/** The most sequences, of those that fit, whose step takes no longer; 0 if none do. */
function mostWithin(state, layout, seconds) {
  let fit = 0;
  let tooMany = maxSequences(state, layout) / layout.ranks + 1;
  while (tooMany - fit > 1) {
    const middle = Math.floor((fit + tooMany) / 2);
    if (stepSeconds(state, layout, middle * layout.ranks) <= seconds) fit = middle;
    else tooMany = middle;
  }
  return fit * layout.ranks;
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

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function divisors(count) {
  return Array.from({ length: count }, (_, i) => i + 1).filter((k) => count % k === 0);
}

"use strict";

/* Which sizes to take and which layouts to compare: the rules of fgtp_pass/cost/advice.py and
   compare.py. The tests hold both to the same answers. */

const OFF = { size: 1, change: { low: 0, mid: 0, high: 0 }, saved: 0 };

function componentOf(name) {
  return DATA.components.find((component) => component.name === name);
}

/** Sizes > 1 whose groups stay within a node. */
function groupSizes(state, layout) {
  const perNode = Math.max(1, Math.floor(state.node / layout.cut));
  const within = Math.min(perNode, layout.ranks);
  return divisors(layout.ranks).filter((k) => k > 1 && within % k === 0);
}

/** Sizes for the objective at `tokens` per rank, that free `needed` bytes if any do. */
function chooseSizes(state, layout, tokens, objective, needed) {
  const options = DATA.tied.map((names) =>
    groupSizes(state, layout).map((size) => candidate(state, layout, names, size, tokens)),
  );
  let chosen = options.map((candidates) => chooseOne(candidates, objective));
  if (sum(chosen.map((one) => one.saved)) < needed) chosen = smallestLoss(options, needed);
  const pairs = DATA.tied.flatMap((names, i) => names.map((name) => [name, chosen[i].size]));
  return Object.fromEntries(DATA.components.map(({ name }) => [name, Object.fromEntries(pairs)[name]]));
}

function candidate(state, layout, names, size, tokens) {
  const changes = names.map((name) =>
    predict(state, (scale) => changeSeconds(state, componentOf(name), layout, size, tokens, scale)),
  );
  const saved = sum(names.map((name) => savedBytes(state, componentOf(name), size))) / layout.cut;
  const change = {};
  for (const side of ["low", "mid", "high"]) change[side] = sum(changes.map((c) => c[side]));
  return { size, change, saved };
}

function chooseOne(candidates, objective) {
  if (!candidates.length) return OFF;
  const most = (list) => list.reduce((a, b) => (lessGood(a, b) ? b : a));
  if (objective === "memory") return most(candidates);
  const gains = candidates.filter((one) => one.change.high < 0);
  if (!gains.length) return OFF;
  if (objective === "latency") {
    return gains.reduce((a, b) => (b.change.mid < a.change.mid ? b : a));
  }
  return most(gains);
}

/** Whether b frees more than a, or as much in less time. */
function lessGood(a, b) {
  return b.saved > a.saved || (b.saved === a.saved && b.change.mid < a.change.mid);
}

/** One candidate of each: the fastest that free enough together, or else those that free most. */
function smallestLoss(options, needed) {
  let front = [{ seconds: 0, saved: 0, taken: [] }];
  for (const candidates of options) {
    const sums = front.flatMap((base) =>
      [OFF, ...candidates].map((one) => ({
        seconds: base.seconds + one.change.mid,
        saved: base.saved + one.saved,
        taken: [...base.taken, one],
      })),
    );
    sums.sort((a, b) => a.seconds - b.seconds || b.saved - a.saved);
    front = [];
    for (const one of sums) if (!front.length || one.saved > front.at(-1).saved) front.push(one);
  }
  return (front.find((one) => one.saved >= needed) || front.at(-1)).taken;
}

/* layouts ------------------------------------------------------------------------------------- */

function layoutOf(cut, ranks, { stages = 1, experts = false, sizes = {} } = {}) {
  return { cut, ranks, stages, experts, sizes };
}

function isFineGrained(layout) {
  return Object.values(layout.sizes).some((size) => size > 1);
}

function nameOf({ cut, ranks, stages, experts, sizes }) {
  const one = `TP${cut}${stages > 1 ? ` x PP${stages}` : ""}`;
  const fine = isFineGrained({ sizes });
  if (!experts && !fine) {
    if (ranks === 1) return one;
    return one === "TP1" ? `${ranks} replicas` : `${one} x ${ranks} replicas`;
  }
  const together = one === "TP1" ? `DP${ranks}` : `${one} x DP${ranks}`;
  return together + (experts ? " + EP" : "") + (fine ? " + sizes" : "");
}

/** Powers of two that divide the devices and the attention heads, and stay within a node. */
function tensorParallelSizes(state) {
  const limit = Math.min(state.devices, state.node);
  const powers = [];
  for (let k = 1; k <= limit; k *= 2) powers.push(k);
  return powers.filter((k) => state.devices % k === 0 && DATA.model.heads % k === 0);
}

function layoutsOf(state) {
  const experts = DATA.model.has_experts;
  const found = [];
  for (const cut of tensorParallelSizes(state)) {
    const ranks = state.devices / cut;
    found.push(layoutOf(cut, ranks));
    if (ranks === 1) continue;
    const base = layoutOf(cut, ranks, { experts });
    if (experts) found.push(base);
    const fine = { ...base, sizes: fineGrainedSizes(state, base) };
    if (isFineGrained(fine)) found.push(fine);
  }
  const plain = found.filter((layout) => !isFineGrained(layout));
  if (!plain.some((layout) => fitsWith(state, layout, state.sequences))) {
    found.push(...pipelines(state));
  }
  return found;
}

function fineGrainedSizes(state, base) {
  if (base.cut === 1 && Object.keys(state.sizes).length) return state.sizes;
  const tokens = (sequences) => Math.ceil(sequences / base.ranks);
  if (!state.target) {
    const held = weightBytes(state, base) + cacheBytes(state, base, state.sequences);
    const needed = Math.max(0, held - usableBytes(state));
    return chooseSizes(state, base, tokens(state.sequences), state.objective, needed);
  }
  const seconds = state.target / 1e3;
  const sequences = mostWithin(state, base, seconds) || state.sequences;
  const [first, second] = [state.objective, "memory"].map((objective) =>
    chooseSizes(state, base, tokens(sequences), objective, 0),
  );
  const [with_, more] = [first, second].map((sizes) => mostWithin(state, { ...base, sizes }, seconds));
  return more > with_ ? second : first;
}

/** The shallowest pipeline that fits, for the highest degree of tensor parallelism. */
function pipelines(state) {
  const cut = tensorParallelSizes(state).at(-1);
  const deep = [];
  for (let stages = 2; stages <= state.devices / cut && stages <= DATA.model.layers; stages++) {
    if (state.devices % (cut * stages)) continue;
    deep.push(layoutOf(cut, state.devices / (cut * stages), { stages }));
  }
  const fitting = deep.filter((layout) => fitsWith(state, layout, state.sequences));
  return (fitting.length ? fitting : deep.slice(-1)).slice(0, 1);
}

/** Every layout with what it gives, best first. */
function compareLayouts(state) {
  const seconds = state.target / 1e3;
  const options = layoutsOf(state).map((layout) => optionOf(state, layout, seconds));
  if (seconds && options.some((option) => option.meets)) {
    options.sort((a, b) => b.meets - a.meets || b.throughput - a.throughput);
  } else {
    options.sort((a, b) => b.fits - a.fits || a.tpot.mid - b.tpot.mid);
  }
  return options;
}

function optionOf(state, layout, seconds) {
  const within = seconds ? mostWithin(state, layout, seconds) : state.sequences;
  const sequences = within || state.sequences;
  const tpot = predict(state, (scale) => stepSeconds(state, layout, sequences, scale));
  const fits = fitsWith(state, layout, sequences);
  return {
    layout,
    name: nameOf(layout),
    fits,
    meets: within > 0 && fits,
    sequences,
    tpot,
    parts: partsOf(state, layout, sequences),
    weights: weightParts(state, layout),
    cache: cacheBytes(state, layout, sequences),
    most: maxSequences(state, layout),
    throughput: sequences / tpot.mid / (layout.cut * layout.ranks * layout.stages),
  };
}

/** How much longer another layout takes, with its range. */
function difference(state, best, other) {
  return predict(
    state,
    (scale) =>
      stepSeconds(state, other.layout, other.sequences, scale) -
      stepSeconds(state, best.layout, best.sequences, scale),
  );
}

/* in words ------------------------------------------------------------------------------------ */

/** Which layout wins, by how much and why, and whether that is sure. */
function verdictOf(state, options) {
  const best = options[0];
  if (!best.fits) return nothingFits(state, options);
  const said = [];
  if (state.target && !best.meets) {
    said.push(`No layout reaches ${state.target} ms per token; the nearest is ${best.name}.`);
  } else said.push(wonText(state, best));
  const rivals = options.slice(1).filter((option) => option.fits);
  const fine = isFineGrained(best.layout);
  const other = rivals.find((option) => isFineGrained(option.layout) !== fine) || rivals[0];
  if (other) said.push(againstText(state, best, other));
  else if (options.length > 1) said.push("No other layout fits.");
  if (!fine) said.push("It needs no fine-grained sizes, so it does not need fgtp_pass.");
  return said;
}

function wonText(state, best) {
  const time = `${rangeText(best.tpot)} per token with ${countText(best.sequences, "sequence")} in flight`;
  const rate = `${countText(Math.round(best.throughput), "token")}/s per device`;
  if (!state.target) return `${best.name} wins: ${time}, ${rate}.`;
  return `${best.name} wins: ${rate} within ${state.target} ms, ${time}.`;
}

function againstText(state, best, other) {
  if (best.sequences !== other.sequences) {
    const times = (best.throughput / other.throughput).toFixed(2);
    const rate = Math.round(other.throughput).toLocaleString("en");
    const with_ = countText(other.sequences, "sequence");
    return `${other.name} reaches ${rate} (${times} times less) with ${with_}.`;
  }
  const more = difference(state, best, other);
  const gap = (part) => other.parts[part] - best.parts[part];
  const part = DATA.parts.reduce((a, b) => (gap(b) > gap(a) ? b : a));
  const why = `mostly ${part} (${changeText(1e3 * gap(part))})`;
  if (more.low <= 0) {
    return `${other.name} is too close to call: ${changeText(1e3 * more.mid)}, ${why}.`;
  }
  return `${other.name} takes ${(1e3 * other.tpot.mid).toFixed(1)} ms, ${why}.`;
}

function nothingFits(state, options) {
  const nearest = options.reduce((a, b) => (b.most > a.most ? b : a));
  if (nearest.most) {
    const load = `${countText(state.sequences, "sequence")} of ${countText(state.input + state.output, "token")}`;
    return [
      `No layout has room for ${load}.`,
      `${nearest.name} holds the most, ${nearest.most.toLocaleString("en")}.`,
    ];
  }
  return ["The weights do not fit under any layout.", "Take more devices, or weights of fewer bits."];
}

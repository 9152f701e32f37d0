"use strict";

/* Memory of a rank --------------------------------------------------------------------------- */

/** Bars: each part of the weights, what is freed of it dashed, then all of it against the device. */
function memoryBars(memory) {
  const kv = { name: "KV cache", whole: memory.kv, kept: memory.kv };
  const parts = [...memory.weights, kv];
  const bars = element("div", { class: "bars" });
  const largest = Math.max(...parts.map((part) => part.whole));
  const text = (count) => bytesText(count, largest);
  for (const part of parts) {
    const freed = part.whole - part.kept;
    const bar = element("div", { class: "bar", style: `--fill: ${colorOf(part.name)}` });
    bar.append(segment("kept", part.kept / largest), segment("ghost", freed / largest));
    const number = element("span", { class: "number" }, text(part.kept));
    if (freed > 0) {
      number.append(element("span", { class: "freed" }, ` + ${text(freed)} freed`));
    }
    bars.append(element("span", {}, part.name), bar, number);
  }
  const usable = Math.round(100 * DATA.usable_share);
  const title = `Together, against ${bytesText(memory.usable)} usable (${usable} % of the device)`;
  bars.append(element("h3", {}, title));
  for (const [name, key] of [["whole", "whole"], ["sharded", "kept"]]) {
    const total = sum(parts.map((part) => part[key]));
    const scale = Math.max(memory.usable, memory.whole + memory.kv);
    const bar = element("div", { class: "bar" });
    for (const part of parts) {
      const piece = segment("kept", part[key] / scale);
      piece.style.setProperty("--fill", colorOf(part.name));
      bar.append(piece);
    }
    bar.append(element("span", { class: "limit", style: `left: ${percent(memory.usable / scale)}` }));
    const fits = total <= memory.usable;
    const verdict = element("span", { class: fits ? "good" : "bad" }, fits ? " fits" : " too much");
    bars.append(name, bar, element("span", { class: "number" }, bytesText(total), verdict));
  }
  return bars;
}

function segment(kind, share) {
  const width = share > 0 ? percent(share) : "0; border: 0";
  return element("i", { class: kind, style: `width: ${width}` });
}

function percent(share) {
  return `${(100 * share).toFixed(3)}%`;
}

/* TPOT against tokens per rank ---------------------------------------------------------------- */

const PLOT = { width: 680, height: 380, left: 58, right: 14, top: 22, bottom: 44 };

/** The curves of a state: of each component that is sharded, and of their sum. */
function curvesOf(state) {
  const shown = DATA.components.filter((component) => state.sizes[component.name] > 1);
  const curves = shown.map((component) => ({
    name: component.name,
    color: colorOf(component.name),
    at: (tokens) => changeMs(component, { ...state, tokens }),
  }));
  const total = (tokens) => totalChangeMs({ ...state, tokens });
  return [...curves, { name: "total", color: "var(--text)", at: total }];
}

function tpotChart(state) {
  const curves = curvesOf(state);
  const last = DATA.token_stops.at(-1);
  const x = (tokens) =>
    PLOT.left + (Math.log(tokens) / Math.log(last)) * (PLOT.width - PLOT.left - PLOT.right);
  const samples = Array.from({ length: 161 }, (_, i) => last ** (i / 160));
  const [low, high] = rangeOf(curves, samples, state.tokens);
  const y = (ms) =>
    PLOT.top + ((high - ms) / (high - low)) * (PLOT.height - PLOT.top - PLOT.bottom);
  const svg = shape("svg", { viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img" });
  svg.setAttribute("aria-label", describe(curves, state.tokens));
  svg.append(...yAxis(low, high, y), ...xAxis(last, x));
  const clip = { x: PLOT.left, y: y(high), width: x(last) - PLOT.left, height: y(low) - y(high) };
  svg.append(shape("clipPath", { id: "plot" }, shape("rect", clip)));
  for (const curve of curves) {
    const points = samples.map((t) => `${x(t).toFixed(1)},${y(curve.at(t)).toFixed(1)}`);
    svg.append(
      shape("polyline", {
        points: points.join(" "),
        fill: "none",
        stroke: curve.color,
        "stroke-width": curve.name === "total" ? 3 : 1.8,
        "clip-path": "url(#plot)",
      }),
    );
  }
  const now = x(state.tokens);
  svg.append(
    shape("line", { class: "now", x1: now, x2: now, y1: PLOT.top - 6, y2: y(low) }),
    textAt(now, PLOT.top - 10, countText(state.tokens, "token"), anchorAt(now)),
  );
  for (const curve of curves) {
    const ms = curve.at(state.tokens);
    if (ms > high) continue;
    svg.append(shape("circle", { cx: now, cy: y(ms), r: 3.5, fill: curve.color }));
  }
  svg.append(...crossoverMarks(curves, x, y(0), last));
  return svg;
}

/** The ms to show: all that is gained, and as much of the losses; the present always. */
function rangeOf(curves, samples, tokens) {
  const all = curves.flatMap((curve) => samples.map(curve.at));
  const gains = -Math.min(0, ...all);
  const now = curves.map((curve) => curve.at(tokens));
  const high = Math.min(Math.max(...all, 0), Math.max(gains, ...now.map((ms) => 1.2 * ms)));
  const step = niceStep((high + gains) / 6);
  return [-step * Math.ceil((1.02 * gains) / step), step * Math.max(1, Math.ceil(high / step))];
}

function niceStep(size) {
  if (!(size > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(size));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= size);
}

function yAxis(low, high, y) {
  const step = niceStep((high - low) / 6);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const marks = [];
  for (let i = Math.round(low / step); i * step <= high + step / 2; i++) {
    const at = y(i * step);
    const text = i === 0 ? "0" : `${i < 0 ? MINUS : "+"}${Math.abs(i * step).toFixed(digits)}`;
    const ends = { x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: at, y2: at };
    marks.push(shape("line", { class: i === 0 ? "axis" : "grid", ...ends }));
    marks.push(textAt(PLOT.left - 8, at + 4, text, "end", "quiet"));
  }
  return [...marks, textAt(PLOT.left - 8, PLOT.top - 10, "ms", "end", "quiet")];
}

function xAxis(last, x) {
  const marks = [];
  for (let tokens = 1; tokens <= last; tokens *= 2) {
    const bottom = PLOT.height - PLOT.bottom;
    marks.push(shape("line", { class: "grid", x1: x(tokens), x2: x(tokens), y1: bottom, y2: bottom + 5 }));
    marks.push(textAt(x(tokens), bottom + 19, tokens.toLocaleString("en"), "middle", "quiet"));
  }
  const middle = (PLOT.left + PLOT.width - PLOT.right) / 2;
  return [...marks, textAt(middle, PLOT.height - 6, "tokens per rank and step", "middle", "quiet")];
}

/** A circle where each curve crosses zero, with its last number of tokens that pays. */
function crossoverMarks(curves, x, zero, last) {
  const found = curves
    .map((curve) => ({ curve, tokens: lastPaying(curve.at) }))
    .filter(({ tokens }) => tokens >= 1 && tokens < last)
    .sort((a, b) => a.tokens - b.tokens);
  const marks = [];
  const ends = []; // where the texts of each row end
  for (const { curve, tokens } of found) {
    const here = curve.at(tokens);
    const at = x(tokens + here / (here - curve.at(tokens + 1))); // linear between whole tokens
    const text = `${curve.name} ${tokens.toLocaleString("en")}`;
    const width = 7 * text.length + 10;
    const start = Math.min(at - width / 2, PLOT.width - width);
    let row = ends.findIndex((end) => end < start);
    if (row < 0) row = ends.length;
    ends[row] = start + width;
    const height = zero - 12 - 15 * row;
    marks.push(shape("line", { x1: at, x2: at, y1: zero, y2: height + 3, stroke: curve.color }));
    const circle = { cx: at, cy: zero, r: 5, stroke: curve.color, "stroke-width": 2 };
    marks.push(shape("circle", { ...circle, fill: "var(--card)", class: "crossover" }));
    marks.push(textAt(start + width / 2, height, text, "middle"));
  }
  return marks;
}

function textAt(x, y, text, anchor, kind = "") {
  return shape("text", { x, y, "text-anchor": anchor, class: kind }, text);
}

function anchorAt(x) {
  if (x < PLOT.left + 40) return "start";
  return x > PLOT.width - 60 ? "end" : "middle";
}

function describe(curves, tokens) {
  const said = curves.map((curve) => `${curve.name} ${changeText(curve.at(tokens))}`);
  return `Change of TPOT at ${countText(tokens, "token")} per rank: ${said.join(", ")}`;
}

/** What each curve is at the chosen tokens. */
function tpotLegend(state) {
  return curvesOf(state).map((curve) => {
    const mark = element("span", { class: "swatch", style: `background: ${curve.color}` });
    return element("span", {}, mark, `${curve.name} ${changeText(curve.at(state.tokens))}`);
  });
}

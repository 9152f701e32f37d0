"use strict";

/* Layouts as bars ------------------------------------------------------------------------------ */

/** A card for each layout, best first: its name, its time, and bars of throughput and memory. */
function layoutCards(state, options, shown, select) {
  const fastest = Math.max(...options.filter((one) => one.fits).map((one) => one.throughput), 0);
  const largest = Math.max(
    usableBytes(state),
    ...options.filter((one) => one.fits).map((one) => keptBytes(one) + one.cache),
  );
  const cards = options.map((option, i) => {
    const id = `layout-${i}`;
    const input = element("input", {
      type: "radio",
      name: "layout",
      id,
      ...(option === shown ? { checked: "" } : {}),
    });
    input.addEventListener("change", () => select(option.name));
    const sizes = onText(option.layout.sizes);
    const title = element("label", { for: id }, option.name);
    if (sizes) title.append(element("small", {}, ` ${sizes}`));
    const card = element("div", { class: `layout ${option.fits ? "" : "unfit"}` });
    card.append(
      element("div", { class: "name" }, input, title),
      element("div", { class: "time" }, rangeText(option.tpot), element("small", {}, " per token")),
      rateBar(option, fastest),
      memoryBar(state, option, largest),
      element(
        "div",
        { class: "more" },
        `room for ${countText(option.most, "sequence")}; a prompt of ${countText(state.input, "token")} ` +
          `takes ${durationText(1e3 * prefillSeconds(state, option.layout))}`,
      ),
    );
    return card;
  });
  const fit = options.filter((option) => option.fits).length;
  const unfit = element("details", {}, element("summary", {}, `${options.length - fit} do not fit`));
  if (!fit || !shown.fits) unfit.open = true;
  unfit.append(...cards.slice(fit));
  return fit < options.length ? [...cards.slice(0, fit), unfit] : cards;
}

/** What the colors of the memory bars mean. */
function memoryLegend(option) {
  const parts = [...option.weights.filter((part) => part.whole > 0).map((part) => part.name), "KV cache"];
  return parts.map((name) => element("span", {}, swatch(name), name));
}

function keptBytes(option) {
  return sum(option.weights.map((part) => part.kept));
}

function rateBar(option, fastest) {
  const text = `${Math.round(option.throughput).toLocaleString("en")} tokens/s per device`;
  const bar = element("div", { class: "bar", style: "--fill: var(--accent)", title: text });
  if (option.fits) bar.append(segment("kept", option.throughput / fastest));
  const said = option.fits ? text : "does not fit";
  return element("div", { class: "measure rate" }, bar, element("span", {}, said));
}

/** Weights and KV cache of a device against what is usable of it. */
function memoryBar(state, option, largest) {
  const bar = element("div", { class: "bar" });
  const parts = [...option.weights, { name: "KV cache", kept: option.cache }];
  let room = 1;
  for (const part of parts) {
    const share = Math.min(room, part.kept / largest);
    room -= share;
    const piece = segment("kept", share);
    piece.style.setProperty("--fill", colorOf(part.name));
    piece.title = `${part.name} ${bytesText(part.kept)}`;
    bar.append(piece);
  }
  const limit = percent(usableBytes(state) / largest);
  bar.append(element("span", { class: "limit", style: `left: ${limit}` }));
  const text = `${bytesText(keptBytes(option))} weights + ${bytesText(option.cache)} KV`;
  return element("div", { class: "measure" }, bar, element("span", {}, text));
}

/* The chosen layout ---------------------------------------------------------------------------- */

/** The time of a step by part. */
function partBars(option) {
  const bars = element("div", { class: "bars" });
  const entries = Object.entries(option.parts).filter(([, seconds]) => seconds > 0);
  const longest = Math.max(...entries.map(([, seconds]) => seconds));
  for (const [name, seconds] of entries) {
    const bar = element("div", { class: "bar", style: "--fill: var(--accent)" });
    bar.append(segment("kept", seconds / longest));
    const share = Math.round((100 * seconds) / option.tpot.mid);
    const number = `${durationText(1e3 * seconds)}, ${share} %`;
    bars.append(element("span", {}, name), bar, element("span", { class: "number" }, number));
  }
  return bars;
}

/** Each part of the weights, what is freed of it dashed, and the KV cache. */
function memoryBars(state, option) {
  const parts = [...option.weights, { name: "KV cache", whole: option.cache, kept: option.cache }];
  const shown = parts.filter((part) => part.whole > 0);
  const bars = element("div", { class: "bars" });
  const largest = Math.max(...shown.map((part) => part.whole));
  const text = (count) => bytesText(count, largest);
  for (const part of shown) {
    const freed = part.whole - part.kept;
    const bar = element("div", { class: "bar", style: `--fill: ${colorOf(part.name)}` });
    bar.append(segment("kept", part.kept / largest), segment("ghost", freed / largest));
    const number = element("span", { class: "number" }, text(part.kept));
    if (freed > 0) number.append(element("span", { class: "freed" }, ` + ${text(freed)} freed`));
    bars.append(element("span", {}, part.name), bar, number);
  }
  const total = keptBytes(option) + option.cache;
  const verdict = total <= usableBytes(state) ? "fits" : "does not fit";
  const sentence = `${bytesText(total)} of ${bytesText(usableBytes(state))} usable: ${verdict}.`;
  const wrap = element("div", {}, bars, element("p", { class: "note" }, sentence));
  return wrap;
}

function segment(kind, share) {
  const width = share > 0 ? percent(share) : "0; border: 0";
  return element("i", { class: kind, style: `width: ${width}` });
}

function percent(share) {
  return `${(100 * share).toFixed(3)}%`;
}

/* Change of TPOT against tokens per rank --------------------------------------------------------- */

const LAST_TOKENS = 4096;

/** The curves of a layout: of each component that is sharded, and of their sum. */
function curvesOf(state, layout) {
  const shown = DATA.components.filter(({ name }) => (layout.sizes[name] || 1) > 1);
  const curves = shown.map((component) => ({
    name: component.name,
    color: colorOf(component.name),
    at: (tokens) =>
      1e3 * changeSeconds(state, component, layout, layout.sizes[component.name], tokens),
  }));
  const total = (tokens) => sum(curves.map((curve) => curve.at(tokens)));
  return [...curves, { name: "total", color: "var(--text)", at: total }];
}

/** Drawn as wide as there is room, so that its text has one size on every screen. */
function tpotChart(state, layout, now, room) {
  const width = Math.max(300, Math.min(680, room || 680));
  const plot = { width, height: width < 500 ? 300 : 380, left: 52, right: 14, top: 22, bottom: 44 };
  const curves = curvesOf(state, layout);
  const x = (tokens) =>
    plot.left + (Math.log(tokens) / Math.log(LAST_TOKENS)) * (width - plot.left - plot.right);
  const samples = Array.from({ length: 121 }, (_, i) => LAST_TOKENS ** (i / 120));
  const values = curves.map((curve) => samples.map(curve.at));
  const [low, high] = rangeOf(values, curves.map((curve) => curve.at(now)));
  const y = (ms) =>
    plot.top + ((high - ms) / (high - low)) * (plot.height - plot.top - plot.bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${plot.height}`, width, role: "img", tabindex: 0 });
  svg.setAttribute("aria-label", describe(curves, now));
  svg.append(...yAxis(plot, low, high, y), ...xAxis(plot, x));
  const clip = { x: plot.left, y: y(high), width: x(LAST_TOKENS) - plot.left, height: y(low) - y(high) };
  svg.append(shape("clipPath", { id: "plot" }, shape("rect", clip)));
  curves.forEach((curve, i) => {
    const points = samples.map((t, j) => `${x(t).toFixed(1)},${y(values[i][j]).toFixed(1)}`);
    svg.append(
      shape("polyline", {
        points: points.join(" "),
        fill: "none",
        stroke: curve.color,
        "stroke-width": curve.name === "total" ? 3 : 1.8,
        "clip-path": "url(#plot)",
      }),
    );
  });
  svg.append(...crossoverMarks(plot, curves, x, y(0)));
  const cursor = shape("g", { class: "cursor" });
  svg.append(cursor);
  const show = (tokens) => {
    const at = x(tokens);
    cursor.replaceChildren(
      shape("line", { class: "now", x1: at, x2: at, y1: plot.top - 6, y2: y(low) }),
      textAt(at, plot.top - 10, countText(tokens, "token"), anchorAt(plot, at)),
      ...curves
        .filter((curve) => curve.at(tokens) <= high)
        .map((curve) => shape("circle", { cx: at, cy: y(curve.at(tokens)), r: 3.5, fill: curve.color })),
    );
    svg.setAttribute("aria-label", describe(curves, tokens));
    byId("legend").replaceChildren(...tpotLegend(state, layout, tokens));
  };
  moveCursor(svg, plot, now, show);
  show(Math.max(1, Math.min(LAST_TOKENS, now)));
  return svg;
}

/** The values under the pointer, and under the arrow keys. */
function moveCursor(svg, plot, now, show) {
  let tokens = now;
  const to = (count) => {
    tokens = Math.max(1, Math.min(LAST_TOKENS, Math.round(count)));
    show(tokens);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * plot.width;
    const share = (at - plot.left) / (plot.width - plot.left - plot.right);
    to(LAST_TOKENS ** share);
  });
  svg.addEventListener("pointerleave", () => to(now));
  svg.addEventListener("keydown", (event) => {
    const factor = { ArrowRight: 1.25, ArrowLeft: 0.8 }[event.key];
    if (!factor) return;
    event.preventDefault();
    to(factor > 1 ? Math.max(tokens + 1, tokens * factor) : Math.min(tokens - 1, tokens * factor));
  });
}

/** The ms to show: all that is gained, and as much of the losses; the present always. */
function rangeOf(values, now) {
  const all = values.flat();
  const gains = -Math.min(0, ...all);
  const high = Math.min(Math.max(...all, 0), Math.max(gains, ...now.map((ms) => 1.2 * ms)));
  const step = niceStep((high + gains) / 6);
  return [-step * Math.ceil((1.02 * gains) / step), step * Math.max(1, Math.ceil(high / step))];
}

function niceStep(size) {
  if (!(size > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(size));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= size);
}

function yAxis(plot, low, high, y) {
  const step = niceStep((high - low) / 6);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const marks = [];
  for (let i = Math.round(low / step); i * step <= high + step / 2; i++) {
    const at = y(i * step);
    const text = i === 0 ? "0" : `${i < 0 ? MINUS : "+"}${Math.abs(i * step).toFixed(digits)}`;
    const ends = { x1: plot.left, x2: plot.width - plot.right, y1: at, y2: at };
    marks.push(shape("line", { class: i === 0 ? "axis" : "grid", ...ends }));
    marks.push(textAt(plot.left - 8, at + 4, text, "end", "quiet"));
  }
  return [...marks, textAt(plot.left - 8, plot.top - 10, "ms", "end", "quiet")];
}

function xAxis(plot, x) {
  const marks = [];
  const every = plot.width < 500 ? 4 : 2;
  for (let tokens = 1; tokens <= LAST_TOKENS; tokens *= every) {
    const bottom = plot.height - plot.bottom;
    marks.push(shape("line", { class: "grid", x1: x(tokens), x2: x(tokens), y1: bottom, y2: bottom + 5 }));
    marks.push(textAt(x(tokens), bottom + 19, tokens.toLocaleString("en"), "middle", "quiet"));
  }
  const middle = (plot.left + plot.width - plot.right) / 2;
  return [...marks, textAt(middle, plot.height - 6, "tokens per rank and step", "middle", "quiet")];
}

/** A circle where each curve crosses zero, with its last number of tokens that pays. */
function crossoverMarks(plot, curves, x, zero) {
  const found = curves
    .map((curve) => ({ curve, tokens: lastPaying(curve.at) }))
    .filter(({ tokens }) => tokens >= 1 && tokens < LAST_TOKENS)
    .sort((a, b) => a.tokens - b.tokens);
  const marks = [];
  const ends = []; // where the texts of each row end
  for (const { curve, tokens } of found) {
    const here = curve.at(tokens);
    const at = x(tokens + here / (here - curve.at(tokens + 1))); // linear between whole tokens
    const text = `${curve.name} ${tokens.toLocaleString("en")}`;
    const width = 7 * text.length + 10;
    const start = Math.min(at - width / 2, plot.width - width);
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

function anchorAt(plot, x) {
  if (x < plot.left + 40) return "start";
  return x > plot.width - 60 ? "end" : "middle";
}

function describe(curves, tokens) {
  const said = curves.map((curve) => `${curve.name} ${changeText(curve.at(tokens))}`);
  return `Change of TPOT at ${countText(tokens, "token")} per rank: ${said.join(", ")}`;
}

/** What each curve is at a number of tokens. */
function tpotLegend(state, layout, tokens) {
  return curvesOf(state, layout).map((curve) => {
    const mark = element("span", { class: "swatch", style: `background: ${curve.color}` });
    return element("span", {}, mark, `${curve.name} ${changeText(curve.at(tokens))}`);
  });
}

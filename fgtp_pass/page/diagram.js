"use strict";

/* Each component of a layer as a lane: on the left every rank with the whole weights, on the right
   a group that shares them. Columns are ranks, time goes down. */

const LANE = { width: 1180, after: 432, notes: 856, column: 84, box: 54 };

/** What tokens and features a rank has, by the placement of the algebra. */
const PLACEMENTS = {
  Own: () => "its own tokens",
  All: (k) => `the tokens of all ${k} ranks`,
  Cut: (k) => `the tokens of all, 1/${k} of the features`,
  Sum: () => "the tokens of all, partial sums",
};

const CUTS = { in: "input columns", out: "output rows", rows: "table rows" };

function laneDiagram(lane, size) {
  const top = 46;
  const svg = shape("svg", { role: "img" });
  const ranks = shownRanks(size);
  svg.setAttribute(
    "aria-label",
    `${lane.component}: before, every rank holds whole weights; after, ${
      size > 1 ? `groups of ${size}: ${lane.path}` : "the same"
    }`,
  );
  svg.append(
    swatchAt(lane.component, 5),
    textAt(18, 14, `${lane.component}, ${lane.where} (${countText(lane.count, "site")})`, "start"),
    textAt(0, 34, "Before: every rank holds all of it", "start", "quiet"),
    textAt(LANE.after, 34, afterTitle(size), "start", "quiet"),
  );
  let y = placementRow(svg, ranks, top, PLACEMENTS.Own());
  for (const step of lane.steps) {
    if ("cut" in step) y = weightsRow(svg, lane, step, ranks, size, y);
    else if (size > 1) y = moveRow(svg, step, ranks, y);
    if (size > 1 && step !== lane.steps.at(-1)) note(svg, y - 4, PLACEMENTS[step.to](size));
  }
  y = placementRow(svg, ranks, y, PLACEMENTS.Own());
  for (const { x } of [...columns(ranks, 0), ...columns(ranks, LANE.after)]) {
    const middle = x + LANE.column / 2;
    svg.prepend(shape("line", { class: "grid", x1: middle, x2: middle, y1: top, y2: y - 28 }));
  }
  svg.setAttribute("viewBox", `0 0 ${LANE.width} ${y + 6}`);
  return svg;
}

function afterTitle(size) {
  return size > 1 ? `After: groups of ${size} ranks share it` : "After: the same, it is not sharded";
}

/** At most four columns; a gap stands for the ranks left out. */
function shownRanks(size) {
  if (size === 1) return [0, 1];
  return size <= 4 ? Array.from({ length: size }, (_, i) => i) : [0, 1, 2, size - 1];
}

function columns(ranks, offset) {
  return ranks.map((rank, i) => ({ rank, x: offset + i * (LANE.column + 16) + 8 }));
}

function placementRow(svg, ranks, y, text) {
  for (const offset of [0, LANE.after]) {
    for (const { rank, x } of columns(ranks, offset)) {
      const chip = { x: x + 8, y, width: LANE.column - 16, height: 18, rx: 9, fill: "var(--track)" };
      const label = textAt(x + LANE.column / 2, y + 13, `rank ${rank}`, "middle", "quiet plain");
      svg.append(shape("rect", chip), label);
    }
  }
  note(svg, y + 13, text);
  return y + 28;
}

function moveRow(svg, step, ranks, y) {
  const all = columns(ranks, LANE.after);
  const width = all.at(-1).x + LANE.column - all[0].x;
  svg.append(
    shape("rect", { x: all[0].x, y, width, height: 22, rx: 4, fill: "var(--accent)" }),
    textAt(all[0].x + width / 2, y + 15, step.move, "middle", "plain inverse"),
  );
  note(svg, y + 15, `${step.move}: ${bytesText(step.width)} per token`);
  return y + 44;
}

function weightsRow(svg, lane, step, ranks, size, y) {
  const color = colorOf(lane.component);
  for (const offset of [0, LANE.after]) {
    const cut = offset > 0 && size > 1 ? size : 1;
    for (const { rank, x } of columns(ranks, offset)) {
      step.weights.forEach((weight, i) => {
        const each = (LANE.column - 4 * (step.weights.length - 1)) / step.weights.length;
        svg.append(...weightBox(x + i * (each + 4), y, each, weight, cut, rank, color));
      });
    }
  }
  step.weights.forEach((weight, i) => {
    const shard = size > 1 ? ` \u2192 ${dims(weight.shards[size])}` : "";
    const shapes = dims(weight.shape) + shard;
    note(svg, y + 15 + 16 * i, `${weight.name} ${shapes}`, "");
  });
  if (size > 1) note(svg, y + 15 + 16 * step.weights.length, `cut by ${CUTS[step.cut]}`);
  const height = Math.max(LANE.box, 16 * (step.weights.length + 1));
  return y + height + (step.weights.length > 2 ? 24 : 16);
}

/** A weight as its outline, and what the rank holds of it filled in. */
function weightBox(x, y, width, weight, size, rank, color) {
  const whole = { x, y, width, height: LANE.box };
  const [start, length] = weight.cut_dim === 0 ? ["y", "height"] : ["x", "width"];
  const block = whole[length] / weight.blocks;
  const part = size > 1 ? rank : 0;
  const held = Array.from({ length: weight.blocks }, (_, i) => ({
    ...whole,
    [start]: whole[start] + i * block + (part * block) / size,
    [length]: block / size,
  }));
  const dashes = size > 1 ? "3 3" : "0";
  const outline = { ...whole, fill: "var(--card)", stroke: color, "stroke-dasharray": dashes };
  return [shape("rect", outline), ...held.map((one) => shape("rect", { ...one, fill: color }))];
}

function dims(sizes) {
  return sizes.join(" \u00d7 ");
}

function note(svg, y, text, kind = "quiet") {
  svg.append(textAt(LANE.notes, y, text, "start", kind));
}

function swatchAt(name, y) {
  return shape("rect", { x: 0, y, width: 10, height: 10, rx: 2, fill: colorOf(name) });
}

"use strict";

/* Each component of a layer as a lane: every rank with the whole weights, and a group that shares
   them. Columns are ranks, time goes down. Where there is room both stand side by side with notes
   to the right; on a narrow screen only the group is drawn, with its notes between the rows. */

const WIDE = { width: 1180, before: 0, after: 432, notes: 856, column: 84, gap: 16 };
const NARROW = { before: null, after: 0, notes: 0, column: 66, gap: 12 };
const BOX = 54;

/** What tokens and features a rank has, by the placement of the algebra. */
const PLACEMENTS = {
  Own: () => "its own tokens",
  All: (k) => `the tokens of all ${k} ranks`,
  Cut: (k) => `the tokens of all, 1/${k} of the features`,
  Sum: () => "the tokens of all, partial sums",
};

const CUTS = { in: "input columns", out: "output rows", rows: "table rows" };

function laneDiagram(lane, size, room) {
  const view = room && room < 900 ? { ...NARROW, width: Math.max(300, room) } : WIDE;
  const narrow = view.before === null;
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
    textAt(view.after, 34, afterTitle(size), "start", "quiet"),
  );
  if (!narrow) svg.append(textAt(0, 34, "Before: every rank holds all of it", "start", "quiet"));
  const draw = { svg, view, ranks, size, lane, narrow };
  let y = placementRow(draw, top, PLACEMENTS.Own());
  for (const step of lane.steps) {
    if ("cut" in step) y = weightsRow(draw, step, y);
    else if (size > 1) y = moveRow(draw, step, y);
    if (size > 1 && step !== lane.steps.at(-1)) y = note(draw, y - 4, PLACEMENTS[step.to](size), 0);
  }
  y = placementRow(draw, y, PLACEMENTS.Own());
  for (const offset of offsets(view)) {
    for (const { x } of columns(view, ranks, offset)) {
      const middle = x + view.column / 2;
      svg.prepend(shape("line", { class: "grid", x1: middle, x2: middle, y1: top, y2: y - 28 }));
    }
  }
  svg.setAttribute("viewBox", `0 0 ${view.width} ${y + 6}`);
  return svg;
}

function offsets(view) {
  return view.before === null ? [view.after] : [view.before, view.after];
}

function afterTitle(size) {
  return size > 1 ? `After: groups of ${size} ranks share it` : "Not sharded: every rank holds all of it";
}

/** At most four columns; a gap stands for the ranks left out. */
function shownRanks(size) {
  if (size === 1) return [0, 1];
  return size <= 4 ? Array.from({ length: size }, (_, i) => i) : [0, 1, 2, size - 1];
}

function columns(view, ranks, offset) {
  return ranks.map((rank, i) => ({ rank, x: offset + i * (view.column + view.gap) + 4 }));
}

function placementRow(draw, y, text) {
  const { svg, view, ranks } = draw;
  for (const offset of offsets(view)) {
    for (const { rank, x } of columns(view, ranks, offset)) {
      const chip = { x: x + 4, y, width: view.column - 8, height: 18, rx: 9, fill: "var(--track)" };
      const label = textAt(x + view.column / 2, y + 13, `rank ${rank}`, "middle", "quiet plain");
      svg.append(shape("rect", chip), label);
    }
  }
  return note(draw, y + 13, text, 15) + 15;
}

function moveRow(draw, step, y) {
  const { svg, view, ranks } = draw;
  const all = columns(view, ranks, view.after);
  const width = all.at(-1).x + view.column - all[0].x;
  svg.append(
    shape("rect", { x: all[0].x, y, width, height: 22, rx: 4, fill: "var(--accent)" }),
    textAt(all[0].x + width / 2, y + 15, step.move, "middle", "plain inverse"),
  );
  return note(draw, y + 15, `${step.move}: ${bytesText(step.width)} per token`, 22) + 29;
}

function weightsRow(draw, step, y) {
  const { svg, view, ranks, size, lane, narrow } = draw;
  const color = colorOf(lane.component);
  for (const offset of offsets(view)) {
    const cut = offset === view.after && size > 1 ? size : 1;
    for (const { rank, x } of columns(view, ranks, offset)) {
      step.weights.forEach((weight, i) => {
        const each = (view.column - 4 * (step.weights.length - 1)) / step.weights.length;
        svg.append(...weightBox(x + i * (each + 4), y, each, weight, cut, rank, color));
      });
    }
  }
  const lines = step.weights.map((weight) => {
    const shard = size > 1 ? ` \u2192 ${dims(shardShape(weight, size))}` : "";
    return `${weight.name} ${dims(weight.shape)}${shard}`;
  });
  if (size > 1) lines.push(`cut by ${CUTS[step.cut]}`);
  let below = narrow ? y + BOX + 16 : y + 15;
  for (const line of lines) {
    svg.append(textAt(view.notes, below, line, "start", line.startsWith("cut by") ? "quiet" : ""));
    below += 16;
  }
  return Math.max(y + BOX, below - 10) + (step.weights.length > 2 ? 24 : 16);
}

function shardShape(weight, size) {
  const shard = [...weight.shape];
  const block = Math.ceil(weight.shape[weight.cut_dim] / weight.blocks / size);
  shard[weight.cut_dim] = weight.blocks * block;
  return shard;
}

/** A weight as its outline, and what the rank holds of it filled in. */
function weightBox(x, y, width, weight, size, rank, color) {
  const whole = { x, y, width, height: BOX };
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

/** Says something beside a row, or below it where it is narrow; gives where the next may start. */
function note({ svg, view, narrow }, y, text, height) {
  if (!narrow) {
    svg.append(textAt(view.notes, y, text, "start", "quiet"));
    return y + (height ? 0 : 4);
  }
  svg.append(textAt(view.notes, y + (height ? height + 4 : 8), text, "start", "quiet"));
  return y + height + 12;
}

function swatchAt(name, y) {
  return shape("rect", { x: 0, y, width: 10, height: 10, rx: 2, fill: colorOf(name) });
}

"use strict";

const MINUS = "\u2212";
const GRAYS = { experts: "var(--g0)", "other weights": "var(--g1)", "KV cache": "var(--g2)" };

/** Bytes in the largest binary unit below them; in that of `like`, if they are not far below it. */
function bytesText(count, like = count) {
  if (count < 0.5) return "0";
  if (count < like / 1000) like = count;
  for (const unit of ["B", "KiB", "MiB"]) {
    if (like < 1024) return `${count.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    count /= 1024;
    like /= 1024;
  }
  return `${count.toFixed(2)} GiB`;
}

/** A time without its sign. */
function durationText(ms) {
  const size = Math.abs(ms);
  if (size >= 999.5) return `${(size / 1e3).toFixed(size < 9995 ? 2 : 1)} s`;
  if (size >= 0.095) return `${size.toFixed(size < 9.995 ? 2 : 1)} ms`;
  return `${(1e3 * size).toFixed(size < 0.00995 ? 1 : 0)} \u00b5s`;
}

/** A change of time with its sign. */
function changeText(ms) {
  if (ms === 0) return "0 ms";
  return `${ms < 0 ? MINUS : "+"}${durationText(ms)}`;
}

/** A prediction of seconds with its range, in ms. */
function rangeText({ low, mid, high }) {
  const [a, b, c] = [low, mid, high].map((seconds) => (1e3 * seconds).toFixed(1));
  return `${b} ms (${a} to ${c})`;
}

/** A change of seconds with its range, in ms. */
function changeRange({ low, mid, high }) {
  return `${changeText(1e3 * mid)} (${changeText(1e3 * low)} to ${changeText(1e3 * high)})`;
}

function countText(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/** The range of tokens per rank in which a component pays. */
function paysText(row) {
  if (row.size === 1) return "";
  if (row.lastPaying === 0) return "never";
  if (row.lastPaying === Infinity) return "always";
  return `1 to ${row.lastPaying.toLocaleString("en")}`;
}

function sizeText(size) {
  return size > 1 ? String(size) : "off";
}

/** The components that are on. */
function onText(sizes) {
  const on = Object.entries(sizes).filter(([, size]) => size > 1);
  return on.map(([name, size]) => `${name} ${size}`).join(", ");
}

/** The color of a component, by its place among them; grays for all that is none. */
function colorOf(name) {
  const index = DATA.components.findIndex((component) => component.name === name);
  return index < 0 ? GRAYS[name] : `var(--c${index % 6})`;
}

/** An element with attributes and children; text goes in as text. */
function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Text with its parts between backticks as code. */
function coded(text) {
  return text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));
}

function swatch(name) {
  return element("span", { class: "swatch", style: `background: ${colorOf(name)}` });
}

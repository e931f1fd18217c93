// Recall and density of a sparse prompt, by layer, as a picture and as a table.

import { count, h, percent, s } from "./dom.js";

const NARROW = 600; // window, in CSS pixels
const LEFT = 44;
const RIGHT = 8;
const PANEL = 110; // height of a panel
const GAP = 34;
const TOP = 20;
let number = 0; // of pictures, for their ids

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Return the figure of one answer's attention, or a sentence where there is nothing to draw. */
export function attentionFigure(attention) {
  if (!attention.mode) return null;
  if (!attention.layers?.length) return h("p", { class: "meta" }, sentence(attention));
  const layers = attention.layers.map((one) => ({
    layer: one.layer,
    recall: spread(one.held_out_recall),
    density: spread(one.density),
    fallbacks: one.fallbacks.reduce((sum, value) => sum + value, 0),
  }));
  return h("figure", {},
    h("figcaption", {}, sentence(attention)),
    picture(layers, attention),
    h("details", {}, h("summary", {}, "Figures by layer"), h("div", { class: "scrolls", tabindex: 0, role: "region",
      "aria-label": "Figures by layer" }, table(layers))));
}

const spread = (values) => ({ mean: mean(values), low: Math.min(...values), high: Math.max(...values) });

function sentence(attention) {
  if (attention.mode !== "sparse") return "Dense attention: every token read all before it.";
  if (!attention.cells) return "Sparse attention; no part of this prompt was chosen anew: it was there already.";
  const fallbacks = attention.fallbacks ? `, ${count(attention.fallbacks)} heads of cells turned dense` : "";
  return `Sparse attention in ${count(attention.cells)} ${attention.cells === 1 ? "cell" : "cells"}: it visits ${percent(attention.density)} of the pairs and ` +
    `keeps ${percent(attention.held_out_recall)} of the attention (worst head and cell ` +
    `${percent(attention.held_out_recall_min)})${fallbacks}.`;
}

function picture(layers, attention) {
  const width = window.innerWidth < NARROW ? 340 : 720;
  const total = TOP + 2 * PANEL + GAP + 30;
  const id = `layers-${++number}`;
  const tenth = (round, share) => Math.min(1, round(10 * share) / 10);
  const low = Math.min(0.9, tenth(Math.floor, Math.min(...layers.map((one) => one.recall.low))));
  const high = tenth(Math.ceil, Math.max(...layers.map((one) => one.density.high)));
  const recall = { top: TOP, low, high: 1, width };
  const density = { top: TOP + PANEL + GAP, low: 0, high, width };
  const step = (width - LEFT - RIGHT) / layers.length;
  const x = (index) => LEFT + step * (index + 0.5);
  const bottom = density.top + PANEL;
  const words = `By layer: recall ${percent(attention.held_out_recall)} and density ${percent(attention.density)} in the ` +
    "mean; the table below has the figures.";
  const every = Math.ceil((layers.length * 28) / (width - LEFT - RIGHT));
  return s("svg", { viewBox: `0 0 ${width} ${total}`, role: "img", "aria-labelledby": id, class: "layers" },
    s("title", { id }, words),
    panel("Recall of the heads: mean, and worst to best", recall),
    panel("Density of the heads: mean, and least to most", density),
    ...layers.map((one, index) => s("g", {},
      mark(x(index), recall, one.recall, step, "recall"),
      mark(x(index), density, one.density, step, "density"),
      index % every === 0 && s("text", { x: x(index), y: bottom + 14, "text-anchor": "middle" }, one.layer),
      s("rect", { x: x(index) - step / 2, y: TOP, width: step, height: bottom - TOP, class: "touch" },
        s("title", {}, `Layer ${one.layer}: recall ${percent(one.recall.mean)} ` +
          `(${percent(one.recall.low)} to ${percent(one.recall.high)}), density ${percent(one.density.mean)} ` +
          `(${percent(one.density.low)} to ${percent(one.density.high)})`)))),
    s("text", { x: (LEFT + width - RIGHT) / 2, y: total - 2, "text-anchor": "middle" }, "layer"));
}

const heightOf = (share, { top, low, high }) => top + PANEL * (1 - (share - low) / (high - low));

function panel(title, scale) {
  const { top, low, high, width } = scale;
  return s("g", {},
    s("text", { x: LEFT, y: top - 7, class: "title" }, title),
    ...[low, (low + high) / 2, high].flatMap((tick) => {
      const y = heightOf(tick, scale);
      return [
        s("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid" }),
        s("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `${Math.round(1000 * tick) / 10} %`),
      ];
    }));
}

function mark(x, scale, { mean: middle, low, high }, step, kind) {
  const y = (share) => heightOf(share, scale);
  const width = Math.min(28, step * 0.6);
  const column = { x: x - width / 2, y: y(middle), width, height: y(0) - y(middle), class: "column" };
  return s("g", { class: kind },
    kind === "density" && s("rect", column),
    s("line", { x1: x, x2: x, y1: y(low), y2: y(high), class: "range" }),
    kind === "recall" && s("circle", { cx: x, cy: y(middle), r: Math.min(4.5, step * 0.3) }));
}

function table(layers) {
  const names = ["Layer", "Recall", "of the worst head", "Density", "of the least", "of the most", "Turned dense"];
  return h("table", {},
    h("thead", {}, h("tr", {}, ...names.map((name) => h("th", { scope: "col", class: "number" }, name)))),
    h("tbody", {}, ...layers.map(({ layer, recall, density, fallbacks }) => h("tr", {},
      h("th", { scope: "row", class: "number" }, layer),
      ...[recall.mean, recall.low, density.mean, density.low, density.high].map((share) =>
        h("td", { class: "number" }, percent(share))),
      h("td", { class: "number" }, count(fallbacks))))));
}

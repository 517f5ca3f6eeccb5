/** What was found in a picture as elements: the drawn picture, bars, tables, and where its milliseconds went. */

import { definitions, element, milliseconds, percent, table } from "./dom.js";
import { colour, draw } from "./draw.js";

const STEPS = [["decode", "decode and resize"], ["queue", "queue"], ["compute", "network"]];

/** The picture with what was found drawn over it; its text alternative says what that is. */
export function drawing(picture, answer, model, name) {
  const canvas = element("canvas", { role: "img", "aria-label": `${name}: ${inWords(answer)}` });
  draw(canvas, picture, answer, model);
  return canvas;
}

/** One sentence of what was found. */
export function inWords({ predictions, objects, shares, embedding }) {
  if (predictions) return predictions.map(({ label, probability }) => `${label} ${percent(probability)}`).join(", ") || "nothing";
  if (shares) return Object.entries(shares).slice(0, 4).map(([label, share]) => `${label} ${percent(share)}`).join(", ");
  if (embedding) return `${embedding.length} numbers`;
  const counts = new Map();
  for (const { label } of objects) counts.set(label ?? "object", (counts.get(label ?? "object") ?? 0) + 1);
  return [...counts].map(([label, count]) => `${count} ${label}`).join(", ") || "nothing";
}

/** What was found as bars, a table or numbers. */
export function details(answer, model) {
  const { predictions, objects, shares, embedding } = answer;
  if (predictions) {
    const said = predictions.map(({ label, probability }) => bar(label, probability));
    return said.length ? element("div", { class: "bars" }, ...said) : element("p", {}, "No label is above the threshold.");
  }
  if (shares) {
    const said = Object.entries(shares).map(([label, share]) => bar(label, share, model.labels.indexOf(label)));
    return element("div", { class: "bars" }, ...said);
  }
  if (embedding) return numbers(embedding);
  if (!objects.length) return element("p", {}, "Nothing is above the threshold.");
  return model.keypoints || objects[0].keypoints ? keypoints(objects, model) : boxes(objects);
}

function bar(label, share, tone = null) {
  const fill = element("span", { class: "fill" });
  fill.style.width = percent(Math.min(1, share));
  const name = element("span", { class: "name" }, label);
  if (tone !== null) {
    const square = element("span", { class: "square", "aria-hidden": "true" });
    square.style.background = `rgb(${colour(tone).join(" ")})`;
    name.prepend(square);
  }
  return element(
    "div", { class: "bar" }, name, element("span", { class: "track", "aria-hidden": "true" }, fill),
    element("span", { class: "number" }, percent(share)),
  );
}

function numbers(embedding) {
  const length = Math.sqrt(embedding.reduce((sum, value) => sum + value * value, 0));
  const first = embedding.slice(0, 6).map((value) => value.toPrecision(4)).join(", ");
  return definitions([["numbers", String(embedding.length)], ["length", length.toPrecision(4)], ["first", `${first}, ...`]]);
}

function boxes(objects) {
  const rows = objects.map(({ label, score, box }) => [label, score.toFixed(2), box.map(Math.round).join(", ")]);
  return table("Objects", ["label", "score", "box in pixels"], rows);
}

function keypoints(objects, model) {
  const rows = objects.flatMap(({ keypoints: points }, object) =>
    points.map(([x, y, score], k) => [
      String(object + 1), model.keypoints?.names[k] ?? String(k), `${Math.round(x)}, ${Math.round(y)}`, score.toFixed(2),
    ]),
  );
  return table("Keypoints", ["object", "keypoint", "place in pixels", "score"], rows);
}

/** A bar of where the milliseconds of an answer went, and the same in words. */
export function latency(times) {
  const steps = STEPS.filter(([key]) => times[key] !== undefined);
  const total = steps.reduce((sum, [key]) => sum + times[key], 0);
  const track = element("div", { class: "latency", "aria-hidden": "true" });
  for (const [key] of steps) {
    const part = element("span", { class: `step ${key}` });
    part.style.width = percent(times[key] / Math.max(total, 1e-9));
    track.append(part);
  }
  const words = steps.map(([key, name]) =>
    element("span", { class: "key" }, element("span", { class: `square ${key}`, "aria-hidden": "true" }), `${name} ${milliseconds(times[key])}`),
  );
  return element("div", { class: "times" }, track, element("p", {}, ...words, `together ${milliseconds(total)}`));
}

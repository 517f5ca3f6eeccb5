/** What a user may ask of a prediction, as inputs; a task says which it follows. */

import { element } from "./dom.js";

const KINDS = {
  topK: { label: "Labels", type: "number", min: 1, max: 1000, step: 1, value: 5, read: (text) => Math.max(1, Math.trunc(Number(text)) || 1) },
  scoreThreshold: {
    label: "Least score", type: "number", min: 0, max: 1, step: 0.05, value: 0.5,
    read: (text) => (text.trim() === "" ? null : Math.min(1, Math.max(0, Number(text)))),
  },
  boxes: {
    label: "Boxes of objects, x1 y1 x2 y2 each; empty: the whole picture", type: "text", value: "", read: readBoxes,
  },
};

/** What a task shows otherwise: a bundle of several labels may have a least score of each, as `leanvit predict` asks. */
const OF_TASK = { multilabel: { scoreThreshold: { label: "Least score; empty: the model's own of each label", value: "" } } };

/** Boxes in pixels, four numbers each; null where the text is empty. Throws where one has no area or lacks a number. */
export function readBoxes(text) {
  const numbers = text.split(/[\s,;]+/).filter(Boolean).map(Number);
  const boxes = [];
  for (let i = 0; i < numbers.length; i += 4) boxes.push(numbers.slice(i, i + 4));
  if (!boxes.every(([x1, y1, x2, y2]) => x1 < x2 && y1 < y2)) {
    throw new Error(`boxes are "${text}", expected x1 y1 x2 y2 in pixels of each object, x1 below x2 and y1 below y2.`);
  }
  return boxes.length ? boxes : null;
}

/** Inputs for options of these names and a task: {element, values()}; changed() is called when one has changed. */
export function optionInputs(names, task, changed) {
  const inputs = names.filter((name) => name in KINDS).map((name) => {
    const { label, read, ...attributes } = { ...KINDS[name], ...OF_TASK[task]?.[name] };
    const input = element("input", { ...attributes, id: `option-${name}`, change: changed });
    return { name, read, input, field: element("p", { class: "option" }, element("label", { for: input.id }, label), input) };
  });
  return {
    element: element("div", { class: "options" }, ...inputs.map(({ field }) => field)),
    values: () => Object.fromEntries(inputs.map(({ name, read, input }) => [name, read(input.value)])),
  };
}

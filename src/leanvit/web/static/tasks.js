/**
 * What a bundle of each task is: one row a task, as in leanvit/runtime/task.py.
 *
 * continuous: the output whose SQNR is asked for. eachPicture: whether that of the worst picture counts, or of all
 * together. all: whether golden.npz has all its values. options: what a user may set; a score of null: nothing set.
 * inputs(picture, manifest, options): [{pixels, place}], what the network sees. answer(rows, inputs, manifest, options,
 * size): what was found, in the JSON that `leanvit predict` and the service write; rows: tensors by name of each input.
 */

import { classMap, foundObjects, heatmapKeypoints, pasteMask, ranked, row, sigmoid, softmax } from "./outputs.js";
import { cropRegion, place, poseRegion, prepare } from "./prepare.js";

/** The least score where neither the user nor the bundle says another. */
const LEAST_SCORE = 0.5;

/** Larger maps take a browser minutes; the picture's own pixels are asked for where it is smaller. */
export const MAX_MAP_SIDE = 1024;

const whole = (picture, manifest) => [{ pixels: prepare(picture, manifest), place: null }];

const letterboxed = (picture, manifest) => {
  const where = place([picture.height, picture.width], manifest.preprocess.input_size);
  return [{ pixels: prepare(picture, manifest), place: where }];
};

const rounded = (value, digits) => Number(value.toFixed(digits));
const labelled = (pairs) => ({ predictions: pairs.map(([label, p]) => ({ label, probability: rounded(p, 6) })) });

function classes([{ logits }], inputs, manifest, { topK }) {
  const shares = softmax(logits.data);
  return labelled(ranked(shares).slice(0, topK).map((place) => [manifest.labels[place], shares[place]]));
}

function labels([{ logits }], inputs, manifest, { scoreThreshold }) {
  const shares = Array.from(logits.data, sigmoid);
  const own = manifest.answers.thresholds ?? [];
  const said = ranked(shares).filter((place) => shares[place] >= (scoreThreshold ?? own[place] ?? LEAST_SCORE));
  return labelled(said.map((place) => [manifest.labels[place], shares[place]]));
}

function oneOfTwo([{ logits }], inputs, manifest, { scoreThreshold }) {
  const second = sigmoid(logits.data[0]);
  const pairs = [[manifest.labels[0], 1 - second], [manifest.labels[1], second]];
  return labelled(second >= (scoreThreshold ?? LEAST_SCORE) ? pairs.reverse() : pairs);
}

function vector([{ embeddings }], inputs, manifest) {
  const values = Float64Array.from(embeddings.data);
  const length = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
  const scale = manifest.answers.normalize && length > 0 ? length : 1;
  return { embedding: Array.from(values, (value) => Math.fround(value / scale)) };
}

function objects([outputs], [input], manifest, { scoreThreshold }, size) {
  const { boxes, scores } = outputs;
  const found = foundObjects(boxes, scores, outputs.labels, input.place, size, scoreThreshold ?? LEAST_SCORE);
  return {
    objects: found.map(({ label, score, box, whole: around, index }) => ({
      label: manifest.labels[label],
      score: rounded(score, 5),
      box: box.map((side) => rounded(side, 2)),
      ...(outputs.masks ? { segmentation: pasteMask(row(outputs.masks, index), around, size) } : {}),
    })),
  };
}

function mapOfClasses([{ logits }], [input], manifest, options, [height, width]) {
  const factor = Math.min(1, MAX_MAP_SIDE / Math.max(height, width));
  const size = [height, width].map((side) => Math.max(1, Math.round(side * factor)));
  const chosen = classMap(logits, input.place, size);
  const counts = new Map();
  for (const label of chosen) counts.set(label, (counts.get(label) ?? 0) + 1);
  const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const shares = order.map(([label, count]) => [manifest.labels[label], rounded(count / chosen.length, 5)]);
  return { shares: Object.fromEntries(shares), map: { size, data: chosen } };
}

function crops(picture, manifest, { boxes }) {
  const size = manifest.preprocess.input_size;
  return (boxes ?? [[0, 0, picture.width, picture.height]]).map((box) => {
    const region = poseRegion(box, size[1] / size[0]);
    return { pixels: cropRegion(picture, region, manifest), place: { region, box } };
  });
}

function keypoints(rows, inputs) {
  return {
    objects: rows.map(({ heatmaps }, index) => {
      const points = heatmapKeypoints(heatmaps, inputs[index].place.region);
      const score = points.reduce((sum, point) => sum + point[2], 0) / points.length;
      return {
        score: rounded(score, 5),
        box: inputs[index].place.box.map((side) => rounded(side, 2)),
        keypoints: points.map((point) => point.map((value) => rounded(value, 3))),
      };
    }),
  };
}

const scored = { continuous: "logits", eachPicture: false, all: true, options: ["scoreThreshold"], inputs: whole };
const found = { continuous: "objectness", eachPicture: true, all: false, options: ["scoreThreshold"] };

export const TASKS = {
  classify: { ...scored, options: ["topK"], answer: classes },
  multilabel: { ...scored, answer: labels },
  binary: { ...scored, answer: oneOfTwo },
  embed: { continuous: "embeddings", eachPicture: true, all: true, options: [], inputs: whole, answer: vector },
  detect: { ...found, inputs: letterboxed, answer: objects },
  segment: { ...found, inputs: letterboxed, answer: objects },
  semantic: {
    continuous: "logits", eachPicture: true, all: false, options: [], inputs: letterboxed, answer: mapOfClasses,
  },
  pose: { continuous: "heatmaps", eachPicture: true, all: false, options: ["boxes"], inputs: crops, answer: keypoints },
};

/** How near outputs are to those recorded at export, as runtime/task.py and runtime/golden_objects.py measure it. */

import { row } from "./outputs.js";

const VALUES_KEPT = 4096;
const [CLEAR_SCORE, MIN_OVERLAP, MAX_SCORE_CHANGE, MAX_MASK_CHANGE] = [0.3, 0.9, 0.1, 0.05];

/** Signal to noise ratio in dB, -200 to 200. */
export function sqnr(truth, value) {
  let [signal, noise] = [0, 0];
  for (let i = 0; i < truth.length; i++) {
    signal += truth[i] * truth[i];
    noise += (value[i] - truth[i]) ** 2;
  }
  if (!Number.isFinite(noise) || truth.length !== value.length) return -200;
  if (noise === 0 || signal === 0) return noise === 0 ? 200 : -200;
  return Math.min(200, Math.max(-200, 10 * Math.log10(signal / noise)));
}

/** One picture's values of a continuous output that golden.npz keeps: all, or at most 4096 evenly spread. */
export function keptValues(values, all) {
  const step = all ? 1 : Math.ceil(values.length / VALUES_KEPT);
  return step === 1 ? values : values.filter((_, place) => place % step === 0);
}

/** SQNR of pictures' values: of the worst picture, or of all together. */
export function compare(expected, found, eachPicture) {
  if (eachPicture) return Math.min(...expected.map((values, i) => sqnr(values, found[i])));
  const joined = (parts) => parts.flatMap((part) => Array.from(part));
  return sqnr(joined(expected), joined(found));
}

/**
 * Of the clear recorded objects of the first pictures, how many are found again: {found, all}.
 * outputs: of each picture, tensors by name. records: arrays of golden.npz.
 */
export function matched(outputs, records) {
  if (!("found_scores" in records)) return null;
  const recorded = records.found_scores;
  const best = recorded.data.reduce((most, score) => Math.max(most, score), 0);
  const least = Math.min(CLEAR_SCORE, best / 2);
  const places = recorded.dims[1];
  let [found, all] = [0, 0];
  for (let picture = 0; picture < outputs.length; picture++) {
    for (let place = 0; place < places; place++) {
      const score = recorded.data[picture * places + place];
      if (score < least || score <= 0) continue;
      all++;
      found += foundAgain(outputs[picture], records, picture, place) ? 1 : 0;
    }
  }
  return { found, all };
}

function foundAgain(outputs, records, picture, place) {
  const of = (name) => row(records[`found_${name}`], picture).data;
  const score = of("scores")[place];
  const box = of("boxes").subarray(4 * place, 4 * place + 4);
  for (let index = 0; index < outputs.scores.data.length; index++) {
    if (
      Number(outputs.labels.data[index]) === Number(of("labels")[place]) &&
      Math.abs(outputs.scores.data[index] - score) <= Math.min(MAX_SCORE_CHANGE, score / 2) &&
      overlap(outputs.boxes.data.subarray(4 * index, 4 * index + 4), box) >= MIN_OVERLAP &&
      sameMask(outputs, records, picture, place, index)
    ) {
      return true;
    }
  }
  return false;
}

function overlap(one, other) {
  const across = Math.max(0, Math.min(one[2], other[2]) - Math.max(one[0], other[0]));
  const down = Math.max(0, Math.min(one[3], other[3]) - Math.max(one[1], other[1]));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (across * down) / Math.max(area(one) + area(other) - across * down, 1e-9);
}

function sameMask(outputs, records, picture, place, index) {
  if (!("found_masks" in records)) return true;
  const expected = row(row(records.found_masks, picture), place).data;
  const found = row(outputs.masks, index).data;
  const apart = expected.reduce((sum, level, i) => sum + Math.abs(found[i] - level / 255), 0);
  return apart / expected.length <= MAX_MASK_CHANGE;
}

/** Lower-case hexadecimal SHA-256 of bytes. */
export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether bundle.json, as bytes, holds its own SHA-256, which is that of the file with zeros in its place. */
export async function hasOwnDigest(bytes) {
  const text = new TextDecoder("latin1").decode(bytes);
  const digest = /"sha256": "([0-9a-f]{64})"/.exec(text)?.[1];
  if (!digest) return false;
  const unsigned = text.replaceAll(digest, "0".repeat(64));
  return (await sha256(Uint8Array.from(unsigned, (letter) => letter.charCodeAt(0)))) === digest;
}

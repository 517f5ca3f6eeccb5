/**
 * Runs a bundle beside the page. It answers nothing before the golden images returned what was recorded for them.
 *
 * Messages to it: {id, call: "open" | "predict" | "measure", ...}. From it: {id, value} or {id, error: {message}}, and
 * {progress: text}.
 */

import * as ort from "./ort/ort.js";
import { decodePicture } from "./decode.js";
import { compare, hasOwnDigest, keptValues, matched, sha256 } from "./golden.js";
import { readNpz } from "./npz.js";
import { row } from "./outputs.js";
import { prepare } from "./prepare.js";
import { TASKS } from "./tasks.js";

/** Golden images a batch: as many as a phone's memory takes of a large network. */
const BATCH = 8;

/** Levels by which the pixels of a golden JPEG may differ on average: decoders differ in the last bit of a cosine. */
const MEAN_LEVELS = 1;

let proved = null; // the bundle that answers, once its golden images have passed

const progress = (text) => postMessage({ progress: text });

async function fetchBytes(path) {
  const response = await fetch(new URL(path, import.meta.url));
  if (!response.ok) throw new Error(`${path}: the server says ${response.status}. Copy the whole folder again.`);
  return response.arrayBuffer();
}

/** Bytes of a file whose SHA-256 is known. */
async function fetchChecked(path, digest) {
  const bytes = await fetchBytes(path);
  if ((await sha256(bytes)) !== digest) {
    throw new Error(`${path}: its SHA-256 differs from the recorded one; the file was changed or damaged. Copy it again.`);
  }
  return bytes;
}

async function startRuntime(site, threads) {
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { mjs: new URL("./ort/ort-wasm.js", import.meta.url).href };
  ort.env.wasm.wasmBinary = await fetchChecked("ort/ort-wasm.wasm", site.files["ort/ort-wasm.wasm"]);
}

/** A bundle folder: its files checked, its model loaded. */
async function openBundle(folder) {
  progress(`Loading ${folder}`);
  const raw = await fetchBytes(`${folder}/bundle.json`);
  if (!(await hasOwnDigest(raw))) {
    throw new Error(`${folder}/bundle.json: its SHA-256 differs from the one inside; the file was changed or damaged.`);
  }
  const manifest = JSON.parse(new TextDecoder().decode(raw));
  const task = TASKS[manifest.task];
  if (!task) throw new Error(`task ${manifest.task} is unknown to this page, expected one of ${Object.keys(TASKS)}.`);
  const model = await fetchChecked(`${folder}/model.onnx`, manifest.files["model.onnx"]);
  const golden = readNpz(await fetchChecked(`${folder}/golden.npz`, manifest.files["golden.npz"]));
  progress("Starting the runtime");
  const session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
  return { folder, manifest, task, golden, session, bytes: model.byteLength };
}

/** Outputs by name of prepared pictures, one a row. */
async function run({ session, manifest }, pictures) {
  const [height, width] = manifest.preprocess.input_size;
  const { step } = pictures[0];
  const data = new Uint8Array(pictures.length * height * width * step);
  pictures.forEach((picture, index) => data.set(picture.data, index * height * width * step));
  const images = new ort.Tensor("uint8", data, [pictures.length, height, width, step]);
  const found = await session.run({ images });
  images.dispose();
  return pictures.map((_, index) => {
    const own = Object.entries(found).map(([name, { data, dims }]) => [name, row({ data, dims }, index)]);
    return Object.fromEntries(own);
  });
}

/** Decoded and prepared golden images, and how far their pixels are from those recorded. */
async function prepareGolden({ golden, manifest }, replaced) {
  const count = golden.logits.shape[0];
  const pictures = [];
  const pixels = { equal: 0, near: 0, far: 0, levels: 0 };
  for (let index = 0; index < count; index++) {
    progress(`Reading golden image ${index + 1} of ${count}`);
    const name = `golden/${index}.png`;
    const bytes = name in replaced ? await fetchChecked(name, replaced[name]) : golden[`image_${index}`].data;
    const prepared = prepare(await decodePicture(new Blob([bytes])), manifest);
    pictures.push(prepared);
    if (index < (golden.pixels?.shape[0] ?? 0)) note(pixels, prepared.data, golden.pixels, index, bytes);
  }
  return { pictures, pixels };
}

/** Count a golden image whose prepared pixels are recorded: equal, near (a JPEG's), or far. */
function note(pixels, found, recorded, index, bytes) {
  const expected = row({ data: recorded.data, dims: recorded.shape }, index).data;
  const apart = expected.reduce((sum, level, place) => sum + Math.abs(level - found[place]), 0) / expected.length;
  pixels.levels = Math.max(pixels.levels, apart);
  const lossless = new Uint8Array(bytes.buffer ?? bytes, bytes.byteOffset ?? 0)[0] === 0x89; // a PNG
  if (apart === 0) pixels.equal++;
  else if (!lossless && apart <= MEAN_LEVELS) pixels.near++;
  else pixels.far++;
}

/** Whether the network returns in this browser what was recorded for the golden images. */
async function gate(bundle, replaced) {
  const { task, golden, manifest } = bundle;
  const { pictures, pixels } = await prepareGolden(bundle, replaced);
  const width = golden.logits.data.length / pictures.length;
  const expected = pictures.map((_, index) => golden.logits.data.subarray(index * width, (index + 1) * width));
  const [outputs, batches] = [[], []];
  const kept = (rows) => rows.map((tensors) => keptValues(tensors[task.continuous].data, task.all));
  // The first image also alone: a graph may be right for one size of batch only.
  for (const [first, size] of [[0, 1], ...starts(pictures.length)]) {
    progress(`Checking golden images ${first + 1} to ${first + size} of ${pictures.length}`);
    const rows = await run(bundle, pictures.slice(first, first + size));
    if (!(task.continuous in rows[0])) throw new Error(`the graph has no output ${task.continuous}. Export it again.`);
    const db = compare(expected.slice(first, first + size), kept(rows), task.eachPicture);
    batches.push({ first, size, db });
    if (batches.length > 1) outputs.push(...rows);
  }
  const db = Math.min(batches[0].db, compare(expected, kept(outputs), task.eachPicture));
  const needed = manifest.runtimes.onnxruntime ?? manifest.minimum_sqnr_db;
  const share = matched(outputs, Object.fromEntries(
    Object.entries(golden).map(([name, { data, shape }]) => [name, { data, dims: shape }]),
  ));
  const neededShare = manifest.answers.matched_share ?? 0.95; // as runtime/golden_objects.py: MATCHED_SHARE
  const enough = share === null || share.all === 0 || share.found / share.all >= neededShare;
  return { passed: db >= needed && enough && pixels.far === 0, db, needed, batches, pixels, share, neededShare };
}

function starts(count) {
  const found = [];
  for (let first = 0; first < count; first += BATCH) found.push([first, Math.min(BATCH, count - first)]);
  return found;
}

const calls = {
  async open({ threads }) {
    const site = JSON.parse(new TextDecoder().decode(await fetchBytes("web.json")));
    await startRuntime(site, threads);
    const bundle = await openBundle("bundle");
    const verdict = await gate(bundle, site.golden);
    if (verdict.passed) proved = { bundle, site };
    return { verdict, manifest: bundle.manifest, threads, bytes: bundle.bytes, options: bundle.task.options, site };
  },

  /** What is found in a picture, with milliseconds of each step. */
  async predict({ picture, options }) {
    if (!proved) throw new Error("the golden images have not passed, so there are no answers.");
    const { bundle } = proved;
    const start = performance.now();
    const decoded = await decodePicture(picture);
    const inputs = bundle.task.inputs(decoded, bundle.manifest, options);
    const ready = performance.now();
    const rows = inputs.length ? await run(bundle, inputs.map((input) => input.pixels)) : [];
    const computed = performance.now();
    const size = [decoded.height, decoded.width];
    const answer = bundle.task.answer(rows, inputs, bundle.manifest, options, size);
    return {
      ...answer,
      image: { height: decoded.height, width: decoded.width },
      milliseconds: { decode: ready - start, compute: computed - ready },
    };
  },

  /** Milliseconds a picture of the bundle and of the float one, in turns: [{batch, bundle, float}]. */
  async measure({ batches, rounds }) {
    if (!proved) throw new Error("the golden images have not passed, so there is nothing to measure.");
    proved.float ??= proved.site.float ? await openBundle("float") : null;
    const rivals = [proved.bundle, proved.float].filter(Boolean);
    const table = [];
    for (const batch of batches) {
      const pictures = await goldenPictures(batch);
      const times = rivals.map(() => []);
      for (let round = -1; round < rounds; round++) {
        progress(`Measuring batches of ${batch}: round ${Math.max(1, round + 1)} of ${rounds}`);
        for (const [index, rival] of rivals.entries()) {
          const start = performance.now();
          await run(rival, pictures);
          if (round >= 0) times[index].push((performance.now() - start) / batch); // the first one warms up
        }
      }
      table.push({ batch, milliseconds: times.map(median) });
    }
    return table;
  },
};

async function goldenPictures(count) {
  const { pictures } = await prepareGolden(proved.bundle, proved.site.golden);
  return Array.from({ length: count }, (_, index) => pictures[index % pictures.length]);
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

addEventListener("message", async ({ data: { id, call, ...rest } }) => {
  try {
    postMessage({ id, value: await calls[call](rest) });
  } catch (error) {
    postMessage({ id, error: { message: String(error?.message ?? error) } });
  }
});

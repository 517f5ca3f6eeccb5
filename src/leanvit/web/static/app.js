/** The page of `leanvit web`: proves the bundle in this browser, then answers. */

import { cardList } from "./cards.js";
import { definitions, element, megabytes, milliseconds, table } from "./dom.js";
import { optionInputs } from "./options.js";
import { pictureInput } from "./pictures.js";
import { details, drawing, latency } from "./results.js";

const ROUNDS = 7; // of a measurement; their median counts
const MOST_THREADS = 8; // more make small networks slower

const by = (id) => document.getElementById(id);
const verdictLine = by("verdict");

/** Wait until the service worker answers for this page: it keeps files for offline use and permits threads. */
async function serviceWorker() {
  if (!navigator.serviceWorker) return;
  try {
    const registration = await navigator.serviceWorker.register("sw.js");
    offerUpdate(registration);
    if (!navigator.serviceWorker.controller) {
      await new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
    }
  } catch {
    return; // blocked by the browser's settings: the page works while it is online, with one thread
  }
  if (!crossOriginIsolated && !sessionStorage.getItem("isolating")) {
    sessionStorage.setItem("isolating", "1"); // once: a browser that can't is served with one thread
    location.reload();
    await new Promise(() => {});
  }
  sessionStorage.removeItem("isolating");
}

/** A newer version of the page waits until it is asked for: files of two versions never mix. */
function offerUpdate(registration) {
  const offer = () => {
    if (!registration.waiting || !navigator.serviceWorker.controller) return;
    const renew = () => {
      navigator.serviceWorker.addEventListener("controllerchange", () => location.reload(), { once: true });
      registration.waiting.postMessage("renew");
    };
    document.querySelector("header").append(
      element("p", { role: "status" }, "A newer version is there. ", element("button", { type: "button", click: renew }, "Use it")),
    );
  };
  offer();
  registration.addEventListener("updatefound", () => registration.installing?.addEventListener("statechange", offer));
}

/** Calls of the worker: call("predict", {...}) returns what it answers. */
function connect(progress) {
  const worker = new Worker("worker.js", { type: "module" });
  const waiting = new Map();
  let calls = 0;
  worker.addEventListener("message", ({ data }) => {
    if (data.progress) return progress(data.progress);
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    return data.error ? reject(new Error(data.error.message)) : resolve(data.value);
  });
  worker.addEventListener("error", (event) => {
    const error = new Error(event.message || "the program of this page could not be loaded. Copy the whole folder again.");
    waiting.forEach(({ reject }) => reject(error));
    waiting.clear();
  });
  return (call, values) =>
    new Promise((resolve, reject) => {
      waiting.set(++calls, { resolve, reject });
      worker.postMessage({ id: calls, call, ...values });
    });
}

function refuse(text, proof) {
  document.body.dataset.state = "refused";
  verdictLine.className = "verdict refused";
  verdictLine.setAttribute("role", "alert");
  verdictLine.textContent = `Refused: ${text}`;
  if (proof) by("proof").append(proof);
}

function proofOf({ verdict, manifest, threads, bytes, site }) {
  const batches = verdict.batches.map(({ first, size, db }) => [
    size === 1 ? `golden image ${first + 1} alone` : `golden images ${first + 1} to ${first + size}`, `${db.toFixed(1)} dB`,
  ]);
  const { equal, near, far } = verdict.pixels;
  const sites = Object.values(manifest.plan);
  const mean = (index) => (sites.reduce((sum, bits) => sum + bits[index], 0) / sites.length).toFixed(1);
  const { accuracy } = manifest;
  return element("div", {},
    table("Golden images in this browser", ["batch", "signal to noise"], batches),
    definitions([
      ["needed", `${verdict.needed.toFixed(0)} dB`],
      ["pixels", `${equal} of ${equal + near + far} prepared images equal those recorded${near ? `, ${near} JPEG within ${verdict.pixels.levels.toFixed(2)} levels` : ""}`],
      ["objects", verdict.share && `${verdict.share.found} of ${verdict.share.all} found again`],
      ["network", `${manifest.architecture}, ${manifest.profile}${manifest.simulated ? ", simulated" : ""}`],
      ["bits", sites.length ? `${mean(0)} weights, ${mean(1)} activations` : "float"],
      ["accuracy", accuracy && `${accuracy.metric} ${format(accuracy.value)}${accuracy.float === null || accuracy.float === undefined ? "" : ` (float ${format(accuracy.float)})`}`],
      ["file", `${megabytes(bytes)}, SHA-256 ${manifest.files["model.onnx"].slice(0, 12)} as recorded`],
      ["runtime", `${site.runtime}, ${threads} ${threads === 1 ? "thread" : "threads"}`],
    ]),
  );
}

const format = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(3));

function verdictOf({ db, needed, share, pixels, neededShare }) {
  if (pixels.far) return `this browser decodes or resizes ${pixels.far} golden images to other pixels than recorded. Use another browser.`;
  if (db < needed) return `golden images give ${db.toFixed(1)} dB in this browser, expected at least ${needed.toFixed(0)} dB. Use another browser, or export the model again.`;
  return `${share.found} of ${share.all} objects in golden images are found again, expected ${(100 * neededShare).toFixed(0)}%.`;
}

function answers(call, opened) {
  const { manifest } = opened;
  const model = { labels: manifest.labels, keypoints: manifest.answers.keypoints ?? null };
  const say = (text) => { by("problem").textContent = text; };
  const cards = cardList(by("results"), { card: "card", problem: "problem" }, fill);
  const asked = optionInputs(opened.options, manifest.task, cards.again);

  async function fill(card, blob, name) {
    const answer = await call("predict", { picture: blob, options: asked.values() });
    const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
    card.replaceChildren(
      element("h3", {}, name), drawing(bitmap, answer, model, name),
      element("div", { class: "found" }, details(answer, model), latency(answer.milliseconds)),
    );
    bitmap.close();
  }

  by("inputs").append(pictureInput(cards.take, say), asked.element);
  by("ask").hidden = false;
}

function speed(call, { site, manifest }) {
  const [button, times] = [by("measure"), by("times")];
  button.addEventListener("click", async () => {
    button.disabled = true;
    const batches = Math.max(...manifest.preprocess.input_size) > 256 ? [1] : [1, 16];
    try {
      const rows = await call("measure", { batches, rounds: ROUNDS });
      const columns = ["batch", `${manifest.profile}, a picture`, ...(site.float ? ["float, a picture", "faster"] : [])];
      times.replaceChildren(table("Median milliseconds of the network", columns, rows.map(({ batch, milliseconds: [own, float] }) => [
        String(batch), milliseconds(own), ...(site.float ? [milliseconds(float), `${(float / own).toFixed(2)} times`] : []),
      ])));
      by("measuring").textContent = "Measured";
    } catch (error) {
      by("measuring").textContent = error.message;
    }
    button.disabled = false;
  });
  by("speed").hidden = false;
}

async function start() {
  if (!isSecureContext) return refuse("browsers let pages check files only on https or localhost. Serve the folder so.");
  await serviceWorker();
  const most = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  const threads = Math.max(1, Math.min(most, Number(new URLSearchParams(location.search).get("threads")) || most));
  const call = connect((text) => {
    (document.body.dataset.state ? by("measuring") : verdictLine).textContent = text;
  });
  let opened;
  try {
    opened = await call("open", { threads });
  } catch (error) {
    return refuse(error.message);
  }
  const { verdict, manifest } = opened;
  by("title").textContent = document.title = `${manifest.architecture} (${manifest.task})`;
  if (!verdict.passed) return refuse(verdictOf(verdict), proofOf(opened));
  verdictLine.className = "verdict passed";
  verdictLine.textContent = `Proved in this browser: ${verdict.db.toFixed(1)} dB, ${verdict.needed.toFixed(0)} needed`;
  by("proof").append(element("details", {}, element("summary", {}, "What was checked"), proofOf(opened)));
  answers(call, opened);
  speed(call, opened);
  document.body.dataset.state = "ready";
}

start();

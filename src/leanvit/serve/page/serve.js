/** The page of `leanvit serve`: pictures in, what one model or two find in them. */

import { cardList } from "./cards.js";
import { Client, TokenNeeded, optionsOf } from "./client.js";
import { difference } from "./differences.js";
import { definitions, element, megabytes, table } from "./dom.js";
import { optionInputs } from "./options.js";
import { pictureInput } from "./pictures.js";
import { details, drawing, latency } from "./results.js";

const by = (id) => document.getElementById(id);
const say = (text) => { by("problem").textContent = text; };
const client = new Client();

let chosen = []; // what GET /v1/models/NAME says of the models that answer: one, or two side by side
let asked = optionInputs([], "", () => {});
const cards = cardList(by("results"), { card: "card sides", problem: "problem all" }, fill);

// --- models ---

async function start() {
  try {
    const models = await client.models();
    by("model").replaceChildren(...models.map(({ name, title }) => element("option", { value: name }, `${name} (${title})`)));
    by("token-form").hidden = true;
    by("work").hidden = false;
    by("state").textContent = `${models.length} ${models.length === 1 ? "model" : "models"}`;
    say("");
    by("model").onchange = () => offerBeside(models);
    by("beside").onchange = choose;
    await offerBeside(models);
    document.body.dataset.state = "ready";
  } catch (error) {
    failed(error);
  }
}

function failed(error) {
  if (error instanceof TokenNeeded) {
    by("token-form").hidden = false;
    by("state").textContent = "A token is needed";
    say(client.token ? "That is not its token." : "");
    by("token").focus();
    document.body.dataset.state = "token";
  } else {
    say(error.message);
  }
}

/** The second model is one of the same task, for only such answers can be compared. */
async function offerBeside(models) {
  const task = models.find(({ name }) => name === by("model").value)?.task;
  const others = models.filter((model) => model.task === task && model.name !== by("model").value);
  by("beside").replaceChildren(element("option", { value: "" }, "no other"), ...others.map(({ name }) => element("option", { value: name }, name)));
  by("beside").disabled = !others.length;
  await choose();
}

async function choose() {
  try {
    chosen = await Promise.all([by("model").value, by("beside").value].filter(Boolean).map((name) => client.model(name)));
  } catch (error) {
    failed(error);
    return;
  }
  by("proof").classList.toggle("two", chosen.length > 1);
  by("proof").replaceChildren(...chosen.map(proofOf));
  asked = optionInputs(optionsOf(chosen[0]), chosen[0].task, cards.again);
  by("asked").replaceChildren(asked.element);
  cards.again();
}

const number = (value) => (value === null || value === undefined ? null : Number.isInteger(value) ? String(value) : value.toFixed(3));

function proofOf(info) {
  const { gate, golden, accuracy, bits, bytes, input } = info;
  const checks = (gate?.checks ?? []).filter(({ passed }) => passed !== null);
  const rows = checks.map(({ name, passed, found, expected }) => [name, passed ? "passed" : "failed", found ?? "", expected ?? ""]);
  return element("details", {},
    element("summary", {}, `What ${info.name} proves: ${gate ? (gate.passed ? `all ${checks.length} checks passed` : "a check failed") : "no checks recorded"}`),
    definitions([
      ["network", `${info.architecture}, ${info.profile}${info.simulated ? ", simulated" : ""}`],
      ["input", `${input.height} × ${input.width}, ${input.channels === 1 ? "grey" : `${input.channels} channels`}`],
      ["golden images", golden && `at least ${number(golden.minimum_db)} dB in ${golden.runtime}, checked when the server loaded it`],
      ["accuracy", accuracy && `${accuracy.metric} ${number(accuracy.value)}${number(accuracy.float) === null ? "" : ` (float ${number(accuracy.float)})`}`],
      ["bits", bits ? `${number(bits.weights)} weights, ${number(bits.activations)} activations, ${bits.sites} sites` : "float"],
      ["size", bytes && megabytes(bytes["model.onnx"])],
      ["bundle", info.bundle.slice(0, 12)],
    ]),
    rows.length ? table(`Checks of ${info.name}`, ["check", "verdict", "found", "expected"], rows) : null,
  );
}

// --- pictures ---

async function fill(card, blob, name) {
  const infos = chosen;
  const answers = [];
  try {
    for (const info of infos) answers.push(await client.predict(info, blob, asked.values()));
  } catch (error) {
    if (error instanceof TokenNeeded) failed(error);
    throw error;
  }
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" }).catch(() => null);
  const sides = answers.map((answer, index) => side(answer, infos[index], bitmap, name, infos.length > 1));
  card.classList.toggle("two", infos.length > 1);
  card.dataset.models = infos.map((info) => info.name).join(" ");
  const words = answers.length > 1 ? element("p", { class: "all difference" }, `Difference: ${difference(...answers)}`) : null;
  card.replaceChildren(...[element("h3", {}, name), words, ...sides].filter(Boolean));
  bitmap?.close();
  if (answers.some((answer, index) => answer.bundle !== infos[index].bundle)) cards.afterwards(choose); // replaced meanwhile
}

function side(answer, info, bitmap, name, named) {
  const picture = bitmap
    ? drawing(bitmap, answer, info, named ? `${name}, ${info.name}` : name)
    : element("p", {}, "This browser can't show the picture.");
  const notes = (answer.notes ?? []).map((note) => element("p", {}, `Note: ${note}`));
  return element("div", { class: "side" }, named ? element("h4", {}, info.name) : null, picture,
    details(answer, info), latency(answer.milliseconds), ...notes);
}

by("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  client.token = by("token").value.trim();
  start();
});
by("inputs").append(pictureInput(cards.take, say));
start();

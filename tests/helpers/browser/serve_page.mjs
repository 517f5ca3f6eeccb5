/** What the page of `leanvit serve` does in Chromium: a scene a key, each told under its name. */

import { accessibility, cards, given, handInAllWays, launch, open, overflow, state, tabOrder, tell } from "./session.mjs";

const texts = (page, selector) => page.$$eval(selector, (found) => found.map((element) => element.innerText));

async function classify({ page, said }) {
  await page.goto(given.server);
  const told = { state: await state(page), models: await texts(page, "#model option") };
  await page.setInputFiles("#files", given.photos);
  told.cards = await cards(page, given.photos.length);
  await page.selectOption("#beside", { index: 1 });
  await page.waitForFunction((n) => document.querySelectorAll(".difference").length === n, given.photos.length);
  told.differences = await texts(page, ".difference");
  told.sides = await texts(page, ".card:first-child h4");
  if (given.picture) await page.screenshot({ path: given.picture, fullPage: true });
  await page.click("summary >> nth=0");
  told.proof = await page.innerText("#proof details[open]");
  told.violations = await accessibility(page);
  told.order = await tabOrder(page);
  return { ...told, said };
}

async function ways({ page, said }) {
  await handInAllWays(page, given.server);
  await page.setInputFiles("#files", given.broken);
  const found = await cards(page, 4);
  return { cards: found, violations: await accessibility(page), overflow: await overflow(page), said };
}

async function tasks({ page, said }) {
  await page.goto(given.server);
  await state(page);
  const told = {};
  for (const name of given.tasks) {
    await page.selectOption("#model", name);
    await page.waitForFunction((text) => document.querySelector("#proof summary")?.innerText.includes(text), name);
    if (name === "pose") {
      await page.fill("#option-boxes", given.boxes);
      await page.press("#option-boxes", "Enter");
    }
    if (name === given.tasks[0]) await page.setInputFiles("#files", given.photos[0]);
    await page.waitForFunction((text) => document.querySelector(".card")?.dataset.models === text, name);
    await cards(page, 1);
    told[name] = { found: await page.innerText(".side"), canvas: await page.$eval("canvas", (canvas) => canvas.toDataURL()) };
  }
  return { told, violations: await accessibility(page), said };
}

async function token({ page }) {
  await page.goto(given.guarded);
  const told = { state: await state(page), violations: await accessibility(page) };
  await page.fill("#token", "wrong");
  await page.click("text=Use it");
  await page.waitForFunction(() => document.querySelector("#problem").textContent);
  told.wrong = await page.innerText("#problem");
  await page.fill("#token", given.token);
  await page.click("text=Use it");
  await page.waitForFunction(() => document.body.dataset.state === "ready");
  await page.setInputFiles("#files", given.photos[0]);
  return { ...told, cards: await cards(page, 1) };
}

const browser = await launch();
const told = {};
const scene = async (name, play, form) => {
  const opened = await open(browser, form);
  told[name] = await play(opened);
  await opened.context.close();
};
await scene("classify", classify);
await scene("ways", ways, { width: 400, dark: true });
await scene("tasks", tasks);
await scene("token", token);
await browser.close();
tell(told);

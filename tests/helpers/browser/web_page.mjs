/** What the page of `leanvit web` does in Chromium: a scene a key, each told under its name. */

import { accessibility, cards, given, handInAllWays, launch, open, overflow, state, tabOrder, tell } from "./session.mjs";

const verdict = (page) => page.textContent("#verdict");

async function answers({ page, said, context }) {
  await page.goto(given.site);
  const told = { state: await state(page), isolated: await page.evaluate(() => crossOriginIsolated) };
  await page.setInputFiles("#files", given.photos);
  told.cards = await cards(page, given.photos.length);
  told.verdict = await verdict(page);
  told.browser = browser.version();
  told.threads = await page.$eval("#proof dl dd:last-of-type", (element) => element.textContent);
  told.violations = await accessibility(page);
  told.order = await tabOrder(page);
  await page.click("#measure");
  await page.waitForFunction(() => document.querySelector("#measuring").textContent === "Measured");
  told.times = await page.$$eval("#times tr", (rows) => rows.map((row) => row.innerText.split("\t")));
  await context.setOffline(true);
  await page.reload();
  told.offline = await state(page);
  await page.setInputFiles("#files", given.photos.slice(0, 1));
  told.offlineCards = await cards(page, 1);
  return { ...told, said };
}

async function ways({ page, said }) {
  await handInAllWays(page, given.site);
  await page.click("text=Close camera");
  await page.setInputFiles("#files", given.broken);
  const found = await cards(page, 3 + given.broken.length);
  const told = { cards: found, violations: await accessibility(page), overflow: await overflow(page) };
  await page.fill("#option-topK", "1");
  await page.press("#option-topK", "Enter");
  await page.waitForFunction(() => document.querySelectorAll(".bar").length === 3);
  return { ...told, said };
}

async function plain({ page, said }) {
  await page.goto(given.plain);
  return { state: await state(page), isolated: await page.evaluate(() => crossOriginIsolated), said };
}

async function refused(opened, site) {
  const { page } = opened;
  await page.goto(site);
  const told = { state: await state(page), verdict: await verdict(page), violations: await accessibility(page) };
  told.inputs = await page.$$eval("input", (inputs) => inputs.length);
  told.asked = await page.isVisible("#ask");
  const background = (element) => getComputedStyle(element).backgroundColor;
  return { ...told, colour: await page.$eval("#verdict", background) };
}

async function task(opened, { site, photo, options }) {
  const { page, said } = opened;
  await page.goto(site);
  const told = { state: await state(page), verdict: await verdict(page) };
  for (const [name, value] of Object.entries(options ?? {})) await page.fill(`#option-${name}`, value);
  await page.setInputFiles("#files", photo);
  told.card = (await cards(page, 1))[0];
  told.found = await page.$eval(".found", (element) => element.innerText);
  told.canvas = await page.$eval("canvas", (canvas) => canvas.toDataURL("image/png"));
  return { ...told, violations: await accessibility(page), said };
}

/** The picture for docs/web.md. */
async function picture(page) {
  await page.goto(given.picture.site);
  await state(page);
  await page.setInputFiles("#files", given.picture.photo);
  await cards(page, 1);
  await page.click("summary");
  await page.screenshot({ path: given.picture.path, fullPage: true });
}

const browser = await launch();
const told = {};
const scene = async (name, play, form) => {
  if (given.scenes && !given.scenes.includes(name)) return;
  const opened = await open(browser, form);
  told[name] = await play(opened);
  await opened.context.close();
};
await scene("answers", answers);
await scene("ways", ways, { width: 400, dark: true });
await scene("plain", plain);
for (const [name, site] of Object.entries(given.refused ?? {})) await scene(name, (opened) => refused(opened, site));
for (const [name, values] of Object.entries(given.tasks ?? {})) await scene(name, (opened) => task(opened, values));
if (given.picture) await scene("picture", ({ page }) => picture(page), { width: 900 });
await browser.close();
tell(told);

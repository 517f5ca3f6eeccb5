/** Headless Chromium for the tests of the pages: what the page writes to its console, asks for and looks like. */

import fs from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.BROWSER_MODULES}/`);
const { chromium } = require("playwright-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

/** Values that the test gives; what `tell` is handed goes back to it. */
export const given = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
export const tell = (values) => fs.writeFileSync(process.argv[3], JSON.stringify(values));

/** Chromium with a camera that shows a test picture. */
export function launch() {
  const args = [
    "--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--disable-background-networking", "--disable-component-update",
  ];
  return chromium.launch({ executablePath: process.env.CHROMIUM, args });
}

/** A page of its own context, and what it says: {page, said: {console, elsewhere}}. */
export async function open(browser, { width = 1100, height = 900, dark = false, headers } = {}) {
  const context = await browser.newContext({
    viewport: { width, height }, colorScheme: dark ? "dark" : "light", permissions: ["camera"], extraHTTPHeaders: headers,
  });
  const page = await context.newPage();
  page.setDefaultTimeout(given.timeout ?? 300_000);
  const said = { console: [], elsewhere: [] };
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) said.console.push(message.text());
  });
  page.on("pageerror", (error) => said.console.push(error.message));
  context.on("request", (request) => {
    const { protocol, hostname } = new URL(request.url());
    if (!["blob:", "data:"].includes(protocol) && hostname !== "localhost") said.elsewhere.push(request.url());
  });
  return { page, context, said };
}

/** What axe-core finds wrong, as short texts. The page's policy forbids injected scripts, so it is evaluated. */
export async function accessibility(page) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run(document));
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html.slice(0, 120)).join(" | ")}`);
}

/** Pixels by which the page is wider than its window. */
export const overflow = (page) => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);

/** Names of what the tabulator key reaches, in its order. */
export async function tabOrder(page, most = 12) {
  const names = [];
  // From the start of the page, wherever the last click was.
  await page.evaluate(() => {
    document.body.tabIndex = -1;
    document.body.focus();
    document.body.removeAttribute("tabindex");
  });
  for (let i = 0; i < most; i++) {
    await page.keyboard.press("Tab");
    const name = await page.evaluate(() => {
      const { tagName, id, textContent } = document.activeElement;
      return tagName === "BODY" ? null : id || textContent.trim().slice(0, 40);
    });
    if (name === null || names.includes(name)) break;
    names.push(name);
  }
  return names;
}

/** Hand over files as the system does: "paste" or "drop". */
export function hand(page, kind, path) {
  const data = fs.readFileSync(path).toString("base64");
  return page.evaluate(
    ([event, text]) => {
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], `${event}.jpg`, { type: "image/jpeg" }));
      const init = { bubbles: true, cancelable: true };
      dispatchEvent(
        event === "paste"
          ? new ClipboardEvent("paste", { ...init, clipboardData: transfer })
          : new DragEvent("drop", { ...init, dataTransfer: transfer }),
      );
    },
    [kind, data],
  );
}

/** Wait for so many answered pictures; returns each as {name, text, busy...}. */
export async function cards(page, count) {
  await page.waitForFunction((n) => document.querySelectorAll(".card:not([aria-busy])").length === n, count);
  return page.$$eval(".card", (all) =>
    all.map((card) => ({
      name: card.querySelector("h3").textContent,
      first: card.querySelector(".bar .name")?.textContent ?? null,
      problem: card.querySelector(".problem")?.textContent ?? null,
      alternative: card.querySelector("canvas")?.getAttribute("aria-label") ?? null,
      times: card.querySelector(".times")?.innerText ?? null,
    })),
  );
}

/** Wait until a page says how it stands; returns that. */
export const state = (page) => page.waitForFunction(() => document.body.dataset.state).then((handle) => handle.jsonValue());

/** Open a page and hand it a picture in each way but choosing a file: pasted, dropped, taken by the camera. */
export async function handInAllWays(page, address) {
  await page.goto(address);
  await state(page);
  await hand(page, "paste", given.photos[0]);
  await cards(page, 1);
  await hand(page, "drop", given.photos[0]);
  await cards(page, 2);
  await page.click("text=Camera");
  await page.click("text=Take picture");
  await cards(page, 3);
}

/** Pictures that were handed over: each is a card, and one is filled at a time. */

import { element } from "./dom.js";

/**
 * Cards in an element, the newest first. fill(card, blob, name) puts what was found into one; where it throws, the card
 * says so. classes: {card, problem} of what is made here. Returns take(blob, name) for a new picture, again() to fill
 * all cards anew, and afterwards(work) to do something once those in line are filled.
 */
export function cardList(into, classes, fill) {
  const shown = [];
  let last = Promise.resolve();
  const afterwards = (work) => { last = last.then(work); };

  function take(blob, name) {
    const card = element("article", { class: classes.card, "aria-busy": "true" }, element("h3", {}, name), element("p", {}, "Working"));
    into.prepend(card);
    const turn = () => afterwards(() => filled(card, blob, name));
    shown.push(turn);
    turn();
  }

  async function filled(card, blob, name) {
    card.setAttribute("aria-busy", "true");
    try {
      await fill(card, blob, name);
    } catch (error) {
      card.replaceChildren(element("h3", {}, name), element("p", { class: classes.problem, role: "alert" }, `${name}: ${error.message}`));
    }
    card.removeAttribute("aria-busy");
  }

  return { take, again: () => shown.forEach((turn) => turn()), afterwards };
}

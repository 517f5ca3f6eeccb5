/** Ways to hand a page its pictures: pick, drop, paste, or the camera. */

import { element } from "./dom.js";

/** The elements for it; take(blob, name) is called for each picture, say(text) with what went wrong. */
export function pictureInput(take, say) {
  const each = (files) => [...files].forEach((file) => take(file, file.name || "pasted picture"));
  const chooser = element("input", {
    type: "file", accept: "image/*", multiple: true, id: "files", change: () => {
      each(chooser.files);
      chooser.value = "";
    },
  });
  const zone = element(
    "div", { class: "drop" },
    element("label", { for: "files" }, "Pictures: choose, drop or paste them"), chooser,
    camera(take, say),
  );
  const stop = (event) => event.preventDefault();
  addEventListener("dragover", (event) => { stop(event); zone.classList.add("over"); });
  addEventListener("dragleave", () => zone.classList.remove("over"));
  addEventListener("drop", (event) => {
    stop(event);
    zone.classList.remove("over");
    each(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => each(event.clipboardData?.files ?? []));
  return zone;
}

function camera(take, say) {
  const video = element("video", { playsinline: true, muted: true, "aria-label": "What the camera sees" });
  let stream = null;
  const start = element("button", { type: "button", click: open }, "Camera");
  const shoot = element("button", { type: "button", class: "main", click: picture }, "Take picture");
  const end = element("button", { type: "button", click: close }, "Close camera");
  const view = element("div", { class: "camera", hidden: true }, video, element("p", {}, shoot, " ", end));

  async function open() {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      say(`The camera can't be used: ${error.message}. Allow it for this page, or choose a file.`);
      return;
    }
    video.srcObject = stream;
    await video.play();
    [start.hidden, view.hidden] = [true, false];
    shoot.focus();
  }

  function close() {
    stream?.getTracks().forEach((track) => track.stop());
    [start.hidden, view.hidden] = [false, true];
    start.focus();
  }

  async function picture() {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    // Without loss, so that the network sees what the camera saw.
    take(await canvas.convertToBlob({ type: "image/png" }), "camera");
  }

  return element("div", {}, start, view);
}

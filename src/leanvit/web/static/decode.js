/** From an image file to pixels, by the browser's own decoders. */

import { MAX_PIXELS, MIN_SIDE } from "./prepare.js";

const STARTS = [
  [0xff, 0xd8, 0xff], // JPEG
  [0x89, 0x50, 0x4e, 0x47], // PNG
  [0x42, 0x4d], // BMP
];

function isReadable(head) {
  const text = String.fromCharCode(...head);
  const webp = text.startsWith("RIFF") && text.slice(8, 12) === "WEBP";
  const avif = ["ftypavif", "ftypavis"].includes(text.slice(4, 12));
  return webp || avif || STARTS.some((start) => start.every((byte, index) => head[index] === byte));
}

/**
 * Pixels of the first frame of a JPEG, PNG, WebP, AVIF or BMP image, upright, laid on white where it is transparent;
 * a colour profile is ignored, as Pillow does. Returns {data, width, height, step: 4}.
 */
export async function decodePicture(blob) {
  const head = new Uint8Array(await blob.slice(0, 12).arrayBuffer());
  if (!isReadable(head)) throw new Error("not an image that can be read here, expected JPEG, PNG, WebP, AVIF or BMP.");
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Error("damaged image, expected a complete file.");
  }
  const { width, height } = bitmap;
  if (Math.min(width, height) < MIN_SIDE || width * height > MAX_PIXELS) {
    throw new Error(`the image has ${width} x ${height} pixels, expected ${MIN_SIDE} a side to 100 million.`);
  }
  // A canvas in the processor's memory: one of the graphics card rounds as it likes.
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height, step: 4 };
}

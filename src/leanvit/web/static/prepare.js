/**
 * From a decoded picture to a network's input, with the numbers of leanvit.imaging, runtime/letterbox.py and
 * runtime/decode.py. Pictures are those of resize.js; sizes are [height, width], boxes [x1, y1, x2, y2] in pixels.
 */

import { resize } from "./resize.js";

export const MAX_PIXELS = 100_000_000;
export const MIN_SIDE = 2;
const GREY = 114;
const POSE_PADDING = 1.25;

/** Rounded as Python does: halves to the even number. */
export function round(value) {
  const low = Math.floor(value);
  const rest = value - low;
  if (rest !== 0.5) return rest < 0.5 ? low : low + 1;
  return low % 2 === 0 ? low : low + 1;
}

/** [height, width] that a picture gets in a letterbox of `size`. */
export function letterboxedSize([height, width], size) {
  const scale = Math.min(size[0] / height, size[1] / width);
  return [Math.max(1, round(height * scale)), Math.max(1, round(width * scale))];
}

/** Where a picture of `pictureSize` lies in a letterbox: pixels of the input for one of the picture, and its size. */
export function place(pictureSize, size) {
  const [tall, wide] = letterboxedSize(pictureSize, size);
  return { scale: [wide / pictureSize[1], tall / pictureSize[0]], size: [tall, wide], networkSize: size };
}

function sizeBeforeCrop(width, height, preprocess) {
  const [tall, wide] = preprocess.input_size.map((side) => Math.floor(side / preprocess.crop_pct));
  if (tall * width >= wide * height) return [Math.max(wide, Math.trunc((tall * width) / height)), tall];
  return [wide, Math.max(tall, Math.trunc((wide * height) / width))];
}

function crop(picture, left, top, width, height) {
  const { step } = picture;
  const data = new Uint8Array(width * height * step);
  for (let y = 0; y < height; y++) {
    const from = ((top + y) * picture.width + left) * step;
    data.set(picture.data.subarray(from, from + width * step), y * width * step);
  }
  return { data, width, height, step };
}

/** `picture` laid at (left, top) on a grey sheet. */
function pasted(picture, left, top, width, height) {
  const channels = Math.min(picture.step, 3);
  const data = new Uint8Array(width * height * channels).fill(GREY);
  const [first, last] = [Math.max(0, -left), Math.min(picture.width, width - left)];
  for (let y = Math.max(0, -top); y < Math.min(picture.height, height - top); y++) {
    for (let x = first; x < last; x++) {
      const from = (y * picture.width + x) * picture.step;
      const to = ((y + top) * width + x + left) * channels;
      for (let channel = 0; channel < channels; channel++) data[to + channel] = picture.data[from + channel];
    }
  }
  return { data, width, height, step: channels };
}

/** Grey of a colour picture: Pillow's convert("L"), ITU-R 601-2 in 16 bits. */
function grey(picture) {
  const { data, width, height, step } = picture;
  const result = new Uint8Array(width * height);
  for (let i = 0, from = 0; i < result.length; i++, from += step) {
    result[i] = (data[from] * 19595 + data[from + 1] * 38470 + data[from + 2] * 7471 + 0x8000) >> 16;
  }
  return { data: result, width, height, step: 1 };
}

/** Major version of the Pillow that made the bundle's pixels. */
const pillowOf = ({ versions }) => Number.parseInt(versions?.pillow ?? "13", 10);

/** The network's input of a whole picture: {data, width, height, step} of its size and channels. */
export function prepare(picture, manifest) {
  const { preprocess } = manifest;
  const pillow = pillowOf(manifest);
  const [height, width] = preprocess.input_size;
  const filter = preprocess.interpolation;
  const source = preprocess.mean.length === 1 ? grey(picture) : picture;
  if (preprocess.crop_mode === "squash") return resize(source, width, height, filter, pillow);
  if (preprocess.crop_mode === "letterbox") {
    const [tall, wide] = letterboxedSize([source.height, source.width], preprocess.input_size);
    return pasted(resize(source, wide, tall, filter, pillow), 0, 0, width, height);
  }
  const [wholeWidth, wholeHeight] = sizeBeforeCrop(source.width, source.height, preprocess);
  const left = round((wholeWidth - width) / 2);
  const top = round((wholeHeight - height) / 2);
  if (wholeWidth * wholeHeight > MAX_PIXELS) {
    const x = source.width / wholeWidth;
    const y = source.height / wholeHeight;
    const box = [left * x, top * y, (left + width) * x, (top + height) * y];
    return resize(source, width, height, filter, pillow, box);
  }
  return crop(resize(source, wholeWidth, wholeHeight, filter, pillow), left, top, width, height);
}

/** The part of a picture that a pose network sees of an object; aspect: width over height of its input. */
export function poseRegion([x1, y1, x2, y2], aspect) {
  const width = Math.max(x2 - x1, (y2 - y1) * aspect) * POSE_PADDING;
  const height = Math.max(y2 - y1, (x2 - x1) / aspect) * POSE_PADDING;
  const [x, y] = [(x1 + x2) / 2, (y1 + y2) / 2];
  return [x - width / 2, y - height / 2, x + width / 2, y + height / 2];
}

/** A part of a picture at the network's input size, bilinear, grey where it is outside of the picture. */
export function cropRegion(picture, [x1, y1, x2, y2], manifest) {
  const [height, width] = manifest.preprocess.input_size;
  const margin = Math.ceil(Math.max((x2 - x1) / width, (y2 - y1) / height, 1));
  const [left, top] = [Math.floor(x1) - margin, Math.floor(y1) - margin];
  const [right, bottom] = [Math.ceil(x2) + margin, Math.ceil(y2) + margin];
  const sheet = pasted(picture, -left, -top, right - left, bottom - top);
  return resize(sheet, width, height, "bilinear", pillowOf(manifest), [x1 - left, y1 - top, x2 - left, y2 - top]);
}

/**
 * From the raw outputs of a network to objects, class maps and keypoints of a picture, as runtime/decode.py does it.
 * A tensor is {data, dims}, of which `row(tensor, i)` is one picture's part.
 */

const { fround } = Math;

/** One picture's part of a batch: {data, dims} without the first dimension. */
export function row({ data, dims }, index) {
  const size = dims.slice(1).reduce((product, side) => product * side, 1);
  return { data: data.subarray(index * size, (index + 1) * size), dims: dims.slice(1) };
}

export function softmax(logits) {
  const largest = logits.reduce((most, value) => Math.max(most, value), -Infinity);
  const exponents = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = exponents.reduce((total, value) => total + value, 0);
  return exponents.map((value) => value / sum);
}

export function sigmoid(value) {
  const small = Math.exp(-Math.abs(value));
  return (value >= 0 ? 1 : small) / (1 + small);
}

/** Places of the values, the largest first; of equal ones the lower place. */
export function ranked(values) {
  return Array.from(values, (_, place) => place).sort((a, b) => values[b] - values[a] || a - b);
}

/** Two pixels and their weights for each of `wanted` along an axis: bilinear as torch does it, corners not aligned. */
function taps(found, wanted) {
  const ratio = fround(found / wanted);
  return Array.from({ length: wanted }, (_, place) => {
    const source = Math.max(0, fround(fround(ratio * fround(place + 0.5)) - 0.5));
    const low = Math.min(Math.trunc(source), found - 1);
    const share = fround(source - low);
    return [[low, fround(1 - share)], [Math.min(low + 1, found - 1), share]];
  });
}

/** Objects of a detector that has done its own NMS: [{label, score, box, whole, index}], in its order. */
export function foundObjects(boxes, scores, labels, placement, [height, width], threshold) {
  const found = [];
  const [x, y] = placement.scale;
  for (let index = 0; index < scores.data.length; index++) {
    const [left, top, right, bottom] = boxes.data.subarray(4 * index, 4 * index + 4);
    const whole = [left / x, top / y, right / x, bottom / y];
    const box = whole.map((value, side) => Math.min(Math.max(value, 0), side % 2 ? height : width));
    const score = scores.data[index];
    if (score >= threshold && score > 0 && box[2] > box[0] && box[3] > box[1]) {
      found.push({ label: Number(labels.data[index]), score, box, whole, index });
    }
  }
  return found;
}

/**
 * COCO's run lengths (column by column, first those outside) of one mask (m, m) laid over its box in a picture, with
 * the roundings of torchvision's paste_masks_in_image.
 */
export function pasteMask({ data, dims }, box, [height, width], threshold = 0.5) {
  const side = dims[dims.length - 1];
  const padded = side + 2;
  const at = (y, x) => (y > 0 && x > 0 && y <= side && x <= side ? data[(y - 1) * side + x - 1] : 0);
  const [x1, y1, x2, y2] = expanded(box, padded / side).map(Math.trunc);
  const columns = taps(padded, Math.max(x2 - x1 + 1, 1));
  const rows = taps(padded, Math.max(y2 - y1 + 1, 1));
  const inside = (x, y) => {
    let sum = 0;
    for (const [v, down] of rows[y - y1]) for (const [u, across] of columns[x - x1]) sum += down * across * at(v, u);
    return sum > threshold;
  };
  const [top, bottom] = [Math.max(y1, 0), Math.min(y2 + 1, height)];
  const runs = new Runs();
  for (let x = Math.max(x1, 0); x < Math.min(x2 + 1, width); x++) {
    for (let y = top; y < bottom; y++) if (inside(x, y)) runs.add(x * height + y);
  }
  return { size: [height, width], counts: runs.counts(height * width) };
}

function expanded(box, scale) {
  const [x1, y1, x2, y2] = box.map(fround);
  const halves = [x2 - x1, y2 - y1].map((width) => fround(fround(fround(width) * 0.5) * fround(scale)));
  const middles = [x2 + x1, y2 + y1].map((sum) => fround(fround(sum) * 0.5));
  return [...middles.map((middle, i) => fround(middle - halves[i])), ...middles.map((m, i) => fround(m + halves[i]))];
}

/** Run lengths of places that come in rising order. */
class Runs {
  #edges = [];
  #next = 0;

  add(place) {
    if (this.#edges.length === 0) this.#edges.push(place);
    else if (place !== this.#next) this.#edges.push(this.#next, place);
    this.#next = place + 1;
  }

  counts(total) {
    const edges = this.#edges.length ? [...this.#edges, this.#next] : [];
    if (edges.at(-1) !== total) edges.push(total);
    return edges.map((edge, i) => edge - (i ? edges[i - 1] : 0));
  }
}

/**
 * The class of every pixel of a picture (Uint8Array) from logits (K, h, w) over the network's whole input: resampled
 * to the input, cut to the part where the picture lies, resampled to the picture; the first of equal ones wins.
 */
export function classMap({ data, dims }, placement, [height, width]) {
  const [classes, tall, wide] = dims;
  const rows = chained(tall, placement.networkSize[0], placement.size[0], height);
  const columns = chained(wide, placement.networkSize[1], placement.size[1], width);
  const chosen = new Uint8Array(height * width);
  const line = new Float32Array(wide);
  const best = new Float32Array(width);
  for (let y = 0; y < height; y++) {
    best.fill(-Infinity);
    for (let label = 0; label < classes; label++) {
      const plane = label * tall * wide;
      line.fill(0);
      for (const [v, share] of rows[y]) {
        for (let u = 0, from = plane + v * wide; u < wide; u++) line[u] += share * data[from + u];
      }
      for (let x = 0; x < width; x++) {
        let value = 0;
        for (const [u, share] of columns[x]) value += share * line[u];
        if (value > best[x]) {
          best[x] = value;
          chosen[y * width + x] = label;
        }
      }
    }
  }
  return chosen;
}

/** Pixels and weights along an axis of two resamplings: `found` to `input`, of which `kept` are made `wanted`. */
function chained(found, input, kept, wanted) {
  const inner = taps(found, input);
  return taps(kept, wanted).map((pair) => {
    const weights = new Map();
    for (const [place, outer] of pair) {
      for (const [source, share] of inner[place]) weights.set(source, (weights.get(source) ?? 0) + outer * share);
    }
    return [...weights].filter(([, share]) => share !== 0);
  });
}

/** [x, y, score] of each keypoint from heatmaps (K, h, w) over `region`: the largest cell, a quarter aside. */
export function heatmapKeypoints({ data, dims }, [x1, y1, x2, y2]) {
  const [count, tall, wide] = dims;
  const side = (before, after) => 0.25 * Math.sign(after - before);
  return Array.from({ length: count }, (_, keypoint) => {
    const map = data.subarray(keypoint * tall * wide, (keypoint + 1) * tall * wide);
    const most = map.reduce((best, value, place) => (value > map[best] ? place : best), 0);
    const [y, x] = [Math.floor(most / wide), most % wide];
    const across = x > 0 && x < wide - 1 ? side(map[most - 1], map[most + 1]) : 0;
    const down = y > 0 && y < tall - 1 ? side(map[most - wide], map[most + wide]) : 0;
    const place = [x1 + ((x + 0.5 + across) * (x2 - x1)) / wide, y1 + ((y + 0.5 + down) * (y2 - y1)) / tall];
    return [...place, map[most]].map(fround);
  });
}

/**
 * Pillow's resampling, to the bit: the filter is widened where the picture shrinks, there is a pass along each axis, and
 * what is between them is rounded to 8 bits. Source: Pillow, src/libImaging/Resample.c and Geometry.c.
 *
 * A picture is {data, width, height, step}: data of 8-bit levels, `step` of them a pixel (4: RGBA, of which three are
 * read; 3: RGB; 1: grey).
 */

const PRECISION_BITS = 22; // 32 - 8 - 2, as in Resample.c: fixed point of the coefficients

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    at(value) {
      const a = -0.5;
      const x = Math.abs(value);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
  lanczos: { support: 3, at: (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** What of `size` source pixels, between `from` and `to`, makes each of `wanted` pixels: first pixel and weights. */
function coefficients(size, from, to, wanted, filter) {
  const scale = Math.fround(to - from) / wanted;
  const widened = Math.max(scale, 1);
  const support = filter.support * widened;
  const found = [];
  for (let place = 0; place < wanted; place++) {
    const center = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(size, Math.trunc(center + support + 0.5));
    const shares = [];
    let sum = 0;
    for (let x = 0; x < end - first; x++) {
      const share = filter.at((x + first - center + 0.5) * (1 / widened));
      shares.push(share);
      sum += share;
    }
    const weights = Int32Array.from(shares, (share) => {
      const fixed = (sum !== 0 ? share / sum : share) * (1 << PRECISION_BITS);
      return Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    });
    found.push({ first, weights });
  }
  return found;
}

const ROUND = 1 << (PRECISION_BITS - 1);

function clip(sum) {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

function across(picture, columns, channels) {
  const { data, width, height, step } = picture;
  const result = new Uint8Array(columns.length * height * channels);
  let place = 0;
  for (let y = 0; y < height; y++) {
    const row = y * width * step;
    for (const { first, weights } of columns) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = ROUND;
        let from = row + first * step + channel;
        for (let i = 0; i < weights.length; i++, from += step) sum = (sum + data[from] * weights[i]) | 0;
        result[place++] = clip(sum);
      }
    }
  }
  return { data: result, width: columns.length, height, step: channels };
}

function down(picture, rows, channels) {
  const { data, width, step } = picture;
  const result = new Uint8Array(width * rows.length * channels);
  const stride = width * step;
  let place = 0;
  for (const { first, weights } of rows) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = ROUND;
        let from = first * stride + x * step + channel;
        for (let i = 0; i < weights.length; i++, from += stride) sum = (sum + data[from] * weights[i]) | 0;
        result[place++] = clip(sum);
      }
    }
  }
  return { data: result, width, height: rows.length, step: channels };
}

function nearestPlaces(size, from, to, wanted) {
  const scale = Math.fround(to - from) / wanted;
  const places = [];
  // Summed up as Geometry.c does: a product would round otherwise.
  for (let i = 0, at = from + scale * 0.5; i < wanted; i++, at += scale) places.push(Math.min(size - 1, Math.trunc(at)));
  return places;
}

function nearest(picture, width, height, box, channels) {
  const columns = nearestPlaces(picture.width, box[0], box[2], width);
  const rows = nearestPlaces(picture.height, box[1], box[3], height);
  const result = new Uint8Array(width * height * channels);
  let place = 0;
  for (const y of rows) {
    for (const x of columns) {
      const from = (y * picture.width + x) * picture.step;
      for (let channel = 0; channel < channels; channel++) result[place++] = picture.data[from + channel];
    }
  }
  return { data: result, width, height, step: channels };
}

/** Whether the vertical pass is the first: since Pillow 13 (pull request 9549), where the height shrinks much more. */
function isVerticalFirst(picture, width, height, pillow) {
  const less = picture.height - height;
  return pillow >= 13 && less > 0 && less > 2 * (picture.width - width);
}

/**
 * A picture at another size, as Pillow's Image.resize((width, height), filter, box) returns it.
 * pillow: its major version; two of them round in another order.
 */
export function resize(picture, width, height, filter, pillow, box = [0, 0, picture.width, picture.height]) {
  const channels = Math.min(picture.step, 3);
  const [left, top, right, bottom] = box.map(Math.fround);
  if (filter === "nearest") return nearest(picture, width, height, [left, top, right, bottom], channels);
  const passes = [];
  if (width !== picture.width || left !== 0 || right !== width) {
    const columns = coefficients(picture.width, left, right, width, FILTERS[filter]);
    passes.push((from) => across(from, columns, channels));
  }
  if (height !== picture.height || top !== 0 || bottom !== height) {
    const rows = coefficients(picture.height, top, bottom, height, FILTERS[filter]);
    passes.push((from) => down(from, rows, channels));
  }
  if (isVerticalFirst(picture, width, height, pillow)) passes.reverse();
  const result = passes.reduce((from, pass) => pass(from), picture);
  return result.step === channels ? result : withoutAlpha(result);
}

/** RGBA as RGB. */
function withoutAlpha({ data, width, height }) {
  const result = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    result[to++] = data[from];
    result[to++] = data[from + 1];
    result[to++] = data[from + 2];
  }
  return { data: result, width, height, step: 3 };
}

/**
 * A picture on a canvas with what was found in it: boxes, masks, keypoints and class maps, as runtime/draw.py draws
 * them. What was found is in the JSON of `leanvit predict`; a class map is {size: [height, width], data}.
 */

const LONGEST = 1024; // pixels of a canvas a side
const OPACITY = 0.45;

// Okabe and Ito, Color Universal Design, 2008: told apart with every common colour blindness.
const PALETTE = [
  [230, 159, 0], [86, 180, 233], [0, 158, 115], [213, 94, 0], [204, 121, 167], [0, 114, 178], [240, 228, 66],
];

/** [red, green, blue] of a class: seven for the colour-blind, then ever new hues in three tones. */
export function colour(label) {
  if (label < PALETTE.length) return PALETTE[label];
  const hue = (label * (Math.sqrt(5) - 1)) / 2 % 1;
  const lightness = [0.35, 0.55, 0.75][label % 3];
  const spread = 0.8 * Math.min(lightness, 1 - lightness);
  const channel = (turn) => {
    const place = (turn + hue * 12) % 12;
    return Math.round(255 * (lightness - spread * Math.max(-1, Math.min(place - 3, 9 - place, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/** Black or white, whichever stands out more. */
const readableOn = ([red, green, blue]) => (0.299 * red + 0.587 * green + 0.114 * blue > 128 ? "black" : "white");

/**
 * Draw `picture` (an ImageBitmap) and what was found; model: {labels, keypoints} with `skeleton` of the keypoints.
 * The canvas is at most 1024 pixels wide and high.
 */
export function draw(canvas, picture, answer, model) {
  const factor = Math.min(1, LONGEST / Math.max(picture.width, picture.height));
  canvas.width = Math.max(1, Math.round(picture.width * factor));
  canvas.height = Math.max(1, Math.round(picture.height * factor));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (answer.map) drawMap(context, answer.map);
  const objects = [...(answer.objects ?? [])].sort((a, b) => a.score - b.score).map((one) => scaled(one, factor, model));
  const line = Math.max(2, Math.round(Math.max(canvas.width, canvas.height) / 320));
  for (const one of objects) if (one.segmentation) drawMask(context, one, factor, line);
  for (const one of objects) drawBox(context, one, line, model.keypoints?.skeleton ?? []);
  // Labels last, so that no box crosses a text.
  for (const one of objects) drawLabel(context, one);
}

function scaled(one, factor, { labels }) {
  const tone = colour(one.label === undefined ? 0 : labels.indexOf(one.label));
  const keypoints = one.keypoints?.map(([x, y, score]) => [x * factor, y * factor, score]);
  return { ...one, box: one.box.map((side) => side * factor), keypoints, tone };
}

function drawBox(context, { box: [x1, y1, x2, y2], keypoints, tone }, line, skeleton) {
  context.strokeStyle = context.fillStyle = css(tone);
  context.lineWidth = line;
  context.strokeRect(x1 + line / 2, y1 + line / 2, Math.max(1, x2 - x1 - line), Math.max(1, y2 - y1 - line));
  const shown = (keypoints ?? []).map((point) => (point[2] > 0 ? point : null));
  for (const [first, second] of skeleton) {
    if (!shown[first] || !shown[second]) continue;
    context.beginPath();
    context.moveTo(shown[first][0], shown[first][1]);
    context.lineTo(shown[second][0], shown[second][1]);
    context.stroke();
  }
  context.strokeStyle = "white";
  context.lineWidth = 1;
  for (const [x, y] of shown.filter(Boolean)) {
    context.beginPath();
    context.arc(x, y, 1.5 * line, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }
}

function drawLabel(context, { box, label, score, tone }) {
  const { width, height } = context.canvas;
  const size = Math.max(12, Math.round(Math.max(width, height) / 45));
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "top";
  const text = `${label ?? "object"} ${score.toFixed(2)}`;
  const across = context.measureText(text).width + 6;
  const down = size + 6;
  const x = Math.max(0, Math.min(box[0], width - across));
  const y = Math.max(0, Math.min(box[1] >= down ? box[1] - down : box[1], height - down));
  context.fillStyle = css(tone);
  context.fillRect(x, y, across, down);
  context.fillStyle = readableOn(tone);
  context.fillText(text, x + 3, y + 3);
}

function drawMap(context, { size: [height, width], data }) {
  const layer = new ImageData(width, height);
  for (let i = 0; i < data.length; i++) layer.data.set([...colour(data[i]), 255 * OPACITY], 4 * i);
  lay(context, layer, context.canvas.width, context.canvas.height);
}

function lay(context, layer, width, height) {
  const sheet = new OffscreenCanvas(layer.width, layer.height);
  sheet.getContext("2d").putImageData(layer, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(sheet, 0, 0, width, height);
}

function drawMask(context, { segmentation, tone }, factor, line) {
  const { width, height } = context.canvas;
  const mask = maskOn(segmentation, factor, width, height);
  const layer = new ImageData(width, height);
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!mask[y * width + x]) continue;
      const inner = at(x - line, y) && at(x + line, y) && at(x, y - line) && at(x, y + line);
      layer.data.set([...tone, inner ? 255 * OPACITY : 255], 4 * (y * width + x));
    }
  }
  lay(context, layer, width, height);
}

/** COCO's run lengths of a picture as a mask (Uint8Array) on a canvas that is smaller by `factor`. */
export function maskOn({ size: [tall], counts }, factor, width, height) {
  const mask = new Uint8Array(width * height);
  const lengths = typeof counts === "string" ? unpack(counts) : counts;
  let place = 0;
  lengths.forEach((length, index) => {
    for (let first = place; index % 2 && first < place + length; ) {
      const column = Math.floor(first / tall);
      const end = Math.min(place + length, (column + 1) * tall);
      const x = Math.min(width - 1, Math.floor(column * factor));
      const bottom = Math.min(height, Math.ceil((end - column * tall) * factor));
      for (let y = Math.floor((first - column * tall) * factor); y < bottom; y++) mask[y * width + x] = 1;
      first = end;
    }
    place += length;
  });
  return mask;
}

/** Run lengths of COCO's compressed form: rleFrString of cocoapi, common/maskApi.c. */
function unpack(text) {
  const lengths = [];
  let [value, shift] = [0, 0];
  for (const letter of text) {
    const group = letter.charCodeAt(0) - 48;
    value |= (group & 31) << shift;
    shift += 5;
    if (group & 32) continue;
    if (group & 16) value -= 1 << shift;
    lengths.push(lengths.length > 2 ? value + lengths.at(-2) : value);
    [value, shift] = [0, 0];
  }
  return lengths;
}

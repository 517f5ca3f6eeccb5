/** Where two bundles differ on one picture, in a sentence. Answers are the service's JSON of the same task. */

import { percent } from "./dom.js";

const SAME_OVERLAP = 0.5; // boxes of one object: PASCAL VOC's threshold

/** What differs between the answers `a` and `b` of one picture. */
export function difference(a, b) {
  if (a.predictions) return ofLabels(a.predictions, b.predictions);
  if (a.shares) return ofMaps(a, b);
  if (a.embedding) return `cosine ${cosine(a.embedding, b.embedding).toFixed(5)}`;
  return a.objects[0]?.keypoints || b.objects[0]?.keypoints ? ofKeypoints(a.objects, b.objects) : ofObjects(a.objects, b.objects);
}

function ofLabels(a, b) {
  const others = new Map(b.map(({ label, probability }) => [label, probability]));
  const common = a.filter(({ label }) => others.has(label));
  const [first, second] = [a[0]?.label, b[0]?.label];
  const same = first === second ? `the same first label${first === undefined ? ": none" : ""}` : `first ${first ?? "none"} here, ${second ?? "none"} there`;
  if (!common.length) return `${same}; no label in common`;
  const apart = common.map(({ label, probability }) => ({ label, by: Math.abs(probability - others.get(label)) }));
  const most = apart.reduce((best, one) => (one.by > best.by ? one : best));
  return `${same}; probabilities at most ${percent(most.by)} apart${most.by ? ` (${most.label})` : ""}`;
}

function ofMaps(a, b) {
  if (!a.map || !b.map || String(a.map.size) !== String(b.map.size)) return "maps of other sizes";
  const other = a.map.data.reduce((count, label, place) => count + (label !== b.map.data[place] ? 1 : 0), 0);
  return `${percent(other / a.map.data.length)} of the pixels have another class`;
}

function cosine(a, b) {
  const dot = (one, other) => one.reduce((sum, value, i) => sum + value * other[i], 0);
  return dot(a, b) / Math.max(Math.sqrt(dot(a, a) * dot(b, b)), Number.MIN_VALUE);
}

function overlap(a, b) {
  const shared = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return shared / Math.max(area(a) + area(b) - shared, Number.MIN_VALUE);
}

function ofObjects(a, b) {
  const left = [...b];
  let apart = 0;
  const pairs = a.filter((one) => {
    const place = left.findIndex((other) => other.label === one.label && overlap(one.box, other.box) >= SAME_OVERLAP);
    if (place < 0) return false;
    const [found] = left.splice(place, 1);
    apart = Math.max(apart, Math.abs(found.score - one.score));
    return true;
  });
  const scores = pairs.length ? `, scores at most ${apart.toFixed(2)} apart` : "";
  return `${pairs.length} objects in both${scores}; ${a.length - pairs.length} only here, ${left.length} only there`;
}

function ofKeypoints(a, b) {
  const distances = a.flatMap(({ keypoints }, object) =>
    keypoints.map(([x, y], k) => Math.hypot(x - b[object].keypoints[k][0], y - b[object].keypoints[k][1])),
  );
  const mean = distances.reduce((sum, value) => sum + value, 0) / distances.length;
  return `keypoints ${mean.toFixed(1)} pixels apart on average, ${Math.max(...distances).toFixed(1)} at most`;
}

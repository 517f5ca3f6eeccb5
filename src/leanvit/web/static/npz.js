/** Reads an .npz archive as NumPy's savez writes it: a zip of .npy files that are not compressed. */

const END_OF_DIRECTORY = 0x06054b50;
const ENTRY = 0x02014b50;
const END_SIZE = 22;

const KINDS = {
  "|u1": Uint8Array,
  "<f4": Float32Array,
  "<f8": Float64Array,
  "<i4": Int32Array,
  "<i8": BigInt64Array,
};

/** {name: {shape, data}} of an archive; data is a typed array, or a list of strings. */
export function readNpz(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - END_SIZE;
  while (end >= 0 && view.getUint32(end, true) !== END_OF_DIRECTORY) end--;
  if (end < 0) throw new Error("golden.npz is not an archive that can be read. Write the page again.");
  const arrays = {};
  let entry = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (view.getUint32(entry, true) !== ENTRY || view.getUint16(entry + 10, true) !== 0) {
      throw new Error("golden.npz is compressed or damaged. Write the page again.");
    }
    const size = view.getUint32(entry + 24, true);
    const nameLength = view.getUint16(entry + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, entry + 46, nameLength));
    const local = view.getUint32(entry + 42, true);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    arrays[name.replace(/\.npy$/, "")] = readNpy(buffer.slice(start, start + size), name);
    entry += 46 + nameLength + view.getUint16(entry + 30, true) + view.getUint16(entry + 32, true);
  }
  return arrays;
}

function readNpy(buffer, name) {
  const view = new DataView(buffer);
  const wide = view.getUint8(6) > 1;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const start = (wide ? 12 : 10) + length;
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, start - length, length));
  const kind = /'descr': '([^']+)'/.exec(header)[1];
  const shape = (/'shape': \(([^)]*)\)/.exec(header)[1].match(/\d+/g) ?? []).map(Number);
  const body = buffer.slice(start);
  if (kind.startsWith("<U")) return { shape, data: readStrings(body, Number(kind.slice(2))) };
  if (!(kind in KINDS)) throw new Error(`golden.npz: ${name} holds ${kind}, which this page can't read.`);
  const data = new KINDS[kind](body);
  return { shape, data: kind === "<i8" ? Float64Array.from(data, Number) : data };
}

/** Strings of NumPy: each `width` code points of four bytes, filled up with zeros. */
function readStrings(body, width) {
  const points = new Uint32Array(body);
  const found = [];
  for (let start = 0; start < points.length; start += width) {
    const own = [...points.subarray(start, start + width)];
    const end = own.indexOf(0);
    found.push(String.fromCodePoint(...(end < 0 ? own : own.slice(0, end))));
  }
  return found;
}

/** Calls of the service: docs/serve.md has their JSON. */

const OPTIONS = { topK: "top_k", scoreThreshold: "score_threshold", boxes: "boxes" };

/** What a user may set of a model, by the names of options.js. */
export const optionsOf = (info) => Object.keys(OPTIONS).filter((name) => info.options.includes(OPTIONS[name]));

/** The query of a prediction from values of options.js; a class map is asked for where there is one. */
export function queryOf(values, info) {
  const query = new URLSearchParams();
  for (const name of optionsOf(info)) {
    const value = values[name];
    if (name === "boxes") (value ?? []).forEach((box) => query.append("boxes", box.join(",")));
    else if (value !== undefined && value !== null) query.set(OPTIONS[name], String(value));
  }
  if (info.drawn.includes("map")) query.set("map", "true");
  return query.toString();
}

/** Thrown where the server asks for a token. */
export class TokenNeeded extends Error {}

/** The service, asked with a token where one is known. */
export class Client {
  token = "";

  async ask(path, init = {}) {
    const headers = { ...init.headers, ...(this.token ? { Authorization: `Bearer ${this.token}` } : {}) };
    const response = await fetch(path, { ...init, headers });
    if (response.status === 401) throw new TokenNeeded("this server asks for its token.");
    const values = await response.json().catch(() => ({ error: `the server says ${response.status}.` }));
    if (response.ok) return values;
    const wait = response.headers.get("Retry-After");
    throw new Error(values.error + (wait ? ` Try again in ${wait} s.` : ""));
  }

  models = async () => (await this.ask("v1/models")).models;

  model = (name) => this.ask(`v1/models/${encodeURIComponent(name)}`);

  /** What is found in a picture; a class map as {size, data}. */
  async predict(info, blob, values) {
    const query = queryOf(values, info);
    const path = `v1/models/${encodeURIComponent(info.name)}:predict${query ? `?${query}` : ""}`;
    const type = blob.type || "application/octet-stream";
    const answer = await this.ask(path, { method: "POST", body: blob, headers: { "Content-Type": type } });
    return answer.map ? { ...answer, map: await readMap(answer.map) } : answer;
  }
}

/** The class of every pixel from a PNG whose grey levels are the classes. */
async function readMap(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const levels = context.getImageData(0, 0, width, height).data;
  return { size: [height, width], data: Uint8Array.from({ length: width * height }, (_, i) => levels[4 * i]) };
}

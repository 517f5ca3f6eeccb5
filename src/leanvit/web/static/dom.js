/** Elements in one call; no inline styles or scripts, which the pages' Content-Security-Policy forbids. */

/** An element: attributes that are functions listen to events, `false` and null are left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A list of terms and what is said of each: pairs of texts; those without a value are left out. */
export function definitions(pairs) {
  const told = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return element("dl", {}, ...told.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]));
}

/** A table in a frame that scrolls where it is too wide. */
export function table(caption, columns, rows) {
  const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
  const made = element(
    "table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body),
  );
  return element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption }, made);
}

export const percent = (share) => `${(100 * share).toFixed(1)}%`;

export const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

export function megabytes(bytes) {
  return bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/**
 * Keeps the page's files for offline use, all of one version, and sends the headers that permit threads.
 * The names in @ are filled in by `leanvit web`.
 */

const CACHE = `leanvit ${registration.scope} @SITE@`;
const SHELL = @SHELL@;
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy": "@POLICY@",
};

addEventListener("install", (event) => {
  const fresh = SHELL.map((path) => new Request(path, { cache: "reload" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(fresh)));
});

addEventListener("activate", (event) => {
  const old = (name) => name.startsWith(`leanvit ${registration.scope} `) && name !== CACHE;
  event.waitUntil(
    caches.keys().then((names) => Promise.all(names.filter(old).map((name) => caches.delete(name)))).then(() => clients.claim()),
  );
});

addEventListener("message", ({ data }) => {
  if (data === "renew") skipWaiting();
});

addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && request.url.startsWith(registration.scope)) event.respondWith(answer(request));
});

async function answer(request) {
  const url = new URL(request.url);
  const home = request.mode === "navigate" && `${url.origin}${url.pathname}`.replace(/index\.html$/, "") === registration.scope;
  const key = home ? registration.scope : request;
  const cache = await caches.open(CACHE);
  let found = await cache.match(key, { ignoreSearch: true });
  if (!found) {
    found = await fetch(key, { cache: "no-cache" });
    if (found.status === 200) await cache.put(key, found.clone());
  }
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}

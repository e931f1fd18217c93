// Calls to the head, with the key of this tab where the head has keys, and streams that survive broken connections.

const STORAGE = "longreach.key";
const PAUSES_MS = [500, 1000, 2000, 4000, 8000];

/** An answer that is no success: `status` (0: the head cannot be reached) and the head's own words. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(retryAfter ? `${message} (try again in ${retryAfter} s)` : message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORAGE),
  set: (value) => sessionStorage.setItem(STORAGE, value),
  clear: () => sessionStorage.removeItem(STORAGE),
};

let onUnauthorized = () => {};

/** Call `callback` whenever the head wants another key. */
export function whenUnauthorized(callback) {
  onUnauthorized = callback;
}

async function open(path, options = {}) {
  const headers = new Headers(options.headers);
  const sent = key.get();
  if (sent) headers.set("Authorization", `Bearer ${sent}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the head cannot be reached");
  }
  if (response.ok) return response;
  if (response.status === 401 && sent === key.get()) onUnauthorized();
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `the head answered with status ${response.status}`;
  throw new ApiError(response.status, message, response.headers.get("Retry-After"));
}

/** Return the JSON of a route. */
export const get = async (path, signal) => (await open(path, { signal })).json();

/** Send JSON, or nothing, and return the JSON of the answer. */
export async function post(path, body, headers = {}) {
  const sent = body === undefined
    ? { headers }
    : { body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" } };
  return (await open(path, { method: "POST", ...sent })).json();
}

/** Delete what a path names. */
export const remove = (path) => open(path, { method: "DELETE" });

/** Store a text (a Blob) as a document and return it. */
export async function upload(name, blob) {
  const query = new URLSearchParams({ name: name.slice(0, 200) });
  const headers = { "Content-Type": "text/plain; charset=utf-8" };
  return (await open(`/v1/documents?${query}`, { method: "POST", body: blob, headers })).json();
}

/**
 * Yield the events of a job from token `after + 1` on until it has ended. A connection that breaks is made again after
 * the last token that came.
 */
export async function* follow(jobId, after, signal) {
  let last = after;
  let tries = 0;
  while (true) {
    try {
      const response = await open(`/v1/jobs/${jobId}/events?after=${last}`, { signal });
      for await (const event of readEvents(response.body)) {
        if (event.error) throw new ApiError(0, event.error.message);
        tries = 0;
        if (event.event === "token") last = event.number;
        yield event;
        if (event.event === "ended") return;
      }
    } catch (error) {
      const isFinal = error.status >= 400 && error.status < 500 && error.status !== 429;
      if (signal.aborted || isFinal || !(error instanceof ApiError || error instanceof TypeError)) throw error;
    }
    await pause(PAUSES_MS[Math.min(tries++, PAUSES_MS.length - 1)], signal);
  }
}

async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal.addEventListener("abort", stop, { once: true });
  });
}

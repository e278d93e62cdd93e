// The server's own API: requests with the key, errors in its own words, and events that survive a lost connection.

const KEY = "latentrt.key";
const RETRY_MS = 2000;
const MOST_TRIES = 15;
const TERMINAL = new Set(["completed", "failed", "cancelled"]);

/** What the server says is wrong: found, expected, fix, and the status of HTTP (0 where it did not answer). */
export class ApiError extends Error {
  constructor({ found, expected = "", fix = "" }, status = 0, retryAfter = null) {
    super(found);
    Object.assign(this, { found, expected, fix, status, retryAfter });
  }
}

const SILENT = {
  found: "The server does not answer",
  expected: "latentrt serve, running at this address",
  fix: "See whether it still runs, and try again.",
};

const FORGOTTEN = {
  found: "The server knows this drawing no longer",
  expected: "one that was not started again meanwhile, or not long ago",
  fix: "Draw it again.",
};

let askForKey = async () => null;
let asking = null;

/** Have `ask(again)` called for a key; `again` where one was sent that the server does not know. */
export function keysComeFrom(ask) {
  askForKey = ask;
}

/** An answer that is no error. Paths are below the page's own, whatever stands before it. */
export async function request(path, { method = "GET", body, headers = {} } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const answer = await fetched(new URL(path.replace(/^\//, ""), document.baseURI), {
      method,
      body,
      cache: "no-store",
      headers: {
        ...headers,
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...(key === null ? {} : { authorization: `Bearer ${key}` }),
      },
    });
    if (answer.ok) return answer;
    const error = await errorOf(answer);
    if (answer.status !== 401 || !(await anotherKey(key))) throw error;
  }
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

async function fetched(url, options) {
  try {
    return await fetch(url, options);
  } catch {
    throw new ApiError(SILENT);
  }
}

async function errorOf(answer) {
  let told = {};
  try {
    told = (await answer.json()).error ?? {};
  } catch {
    // a proxy's page, perhaps
  }
  const found = told.found ?? told.message ?? `The server answered ${answer.status}`;
  return new ApiError({ ...told, found }, answer.status, answer.headers.get("retry-after"));
}

/** Whether there is another key than the one that was refused. Requests that fail together ask once. */
async function anotherKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return true;
  asking ??= askForKey(refused !== null).finally(() => (asking = null));
  const key = await asking;
  if (key) sessionStorage.setItem(KEY, key);
  return Boolean(key);
}

/** What happens to a job: {id, kind, data}, the last of which is its end. */
export async function* events(job) {
  let last = 0;
  for (let tries = 0; tries < MOST_TRIES; tries += 1) {
    try {
      const headers = last ? { "last-event-id": String(last) } : {};
      const answer = await request(`v1/jobs/${job}/events`, { headers });
      for await (const event of parsed(answer.body)) {
        tries = 0;
        last = event.id;
        yield event;
        if (TERMINAL.has(event.kind)) return;
      }
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) throw new ApiError(FORGOTTEN, 404);
      if (error instanceof ApiError && error.status) throw error;
    }
    yield { id: last, kind: "silent", data: {} };
    await new Promise((resume) => setTimeout(resume, RETRY_MS));
  }
  throw new ApiError(SILENT);
}

/** Server-sent events of a stream of bytes. */
async function* parsed(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = read(block);
        if (event.kind) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function read(block) {
  const found = {};
  for (const line of block.split("\n")) {
    const [, name, value] = /^(\w+): (.*)$/.exec(line) ?? [];
    if (name) found[name] = value;
  }
  return { id: Number(found.id), kind: found.event, data: JSON.parse(found.data ?? "{}") };
}

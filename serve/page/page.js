// The page: what its buttons and keys do.

import { ApiError, json, keysComeFrom } from "./api.js";
import * as drawing from "./drawing.js";
import { make, the } from "./elements.js";
import { Fields } from "./fields.js";
import { History } from "./history.js";
import { Controls, Loras } from "./picks.js";
import { Shelf } from "./shelf.js";
import { Stage } from "./stage.js";
import { Start } from "./start.js";

const EXAMPLES = [
  "a red circle on a blue background",
  "a large purple star on a white background",
  "a small green heart on a pink background",
];

const fields = new Fields();
const loras = new Loras();
const controls = new Controls();
const start = new Start();
const stage = new Stage();
const history = new History();
const shelf = new Shelf(history, (entry) => show([entry]));

let server = null; // what /v1/capabilities said
let running = null; // {id, cancelled} of the job that is watched
let shown = []; // entries on the stage
let selected = null; // the one that the buttons are for
let told = null; // the record of the start picture
let fitted = null; // the size that was made for it

// ── what there is ────────────────────────────────────────────────────────────────────────────────────

async function begin() {
  await history.open();
  const [newest] = history.all();
  if (newest) {
    the("prompt").value ||= newest.parameters.prompt;
    show([newest]);
  } else {
    rest();
  }
  await meet();
}

/** Ask the server what it draws with. */
async function meet() {
  try {
    server = await json("v1/capabilities");
  } catch (error) {
    stage.fail(error);
    return;
  }
  const names = Object.keys(server.models);
  the("model").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  the("model").value = server.default;
  the("model-choice").hidden = names.length === 1;
  the("model-name").textContent = names.length === 1 ? names[0] : "";
  choose();
  the("draw").disabled = false;
  if (stage.state === "error") rest();
  const left = drawing.left();
  if (left) work(left, () => drawing.watch(left, watcher));
}

const model = () => server.models[the("model").value];

function choose() {
  const chosen = model();
  fields.build(chosen, server.bounds);
  loras.build(chosen);
  controls.build(chosen);
  the("avoid").hidden = !("negative_prompt" in chosen.schema.properties);
  the("start").hidden = !("image" in chosen.schema.properties);
  the("examples").hidden = chosen.name !== "demo";
  fit();
}

for (const prompt of EXAMPLES) {
  const button = make("button", { type: "button" }, prompt);
  button.addEventListener("click", () => {
    the("prompt").value = prompt;
    drawNow();
  });
  the("example-list").append(make("li", {}, button));
}

// ── drawing ──────────────────────────────────────────────────────────────────────────────────────────

async function ordered() {
  const mask = await start.mask();
  const there = [start.picture && "image", mask && "mask_image"].filter(Boolean);
  const found = { prompt: the("prompt").value, ...fields.values(there) };
  if (the("negative").value && !the("avoid").hidden) found.negative_prompt = the("negative").value;
  const adapters = loras.values();
  if (adapters.length) found.loras = adapters;
  return { model: the("model").value, fields: found, start: start.picture, mask, controls: steering() };
}

function steering() {
  try {
    return controls.values();
  } catch (error) {
    throw new ApiError({
      found: `The control ${error.message} has no picture`,
      expected: "a picture that steers",
      fix: "Choose one, or remove the control.",
    });
  }
}

async function drawNow() {
  if (running || !server) return;
  let order;
  try {
    order = await ordered();
  } catch (error) {
    fail(error);
    return;
  }
  await work(order, () => drawing.draw(order, watcher));
}

/** Show a job that is being drawn until its end. */
async function work(order, drawn) {
  running = { id: null, cancelled: false };
  if (order.id) watcher.accepted(order);
  buttons();
  stage.begin(sizeOf(order));
  the("stage").scrollIntoView({ block: "nearest" });
  try {
    const job = await drawn();
    if (job === null) rest("Cancelled.");
    else await finish(job, order);
  } catch (error) {
    fail(error);
  } finally {
    running = null;
    buttons();
  }
}

const watcher = {
  accepted({ id }) {
    running.id = id;
    if (running.cancelled) drawing.cancel(id);
  },
  waiting: (position, seconds) => stage.waiting(position, seconds),
  started: () => stage.started(),
  step: (step) => stage.step(step),
  preview: (picture, url) => stage.preview(picture, url),
  image: (picture, blob) => stage.image(picture, blob),
  silent: () => stage.silent(),
};

function sizeOf({ fields: { width, height, upscale = 1, num_images_per_prompt: count = 1 } }) {
  const { defaults } = model();
  const whole = start.size ?? defaults;
  return { count, width: width ?? whole.width * upscale, height: height ?? whole.height * upscale };
}

async function finish(job, order) {
  const images = job.images.toSorted((one, other) => one.index - other.index);
  const entries = [];
  for (const image of images) {
    entries.push(
      await history.add({
        created: Date.now(),
        blob: job.blobs.get(image.index),
        seed: seedOf(order.fields.seed, image),
        width: image.width,
        height: image.height,
        seconds: job.ended - job.started,
        parameters: image.parameters,
        order,
      }),
    );
  }
  show(entries);
  const missing = (order.fields.num_images_per_prompt ?? 1) - entries.length;
  stage.say(missing > 0 ? `Done; ${missing} could not be drawn.` : "Done.");
}

/** A picture's seed as text: as a number it may have lost digits on the way here. */
function seedOf(first, { seed, index }) {
  return first === undefined || first === "-1" ? String(seed) : String((BigInt(first) + BigInt(index)) % 2n ** 64n);
}

function cancelNow() {
  if (!running || running.cancelled) return;
  running.cancelled = true;
  if (running.id) drawing.cancel(running.id).catch(fail);
}

function fail(error) {
  if (!(error instanceof ApiError)) {
    console.error(error);
    error = { found: "The page failed", expected: "a drawing", fix: `Load the page again. (${error.message})` };
  }
  stage.fail(error);
}

/** The button that begins, or the one that ends. The focus stays where it is, on the other one if need be. */
function buttons() {
  const [off, on] = running ? ["draw", "cancel"] : ["cancel", "draw"];
  const focused = document.activeElement === the(off);
  the(on).hidden = false;
  if (focused) the(on).focus();
  the(off).hidden = true;
  the("history").inert = running !== null;
}

// ── pictures that are there ────────────────────────────────────────────────────────────────────────────

function show(entries) {
  shown = entries;
  stage.done(entries, select);
}

function select(entry) {
  selected = entry;
  stage.caption(entry);
  if (the("download").href) URL.revokeObjectURL(the("download").href);
  the("download").href = URL.createObjectURL(entry.blob);
  the("download").download = `${nameOf(entry)}.${entry.blob.type.replace("image/", "").replace("jpeg", "jpg")}`;
  shelf.render(entry);
}

function nameOf({ parameters, seed }) {
  const words = parameters.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  return `${words.replace(/^-+|-+$/g, "") || "picture"}-${seed}`;
}

/** What the stage shows when nothing is drawn. */
function rest(words = "") {
  const entries = shown.filter((entry) => history.get(entry.id));
  if (entries.length) {
    show(entries);
  } else {
    selected = null;
    stage.empty();
    shelf.render();
  }
  if (words) stage.say(words);
}

async function useParameters({ order, seed }) {
  if (order.model in server.models && order.model !== the("model").value) {
    the("model").value = order.model;
    choose();
  }
  if (order.start) await start.set(order.start, order.mask);
  else start.clear();
  const { num_images_per_prompt: _, ...wanted } = order.fields;
  write({ ...wanted, seed });
  controls.replace(order.controls ?? []);
}

/** Fill the form with fields of a request; all others are their defaults. */
function write({ prompt, negative_prompt: negative = "", loras: adapters = [], ...values }) {
  the("prompt").value = prompt;
  the("negative").value = negative;
  the("avoid").open = negative !== "";
  fields.replace(values);
  loras.replace(adapters);
  the("prompt").focus();
  stage.say("The form has these parameters.");
}

/** A picture's own record as fields. Its start picture and controls are in it by name alone. */
function fieldsOf(record) {
  const known = model().schema.properties;
  const named = Object.entries(record).filter(([name]) => name in known && !["image", "mask_image"].includes(name));
  const { controls: _, loras: adapters = [], ...values } = Object.fromEntries(named);
  const pairs = adapters.map(([name, strength]) => ({ name, strength: typeof strength === "number" ? strength : 1 }));
  return { ...values, loras: pairs.filter(({ name }) => model().loras.includes(name)) };
}

// ── the start picture ──────────────────────────────────────────────────────────────────────────────────

/** A size for the start picture: its own, unless that is much more than the model draws. */
function fit() {
  const properties = server && model().schema.properties;
  the("of-picture").disabled = start.picture === null;
  if (!properties?.width) return;
  const { width, height } = model().defaults;
  if (fitted) fields.write({ width: undefined, height: undefined });
  fitted = null;
  fields.hint(String(start.size?.width ?? width), String(start.size?.height ?? height));
  if (!start.size) return;
  const scale = Math.sqrt((width * height) / (start.size.width * start.size.height));
  if (scale > 0.8) return;
  const step = properties.width.multipleOf;
  const round = (side) => Math.max(1, Math.round((side * scale) / step)) * step;
  fitted = { width: round(start.size.width), height: round(start.size.height) };
  fields.write(fitted);
}

start.addEventListener("change", () => {
  told = null;
  fit();
});
start.addEventListener("tells", ({ detail }) => (told = detail));
start.addEventListener("odd", ({ detail }) =>
  stage.fail({
    found: `This browser cannot read ${detail.name} as a picture`,
    expected: "PNG, JPEG, WebP, or what else it shows",
    fix: "Choose another file.",
  }),
);

// ── buttons and keys ───────────────────────────────────────────────────────────────────────────────────

the("form").addEventListener("submit", (event) => {
  event.preventDefault();
  drawNow();
});
the("form").addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
the("cancel").addEventListener("click", cancelNow);
the("again").addEventListener("click", () => (server ? drawNow() : meet()));
the("model").addEventListener("change", choose);
the("reset").addEventListener("click", () => {
  fields.replace({});
  loras.replace([]);
  controls.replace([]);
  fitted = null;
  fit();
});
the("use-parameters").addEventListener("click", () => useParameters(selected).catch(fail));
the("use-picture").addEventListener("click", () => start.set(selected.blob).catch(fail));
the("use-seed").addEventListener("click", () => fields.write({ seed: selected.seed }));
the("use-told").addEventListener("click", () => write(fieldsOf(told)));
the("remove").addEventListener("click", async () => {
  await history.remove(selected.id);
  rest("Removed.");
});
the("empty-history").addEventListener("click", () => {
  the("sure-text").textContent = "Pictures that you have not downloaded are gone then.";
  the("sure").returnValue = "";
  the("sure").showModal();
});
the("sure").addEventListener("close", async () => {
  if (the("sure").returnValue !== "yes") return;
  await history.empty();
  rest("The history is empty.");
});

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    the("form").requestSubmit();
  }
  if (event.key === "Escape") cancelNow();
});

keysComeFrom((again) => {
  the("lock-text").textContent = again ? "The key that was sent is not known here." : "Who runs it has one for you.";
  the("key").value = "";
  the("lock").returnValue = "";
  the("lock").showModal();
  return new Promise((resolve) => {
    const closed = () => resolve(the("lock").returnValue === "key" ? the("key").value : null);
    the("lock").addEventListener("close", closed, { once: true });
  });
});

begin();

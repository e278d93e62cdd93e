// The place where pictures appear: empty, waiting, drawing, done, or an error. `data-state` says which.

import { make, the } from "./elements.js";

const SAID_EVERY = 0.25; // of the way, for who listens to the page

export class Stage {
  #tiles = [];
  #steps = new Map(); // picture -> how many are made
  #total = 1; // of each
  #began = 0;
  #said = 0;

  get state() {
    return the("stage").dataset.state;
  }

  #turn(state) {
    the("stage").dataset.state = state;
  }

  /** Say something to who does not see the page. */
  say(text) {
    the("said").textContent = text;
  }

  empty() {
    this.#turn("empty");
    this.#tell("", "latentrt");
  }

  /** Ready for so many pictures of one size: {count, width, height}. */
  begin({ count, width, height }) {
    this.#steps.clear();
    this.#said = 0;
    this.#began = 0;
    this.#lay(Array.from({ length: count }, (_, index) => tileOf(index, count, width, height)));
    the("progress").removeAttribute("value");
    this.#turn("waiting");
    this.#tell("Sending…", "waiting – latentrt");
    this.say("Waiting.");
  }

  waiting(position, seconds) {
    this.#turn("waiting");
    const place = position === 1 ? "Next in line" : `${position - 1} before you`;
    const words = seconds == null ? place : `${place}, done in about ${duration(seconds)}`;
    this.#tell(words, "waiting – latentrt");
    this.say(words);
  }

  started() {
    this.#turn("drawing");
    this.#began = performance.now();
    this.#tell("Starting…", "drawing – latentrt");
  }

  step({ picture, index, total }) {
    if (this.state !== "drawing") this.started();
    this.#total = total;
    this.#made(picture, index + 1);
  }

  #made(picture, steps) {
    const total = this.#total;
    this.#steps.set(picture, steps);
    const made = [...this.#steps.values()].reduce((sum, one) => sum + one, 0);
    const share = made / (total * this.#tiles.length);
    const seconds = ((performance.now() - this.#began) / 1000) * (1 / share - 1);
    the("progress").value = share;
    const step = Math.ceil(made / this.#tiles.length);
    const left = share < 1 && this.#began && made > 2 ? ` · ${duration(seconds)} left` : "";
    this.#tell(`Step ${step} of ${total}${left}`, `${Math.floor(share * 100)} % – latentrt`);
    if (share >= this.#said + SAID_EVERY) {
      this.#said = Math.floor(share / SAID_EVERY) * SAID_EVERY;
      this.say(`${Math.round(this.#said * 100)} percent drawn.`);
    }
  }

  preview(picture, url) {
    const tile = this.#tiles[picture];
    if (tile && !tile.finished) tile.show(url);
  }

  image(picture, blob) {
    const tile = this.#tiles[picture];
    if (!tile) return;
    tile.finished = true;
    this.#made(picture, this.#total); // not every step is told
    tile.show(URL.createObjectURL(blob));
  }

  silent() {
    this.#tell("The connection is lost. Looking for the server…", "waiting – latentrt");
    this.say("The connection is lost.");
  }

  /** Show finished pictures, history's entries; `select(entry)` is called for the first, and for one that is pressed. */
  done(entries, select) {
    this.#lay(entries.map(({ width, height }, index) => tileOf(index, entries.length, width, height)));
    this.#tiles.forEach((tile, index) => {
      tile.show(URL.createObjectURL(entries[index].blob), entries[index].parameters.prompt);
      if (entries.length === 1) return;
      tile.element.addEventListener("click", () => {
        this.#press(tile);
        select(entries[index]);
      });
    });
    this.#turn("done");
    this.#tell("", "latentrt");
    this.#press(this.#tiles[0]);
    select(entries[0]);
  }

  #lay(tiles) {
    for (const tile of this.#tiles) tile.forget();
    this.#tiles = tiles;
    the("pictures").replaceChildren(...tiles.map((tile) => tile.element));
    the("pictures").dataset.count = String(tiles.length);
  }

  #press(pressed) {
    if (this.#tiles.length === 1) return;
    for (const tile of this.#tiles) tile.element.setAttribute("aria-pressed", String(tile === pressed));
  }

  /** What is under the picture. */
  caption({ parameters, seed, width, height, seconds }) {
    the("title").textContent = parameters.prompt;
    const facts = [
      `${width} × ${height}`,
      `${parameters.num_inference_steps} steps`,
      parameters.sampler?.name ?? parameters.sampler,
      `guidance ${parameters.guidance_scale}`,
      `seed ${seed}`,
      seconds ? duration(seconds) : null,
    ];
    the("facts").textContent = facts.filter(Boolean).join(" · ");
  }

  fail({ found, expected, fix, retryAfter }) {
    the("found").textContent = found[0].toUpperCase() + found.slice(1);
    the("expected").textContent = expected ? `Expected: ${expected}` : "";
    const wait = retryAfter ? ` There may be room in ${duration(Number(retryAfter))}.` : "";
    the("fix").textContent = `${fix ?? ""}${wait}`;
    this.#turn("error");
    this.#tell("", "error – latentrt");
  }

  #tell(text, title) {
    the("told").textContent = text;
    document.title = title;
  }
}

function tileOf(index, count, width, height) {
  const image = make("img", { alt: "", decoding: "sync", hidden: true, width, height });
  const element =
    count === 1
      ? make("div", { className: "tile" }, image)
      : make("button", { type: "button", className: "tile", "aria-label": `Picture ${index + 1} of ${count}` }, image);
  element.style.setProperty("--width", `${width}px`);
  element.style.setProperty("--shape", String(width / height));
  const forget = () => image.src.startsWith("blob:") && URL.revokeObjectURL(image.src);
  const show = (url, alt = "") => {
    forget();
    Object.assign(image, { src: url, alt, hidden: false });
  };
  return { element, show, forget, finished: false };
}

/** Seconds in words. */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

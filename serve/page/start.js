// The picture to start from: chosen, dropped or pasted, with a mask to paint on it.

import { the } from "./elements.js";
import { Mask } from "./mask.js";
import { recordOf } from "./recorded.js";

const TAKEN = new Set(["image/png", "image/jpeg", "image/webp"]); // what the server reads
const MOST_PIXELS = 16e6;

/** Fires "change" when there is another picture or none, "tells" with its record if it says how it was made. */
export class Start extends EventTarget {
  #blob = null;
  #url = null;
  #mask = new Mask(the("mask"), the("cursor"));
  size = null; // {width, height} in pixels

  constructor() {
    super();
    const mask = this.#mask;
    the("file").addEventListener("change", ({ target }) => this.#file(target.files[0]));
    the("drop-picture").addEventListener("click", () => {
      this.clear();
      the("file").focus();
    });
    the("brush").addEventListener("input", ({ target }) => (mask.brush = Number(target.value)));
    the("erase").addEventListener("click", ({ target }) => {
      mask.erasing = !mask.erasing;
      target.setAttribute("aria-pressed", String(mask.erasing));
    });
    the("undo").addEventListener("click", () => mask.undo());
    the("clear").addEventListener("click", () => mask.clear());
    the("mask").addEventListener("keydown", (event) => {
      if (event.key === "z" && (event.ctrlKey || event.metaKey)) mask.undo();
    });
    mask.addEventListener("change", () => {
      the("undo").disabled = !mask.changed;
      the("clear").disabled = !mask.changed && !mask.painted;
    });
    this.#takeDropped();
  }

  get picture() {
    return this.#blob;
  }

  async mask() {
    return this.#blob && this.#mask.file();
  }

  /** Take a picture; one that the server could not read is written anew. Throws for what is no picture. */
  async set(blob, mask = null) {
    const bitmap = await createImageBitmap(blob);
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
    this.#blob = TAKEN.has(blob.type) && scale === 1 ? blob : await written(bitmap, scale);
    this.size = { width: Math.floor(bitmap.width * scale), height: Math.floor(bitmap.height * scale) };
    const base = mask && (await createImageBitmap(mask));
    this.#mask.reset(this.size.width, this.size.height, base);
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = URL.createObjectURL(this.#blob);
    the("ground").src = this.#url;
    this.#show();
    const record = await recordOf(blob);
    the("tells").hidden = record === null;
    if (record) this.dispatchEvent(new CustomEvent("tells", { detail: record }));
  }

  clear() {
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#blob = this.#url = this.size = null;
    the("ground").removeAttribute("src");
    the("file").value = "";
    this.#show();
  }

  #show() {
    the("drop").hidden = this.#blob !== null;
    the("chosen").hidden = this.#blob === null;
    this.dispatchEvent(new Event("change"));
  }

  async #file(file) {
    if (!file) return;
    try {
      await this.set(file);
    } catch {
      this.dispatchEvent(new CustomEvent("odd", { detail: file }));
    }
  }

  #takeDropped() {
    addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.items].some((item) => item.kind === "file")) return;
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("dropping");
    });
    addEventListener("drop", (event) => {
      document.body.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (!file || event.defaultPrevented) return;
      event.preventDefault();
      this.#file(file);
    });
    addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.#file(file);
    });
  }
}

async function written(bitmap, scale) {
  const canvas = new OffscreenCanvas(Math.floor(bitmap.width * scale), Math.floor(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/png" });
}

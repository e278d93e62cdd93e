// Adapters and controls that the server was started with: chosen from a list, each with its own settings.

import { make, the } from "./elements.js";
import { fieldOf } from "./fields.js";

/** LoRAs with strengths. */
export class Loras {
  #chosen = [];

  constructor() {
    the("lora-names").addEventListener("change", ({ target }) => this.add(target.value));
  }

  build({ loras, schema }) {
    the("loras").hidden = !loras.length || !schema.properties.loras;
    offer(the("lora-names"), "Add a LoRA…", loras);
    this.replace(this.values().filter((one) => loras.includes(one.name)));
  }

  add(name, strength = 1) {
    if (!name) return;
    const field = fieldOf("strength", { type: "number", minimum: -2, maximum: 2, default: 1 });
    field.write(strength);
    const row = rowOf(name, [field.element], () => (this.#chosen = this.#chosen.filter((one) => one.row !== row)));
    this.#chosen.push({ name, field, row });
    the("lora-list").append(row);
    the("lora-names").value = "";
  }

  values() {
    return this.#chosen.map(({ name, field }) => ({ name, strength: field.read() ?? 1 }));
  }

  replace(values) {
    this.#chosen = [];
    the("lora-list").replaceChildren();
    for (const one of values) this.add(one.name, one.strength);
  }
}

/** Controls, each with a picture that steers. */
export class Controls {
  #chosen = [];
  #known = { kinds: {}, schema: {} };

  constructor() {
    the("control-names").addEventListener("change", ({ target }) => this.add({ model: target.value }));
  }

  build({ controls, schema }) {
    const names = Object.keys(controls);
    this.#known = { kinds: controls, schema: schema.properties.controls?.items.properties ?? {} };
    the("controls").hidden = !names.length || !schema.properties.controls;
    offer(the("control-names"), "Add a control…", names);
    this.replace(this.#values().filter((one) => names.includes(one.model)));
  }

  add({ model, image = null, ...values }) {
    if (!model) return;
    const fields = new Map(this.#settings(model).map(([name, schema]) => [name, fieldOf(name, schema)]));
    for (const [name, field] of fields) if (name in values) field.write(values[name]);
    const picture = new Picture(`The picture for ${model}`, image);
    const settings = make("div", { className: "fields" }, ...[...fields.values()].map((one) => one.element));
    const forget = () => (this.#chosen = this.#chosen.filter((one) => one.row !== row));
    const row = rowOf(model, [picture.element, settings], forget);
    this.#chosen.push({ model, picture, fields, row });
    the("control-list").append(row);
    the("control-names").value = "";
  }

  /** What is sent; each has a Blob as its image. Throws the name of one that has none. */
  values() {
    const bare = this.#chosen.find((one) => !one.picture.blob);
    if (bare) {
      bare.picture.focus();
      throw new Error(bare.model);
    }
    return this.#values();
  }

  replace(values) {
    this.#chosen = [];
    the("control-list").replaceChildren();
    for (const one of values) this.add(one);
  }

  #values() {
    return this.#chosen.map(({ model, picture, fields }) => {
      const changed = [...fields].map(([name, field]) => [name, field.read(), field.usual]);
      const said = changed.filter(([, value, usual]) => value !== undefined && String(value) !== String(usual));
      return { model, image: picture.blob, ...Object.fromEntries(said.map(([name, value]) => [name, value])) };
    });
  }

  /** The settings of one kind of control, with their schemas. */
  #settings(model) {
    const nets = new Set(["mode", "preparation"]); // what an adapter for pictures has not
    const prompts = this.#known.kinds[model] === "ip-adapter";
    return Object.entries(this.#known.schema).filter(
      ([name]) => !["model", "image", "mask_image"].includes(name) && !(prompts && nets.has(name)),
    );
  }
}

/** A small picture to choose or to drop. */
class Picture {
  constructor(label, blob) {
    this.blob = blob;
    this.shown = make("img", { alt: "" });
    this.input = make("input", { type: "file", accept: "image/*", className: "visually-hidden", "aria-label": label });
    this.words = make("span", {}, "Choose a picture");
    this.element = make("label", { className: "drop small" }, this.input, this.shown, this.words);
    this.input.addEventListener("change", () => this.set(this.input.files[0]));
    this.element.addEventListener("drop", (event) => {
      event.preventDefault();
      this.set(event.dataTransfer.files[0]);
    });
    if (blob) this.set(blob);
    else this.shown.hidden = true;
  }

  set(blob) {
    if (!blob) return;
    this.blob = blob;
    this.shown.hidden = false;
    this.shown.src = URL.createObjectURL(blob);
    this.shown.addEventListener("load", () => URL.revokeObjectURL(this.shown.src), { once: true });
    this.words.textContent = "Choose another";
  }

  focus() {
    this.input.focus();
  }
}

function offer(select, words, names) {
  const options = names.map((name) => make("option", { value: name }, name));
  select.replaceChildren(make("option", { value: "" }, words), ...options);
}

function rowOf(name, parts, forget) {
  const remove = make("button", { type: "button", className: "plain", "aria-label": `Remove ${name}` }, "Remove");
  const head = make("div", { className: "pick-head" }, make("strong", {}, name), remove);
  const row = make("li", {}, head, ...parts);
  remove.addEventListener("click", () => {
    row.remove();
    forget();
  });
  return row;
}

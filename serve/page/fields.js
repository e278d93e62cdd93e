// The parameters that a model has a use for, as inputs: made of the JSON Schema that /v1/capabilities has.

import { make, newId, the } from "./elements.js";

const USUAL = ["width", "height", "num_inference_steps", "guidance_scale", "sampler", "num_images_per_prompt", "seed"];
const OF_PICTURE = ["resize_mode", "noise_level"]; // besides those that the schema says need a picture
// These have places of their own on the page.
const ELSEWHERE = new Set(["prompt", "negative_prompt", "image", "mask_image", "loras", "controls", "output", "preview"]);
const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  num_images_per_prompt: "Pictures",
  clip_skip: "CLIP skip",
  rng: "Noise of",
  padding_mask_crop: "Crop to the mask",
  eta: "Eta",
};
const HELP = {
  sampler: "How noise becomes a picture.",
  seed: "A number whose picture comes again. Empty is random.",
  width: "Pixels.",
  height: "Pixels.",
};
// What a slider spans, where the whole range would make it useless; the number beside it takes all.
const SPANS = {
  num_inference_steps: { min: 1, max: 60, step: 1 },
  guidance_scale: { min: 1, max: 15, step: 0.5 },
};

/** The inputs of one model. */
export class Fields {
  #all = new Map();
  #needs = {};

  /** Make the inputs anew. What was changed by hand stays where the model has the field, too. */
  build({ schema, defaults }, bounds) {
    const before = this.values();
    for (const id of ["usual", "of-picture", "further"]) the(id).replaceChildren();
    this.#all.clear();
    this.#needs = schema.dependentRequired ?? {};
    const names = Object.keys(schema.properties).filter((name) => !ELSEWHERE.has(name));
    for (const name of [...USUAL.filter((one) => names.includes(one)), ...names.filter((one) => !USUAL.includes(one))]) {
      const field = fieldOf(name, bounded(name, schema.properties[name], bounds), defaults[name]);
      this.#all.set(name, field);
      the(this.#placeOf(name)).append(field.element);
    }
    this.write(before);
  }

  #placeOf(name) {
    if (USUAL.includes(name)) return "usual";
    const needs = this.#needs[name] ?? [];
    const picture = OF_PICTURE.includes(name) || needs.includes("image") || needs.includes("mask_image");
    return picture ? "of-picture" : "further";
  }

  /** What differs from the defaults. `there`: the pictures that come along, by their fields' names. */
  values(there = ["image", "mask_image"]) {
    const found = {};
    for (const [name, field] of this.#all) {
      const value = field.read();
      const fits = (this.#needs[name] ?? []).every((one) => there.includes(one) || this.#all.has(one));
      if (fits && value !== undefined && !same(value, field.usual)) found[name] = value;
    }
    return found;
  }

  /** Set what is named, and leave the rest. */
  write(values) {
    for (const [name, value] of Object.entries(values)) this.#all.get(name)?.write(value);
  }

  /** Set what is named, and all else to its default. */
  replace(values) {
    for (const [name, field] of this.#all) field.write(values[name] ?? field.usual);
  }

  /** What an empty width and height mean. */
  hint(width, height) {
    this.#all.get("width")?.hint(width);
    this.#all.get("height")?.hint(height);
  }
}

/** A label for a field. */
export function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

const same = (one, other) => String(one) === String(other);

function bounded(name, schema, bounds) {
  const most = name === "num_inference_steps" ? bounds.request_steps : undefined;
  return most === undefined ? schema : { ...schema, maximum: Math.min(schema.maximum ?? most, most) };
}

/** An input for a schema: {element, usual, read, write, hint}. `usual` is sent by leaving the field out. */
export function fieldOf(name, schema, modelDefault) {
  const usual = schema.default ?? modelDefault;
  const made = kindOf(name, schema)(name, schema, usual);
  const help = HELP[name] ?? helpOf(schema.description);
  const label = make("label", { for: made.input.id }, labelOf(name));
  const element = make("div", { className: `field ${made.className ?? ""}`, title: help }, label, ...made.parts);
  const field = { element, usual, read: made.read, write: made.write, hint: (text) => (made.input.placeholder = text) };
  field.write(made.blank ? undefined : usual);
  return field;
}

// Help is written for people with a command line: --draw-tile is a field's name here.
const helpOf = (text = "") => text.replace(/--([a-z][a-z-]*)/g, (_, name) => labelOf(name.replaceAll("-", "_")));

function kindOf(name, schema) {
  if (name === "seed") return seed;
  if (schema.enum) return choice;
  if (schema.type === "boolean") return checkbox;
  if (schema.type === "array") return numbers;
  const type = [schema.type].flat()[0]; // of several, such as a number or a list of them, the first is drawn
  return type === "integer" || type === "number" ? number : text;
}

function choice(name, schema, usual) {
  const options = schema.enum.map((one) => make("option", { value: one }, one));
  if (usual === undefined) options.unshift(make("option", { value: "" }, "none"));
  const input = make("select", { id: newId(), name }, ...options);
  return {
    input,
    className: name === "sampler" ? "wide" : "",
    parts: [input],
    read: () => input.value || undefined,
    write: (value) => {
      const known = value?.name ?? value ?? "";
      if ([...input.options].some((one) => one.value === known)) input.value = known;
    },
  };
}

function checkbox(name) {
  const input = make("input", { id: newId(), name, type: "checkbox" });
  return { input, parts: [input], read: () => input.checked, write: (value) => (input.checked = value === true) };
}

function number(name, schema, usual) {
  const whole = schema.type === "integer";
  const { minimum: min, maximum: max } = schema;
  const step = schema.multipleOf ?? (whole ? 1 : "any");
  const input = make("input", {
    id: newId(), name, type: "number", min, max, step, inputMode: whole ? "numeric" : "decimal",
    placeholder: usual === undefined ? "auto" : String(usual),
  });
  const read = () => (input.value === "" || Number.isNaN(input.valueAsNumber) ? undefined : input.valueAsNumber);
  const span = SPANS[name] ?? (!whole && min === 0 && max === 1 ? { min: 0, max: 1, step: 0.01 } : null);
  // A picture to start from changes what an empty size means, so it begins empty.
  const blank = name === "width" || name === "height";
  if (!span) return { input, parts: [input], read, blank, write: (value) => (input.value = value ?? "") };
  const slider = make("input", { type: "range", ...span, max: Math.min(span.max, max ?? span.max), tabIndex: -1 });
  slider.setAttribute("aria-hidden", "true");
  const follow = () => (slider.value = input.value === "" ? (usual ?? (span.min + span.max) / 2) : input.value);
  slider.addEventListener("input", () => (input.value = slider.value));
  input.addEventListener("input", follow);
  return {
    input,
    className: "wide",
    parts: [make("div", { className: "pair" }, slider, input)],
    read,
    write: (value) => {
      input.value = Number.isFinite(value) ? value : "";
      follow();
    },
  };
}

function seed(name) {
  const input = make("input", {
    id: newId(), name, type: "text", inputMode: "numeric", pattern: "-1|[0-9]{1,20}", placeholder: "random",
    title: "A whole number from 0 to 18446744073709551615",
  });
  return {
    input,
    parts: [input],
    read: () => input.value.trim() || undefined,
    write: (value) => (input.value = value === undefined || String(value) === "-1" ? "" : String(value)),
  };
}

function numbers(name, schema) {
  const input = make("input", { id: newId(), name, type: "text", inputMode: "decimal", placeholder: "none" });
  if (schema.default) input.placeholder = schema.default.join(", ");
  return {
    input,
    parts: [input],
    read: () => {
      const found = input.value.split(/[,\s]+/).filter(Boolean);
      return found.length ? found.map(Number) : undefined;
    },
    write: (value) => (input.value = value?.join?.(", ") ?? ""),
  };
}

function text(name, schema) {
  const input = make("textarea", { id: newId(), name, rows: 2, placeholder: "as the prompt" });
  if (schema.maxLength) input.maxLength = schema.maxLength;
  return {
    input,
    className: "wide",
    parts: [input],
    read: () => input.value || undefined,
    write: (value) => (input.value = value ?? ""),
  };
}

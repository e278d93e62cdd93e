// The history, as a shelf of small pictures.

import { make, the } from "./elements.js";

export class Shelf {
  #history;
  #urls = new Map();
  #open;

  /** `open(entry)` is called for one that is pressed. */
  constructor(history, open) {
    this.#history = history;
    this.#open = open;
  }

  /** Show what the history has; `current` is the entry that is on the stage. */
  render(current = null) {
    const entries = this.#history.all();
    const ids = new Set(entries.map((entry) => entry.id));
    for (const [id, url] of this.#urls) {
      if (ids.has(id)) continue;
      URL.revokeObjectURL(url);
      this.#urls.delete(id);
    }
    the("shelf").replaceChildren(...entries.map((entry) => this.#item(entry, current)));
    the("empty-history").hidden = !entries.length;
    const where = this.#history.lasts ? "in this browser" : "until this page is closed";
    const many = entries.length === 1 ? "1 picture" : `${entries.length} pictures`;
    the("history-note").textContent = entries.length ? `${many}, kept ${where}` : "What you draw is kept here.";
  }

  #item(entry, current) {
    if (!this.#urls.has(entry.id)) this.#urls.set(entry.id, URL.createObjectURL(entry.blob));
    const { prompt } = entry.parameters;
    const image = make("img", { src: this.#urls.get(entry.id), alt: "", loading: "lazy" });
    const button = make(
      "button",
      {
        type: "button",
        title: prompt,
        "aria-label": `Show: ${prompt || "no prompt"}, seed ${entry.seed}`,
        "aria-current": entry.id === current?.id ? "true" : undefined,
      },
      image,
    );
    button.addEventListener("click", () => this.#open(entry));
    return make("li", {}, button);
  }
}

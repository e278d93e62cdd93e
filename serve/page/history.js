// Pictures that were drawn here, kept in this browser: IndexedDB, or this page's memory where there is none.

const NAME = "latentrt";
const STORE = "pictures";
const MOST = 300; // the oldest go first

/**
 * A picture with all that it takes to draw it again.
 * @typedef {{id: number, created: number, blob: Blob, seed: string, width: number, height: number,
 *   seconds: number, parameters: Object, order: Object}} Entry
 */

export class History {
  #database = null;
  #entries = new Map(); // in the order of their making
  #next = 1;

  /** Whether pictures outlive the page. */
  get lasts() {
    return this.#database !== null;
  }

  async open() {
    try {
      const asked = indexedDB.open(NAME, 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
      this.#database = await done(asked);
      for (const entry of await done(this.#store("readonly").getAll())) this.#entries.set(entry.id, entry);
    } catch {
      this.#database = null; // a private window, or no room
    }
  }

  /** The newest first. */
  all() {
    return [...this.#entries.values()].reverse();
  }

  get(id) {
    return this.#entries.get(id);
  }

  /** Keep a picture. Returns its entry with an id. */
  async add(entry) {
    let id;
    try {
      id = this.#database ? await done(this.#store().add(entry)) : undefined;
    } catch {
      id = undefined; // the disk is full: it is there as long as the page is
    }
    id ??= `page-${this.#next++}`;
    const kept = { ...entry, id };
    this.#entries.set(id, kept);
    for (const old of [...this.#entries.keys()].slice(0, -MOST)) await this.remove(old);
    return kept;
  }

  async remove(id) {
    this.#entries.delete(id);
    if (this.#database && typeof id === "number") await done(this.#store().delete(id));
  }

  async empty() {
    this.#entries.clear();
    if (this.#database) await done(this.#store().clear());
  }

  #store(mode = "readwrite") {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }
}

/** What an opened database, or a request once its transaction is written, brought. */
const done = (asked) =>
  new Promise((resolve, reject) => {
    const { transaction } = asked; // null while a database is opened
    if (transaction) {
      transaction.oncomplete = () => resolve(asked.result);
      transaction.onabort = () => reject(transaction.error ?? asked.error);
    } else {
      asked.onsuccess = () => resolve(asked.result);
    }
    asked.onerror = () => reject(asked.error);
  });

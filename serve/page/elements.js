// Elements of the page, found and made. Text is only ever set as text: nothing here reads HTML.

/** The element with an id; the page has all that its scripts ask for. */
export function the(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/** A new element. What it has no property for is an attribute; undefined is left out. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name in made && !name.includes("-")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

let made = 0;

/** An id that no other element has. */
export function newId() {
  made += 1;
  return `made-${made}`;
}

// What a PNG of latentrt says of how it was made: the text chunk `latentrt`, as JSON.

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const KEYWORD = "latentrt\0";

/** The record of a picture's file; null if it has none. */
export async function recordOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (SIGNATURE.some((one, at) => bytes[at] !== one)) return null;
  const view = new DataView(bytes.buffer);
  // A chunk: length, type, that many bytes, and a checksum.
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = latin(bytes.subarray(at + 4, at + 8));
    if (type === "tEXt") {
      const text = latin(bytes.subarray(at + 8, at + 8 + length));
      if (text.startsWith(KEYWORD)) return parsed(text.slice(KEYWORD.length));
    }
    at += 12 + length;
  }
  return null;
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);

function parsed(text) {
  try {
    const found = JSON.parse(text);
    return typeof found?.prompt === "string" ? { ...found, seed: seedIn(text) ?? found.seed } : null;
  } catch {
    return null;
  }
}

// Seeds have 64 bits, which a number here has not: its digits are read as they stand.
const seedIn = (text) => /[{,]\s*"seed":\s*(\d+)/.exec(text)?.[1];

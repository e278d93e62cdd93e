// One drawing: what is sent, what happens to it, and the pictures it ends with.

import { ApiError, events, json, request } from "./api.js";

const RUNNING = "latentrt.job"; // so that a page that is loaded again finds its job

/**
 * What is to be drawn.
 * @typedef {{model: string, fields: Object, start: ?Blob, mask: ?Blob, controls: Object[]}} Order
 */

/** Hand an order in, and watch it to its end. */
export async function draw(order, shown) {
  const body = toJson(await bodyOf(order));
  const job = await json("v1/jobs", { method: "POST", body });
  const running = { id: job.id, model: order.model, fields: order.fields };
  sessionStorage.setItem(RUNNING, JSON.stringify(running));
  shown.accepted(running);
  if (job.queue_position) shown.waiting(job.queue_position, job.eta_s);
  return watch(running, shown);
}

/** The job that ran when the page was left: {id, model, fields}, or null. */
export function left() {
  try {
    return JSON.parse(sessionStorage.getItem(RUNNING));
  } catch {
    return null;
  }
}

/** Watch a job to its end. Returns its record with a Blob for each picture, or null if it was cancelled. */
export async function watch({ id }, shown) {
  const blobs = new Map();
  const fetching = [];
  const fetchImage = ({ index }) => {
    if (blobs.has(index)) return;
    blobs.set(index, null);
    fetching.push(
      request(`v1/jobs/${id}/images/${index}`).then(async (answer) => {
        blobs.set(index, await answer.blob());
        shown.image(index, blobs.get(index));
      }),
    );
  };
  try {
    for await (const { kind, data } of events(id)) {
      if (kind === "queued") shown.waiting(data.position, data.eta_s);
      if (kind === "started") shown.started();
      if (kind === "step") shown.step(data);
      if (kind === "preview") shown.preview(data.picture, `data:${data.media_type};base64,${data.b64}`);
      if (kind === "image") fetchImage(data);
      if (kind === "snapshot") caughtUp(data, shown, fetchImage);
      if (kind === "silent") shown.silent();
      if (kind === "failed") throw new ApiError(data.error, 500);
      if (kind === "cancelled") return null;
    }
    await Promise.all(fetching);
    const job = await json(`v1/jobs/${id}`);
    for (const image of job.images) fetchImage(image);
    await Promise.all(fetching);
    return { ...job, blobs };
  } finally {
    sessionStorage.removeItem(RUNNING);
  }
}

/** Want no more of a job. */
export async function cancel(id) {
  await request(`v1/jobs/${id}`, { method: "DELETE" });
}

function caughtUp(told, shown, fetchImage) {
  if (told.state === "queued" && told.position) shown.waiting(told.position.position, told.position.eta_s);
  if (told.state === "started") shown.started();
  for (const step of Object.values(told.steps)) shown.step(step);
  if (told.preview) {
    shown.preview(told.preview.picture, `data:${told.preview.media_type};base64,${told.preview.b64}`);
  }
  told.images.forEach(fetchImage);
}

async function bodyOf({ model, fields, start, mask, controls }) {
  const sent = { model, ...fields, preview: { every: 1 } };
  if (start) sent.image = await base64(start);
  if (start && mask) sent.mask_image = await base64(mask);
  if (controls.length) {
    sent.controls = await Promise.all(
      controls.map(async ({ image, ...control }) => ({ ...control, image: await base64(image) })),
    );
  }
  return sent;
}

/** JSON whose seed is written digit by digit: it has 64 bits, and a number of this language 53. */
function toJson({ seed, ...fields }) {
  const text = JSON.stringify(fields);
  return seed === undefined ? text : `{"seed":${BigInt(seed)},${text.slice(1)}`;
}

async function base64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

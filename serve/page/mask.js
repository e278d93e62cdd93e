// A mask that is painted over a picture: strokes that can be taken back, and a file, white where it is to be drawn anew.

const KEY_STEP = 0.02; // of the picture's longer side, for each press of an arrow

/** Painting on a canvas that lies over the picture. Sizes of brushes are percents of the longer side. */
export class Mask extends EventTarget {
  #canvas;
  #cursor;
  #pen;
  #base = null; // a mask that was there before the first stroke
  #strokes = [];
  #at = { x: 0.5, y: 0.5 }; // the cursor of the keyboard, as shares of the picture
  brush = 12;
  erasing = false;

  constructor(canvas, cursor) {
    super();
    this.#canvas = canvas;
    this.#cursor = cursor;
    this.#pen = canvas.getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerleave", () => (cursor.hidden = true));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => (cursor.hidden = true));
  }

  /** Begin anew on a picture of this size, on a mask perhaps that it had. */
  reset(width, height, base = null) {
    Object.assign(this.#canvas, { width, height });
    this.#base = base;
    this.#strokes = [];
    this.#redraw();
  }

  undo() {
    this.#strokes.pop();
    this.#redraw();
  }

  clear() {
    this.#base = null;
    this.#strokes = [];
    this.#redraw();
  }

  get changed() {
    return this.#strokes.length > 0;
  }

  /** Whether anything is painted that has not been erased. */
  get painted() {
    const { width, height } = this.#canvas;
    if (!width || !(this.#base || this.#strokes.length)) return false;
    const { data } = this.#pen.getImageData(0, 0, width, height);
    for (let at = 3; at < data.length; at += 4) if (data[at] > 127) return true;
    return false;
  }

  /** A PNG of the picture's size, white where it is painted; null where it is not at all. */
  async file() {
    if (!this.painted) return null;
    const { width, height } = this.#canvas;
    const made = new OffscreenCanvas(width, height);
    const pen = made.getContext("2d");
    pen.drawImage(this.#canvas, 0, 0);
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.globalCompositeOperation = "destination-over";
    pen.fillStyle = "black";
    pen.fillRect(0, 0, width, height);
    return made.convertToBlob({ type: "image/png" });
  }

  #begin(event) {
    if (event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#dab(this.#point(event));
  }

  #move(event) {
    const point = this.#point(event);
    this.#show(point);
    if (!(event.buttons & 1) || !this.#canvas.hasPointerCapture(event.pointerId)) return;
    const stroke = this.#strokes.at(-1);
    stroke.points.push(point);
    this.#line(stroke, stroke.points.at(-2), point);
  }

  #key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const far = event.shiftKey ? KEY_STEP / 4 : KEY_STEP;
    const shape = this.#canvas.width / this.#canvas.height;
    if (way) {
      this.#at.x = Math.min(1, Math.max(0, this.#at.x + (way[0] * far) / Math.max(1, shape)));
      this.#at.y = Math.min(1, Math.max(0, this.#at.y + way[1] * far * Math.min(1, shape)));
    } else if (event.key === " ") {
      this.#dab({ x: this.#at.x * this.#canvas.width, y: this.#at.y * this.#canvas.height });
    } else {
      return;
    }
    event.preventDefault();
    this.#show({ x: this.#at.x * this.#canvas.width, y: this.#at.y * this.#canvas.height });
  }

  #point(event) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - left) / width) * this.#canvas.width,
      y: ((event.clientY - top) / height) * this.#canvas.height,
    };
  }

  #dab(point) {
    const size = (this.brush / 100) * Math.max(this.#canvas.width, this.#canvas.height);
    const stroke = { size, erase: this.erasing, points: [point] };
    this.#strokes.push(stroke);
    this.#line(stroke, point, point);
    this.dispatchEvent(new Event("change"));
  }

  #line({ size, erase }, from, to) {
    const pen = this.#pen;
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = getComputedStyle(this.#canvas).getPropertyValue("--accent") || "teal";
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = size;
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
  }

  #redraw() {
    const { width, height } = this.#canvas;
    this.#pen.globalCompositeOperation = "source-over";
    this.#pen.clearRect(0, 0, width, height);
    if (this.#base) this.#drawBase();
    for (const stroke of this.#strokes) {
      stroke.points.forEach((point, index) => this.#line(stroke, stroke.points[Math.max(0, index - 1)], point));
    }
    this.dispatchEvent(new Event("change"));
  }

  #drawBase() {
    const { width, height } = this.#canvas;
    this.#pen.drawImage(this.#base, 0, 0, width, height);
    const pixels = this.#pen.getImageData(0, 0, width, height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at];
    this.#pen.putImageData(pixels, 0, 0);
    this.#pen.globalCompositeOperation = "source-in";
    this.#pen.fillStyle = getComputedStyle(this.#canvas).getPropertyValue("--accent") || "teal";
    this.#pen.fillRect(0, 0, width, height);
  }

  #show({ x, y }) {
    const { width } = this.#canvas.getBoundingClientRect();
    const scale = width / this.#canvas.width;
    const size = (this.brush / 100) * Math.max(this.#canvas.width, this.#canvas.height) * scale;
    this.#cursor.hidden = false;
    Object.assign(this.#cursor.style, {
      width: `${size}px`,
      height: `${size}px`,
      left: `${x * scale}px`,
      top: `${y * scale}px`,
    });
  }
}

// One radiograph on a canvas: window and level on 16 bits, zoom, pan, invert, and a heat of regions over it.

const FULL = 65535;
const HEAT = 288; // resolution of the drawn heat; the patches below it are coarser

export class Viewer {
  constructor(stage) {
    this.canvas = stage.querySelector("canvas");
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.left = stage.querySelector(".bl");
    this.right = stage.querySelector(".br");
    this.picture = null;
    this.base = document.createElement("canvas");
    this.heat = document.createElement("canvas");
    this.heat.width = this.heat.height = HEAT;
    this.heatBox = null;
    this.view = { scale: 1, x: 0, y: 0 };
    this.window = { centre: FULL / 2, width: FULL };
    this.inverted = false;
    this.stale = { base: false, frame: false };
    this.pointers();
    new ResizeObserver(() => this.resize()).observe(this.canvas);
  }

  show({ rows, columns, values }) {
    this.picture = { rows, columns, values };
    this.base.width = columns;
    this.base.height = rows;
    this.inverted = false;
    this.heatBox = null;
    this.autoWindow();
    this.fit();
  }

  showBitmap(bitmap) {
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0);
    const data = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
    const values = new Uint16Array(bitmap.width * bitmap.height);
    for (let i = 0; i < values.length; i++) values[i] = data[4 * i] * 257;
    this.show({ rows: bitmap.height, columns: bitmap.width, values });
  }

  clear() {
    this.picture = null;
    this.heatBox = null;
    this.left.textContent = this.right.textContent = "";
    this.redraw(true);
  }

  autoWindow() {
    if (!this.picture) return;
    const counts = new Uint32Array(4096), { values } = this.picture, step = Math.max(1, values.length >> 18);
    let seen = 0;
    for (let i = 0; i < values.length; i += step) { counts[values[i] >> 4]++; seen++; }
    const at = (share) => {
      let sum = 0;
      for (let i = 0; i < 4096; i++) if ((sum += counts[i]) >= share * seen) return i * 16;
      return FULL;
    };
    const low = at(0.005), high = Math.max(at(0.995), low + 256);
    this.window = { centre: (low + high) / 2, width: high - low };
    this.redraw(true);
  }

  changeWindow(width, centre) {
    this.window.width = Math.min(2 * FULL, Math.max(256, this.window.width + width));
    this.window.centre = Math.min(FULL, Math.max(0, this.window.centre + centre));
    this.redraw(true);
  }

  invert() {
    this.inverted = !this.inverted;
    this.redraw(true);
  }

  fit() {
    if (!this.picture) return;
    const { clientWidth, clientHeight } = this.canvas;
    this.fitted = true;
    this.view.scale = Math.min(clientWidth / this.picture.columns, clientHeight / this.picture.rows) * 0.97;
    this.view.x = (clientWidth - this.picture.columns * this.view.scale) / 2;
    this.view.y = (clientHeight - this.picture.rows * this.view.scale) / 2;
    this.redraw();
  }

  actual() {
    if (this.picture) this.zoom(1 / (this.view.scale * devicePixelRatio));
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = Math.min(40, Math.max(0.02, this.view.scale * factor)), ratio = scale / this.view.scale;
    this.fitted = false;
    this.view = { scale, x: x - (x - this.view.x) * ratio, y: y - (y - this.view.y) * ratio };
    this.redraw();
  }

  pan(x, y) {
    this.fitted = false;
    this.view.x += x;
    this.view.y += y;
    this.redraw();
  }

  // `map` holds side × side weights; null takes the heat away.
  showRegions(map, side, box) {
    this.heatBox = map ? box : null;
    if (map) paintHeat(this.heat, map, side);
    this.redraw();
  }

  redraw(base = false) {
    this.stale.base ||= base;
    if (this.stale.frame) return;
    this.stale.frame = true;
    requestAnimationFrame(() => {
      this.stale.frame = false;
      if (this.stale.base && this.picture) this.applyWindow();
      this.stale.base = false;
      this.paint();
    });
  }

  applyWindow() {
    const { rows, columns, values } = this.picture, { centre, width } = this.window;
    const shades = new Uint32Array(FULL + 1), low = centre - width / 2;
    for (let i = 0; i <= FULL; i++) {
      let grey = Math.min(255, Math.max(0, ((i - low) / width) * 255)) | 0;
      if (this.inverted) grey = 255 - grey;
      shades[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
    }
    const image = new ImageData(columns, rows), words = new Uint32Array(image.data.buffer);
    for (let i = 0; i < values.length; i++) words[i] = shades[values[i]];
    this.base.getContext("2d").putImageData(image, 0, 0);
  }

  paint() {
    const ratio = devicePixelRatio, { context, view, picture } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#050608";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    if (!picture) return;
    context.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.base, 0, 0);
    if (this.heatBox) {
      const [left, top, right, bottom] = this.heatBox;
      const { columns, rows } = picture;
      context.drawImage(this.heat, left * columns, top * rows, (right - left) * columns, (bottom - top) * rows);
    }
    const share = (value) => Math.round((value / FULL) * 1000) / 10;
    this.left.textContent = `W ${share(this.window.width)}  L ${share(this.window.centre)}${this.inverted ? "  ⇄" : ""}`;
    this.right.textContent = `${picture.columns} × ${picture.rows}   ${Math.round(view.scale * ratio * 100)} %`;
  }

  resize() {
    this.canvas.width = Math.round(this.canvas.clientWidth * devicePixelRatio);
    this.canvas.height = Math.round(this.canvas.clientHeight * devicePixelRatio);
    if (this.fitted) this.fit();
    this.redraw();
  }

  pointers() {
    let held = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      held = { x: event.clientX, y: event.clientY, pan: event.button !== 0 || event.shiftKey };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!held) return;
      const x = event.clientX - held.x, y = event.clientY - held.y;
      Object.assign(held, { x: event.clientX, y: event.clientY });
      if (held.pan) this.pan(x, y);
      else this.changeWindow(x * 120, y * 80);
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => { held = null; });
    this.canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    this.canvas.addEventListener("dblclick", () => this.fit());
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = this.canvas.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
  }
}

// Add up tokens and square, as client/serving/grounding.py span_map does; null where nothing rests on the image.
export function spanMap(rows, first, end) {
  const map = new Float64Array(rows[0].length);
  for (let t = first; t < end; t++) for (let i = 0; i < map.length; i++) map[i] += rows[t][i];
  const peak = Math.max(...map);
  if (!(peak > 0)) return null;
  return map.map((value) => (value / peak) ** 2);
}

// Draw a map (peak 1) as warm, transparent light with a line where it falls to half.
function paintHeat(canvas, map, side) {
  const context = canvas.getContext("2d"), image = context.createImageData(HEAT, HEAT);
  const value = (x, y) => {
    const column = Math.min(side - 1, Math.max(0, x)), row = Math.min(side - 1, Math.max(0, y));
    return map[row * side + column];
  };
  const ease = (t) => t * t * (3 - 2 * t);
  const field = new Float32Array(HEAT * HEAT);
  for (let j = 0; j < HEAT; j++) {
    const y = ((j + 0.5) / HEAT) * side - 0.5, top = Math.floor(y), v = ease(y - top);
    for (let i = 0; i < HEAT; i++) {
      const x = ((i + 0.5) / HEAT) * side - 0.5, left = Math.floor(x), u = ease(x - left);
      field[j * HEAT + i] = (value(left, top) * (1 - u) + value(left + 1, top) * u) * (1 - v)
        + (value(left, top + 1) * (1 - u) + value(left + 1, top + 1) * u) * v;
    }
  }
  for (let j = 0; j < HEAT; j++) {
    for (let i = 0; i < HEAT; i++) {
      const at = j * HEAT + i, here = field[at];
      const slope = Math.hypot(field[i + 1 < HEAT ? at + 1 : at] - field[i ? at - 1 : at],
        field[j + 1 < HEAT ? at + HEAT : at] - field[j ? at - HEAT : at]) / 2;
      const line = Math.max(0, 1.1 - Math.abs(here - 0.5) / Math.max(slope, 1e-6)) * 190;
      const alpha = Math.max(line, Math.max(0, here - 0.06) * 105);
      image.data.set(line > alpha - 1 ? [255, 208, 130, alpha] : [255, 176, 70, alpha], 4 * at);
    }
  }
  context.putImageData(image, 0, 0);
}

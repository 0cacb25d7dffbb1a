// Earlier cases of this site that look alike: the strip below, and one of them beside the picture.

import * as api from "./api.js";
import { $, guard, state } from "./state.js";
import { say } from "./words.js";

const pictures = new Map(); // number → object URL, for the open case

export async function loadSimilar(id, leave) {
  while (state.id === id && !leave.signal.aborted) {
    const found = await api.similar(id).catch(() => null);
    if (state.id !== id) return;
    renderSimilar(found);
    if (!found || found.ready) return;
    await new Promise((done) => { setTimeout(done, 700); });
  }
}

async function pictureOf(number) {
  if (!pictures.has(number)) {
    const bitmap = await api.priorPicture(number), canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    pictures.set(number, URL.createObjectURL(await canvas.convertToBlob()));
  }
  return pictures.get(number);
}

export function renderSimilar(found) {
  state.found = found?.cases ?? [];
  if (!found) {
    for (const url of pictures.values()) URL.revokeObjectURL(url);
    pictures.clear();
  }
  const list = $("#similar ol");
  list.replaceChildren(...state.found.map((one) => {
    const item = document.createElement("li");
    item.dataset.number = one.number;
    const picture = document.createElement("img");
    picture.alt = "";
    pictureOf(one.number).then((url) => { picture.src = url; }).catch(() => {});
    const side = document.createElement("div");
    for (const [kind, text] of [["score", `${Math.round(one.cosine * 100)} % ${say("alike")}`],
      ["shared", one.shared.join(", ")], ["text", one.impression || one.findings]]) {
      const line = document.createElement("div");
      line.className = kind;
      line.textContent = text;
      if (text) side.append(line);
    }
    item.append(picture, side);
    item.addEventListener("click", guard(() => openPrior(one)));
    return item;
  }));
  $("#similar > p").textContent = !found || state.found.length ? ""
    : found.ready ? say("no_similar") : say("indexing", found.indexed, found.total);
}

export async function openPrior(one) {
  if (state.prior === one.number) return closePrior();
  state.prior = one.number;
  $("#stage-prior").hidden = false;
  $("#prior-title").textContent = `${say("prior")} · ${one.study}`;
  $("#prior-text").textContent = [one.findings, one.impression].filter(Boolean).join("\n");
  for (const item of $("#similar ol").children) item.ariaCurrent = String(Number(item.dataset.number) === one.number);
  state.priorViewer.showBitmap(await api.priorPicture(one.number));
}

export function closePrior() {
  state.prior = null;
  $("#stage-prior").hidden = true;
  for (const item of $("#similar ol").children) item.ariaCurrent = "false";
}

export function stepPrior() {
  if (!state.found.length) return;
  const at = state.found.findIndex((one) => one.number === state.prior);
  return openPrior(state.found[(at + 1) % state.found.length]);
}

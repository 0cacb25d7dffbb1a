// The page: what the keys and buttons do, and how it starts.

import * as api from "./api.js";
import { askTo, decide, edit, leaveEditing, renderAsk, renderEdited } from "./deciding.js";
import { open, renderReport, showRegions, stepSentence, stepWord, write } from "./reading.js";
import { closePrior, renderSimilar, stepPrior } from "./similar.js";
import { $, OPEN, guard, state, strong, toast } from "./state.js";
import { Viewer } from "./viewer.js";
import { current, place, say, setLanguage } from "./words.js";
import { refresh, renderCases, step } from "./worklist.js";

async function uploadAll(files) {
  let last = null;
  for (const file of files) last = await api.upload(file);
  await refresh();
  if (last) await open(last.id);
}

const DO = {
  overlay: () => {
    state.overlay = !state.overlay;
    $('[data-do="overlay"]').setAttribute("aria-pressed", String(state.overlay));
    showRegions();
  },
  invert: () => state.viewer.invert(),
  auto: () => state.viewer.autoWindow(),
  fit: () => state.viewer.fit(),
  actual: () => state.viewer.actual(),
  similar: () => {
    state.similar = !state.similar;
    $("#similar").hidden = !state.similar;
    $('[data-do="similar"]').setAttribute("aria-pressed", String(state.similar));
    if (!state.similar) closePrior();
  },
  accept: () => askTo("accept"),
  edit: () => (state.editing ? leaveEditing() : edit()),
  reject: () => askTo("reject"),
  redraft: () => state.case && !state.decision && write(state.id, state.leave),
};
const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowDown: () => stepSentence(1), ArrowUp: () => stepSentence(-1),
  ArrowRight: () => stepWord(1), ArrowLeft: () => stepWord(-1), o: DO.overlay, i: DO.invert, w: DO.auto,
  0: DO.fit, 1: DO.actual, v: DO.similar, x: stepPrior, a: DO.accept, e: DO.edit, r: DO.reject, d: DO.redraft,
  "[": () => state.viewer.changeWindow(-2500, 0), "]": () => state.viewer.changeWindow(2500, 0),
  ",": () => state.viewer.changeWindow(0, -1500), ".": () => state.viewer.changeWindow(0, 1500),
  "-": () => state.viewer.zoom(0.8), "+": () => state.viewer.zoom(1.25), "=": () => state.viewer.zoom(1.25),
  u: () => $("#upload").click(), "/": () => $("#filter").focus(), l: () => switchLanguage(),
  "?": () => showHelp(), c: () => copy(),
};
const PAN = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };

async function copy() {
  const text = state.decision?.text || (state.editing ? $("#edit").value : state.draft?.text);
  if (text) { await navigator.clipboard.writeText(text); toast(say("copied")); }
}

function switchLanguage() {
  setLanguage(current() === "zh" ? "en" : "zh");
  renderAbout();
  renderCases();
  renderReport();
  if (state.case) renderSimilar({ cases: state.found, ready: true });
}

function showHelp() {
  $("#keys").replaceChildren(...say("key_list").flatMap(([key, text]) => {
    const name = document.createElement("dt");
    name.append(...key.split(/ +/).map((one) => Object.assign(document.createElement("kbd"), { textContent: one })));
    return [name, Object.assign(document.createElement("dd"), { textContent: text })];
  }));
  $("#help").showModal();
}

function renderAbout() {
  const { model } = state.about ?? {};
  if (!model) return;
  const epsilon = model.release_epsilon === null ? say("no_epsilon") : `ε ${model.release_epsilon.toFixed(2)}`;
  const turn = current() === "zh" ? `${say("round")} ${model.round} 轮` : `${say("round")} ${model.round}`;
  $("#model").replaceChildren(strong(model.version ? `${model.study_id} v${model.version}` : model.study_id), ` · ${turn} · ${epsilon}`);
}

function onKey(event) {
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Enter" && event.ctrlKey && state.editing && !state.asking) { event.preventDefault(); askTo("accept"); }
    return;
  }
  const typing = event.target.matches?.('textarea, input:not([type="checkbox"])');
  if (event.key === "Escape") {
    if (state.asking) { state.asking = null; renderAsk(); $("#stage canvas").focus(); }
    else if (event.target === $("#edit")) leaveEditing();
    else if (state.prior !== null) closePrior();
    else event.target.blur?.();
    return;
  }
  if (state.asking === "reject" && event.target === $("#reason") && !$("#reason").value && /^[1-6]$/.test(event.key)) {
    event.preventDefault();
    $("#reason").value = say("reasons")[Number(event.key) - 1];
    return;
  }
  if (typing) return;
  const run = event.shiftKey && PAN[event.key] ? () => state.viewer.pan(...PAN[event.key]) : KEYS[event.key];
  if (!run) return;
  event.preventDefault();
  guard(run)();
}

async function start() {
  state.about = await api.about();
  renderAbout();
  await refresh();
  const first = state.cases.find((one) => OPEN.has(one.state)) ?? state.cases[0];
  if (first && !state.id) await open(first.id);
}

place();
api.takeToken();
state.viewer = new Viewer($("#stage"));
state.priorViewer = new Viewer($("#stage-prior"));
document.addEventListener("keydown", onKey);
for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", guard(DO[button.dataset.do]));
$("#language").addEventListener("click", switchLanguage);
$("#help-button").addEventListener("click", showHelp);
$("#close-prior").addEventListener("click", closePrior);
$("#filter").addEventListener("input", renderCases);
$("#open-only").addEventListener("change", renderCases);
$("#edit").addEventListener("input", renderEdited);
$("#ask").addEventListener("submit", (event) => { event.preventDefault(); guard(decide)(); });
$("#ask-cancel").addEventListener("click", () => { state.asking = null; renderAsk(); });
$("#upload").addEventListener("change", guard(async (event) => { await uploadAll(event.target.files); event.target.value = ""; }));
$("#examples").addEventListener("click", guard(async () => {
  const { added } = await api.addExamples();
  toast(added ? say("added", added) : say("nothing_new"));
  await refresh();
  if (!state.id && state.cases.length) await open(state.cases[0].id);
}));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", guard(async (event) => { event.preventDefault(); await uploadAll(event.dataTransfer.files); }));
$("#login").addEventListener("close", () => { api.setToken($("#token").value); guard(start)(); });
setInterval(() => { if (!document.hidden) refresh().catch(() => {}); }, 10_000);
guard(start)();

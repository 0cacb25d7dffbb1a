// The page: what is open, what the keys do, and how the parts hang together.

import * as api from "./api.js";
import { renderDomain, renderSentences, spanOf, wordEdits, wordsIn } from "./report.js";
import { Viewer, spanMap } from "./viewer.js";
import { current, place, say, setLanguage } from "./words.js";

const $ = (selector) => document.querySelector(selector);
const OPEN = new Set(["waiting", "drafted", "refused"]);
const state = {
  cases: [], id: null, case: null, draft: null, decision: null, grounding: null, sentence: null, word: null,
  overlay: true, similar: true, editing: false, asking: null, prior: null, leave: null, openedAt: 0, about: null, found: [],
};
let viewer, priorViewer, toastTimer;

// --- worklist ---

function renderCases() {
  const wanted = $("#filter").value.trim().toLowerCase(), openOnly = $("#open-only").checked;
  const shown = state.cases.filter((one) => (!openOnly || OPEN.has(one.state) || one.id === state.id)
    && (!wanted || [...Object.values(one.patient), one.indication, one.id].join(" ").toLowerCase().includes(wanted)));
  $("#cases").replaceChildren(...shown.map((one) => {
    const item = document.createElement("li");
    Object.assign(item.dataset, { id: one.id, state: one.state });
    item.ariaCurrent = String(one.id === state.id);
    const [dot, name, when, what] = ["dot", "name", "when", "what"].map((kind) => {
      const part = document.createElement("span");
      part.className = kind;
      return part;
    });
    dot.title = say(one.state);
    name.textContent = one.patient.name || one.patient.id || `${one.source} ${one.id.slice(0, 6)}`;
    when.textContent = new Date(one.received_s * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    what.textContent = [one.patient.view, one.indication || one.patient.description].filter(Boolean).join(" · ");
    item.append(dot, name, when, what);
    item.addEventListener("click", guard(() => open(one.id)));
    return item;
  }));
  if (!shown.length && state.cases.length) $("#cases").textContent = say("search_none");
  document.body.classList.toggle("nothing", !state.id);
}

async function refresh() {
  state.cases = await api.cases();
  renderCases();
}

function step(by) {
  const ids = [...$("#cases").querySelectorAll("li")].map((item) => item.dataset.id);
  const next = ids[Math.min(ids.length - 1, Math.max(0, ids.indexOf(state.id) + by))];
  return next && next !== state.id ? open(next) : undefined;
}

// --- one case ---

async function open(id) {
  state.leave?.abort();
  const leave = state.leave = new AbortController();
  Object.assign(state, {
    id, case: null, draft: null, decision: null, grounding: null, sentence: null, word: null, editing: false,
    asking: null, openedAt: performance.now(), found: [],
  });
  closePrior();
  renderCases();
  $(`#cases li[data-id="${id}"]`)?.scrollIntoView({ block: "nearest" });
  viewer.clear();
  renderReport();
  renderSimilar(null);
  const picture = api.pixels(id, leave.signal).then((found) => { if (state.id === id) viewer.show(found); });
  const value = await api.oneCase(id);
  if (state.id !== id) return;
  Object.assign(state, { case: value, draft: value.draft, decision: value.decision });
  renderReport();
  if (!value.draft && !value.decision) await write(id, leave);
  else afterDraft(id, leave);
  await picture;
}

async function write(id, leave) {
  Object.assign(state, { draft: null, grounding: null, sentence: null, word: null, editing: false });
  viewer.showRegions(null);
  renderReport();
  const stream = $("#stream");
  stream.textContent = "";
  stream.classList.add("live");
  $("#state").textContent = say("drafting");
  try {
    for await (const { name, value } of api.draft(id, leave.signal)) {
      if (state.id !== id) return;
      if (name === "decision") {
        renderDomain($("#domain"), value);
        if (value.refused) stream.classList.remove("live");
      } else if (name === "token") {
        if (!stream.textContent) performance.mark("first-token");
        stream.textContent += value.text;
      } else if (name === "draft") state.draft = value;
      else if (name === "error") throw new api.Refused(0, value.code, value.message);
    }
  } finally {
    if (state.id === id) {
      stream.classList.remove("live");
      stream.textContent = "";
      const row = state.cases.find((one) => one.id === id);
      if (row && state.draft) row.state = state.case.state = state.draft.decision.refused ? "refused" : "drafted";
      renderCases();
      renderReport();
    }
  }
  afterDraft(id, leave);
}

async function afterDraft(id, leave) {
  if (state.draft?.text) {
    api.grounding(id, leave.signal).then((found) => {
      if (state.id !== id) return;
      state.grounding = found;
      if (state.sentence === null && state.draft.sentences.length) choose(0, null);
      else showRegions();
    }).catch((error) => { if (state.id === id && error.name !== "AbortError") $("#explain").textContent = say("no_regions"); });
  }
  await loadSimilar(id, leave);
}

function renderReport() {
  const { draft, decision, case: one } = state;
  const refused = draft?.decision.refused && !decision;
  $("#patient").replaceChildren(...patientParts(one));
  $("#indication").replaceChildren();
  if (one) $("#indication").append(`${say("indication")}: `, strong(one.indication || say("none_given")));
  const now = decision?.outcome ?? (one ? (draft ? (refused ? "refused" : "drafted") : "waiting") : "");
  $("#state").textContent = now ? say(now) : "";
  $("#state").dataset.state = now;
  renderDomain($("#domain"), draft?.decision);
  const notice = $("#notice");
  notice.hidden = !(refused || decision || draft?.cut);
  if (refused) {
    notice.replaceChildren(strong(say("refused_title")), `${draft.decision[current() === "zh" ? "reason_zh" : "reason"]} ${say("refused_more")}`);
  } else if (decision) {
    notice.replaceChildren(strong(decision.accepted ? say("done_accept", decision.edited_words) : say("done_reject")),
      [decision.reason && `${say("reason_given")}: ${decision.reason}.`, say("decided", decision.user)].filter(Boolean).join(" "));
  } else if (draft?.cut) notice.textContent = say("cut");
  const shown = draft && draft.text && !state.editing && !(decision?.accepted && decision.edited_words);
  $("#sentences").hidden = !shown;
  if (shown) renderSentences($("#sentences"), draft, choose);
  else $("#sentences").replaceChildren();
  $("#explain").textContent = shown ? say("explain") : "";
  const text = $("#edit"), final = decision?.accepted && decision.edited_words > 0;
  text.hidden = !(state.editing || final);
  text.readOnly = !!decision;
  if (final) text.value = decision.text;
  renderEdited();
  const provenance = $("#provenance");
  provenance.replaceChildren();
  if (draft) provenance.append(`${say("preliminary")} `, strong(draft.model.label), `. ${say("not_final")}`);
  for (const button of document.querySelectorAll("#actions button")) button.disabled = !one || !!decision;
  $('[data-do="accept"]').disabled = !one || !!decision || !(state.editing || draft?.text);
  $('[data-do="edit"]').setAttribute("aria-pressed", String(state.editing));
  renderAsk();
  markChosen();
}

function patientParts(one) {
  if (!one) return [];
  const { patient } = one;
  const date = (text) => (/^\d{8}$/.test(text) ? `${text.slice(0, 4)}-${text.slice(4, 6)}-${text.slice(6)}` : text);
  const more = [patient.id, patient.birth_date && `${say("born")} ${date(patient.birth_date)}`, patient.sex, patient.age,
    date(patient.study_date), patient.accession, patient.view].filter(Boolean);
  return [strong(patient.name || `${one.source} ${one.id.slice(0, 6)}`), ...more.map((text) => {
    const part = document.createElement("span");
    part.textContent = text;
    return part;
  })];
}

function strong(text) {
  const part = document.createElement("b");
  part.textContent = text;
  return part;
}

// --- regions ---

function choose(sentence, word, passing = false) {
  if (passing) return showRegions(sentence === null ? undefined : [sentence, word]);
  Object.assign(state, { sentence, word });
  markChosen();
  showRegions();
}

function markChosen() {
  const items = [...$("#sentences").children];
  items.forEach((item, number) => {
    item.ariaCurrent = String(number === state.sentence);
    item.querySelectorAll(".word").forEach((one, index) =>
      one.classList.toggle("on", number === state.sentence && index === state.word));
  });
  items[state.sentence]?.scrollIntoView({ block: "nearest" });
}

function showRegions([sentence, word] = [state.sentence, state.word]) {
  const { grounding, draft } = state;
  if (!grounding || !draft || sentence === null || !state.overlay || state.editing) return viewer.showRegions(null);
  const span = spanOf(draft, sentence, word);
  const map = span && spanMap(grounding.rows, span[0], Math.min(span[1], grounding.rows.length));
  viewer.showRegions(map, grounding.side, grounding.box);
}

function stepSentence(by) {
  const many = state.draft?.sentences.length ?? 0;
  if (many) choose(((state.sentence ?? (by > 0 ? -1 : 0)) + by + many) % many, null);
}

function stepWord(by) {
  if (!state.draft?.sentences.length || state.sentence === null) return stepSentence(by);
  const many = wordsIn(state.draft, state.sentence);
  choose(state.sentence, state.word === null ? (by > 0 ? 0 : many - 1) : (state.word + by + many) % many);
}

// --- similar cases ---

async function loadSimilar(id, leave) {
  while (state.id === id && !leave.signal.aborted) {
    const found = await api.similar(id).catch(() => null);
    if (state.id !== id) return;
    renderSimilar(found);
    if (!found || found.cases.length || (found.indexed >= found.total && found.total)) return;
    if (!found.total && ++loadSimilar.empty > 3) return;
    await new Promise((done) => { setTimeout(done, 700); });
  }
}
loadSimilar.empty = 0;

function renderSimilar(found) {
  state.found = found?.cases ?? [];
  const list = $("#similar ol");
  list.replaceChildren(...state.found.map((one) => {
    const item = document.createElement("li");
    item.dataset.number = one.number;
    const picture = document.createElement("img");
    picture.alt = "";
    api.priorPicture(one.number).then((bitmap) => {
      const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
      canvas.getContext("2d").drawImage(bitmap, 0, 0);
      return canvas.convertToBlob();
    }).then((blob) => {
      picture.src = URL.createObjectURL(blob);
      picture.onload = () => URL.revokeObjectURL(picture.src);
    }).catch(() => {});
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
    : found.total ? say("indexing", found.indexed, found.total) : say("no_similar");
}

async function openPrior(one) {
  if (state.prior === one.number) return closePrior();
  state.prior = one.number;
  $("#stage-prior").hidden = false;
  $("#prior-title").textContent = `${say("prior")} · ${one.study}`;
  $("#prior-text").textContent = [one.findings, one.impression].filter(Boolean).join("\n");
  for (const item of $("#similar ol").children) item.ariaCurrent = String(Number(item.dataset.number) === one.number);
  priorViewer.showBitmap(await api.priorPicture(one.number));
}

function closePrior() {
  state.prior = null;
  $("#stage-prior").hidden = true;
  for (const item of $("#similar ol").children) item.ariaCurrent = "false";
}

function stepPrior() {
  if (!state.found.length) return;
  const at = state.found.findIndex((one) => one.number === state.prior);
  return openPrior(state.found[(at + 1) % state.found.length]);
}

// --- editing and deciding ---

function edit() {
  if (!state.case || state.decision) return;
  if (!state.editing) {
    state.editing = true;
    $("#edit").value = state.draft?.text ?? "";
    renderReport();
    showRegions();
  }
  $("#edit").focus();
}

function leaveEditing() {
  if (wordEdits(state.draft?.text ?? "", $("#edit").value) === 0) {
    state.editing = false;
    renderReport();
    showRegions();
  }
  $("#stage canvas").focus();
}

function renderEdited() {
  if (!state.editing) return void ($("#edited").textContent = "");
  const many = wordEdits(state.draft?.text ?? "", $("#edit").value);
  $("#edited").textContent = many ? say("edited", many) : say("unedited");
}

function askTo(what) {
  if (!state.case || state.decision || (what === "accept" && $('[data-do="accept"]').disabled)) return;
  state.asking = what;
  $("#reason").value = "";
  renderAsk();
  $("#reason").focus();
}

function renderAsk() {
  const form = $("#ask"), what = state.asking;
  form.hidden = !what;
  if (!what) return;
  form.querySelector("p").textContent = say(`${what}_ask`);
  form.querySelector("button.main span").textContent = say(`${what}_yes`);
  $("#reason").placeholder = say(what === "accept" ? "reason_optional" : "reason");
  $("#reasons").replaceChildren(...(what === "accept" ? [] : say("reasons")).map((text, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(text, Object.assign(document.createElement("kbd"), { textContent: String(index + 1) }));
    button.addEventListener("click", () => { $("#reason").value = text; $("#reason").focus(); });
    return button;
  }));
}

async function decide() {
  const accepted = state.asking === "accept", reason = $("#reason").value.trim();
  if (!accepted && !reason) return $("#reason").focus();
  const text = state.editing ? $("#edit").value : state.draft?.text ?? "";
  const { id } = state;
  state.decision = await api.decide(id, {
    outcome: accepted ? "accept" : "reject", text: accepted ? text : "", reason,
    seconds: (performance.now() - state.openedAt) / 1000,
  }).then((value) => ({ ...value, outcome: accepted ? "accepted" : "rejected" }));
  Object.assign(state, { asking: null, editing: false });
  state.cases.find((one) => one.id === id).state = state.decision.outcome;
  toast(accepted ? say("done_accept", state.decision.edited_words) : say("done_reject"));
  renderCases();
  renderReport();
  showRegions();
  $("#stage canvas").focus();
}

// --- the rest ---

function toast(text, bad = false) {
  const box = $("#toast");
  box.textContent = text;
  box.className = bad ? "on bad" : "on";
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { box.className = ""; }, bad ? 6000 : 2200);
}

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
  invert: () => viewer.invert(),
  auto: () => viewer.autoWindow(),
  fit: () => viewer.fit(),
  actual: () => viewer.actual(),
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
  "[": () => viewer.changeWindow(-2500, 0), "]": () => viewer.changeWindow(2500, 0),
  ",": () => viewer.changeWindow(0, -1500), ".": () => viewer.changeWindow(0, 1500),
  "-": () => viewer.zoom(0.8), "+": () => viewer.zoom(1.25), "=": () => viewer.zoom(1.25),
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
  if (state.case) renderSimilar({ cases: state.found, indexed: 0, total: state.found.length });
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
  $("#model").replaceChildren(strong(`${model.study_id} v${model.version}`), ` · ${turn} · ${epsilon}`);
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
  const run = event.shiftKey && PAN[event.key] ? () => viewer.pan(...PAN[event.key]) : KEYS[event.key];
  if (!run) return;
  event.preventDefault();
  guard(run)();
}

// Show what went wrong as one line; ask for the token where it is missing.
const guard = (run) => async (...values) => {
  try { await run(...values); } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) return $("#login").showModal();
    toast(`${say("failed")}: ${error.message || error.code}`, true);
  }
};

async function start() {
  state.about = await api.about();
  renderAbout();
  await refresh();
  const first = state.cases.find((one) => OPEN.has(one.state)) ?? state.cases[0];
  if (first && !state.id) await open(first.id);
}

place();
api.takeToken();
viewer = new Viewer($("#stage"));
priorViewer = new Viewer($("#stage-prior"));
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

// One open case: its picture, its draft as it is written, and the regions behind sentence and word.

import * as api from "./api.js";
import { renderAsk, renderEdited } from "./deciding.js";
import { renderDomain, renderSentences, spanOf, wordsIn } from "./report.js";
import { closePrior, loadSimilar, renderSimilar } from "./similar.js";
import { $, state, strong } from "./state.js";
import { spanMap } from "./viewer.js";
import { current, say } from "./words.js";
import { renderCases } from "./worklist.js";

export async function open(id) {
  if (id === state.id) return;
  state.leave?.abort();
  const leave = state.leave = new AbortController();
  Object.assign(state, {
    id, case: null, draft: null, decision: null, grounding: null, sentence: null, word: null, editing: false,
    asking: null, openedAt: performance.now(), found: [],
  });
  closePrior();
  renderCases();
  $(`#cases li[data-id="${id}"]`)?.scrollIntoView({ block: "nearest" });
  state.viewer.clear();
  renderReport();
  renderSimilar(null);
  const picture = api.pixels(id, leave.signal).then((found) => { if (state.id === id) state.viewer.show(found); });
  picture.catch(() => {}); // awaited below; here only until the case has come
  const value = await api.oneCase(id);
  if (state.id !== id) return;
  Object.assign(state, { case: value, draft: value.draft, decision: value.decision });
  renderReport();
  if (!value.draft && !value.decision) await write(id, leave);
  else afterDraft(id, leave);
  await picture;
}

export async function write(id, leave) {
  Object.assign(state, { draft: null, grounding: null, sentence: null, word: null, editing: false });
  state.viewer.showRegions(null);
  renderReport();
  const stream = $("#stream");
  stream.textContent = "";
  stream.classList.add("live");
  $("#state").textContent = say("drafting");
  performance.mark("draft-asked");
  try {
    for await (const { name, value } of api.draft(id, leave.signal)) {
      if (state.id !== id) return;
      if (name === "decision") {
        renderDomain($("#domain"), value);
        if (value.refused) stream.classList.remove("live");
      } else if (name === "token") {
        if (!stream.textContent) performance.mark("first-token");
        stream.textContent += value.text;
      } else if (name === "draft") {
        performance.mark("draft-done");
        state.draft = value;
      }
      if (name === "error") throw new api.Refused(0, value.code, value.message);
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

export function renderReport() {
  const { draft, decision, case: one } = state;
  const refused = draft?.decision.refused && !decision;
  $("#patient").replaceChildren(...patientParts(one));
  $("#indication").replaceChildren();
  if (one) $("#indication").append(`${say("indication")}: `, strong(one.indication || say("none_given")));
  const now = decision?.outcome ?? (one ? (draft ? (refused ? "refused" : "drafted") : "waiting") : "");
  $("#state").textContent = now === "drafted" ? `${draft.seconds.toFixed(1)} s` : now ? say(now) : "";
  $("#state").dataset.state = now;
  $("#report .badge").hidden = now !== "drafted";
  renderDomain($("#domain"), draft?.decision);
  const notice = $("#notice");
  notice.hidden = !(refused || decision || draft?.cut);
  if (refused) {
    notice.replaceChildren(strong(say("refused_title")), `${sentence(draft.decision)} ${say("refused_more")}`);
  } else if (decision) {
    notice.replaceChildren(strong(decision.accepted ? say("done_accept", decision.edited_words) : say("done_reject")),
      [decision.reason && `${say("reason_given")}: ${decision.reason}.`, say("decided", decision.user)].filter(Boolean).join(" "));
  } else if (draft?.cut) notice.textContent = say("cut");
  notice.dataset.kind = decision?.outcome ?? "";
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

function sentence({ reason, reason_zh: chinese }) {
  const text = (current() === "zh" ? chinese : reason).trim();
  return text[0].toUpperCase() + text.slice(1) + (/[.。!！]$/.test(text) ? "" : current() === "zh" ? "。" : ".");
}

function patientParts(one) {
  if (!one) return [];
  const { patient } = one;
  const date = (text) => (/^\d{8}$/.test(text) ? `${text.slice(0, 4)}-${text.slice(4, 6)}-${text.slice(6)}` : text);
  const more = [patient.name && patient.id, patient.birth_date && `${say("born")} ${date(patient.birth_date)}`, patient.sex, patient.age.replace(/^0+/, ""),
    date(patient.study_date), patient.accession, patient.view].filter(Boolean);
  const name = patient.name || patient.id || `${one.source} ${one.id.slice(0, 6)}`;
  return [strong(name), ...more.map((text) => {
    const part = document.createElement("span");
    part.textContent = text;
    return part;
  })];
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

export function showRegions([sentence, word] = [state.sentence, state.word]) {
  const { grounding, draft } = state;
  const hidden = !state.overlay || $("#sentences").hidden;
  if (!grounding || !draft || sentence === null || hidden) return state.viewer.showRegions(null);
  const span = spanOf(draft, sentence, word);
  const map = span && spanMap(grounding.rows, span[0], Math.min(span[1], grounding.rows.length));
  state.viewer.showRegions(map, grounding.side, grounding.box);
}

export function stepSentence(by) {
  const many = state.draft?.sentences.length ?? 0;
  if (many) choose(((state.sentence ?? (by > 0 ? -1 : 0)) + by + many) % many, null);
}

export function stepWord(by) {
  if (!state.draft?.sentences.length || state.sentence === null) return stepSentence(by);
  const many = wordsIn(state.draft, state.sentence);
  choose(state.sentence, state.word === null ? (by > 0 ? 0 : many - 1) : (state.word + by + many) % many);
}

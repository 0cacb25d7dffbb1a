// Editing the text, and accepting or rejecting it.

import * as api from "./api.js";
import { renderReport, showRegions } from "./reading.js";
import { wordEdits } from "./report.js";
import { $, state, toast } from "./state.js";
import { say } from "./words.js";
import { renderCases } from "./worklist.js";

export function edit() {
  if (!state.case || state.decision) return;
  if (!state.editing) {
    state.editing = true;
    $("#edit").value = state.draft?.text ?? "";
    renderReport();
    showRegions();
  }
  $("#edit").focus();
}

export function leaveEditing() {
  if (wordEdits(state.draft?.text ?? "", $("#edit").value) === 0) {
    state.editing = false;
    renderReport();
    showRegions();
  }
  $("#stage canvas").focus();
}

export function renderEdited() {
  if (!state.editing) return void ($("#edited").textContent = "");
  const many = wordEdits(state.draft?.text ?? "", $("#edit").value);
  $("#edited").textContent = many ? say("edited", many) : say("unedited");
}

export function askTo(what) {
  if (!state.case || state.decision || (what === "accept" && $('[data-do="accept"]').disabled)) return;
  state.asking = what;
  $("#reason").value = "";
  renderAsk();
  $("#reason").focus();
}

export function renderAsk() {
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

export async function decide() {
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

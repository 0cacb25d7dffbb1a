// The list of cases at the left.

import * as api from "./api.js";
import { open } from "./reading.js";
import { $, OPEN, guard, state } from "./state.js";
import { say } from "./words.js";

export function renderCases() {
  const wanted = $("#filter").value.trim().toLowerCase(), openOnly = $("#open-only").checked;
  const shown = state.cases.filter((one) => (!openOnly || OPEN.has(one.state) || one.problem || one.id === state.id)
    && (!wanted || [...Object.values(one.patient), one.indication, one.id, one.problem].join(" ").toLowerCase().includes(wanted)));
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
    name.textContent = one.problem ? say("damaged") : one.patient.name || one.patient.id || `${one.source} ${one.id.slice(0, 6)}`;
    when.textContent = new Date(one.received_s * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    what.textContent = one.problem ?? [one.patient.view, one.indication || one.patient.description].filter(Boolean).join(" · ");
    item.append(dot, name, when, what);
    item.addEventListener("click", guard(() => open(one.id)));
    return item;
  }));
  if (!shown.length && state.cases.length) $("#cases").textContent = say("search_none");
  document.body.classList.toggle("nothing", !state.id);
}

export async function refresh() {
  state.cases = await api.cases();
  renderCases();
}

export function step(by) {
  const ids = [...$("#cases").querySelectorAll("li")].map((item) => item.dataset.id);
  const next = ids[Math.min(ids.length - 1, Math.max(0, ids.indexOf(state.id) + by))];
  return next && next !== state.id ? open(next) : undefined;
}

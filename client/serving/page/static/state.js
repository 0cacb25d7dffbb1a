// What the page knows and shows now, shared by its parts; and small ways to show things.

import { say } from "./words.js";

export const $ = (selector) => document.querySelector(selector);
export const OPEN = new Set(["waiting", "drafted", "refused"]);
export const state = {
  cases: [], id: null, case: null, draft: null, decision: null, grounding: null, sentence: null, word: null,
  overlay: true, similar: true, editing: false, asking: null, prior: null, leave: null, openedAt: 0, about: null, found: [],
  viewer: null, priorViewer: null,
};
let toastTimer;

export function strong(text) {
  return Object.assign(document.createElement("b"), { textContent: text });
}

export function toast(text, bad = false) {
  const box = $("#toast");
  box.textContent = text;
  box.className = bad ? "on bad" : "on";
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { box.className = ""; }, bad ? 6000 : 2200);
}

// Show what went wrong as one line; ask for the token where it is missing.
export const guard = (run) => async (...values) => {
  try { await run(...values); } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) return $("#login").showModal();
    toast(`${say("failed")}: ${error.message || error.code}`, true);
  }
};

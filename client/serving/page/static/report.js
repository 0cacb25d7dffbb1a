// The draft on the page: sentences of words, how sure the model was, which tokens wrote each word.

import { say } from "./words.js";

const WEAK = 0.5;
const level = (uncertainty) => (uncertainty < 0.15 ? 0 : uncertainty < 0.35 ? 1 : 2);

// Which tokens wrote the characters [start, end): by the pieces that each token added to the text.
export function tokensOf(pieces, start, end) {
  let at = 0, first = -1, last = -1;
  pieces.forEach((piece, index) => {
    const from = at;
    at += piece.length;
    if (at > start && from < end) {
      if (first < 0) first = index;
      last = index;
    }
  });
  return first < 0 ? null : [first, last + 1];
}

// Build the list; `pick(from, to, sentence, word)` is called with a span of tokens when one is chosen.
export function renderSentences(list, draft, pick) {
  list.replaceChildren();
  draft.sentences.forEach((sentence, number) => {
    const item = document.createElement("li");
    item.dataset.level = level(sentence.uncertainty);
    const text = document.createElement("span");
    const words = [...sentence.text.matchAll(/\S+/g)];
    words.forEach((match, index) => {
      const start = sentence.start + match.index;
      const tokens = tokensOf(draft.pieces, start, start + match[0].length);
      const word = document.createElement("span");
      word.className = "word";
      word.textContent = match[0];
      if (tokens) {
        const least = Math.min(...draft.logprobs.slice(...tokens).map((one) => one ?? -Infinity));
        if (least < Math.log(WEAK)) word.classList.add("weak");
        word.title = `${Math.round(Math.exp(least) * 100)} %`;
        word.addEventListener("click", (event) => { event.stopPropagation(); pick(number, index); });
        word.addEventListener("mouseenter", () => pick(number, index, true));
        word.addEventListener("mouseleave", () => pick(null, null, true));
      }
      text.append(index ? " " : "", word);
    });
    const sure = document.createElement("span");
    sure.className = "sure";
    sure.textContent = `${Math.round((1 - sentence.uncertainty) * 100)} %`;
    sure.title = say("explain");
    item.append(text, sure);
    item.addEventListener("click", () => pick(number, null));
    list.append(item);
  });
}

// The tokens of a sentence, or of one word of it.
export function spanOf(draft, number, word) {
  const sentence = draft.sentences[number];
  if (word === null) return [sentence.first_token, sentence.end_token];
  const match = [...sentence.text.matchAll(/\S+/g)][word];
  const start = sentence.start + match.index;
  return tokensOf(draft.pieces, start, start + match[0].length);
}

export const wordsIn = (draft, number) => draft.sentences[number].text.match(/\S+/g)?.length ?? 0;

// Levenshtein distance over words, as client/serving/worklist.py word_edits counts it.
export function wordEdits(before, after) {
  const split = (text) => text.split(/\s+/).filter(Boolean);
  const old = split(before), next = split(after);
  let row = Array.from({ length: next.length + 1 }, (_, i) => i);
  old.forEach((word, number) => {
    let diagonal = row[0];
    row[0] = number + 1;
    next.forEach((other, column) => {
      const above = row[column + 1];
      row[column + 1] = Math.min(above + 1, row[column] + 1, diagonal + (word === other ? 0 : 1));
      diagonal = above;
    });
  });
  return row[next.length];
}

export function renderDomain(box, decision) {
  const { ood_score: score, ood_threshold: threshold } = decision ?? {};
  box.hidden = score == null || !(threshold > 0);
  if (box.hidden) return;
  const most = 1.6 * threshold, part = (value) => `${Math.min(100, (value / most) * 100)}%`;
  box.classList.toggle("over", score > threshold);
  box.querySelector("i").style.width = part(score);
  box.querySelector("b").style.left = part(threshold);
  box.querySelector(".value").textContent = `${score.toFixed(2)} / ${threshold.toFixed(2)}`;
}

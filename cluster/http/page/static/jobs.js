// The list of jobs.

import { nameOf } from "./documents.js";
import { KeyedList, byId, count, h, makeBar, progressText, setText, short, show, when } from "./dom.js";

export const isFinal = (state) => state === "succeeded" || state === "failed" || state === "cancelled";

/** Return the progress of the first question that is not answered, else of the last. */
export const progressOf = (job) => (job.answers.find((one) => !one.finish_reason) ?? job.answers.at(-1))?.progress;

/** Return what a job is about, in one line. */
export function titleOf(job) {
  if (job.read) return `Read ${nameOf(job.document_id) || "a document"}`;
  const questions = job.answers.map((answer) => answer.question).filter(Boolean);
  if (!questions.length) return "Prompt";
  return questions.length > 1 ? `${questions.length} questions: ${short(questions[0])}` : short(questions[0]);
}

/** Set the text and the look of a state. */
export function showState(element, state) {
  setText(element, state);
  element.dataset.state = state;
}

/** Return the function that shows a list of jobs. */
export function makeJobs() {
  const list = new KeyedList(byId("jobs"), (job) => job.id, makeRow);
  return (jobs, hasMore) => {
    list.update(jobs);
    show(byId("no-jobs"), !jobs.length);
    show(byId("more-jobs"), hasMore);
  };
}

/** Mark the row of the job that is shown. */
export function markShown(jobId) {
  for (const link of byId("jobs").querySelectorAll("a")) {
    if (link.hash === `#${jobId}`) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function makeRow(first) {
  const state = h("span", { class: "state" });
  const link = h("a", { href: `#${first.id}`, class: "name" });
  const facts = h("span", { class: "meta" });
  const bar = makeBar("Read");
  const element = h("li", {}, state, h("div", { class: "what" }, link, facts, bar.element));
  return {
    element,
    update(job) {
      showState(state, job.state);
      setText(link, titleOf(job));
      const ended = isFinal(job.state);
      const at = progressOf(job);
      const parts = [when(job.created)];
      if (!job.read && nameOf(job.document_id)) parts.push(nameOf(job.document_id));
      const read = Math.max(0, ...job.answers.map((answer) => answer.prompt_tokens));
      if (ended && read) parts.push(`${count(read)} tokens`);
      const progress = ended ? "" : progressText(at);
      if (progress) parts.push(progress);
      if (job.error) parts.push(short(job.error, 160));
      setText(facts, parts.join(" · "));
      show(bar.element, progress !== "" && job.state !== "decoding");
      if (progress) bar.update(at.processed / at.total, progress);
    },
  };
}
